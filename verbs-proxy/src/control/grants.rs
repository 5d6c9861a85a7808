//! Grants as the control thread gives them and waits for their end ([`crate::device::soft::grants`]).
//!
//! What is shown for writing are the same files that are shown for reading (`super::shown`), by descriptors that can write.
//!
//! Such a file is made immutable first, so that nobody can take pages away from it: neither the neighbour, nor the container, for
//! whose hole the neighbour's fault would have to wait. Whoever can write to a file can hold its lock, which emptying it takes:
//! as long as one does, nothing more is granted. And all its pages must be in memory: the neighbour's proxy would make those that are
//! not, in its time and on its account.

use super::node::Node;
use crate::device::soft::grants::BYTES;
use crate::device::soft::grants::giving::Wish;
use crate::device::soft::link::Shared;
use crate::device::soft::links::LinkId;
use crate::device::soft::tickets::Ticket;
use crate::errors::passes;
use crate::fabric::neighbours::{Owed, SharedRun};
use crate::pacing::Nanos;
use crate::shared::{Mapping, SealedFile};
use crate::steps::{self, Step};
use crate::worker::now;
use rustix::fd::{AsFd, OwnedFd};
use rustix::io::Errno;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

/// How long somebody who is copying may take to be through. A copy takes microseconds, and starts over with its check if
/// anything interrupts it: one that is not through by then is not under way.
const PATIENCE: Nanos = 5_000_000;
/// The same of a neighbour for which that was in vain several times of late: it is stopped, or does not say what is true.
const BRIEFLY: Nanos = 100_000;
/// Bytes of a region that may be missing when it is granted, and are made. The library registers memory that is there; the kernel may
/// have swapped some of it out.
const MOST_MISSING: usize = 16 << 20;
/// So much of a region is looked at at once: some milliseconds ...
const SLICE: u64 = 256 << 20;
/// ... and no more for so long, nor, at first and at most, after too much was missing.
const LOOK_AGAIN: [Nanos; 2] = [20_000_000, 5_000_000_000];
/// Looks before the thread sleeps in between.
const LOOKS: u32 = 50;
/// How long it may take to empty what was granted: longer, and somebody holds a lock.
const EMPTYING: std::time::Duration = std::time::Duration::from_secs(1);
/// How often a warden that does not answer in time is asked for a link's page.
const PAGE_TRIES: u32 = 5;
const PAGE_PAUSE: std::time::Duration = std::time::Duration::from_millis(20);
/// Between two looks.
const PAUSE: std::time::Duration = std::time::Duration::from_micros(20);

/// What of a region neighbours may be shown writable.
#[derive(Clone, Debug)]
pub struct Writable {
    /// Its name among what is shared.
    pub name: u32,
    /// Its files, whole.
    pub runs: Vec<SharedRun>,
    /// They are immutable.
    immutable: bool,
}

/// The node's part.
#[derive(Debug, Default)]
pub struct Granted {
    /// By the region's name.
    writable: HashMap<u32, Writable>,
    /// How far regions are in memory, by their names, of which nobody can take pages away any more.
    present: HashMap<u32, Looked>,
    /// A grant was given once: whoever ends what can be granted asks the worker.
    any: bool,
}

/// The memory that a wish is for: a mapping, and what of it neighbours may see.
type Wished = (Arc<Mapping>, Range<u64>);

/// A region's pages as they were found.
#[derive(Debug)]
struct Looked {
    /// In memory, up to this byte of its mapping.
    upto: u64,
    /// Bytes that were made.
    made: usize,
    /// When it is looked at again, and the pause before that.
    again_at: Nanos,
    pause: Nanos,
}

/// Whether memory is there to be granted.
enum Shown {
    /// By this name.
    Yes(u32),
    /// When the neighbour has answered.
    Later,
    /// Somebody is in the way, or slow: later it may be possible.
    Again,
    Never,
}

