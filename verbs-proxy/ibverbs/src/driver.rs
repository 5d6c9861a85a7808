//! What the control thread does for a real card with the plane: queue pairs' transitions, on the card and in the plane, and the
//! card's asynchronous events.

use crate::absence;
use crate::attributes::{self, Place};
use crate::card::{CardQp, Event, Of};
use crate::control::{CardControl, PKEYS_PAUSE};
use crate::device::{self, Ibverbs, Task};
use crate::drained::{self, Refused};
use ringfence_protocol::control::{ModifyQp, QpAttr};
use ringfence_protocol::verbs::{EventType, QpAttrMask as Mask, QpState};
use ringfence_proxy::control::driver::Driver;
use ringfence_proxy::control::node::Node;
use ringfence_proxy::device::control::Control;
use ringfence_proxy::errors::passes;
use ringfence_proxy::state;
use ringfence_proxy::worker::now;
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};
use std::sync::Arc;
use std::time::Duration;

/// `RDMA_VERBS_IOCTL` of `rdma/rdma_user_ioctl.h`, by which libibverbs does everything since kernel 4.20: writing commands to the
/// descriptor, as before, is refused to a process whose credentials are not those with which it was opened.
const RDMA_VERBS_IOCTL: u64 = 0xc018_1b01;

/// Asynchronous events that are taken at once.
const MOST_EVENTS: usize = 64;

/// How often a card is asked again to stop a queue pair where the kernel is short of something.
const TRIES: usize = 16;
/// Between two.
const TRY_PAUSE: Duration = Duration::from_micros(200);

/// The card's number of a queue pair. `EIO` if that card is gone: another queue pair may have the number on the next.
fn number(node: &Node<Ibverbs>, queue: u32) -> Result<u32, Errno> {
    node.worker.call(move |plane| {
        let qp = plane.qps.get(queue as usize).and_then(Option::as_ref).ok_or(Errno::INVAL)?;
        if device::is_lost(plane, queue) { Err(Errno::IO) } else { Ok(qp.number) }
    })
}

fn card_qp(node: &Node<Ibverbs>, queue: u32) -> Result<Arc<CardQp>, Errno> {
    node.device.queue_pair(number(node, queue)?).ok_or(Errno::INVAL)
}

/// The card's port, and its indices of the GID and of the P_Key that a request names, if it names some.
fn place(node: &Node<Ibverbs>, request: &ModifyQp) -> Result<Place, Errno> {
    let QpAttr { mask, av, pkey_index, .. } = &request.attr;
    let source = match mask & Mask::AV.0 != 0 && av.is_global != 0 {
        true => node.device.source(av.sgid_index).ok_or(Errno::NODATA)?,
        false => 0,
    };
    let pkey = match mask & Mask::PKEY_INDEX.0 != 0 {
        true => node.device.partition(*pkey_index).ok_or(Errno::INVAL)?,
        false => 0,
    };
    Ok(Place { port: node.device.card.port_number(), source, pkey })
}

/// Takes the card's queue pair to its error state, and lets the plane know.
fn stop(node: &Node<Ibverbs>, queue: u32, incarnation: u64, qp: &CardQp) {
    let mut taken = qp.take_to(QpState::ERR);
    for _ in 0..TRIES {
        if taken.is_err_and(passes) {
            std::thread::sleep(TRY_PAUSE);
            taken = qp.take_to(QpState::ERR);
        }
    }
    if let Err(error) = taken {
        // In RESET it has nothing. A card that does not obey is gone; its completions will not come, and destroying the queue pair
        // is what remains.
        node.voice.say(&format!("queue pair {}: the card does not take it to the error state: {error}", qp.number));
    }
    node.worker.call(move |plane| device::stopped(plane, queue, incarnation));
}

/// The card's queue pair can neither go on nor back: it is in error, and so is the container's.
fn stuck(node: &Node<Ibverbs>, queue: u32, qp: &CardQp) -> Result<(), Errno> {
    let incarnation = node.worker.call(move |plane| {
        plane.to_error(queue);
        Some(plane.qps[queue as usize].as_ref()?.incarnation)
    });
    stop(node, queue, incarnation.ok_or(Errno::INVAL)?, qp);
    Ok(())
}

