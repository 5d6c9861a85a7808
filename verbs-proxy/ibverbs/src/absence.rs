//! A card that goes, by itself or because the operator wants its driver for himself, and that comes back.
//!
//! Everything that was under way is flushed to the applications, their queue pairs are in error, and each of their contexts hears
//! of `DEVICE_FATAL`, as of a card of their own. The card is closed, so that nothing of this proxy keeps its driver. When a card with
//! the same GUID is there it is opened, and is what new contexts are of; what was made on the former one stays dead.

// UNSAFETY: closes a card, of which nothing is used any more.
#![allow(unsafe_code)]

use crate::card::Card;
use crate::control::LONGEST_PAUSE;
use crate::device::{self, Ibverbs, Open};
use anyhow::{Context, Result};
use ringfence_protocol::verbs::EventType;
use ringfence_proxy::control::node::Node;
use ringfence_proxy::datagram;
use ringfence_proxy::launch::operator::{DONE, DRAIN, RESUME};
use ringfence_proxy::pacing::Nanos;
use ringfence_proxy::worker::now;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::OwnedFd;
use rustix::net::sockopt::socket_peercred;
use std::sync::Arc;

/// After which a card that has come is known to all of the kernel.
const SETTLED: Nanos = 1_000_000_000;

/// Lets go of the card. `why`: what its container's log says.
pub fn begin(node: &mut Node<Ibverbs>, why: &str) {
    if node.device.absence.is_some() {
        return;
    }
    let name = node.device.card.about.name.clone();
    node.voice.say(&format!("RDMA device {name}: {why}; its objects are dead, and it is opened again when it is back"));
    node.worker.call(device::lose);
    node.device.forget();
    // SAFETY: the worker has let go of the card and of all that was made in it; what is left is regions, domains and this thread's.
    unsafe { node.device.card.close() };
    node.worker.call(device::forgotten);
    node.announced.push(EventType::DEVICE_FATAL);
    node.device.miss();
    // That it is gone is what contexts are told.
    node.gids_told = None;
    node.refresh_port();
}

/// Opens the card again, if it is there and it is the time.
pub fn look_for_it(node: &mut Node<Ibverbs>) {
    let Some(mut absence) = node.device.absence.filter(|absence| absence.next <= now()) else { return };
    if absence.drained {
        absence.drained = node.device.card.has_stayed();
    }
    let found = if absence.drained { Ok(None) } else { node.device.card.find_again() };
    match found.map(|card| card.map(|card| use_card(node, card))) {
        Ok(Some(Ok(()))) => return,
        Ok(None) => {}
        Ok(Some(Err(error))) | Err(error) => complain(node, format!("it cannot be opened again: {error:#}")),
    }
    absence.pause = (2 * absence.pause).min(LONGEST_PAUSE);
    absence.next = now() + absence.pause;
    node.device.absence = Some(absence);
}

/// Says once why the card is not used, if it is for the same reason as at the last look: at the first it may not be all there.
fn complain(node: &mut Node<Ibverbs>, why: String) {
    match &mut node.device.complaint {
        Some((last, said)) if *last == why => {
            if !std::mem::replace(said, true) {
                node.voice.say(&format!("RDMA device {}: {why}", node.device.card.about.name));
            }
        }
        complaint => *complaint = Some((why, false)),
    }
}

fn use_card(node: &mut Node<Ibverbs>, card: Card) -> Result<()> {
    let card = Arc::new(card);
    let port = card.port()?;
    let pkeys = card.pkeys()?;
    // Who finds it open finds its addresses.
    card.gids().context("cannot read its GID table")?;
    let open = Open::new(Arc::clone(&card))?;
    node.worker.call(move |plane| device::renew(plane, open, &port));
    node.voice.say(&format!("RDMA device {} is back", card.about.name));
    node.device.use_card(card, &pkeys);
    // Contexts of before are dead, and new ones know no other table.
    node.gids_told = None;
    node.refresh_port();
    // The kernel's other parts may hear of the card after we do, and nothing says when they have: such as who owns an address.
    node.gids_due.get_or_insert(now() + SETTLED);
    node.device.missing_pkey().iter().for_each(|missing| node.voice.say(missing));
    Ok(())
}

/// Whether the kernel is removing the card, and waits for us.
pub fn see_whether_it_leaves(node: &mut Node<Ibverbs>) {
    node.device.looked = now();
    if node.device.card.is_leaving() {
        begin(node, "the kernel is removing it");
    }
}

/// How long a connection may say nothing: whoever has made it has something to say.
const PATIENCE: Timespec = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };

/// There are no links between proxies of cards, so who connects is root with `ringfence drain`, or is hung up on.
pub fn serve_operator(node: &mut Node<Ibverbs>, socket: OwnedFd) {
    let is_root = socket_peercred(&socket).is_ok_and(|peer| peer.uid.is_root());
    let mut word = [0; 16];
    if is_root && poll(&mut [PollFd::new(&socket, PollFlags::IN)], Some(&PATIENCE)) == Ok(1) {
        let said = datagram::receive(&socket, &mut word)
            .map_or(0, |received| if received.fds.is_empty() { received.bytes } else { 0 });
        match &word[..said] {
            DRAIN => {
                begin(node, "it is given up, as the operator wants");
                if let Some(absence) = &mut node.device.absence {
                    absence.drained = true;
                }
                let _ = datagram::send(&socket, DONE, &[]);
            }
            RESUME => {
                if let Some(absence) = &mut node.device.absence {
                    (absence.drained, absence.next) = (false, now());
                }
                look_for_it(node);
                let _ = datagram::send(&socket, DONE, &[]);
            }
            _ => {}
        }
    }
    node.closers.neighbours.close(socket);
}