impl Node {
    /// A neighbour may be granted something, which may take several messages.
    pub fn grant(&mut self, link: LinkId, wish: Wish) {
        steps::at(Step::Wished);
        let position = self.neighbours.list.iter().position(|neighbour| neighbour.link() == Some(link));
        if let Some(position) = position {
            self.neighbours.list[position].granting.wishes.push(wish);
            self.serve_wishes(position);
        }
    }

    /// Grants what can be granted by now.
    pub fn serve_wishes(&mut self, position: usize) {
        let neighbour = &mut self.neighbours.list[position];
        let Some(link) = neighbour.link() else { return };
        let granting = &mut neighbour.granting;
        if granting.wishes.is_empty() && (granting.sent || granting.copies.is_none()) {
            return;
        }
        if !granting.sent {
            let (page, copies) = match self.page(link) {
                Ok(page) => page,
                // The warden is slow, or there is no memory: what is wished for is wished for again in a while.
                Err(error) if passes(error) => {
                    let wishes = std::mem::take(&mut self.neighbours.list[position].granting.wishes);
                    return self.worker.call(move |plane| wishes.iter().for_each(|wish| plane.forget_wish(link, wish)));
                }
                // Where there is no room for another page, everything goes by messages.
                Err(_) => return,
            };
            if let Err(fault) = self.neighbours.list[position].send_page(page.as_fd(), copies) {
                return self.end_neighbour(position, &fault);
            }
        }
        let granting = &mut self.neighbours.list[position].granting;
        let Some(copies) = granting.copies else { return };
        let wishes = std::mem::take(&mut granting.wishes);
        if !copies {
            return self.worker.call(move |plane| plane.revoke_link(link));
        }
        for wish in wishes {
            // What is not wished for any more has been forgotten by the worker.
            let Some(memory) = self.worker.call(move |plane| plane.wished_for(link, &wish)) else { continue };
            let shown = match wish.writes {
                true => self.show_writable(position, link, &wish, memory),
                false => self.show_readable(position, link, &wish, memory),
            };
            let share = match shown {
                Shown::Yes(share) => share,
                Shown::Later => {
                    self.neighbours.list[position].granting.wishes.push(wish);
                    continue;
                }
                Shown::Again => {
                    self.worker.call(move |plane| plane.forget_wish(link, &wish));
                    continue;
                }
                Shown::Never => continue,
            };
            self.granted.any = true;
            let grant = self.worker.call(move |plane| plane.give(link, &wish, share));
            if let Some(grant) = grant
                && let Err(fault) = self.neighbours.list[position].send_grant(grant)
            {
                return self.end_neighbour(position, &fault);
            }
        }
        // What is to be shown for it.
        self.share_owed(position);
    }

    /// A region could not be shown just now. What was to be granted of it is wished for again in a while: the neighbour, which was told
    /// nothing, may have nothing to say that would bring it another time.
    pub(super) fn forget_wishes(&mut self, position: usize, share: u32, writes: bool) {
        let neighbour = &mut self.neighbours.list[position];
        let Some(link) = neighbour.link() else { return };
        let of_region = |wish: &Wish| wish.share == share && wish.writes == writes;
        let forgotten: Vec<Wish> = neighbour.granting.wishes.iter().copied().filter(of_region).collect();
        neighbour.granting.wishes.retain(|wish| !of_region(wish));
        if !writes {
            // Else the next wish would only find that it was not offered.
            neighbour.granting.offered.remove(&share);
        }
        self.worker.call(move |plane| forgotten.iter().for_each(|wish| plane.forget_wish(link, wish)));
    }