/// What is to be done where the kernel has no interface for the source of a connection. Upstream it says so only of one that is gone.
fn without_interface(device: &CardControl, source: u8) -> String {
    let name = &device.card.about.name;
    format!(
        "a queue pair cannot be connected (ENODEV): for the kernel, {name}'s GID number {source} has no interface in the proxy's network \
         namespace; a driver package that replaces ib_core (MLNX_OFED; `ringfence doctor` says which is loaded) demands one: give the \
         container that interface, or, if it is the host's, gids = \"host\" of the device"
    )
}

/// Has the card hold a queue pair, which is in RTS there and not yet in the plane, to the container's rate, if it can.
fn pace(node: &mut Node<Ibverbs>, queue: u32, qp: &CardQp) -> Result<(), Errno> {
    // `enum ibv_mtu`: 1 is 256 bytes.
    let mtu = 128 << node.worker.call(move |plane| plane.query_qp(queue))?.path_mtu.min(5);
    let CardControl { card, pacing, .. } = &mut node.device;
    if let Some(said) = pacing.ready(&**card, qp, mtu) {
        node.voice.say(&said);
    }
    Ok(())
}

/// Has the card hold a queue pair, which is in INIT or RTS there, to the cap of all of the container's, if it can.
fn hang(node: &mut Node<Ibverbs>, qp: &CardQp) {
    let CardControl { card, tree, .. } = &mut node.device;
    // As above; a port that does not answer is no reason to hold anything back.
    let mtu = || card.port().map_or(256, |port| 128 << port.active_mtu.min(5));
    if let Some(said) = tree.hang(card, qp, mtu) {
        node.voice.say(&said);
    }
}

impl Driver for Ibverbs {
    type Control = CardControl;

    const IOCTLS: &'static [u64] = &[RDMA_VERBS_IOCTL];

    /// A card that comes back is opened again.
    const OPENS_FILES: bool = true;

    fn begun(node: &Node<Self>) {
        node.device.beyond().iter().for_each(|beyond| node.voice.say(beyond));
        if node.device.gids().is_some_and(<[_]>::is_empty) {
            node.voice.say(&node.device.without_gids());
        }
        // Beyond it registrations fail, as they would on the host.
        let wanted = node.limits.max_mr_bytes.0;
        if let Some(maximum) = getrlimit(Resource::Memlock).maximum.filter(|maximum| *maximum < wanted) {
            node.voice.say(&format!(
                "the proxy may lock {maximum} bytes of memory, and its container may register {wanted} (max-mr-bytes): raise \
                 LimitMEMLOCK of the engine's service"
            ));
        }
    }

    fn modify_qp(node: &mut Node<Self>, queue: u32, request: &ModifyQp) -> Result<(), Errno> {
        let mut request = *request;
        // The event of a change may not have been heard yet.
        if request.attr.mask & Mask::PKEY_INDEX.0 != 0 {
            read_pkeys(node)?;
        }
        if request.attr.mask & Mask::AV.0 != 0 {
            node.device.mark(&mut request.attr.av);
        }
        let (from, to) = node.worker.call(move |plane| plane.check_modify(queue, &request))?;
        let qp = card_qp(node, queue)?;
        let mask = request.attr.mask;
        let commit = move |node: &Node<Self>| node.worker.call(move |plane| plane.modify_qp(queue, &request, Some(())));
        match to {
            QpState::RESET => {
                // The plane first: it posts nothing more. Then the card, which is done with memory when it returns.
                commit(node)?;
                qp.take_to(QpState::RESET)?;
                let name = qp.cq.name;
                node.worker.call(move |plane| device::drain(plane, name));
            }
            QpState::ERR => {
                commit(node)?;
                let incarnation = node.worker.call(move |plane| Some(plane.qps[queue as usize].as_ref()?.incarnation));
                stop(node, queue, incarnation.ok_or(Errno::INVAL)?, &qp);
            }
            // The plane drains by itself, and the card need not know.
            QpState::SQD if from == QpState::RTS => commit(node)?,
            // It has nothing of the queue pair if that matters: the plane has seen to it.
            QpState::SQD if state::needs_drained(from, to, mask) => {
                let mut attr = attributes::queue_pair(&request.attr, QpState::SQD, place(node, &request)?);
                let changed = drained::change(&*qp, &mut attr, mask & !Mask::PATH_MIG_STATE.0);
                if let Err(Refused { error, is_stuck }) = changed {
                    if is_stuck {
                        stuck(node, queue, &qp)?;
                    }
                    return Err(error);
                }
                commit(node)?;
            }
            QpState::SQD | QpState::RTS if from == QpState::SQD || from == QpState::RTS => {
                let what = mask & (Mask::ACCESS_FLAGS.0 | Mask::MIN_RNR_TIMER.0);
                if what != 0 {
                    let mut attr = attributes::queue_pair(&request.attr, QpState::RTS, place(node, &request)?);
                    qp.modify(&mut attr, what)?;
                }
                commit(node)?;
            }
            to => {
                // The card first: what the plane posts from then on, it takes.
                let place = place(node, &request)?;
                let mut attr = attributes::queue_pair(&request.attr, to, place);
                // Path migration is InfiniBand's, and its only state here is that of the card.
                let taken = qp.modify(&mut attr, mask & !(Mask::PATH_MIG_STATE.0 | Mask::CUR_STATE.0));
                if taken == Err(Errno::NODEV) && mask & Mask::AV.0 != 0 {
                    node.voice.say(&without_interface(&node.device, place.source));
                }
                taken?;
                if to == QpState::INIT || to == QpState::RTS {
                    hang(node, &qp);
                }
                if to == QpState::RTS {
                    pace(node, queue, &qp)?;
                }
                commit(node)?;
            }
        }
        Ok(())
    }

    fn query_qp(node: &mut Node<Self>, queue: u32) -> Result<QpAttr, Errno> {
        let attr = node.worker.call(move |plane| plane.query_qp(queue))?;
        if attr.state == QpState::ERR || card_qp(node, queue)?.state()? != QpState::ERR.0 {
            return Ok(attr);
        }
        // A card that refuses a peer's request may say nothing of it here, but for this.
        node.worker.call(move |plane| {
            plane.to_error(queue);
            plane.query_qp(queue)
        })
    }

    fn remove_qp(node: &mut Node<Self>, queue: u32) {
        let number = number(node, queue);
        drop(node.worker.call(move |plane| plane.remove_qp(queue)));
        let Ok(number) = number else { return };
        // The last that has it is this thread now: destroying it has the card let go of all memory.
        if let Some(room) = node.device.destroy(number) {
            node.worker.call(move |plane| device::drain(plane, room.name));
            node.device.give_back(room);
        }
    }

    fn hear(node: &mut Node<Self>, task: Task) {
        match task {
            Task::Stop { queue, incarnation, number } => {
                // Nobody but this thread resets it: what is to be stopped now is so until it has been.
                let is_to_stop = node.worker.call(move |plane| device::is_to_stop(plane, queue, incarnation));
                if let Some(qp) = node.device.queue_pair(number).filter(|_| is_to_stop) {
                    stop(node, queue, incarnation, &qp);
                }
            }
            Task::Gone { before } if node.worker.call(move |plane| device::is_after(plane, before)) => {
                // It may say so by itself.
                Self::hear_device(node);
                absence::begin(node, "it takes no requests any more");
            }
            // That one has gone.
            Task::Gone { .. } => {}
        }
    }