    /// Whether all of a region that neighbours may see is in memory. Nobody can take pages of it away any more; so what was there once
    /// need not be looked at again.
    fn is_present(&mut self, share: u32, (mapping, shown): Wished) -> bool {
        let none = Looked { upto: shown.start, made: 0, again_at: 0, pause: LOOK_AGAIN[0] };
        let looked = self.granted.present.entry(share).or_insert(none);
        let now = now();
        if looked.upto >= shown.end || now < looked.again_at {
            return looked.upto >= shown.end;
        }
        let end = shown.end.min(looked.upto + SLICE);
        match mapping.make_present(looked.upto as usize..end as usize, MOST_MISSING - looked.made) {
            Some(made) => (looked.upto, looked.made, looked.pause) = (end, looked.made + made, LOOK_AGAIN[0]),
            None => looked.pause = (2 * looked.pause).min(LOOK_AGAIN[1]),
        }
        looked.again_at = now + looked.pause;
        looked.upto >= shown.end
    }

    /// A page for the grants of a link, open for reading; whether we can copy by those of the other end.
    fn page(&mut self, link: LinkId) -> Result<(OwnedFd, bool), Errno> {
        let file = SealedFile::create("ringfence-grants", BYTES)?;
        let page = Arc::new(Mapping::of(&file)?).header(0);
        // The other end may be waiting for this page alone, and nothing would bring it another time.
        let mut theirs = self.warden.read_only(&file);
        for _ in 1..PAGE_TRIES {
            if !theirs.as_ref().is_err_and(|error| passes(*error)) {
                break;
            }
            std::thread::sleep(PAGE_PAUSE);
            theirs = self.warden.read_only(&file);
        }
        let theirs = theirs?;
        let copies = self.worker.call(move |plane| {
            let unlimited = plane.shaping.read_ahead().is_none();
            if let Some(link) = plane.device.links.get_mut(link) {
                link.grants.set_ours(page, unlimited);
            }
            crate::rseq::Thread::current().is_some()
        });
        Ok((theirs, copies))
    }

    /// The neighbour may have been shown it already, for what was written from it.
    fn show_readable(&mut self, position: usize, link: LinkId, wish: &Wish, memory: Wished) -> Shown {
        let share = wish.share;
        let granting = &mut self.neighbours.list[position].granting;
        let offer = !granting.offered.contains(&share);
        let state = self.worker.call(move |plane| {
            let shared = &mut plane.device.links.get_mut(link)?.shared;
            let state = shared.get(&share).map(|shared| shared.confirmed);
            if state.is_none() && offer {
                shared.insert(share, Shared::ASKED);
            }
            Some(state)
        });
        match state {
            Some(Some(true)) => match self.is_present(share, memory) {
                true => Shown::Yes(share),
                false => Shown::Again,
            },
            Some(Some(false)) => Shown::Later,
            Some(None) if offer => {
                granting.offered.insert(share);
                self.neighbours.list[position].owe(Owed::Region(share));
                Shown::Later
            }
            // It did not want it, or it could not be shared just now.
            Some(None) => {
                granting.offered.remove(&share);
                Shown::Again
            }
            None => Shown::Never,
        }
    }

    fn show_writable(&mut self, position: usize, link: LinkId, wish: &Wish, memory: Wished) -> Shown {
        if !self.granted.writable.contains_key(&wish.share) {
            let Some(backing) = self.shares.get(&wish.share) else { return Shown::Never };
            let runs = backing.shown.clone();
            let writable = Writable { name: self.next_share(), runs, immutable: false };
            self.granted.writable.insert(wish.share, writable);
        }
        let Some(&Writable { name, .. }) = self.granted.writable.get(&wish.share) else { return Shown::Never };
        if let Err(shown) = self.make_grantable(wish.share) {
            return shown;
        }
        if !self.is_present(wish.share, memory) {
            return Shown::Again;
        }
        let neighbour = &mut self.neighbours.list[position];
        let offer = neighbour.granting.offered.insert(name);
        let state = self.worker.call(move |plane| {
            let shared = &mut plane.device.links.get_mut(link)?.shared;
            if offer {
                shared.insert(name, Shared::ASKED);
            }
            shared.get(&name).map(|shared| shared.confirmed)
        });
        match state {
            Some(true) => Shown::Yes(name),
            Some(false) => {
                if offer {
                    neighbour.owe(Owed::Writable(wish.share));
                }
                Shown::Later
            }
            // It did not want it, and is not asked again.
            None => Shown::Never,
        }
    }