    fn hear_device(node: &mut Node<Self>) {
        if node.device.absence.is_some() {
            return absence::look_for_it(node);
        }
        for _ in 0..MOST_EVENTS {
            match node.device.card.event() {
                Ok(Some(event)) if event.kind == EventType::DEVICE_FATAL => {
                    return absence::begin(node, "it has failed");
                }
                // What completions it had nobody can tell any more, and several of the container's queues are of one.
                Ok(Some(event)) if event.kind == EventType::CQ_ERR => {
                    return absence::begin(node, "a completion queue of it is broken");
                }
                Ok(Some(event)) => heard(node, event),
                Ok(None) => break,
                Err(_) => return absence::begin(node, "it has been taken away"),
            }
        }
        if node.device.pkeys_due.is_some_and(|due| due <= now()) {
            // If it fails again, it is tried again.
            let _ = read_pkeys(node);
        }
        absence::see_whether_it_leaves(node);
    }

    fn let_neighbour_in(node: &mut Node<Self>, socket: OwnedFd) {
        absence::serve_operator(node, socket);
    }
}

/// Queue pairs that are in partitions of these indices of the container's table have another, or none, by the index that the card was told:
/// they fail, as their peers hear them no more.
fn leave_partitions(node: &Node<Ibverbs>, moved: &[u32]) {
    if moved.is_empty() {
        return;
    }
    let moved = moved.to_vec();
    let gone = node.worker.call(move |plane| {
        let qps = plane.qps.iter().flatten();
        let gone = qps.filter(|qp| qp.state != QpState::RESET && moved.contains(&qp.attr.pkey_index));
        let gone: Vec<_> = gone.map(|qp| (qp.queue, qp.incarnation, qp.number)).collect();
        gone.iter().for_each(|(queue, ..)| plane.to_error(*queue));
        gone
    });
    for (queue, incarnation, number) in gone {
        if let Some(qp) = node.device.queue_pair(number) {
            stop(node, queue, incarnation, &qp);
        }
    }
}

/// Reads the card's P_Keys, and does what is to be done about those that have changed. If it cannot, it is done later as well.
fn read_pkeys(node: &mut Node<Ibverbs>) -> Result<(), Errno> {
    // It is read when there is one again.
    node.device.check()?;
    let had = node.device.pkeys().to_vec();
    let read = node.device.read_pkeys();
    if let Err(error) = &read
        && node.device.pkeys_due.is_none()
    {
        node.voice.say(&format!("cannot read the card's P_Keys ({error}): they are read again"));
    }
    node.device.pkeys_due = read.is_err().then_some(now() + PKEYS_PAUSE);
    leave_partitions(node, &read?);
    if node.device.pkeys() != had {
        node.refresh_port();
        node.announced.push(EventType::PKEY_CHANGE);
    }
    Ok(())
}

/// What happens to the port that the container is shown concerns all of its contexts.
fn heard(node: &mut Node<Ibverbs>, Event { kind, of }: Event) {
    match of {
        // What the plane tells by itself, of what it does.
        Of::Qp(_) if kind == EventType::SQ_DRAINED => {}
        Of::Qp(number) => {
            let fails = matches!(kind, EventType::QP_FATAL | EventType::QP_REQ_ERR | EventType::QP_ACCESS_ERR)
                // Nobody but this thread resets it, which may have been since the card said so.
                && node.device.queue_pair(number).is_some_and(|qp| qp.state().is_ok_and(|state| state == QpState::ERR.0));
            node.worker.call(move |plane| {
                let Some(queue) = plane.by_number.get(&number).copied() else { return };
                plane.event(queue, kind);
                if fails {
                    plane.to_error(queue);
                }
            });
        }
        Of::Port(port) if port != u32::from(node.device.card.port_number()) => {}
        Of::Port(_) => {
            // If it fails, it is tried again.
            let _ = read_pkeys(node);
            // What is shown is read again, before somebody hears of it.
            node.refresh_port();
            if matches!(kind, EventType::PORT_ACTIVE | EventType::DEVICE_SPEED_CHANGE)
                && let Ok(port) = node.device.card.port()
            {
                node.worker.call(move |plane| device::resized(plane, &port));
            }
            // The card's tables have entries of other containers as well: whoever reads them sees what concerns ours.
            if !matches!(kind, EventType::GID_CHANGE | EventType::PKEY_CHANGE) {
                node.announced.push(kind);
            }
        }
        Of::Card => node.voice.say(&format!("the card says event {}", kind.0)),
    }
}