    /// Sees that a region's files are fit to be shown for writing.
    fn make_grantable(&mut self, share: u32) -> Result<(), Shown> {
        match self.keeps_pages() {
            Ok(true) => {}
            Err(error) if passes(error) => return Err(Shown::Again),
            Ok(false) | Err(_) => return Err(Shown::Never),
        }
        if self.closers.granted.is_held_up(EMPTYING) {
            return Err(Shown::Again);
        }
        let Self { granted, warden, closers, .. } = self;
        let Some(writable) = granted.writable.get_mut(&share) else { return Err(Shown::Never) };
        if writable.immutable {
            return Ok(());
        }
        for run in &writable.runs {
            let file = run.file.own().ok_or(Shown::Never)?;
            // Its descriptor is of no use here.
            drop(warden.read_only(file).map_err(|error| match error {
                error if passes(error) => Shown::Again,
                _ => Shown::Never,
            })?);
            run.file.is_granted(&closers.granted, warden.emptier_of_granted());
        }
        writable.immutable = true;
        steps::at(Step::Immutable);
        Ok(())
    }

    /// What a region that is owed for writing is made of.
    pub(super) fn writable(&self, share: u32) -> Option<(u32, Vec<SharedRun>)> {
        let writable = self.granted.writable.get(&share)?;
        Some((writable.name, writable.runs.clone()))
    }

    /// A region is gone: what of it was shown for writing.
    pub(super) fn forget_writable(&mut self, share: u32) -> Option<Writable> {
        self.granted.present.remove(&share);
        self.granted.writable.remove(&share)
    }

    /// Whether a grant may be there to be taken back.
    pub(super) fn has_granted(&self) -> bool {
        self.granted.any
    }

    /// Waits until whoever was using a grant that has been taken back is through, or cannot be under way.
    ///
    /// A copy whose thread loses its processor, is stopped or killed starts over with its check ([`crate::rseq`]). So after a
    /// while in which a requester has not come to the end of what it began, it does not run. What remains is a processor that
    /// has been stopped itself, under a hypervisor: `membarrier` returns when each has taken an interrupt since, or is idle.
    ///
    /// A neighbour that is found at work again and again has others wait for no more than a moment: what it is in the midst of it
    /// does not finish.
    pub fn settle(&mut self, tickets: Vec<Ticket>) {
        if !tickets.is_empty() {
            steps::at(Step::Waiting);
        }
        self.wait_for(tickets);
        steps::at(Step::Settled);
    }

    fn wait_for(&mut self, tickets: Vec<Ticket>) {
        let (mut brief, mut tickets): (Vec<_>, Vec<_>) = tickets.into_iter().partition(|ticket| ticket.brief);
        wait(&mut brief, BRIEFLY);
        wait(&mut tickets, PATIENCE);
        if tickets.is_empty() {
            return;
        }
        // Where that is not to be had (`nohz_full`), waiting has to do.
        let _ = crate::sandbox::pass_all_processors();
        wait(&mut tickets, PATIENCE);
        for ticket in tickets {
            let link = ticket.link;
            self.worker.call(move |plane| plane.strike(link));
        }
    }
}

fn wait(tickets: &mut Vec<Ticket>, patience: Nanos) {
    let until = now() + patience;
    let mut looks = 0;
    loop {
        tickets.retain(|ticket| !ticket.is_over());
        if tickets.is_empty() || now() >= until {
            return;
        }
        looks += 1;
        if looks < LOOKS {
            rustix::thread::sched_yield();
        } else {
            std::thread::sleep(PAUSE);
        }
    }
}
