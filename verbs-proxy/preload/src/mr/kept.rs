//! Deregistered regions that are kept for another registration of the same buffer.
//!
//! Programs that register a buffer, use it once and deregister it, again and again, are common. The region of such a buffer is
//! kept when it is deregistered: its key is withdrawn in shared memory, which the proxy's worker confirms between two turns
//! ([`ringfence_protocol::keys`]); its pages stay where they are. The next registration restores it under another key, if the
//! pages are still under their addresses. Neither takes a message.
//!
//! Only what has been registered and deregistered before is kept, so that a program that registers its memory once gets it back as it was.
//! And only so much as the proxy said, the latest; it all is given up when memory is short, with its domain or its device,
//! and in a forked child.

// UNSAFETY: the list of what is kept is a static guarded by a lock that lies elsewhere, and holds pointers.
#![allow(unsafe_code)]

use super::{Mr, Wanted};
use crate::abi::{ibv_mr, ibv_pd};
use crate::connection::Connection;
use crate::pages;
use crate::process::Generation;
use crate::sys;
use alloc::boxed::Box;
use core::cell::UnsafeCell;
use core::ptr;
use ringfence_protocol::keys::KeyWord;
use ringfence_protocol::verbs::Access;

/// The most regions that are kept, whatever the proxy says.
const MOST: usize = 256;
/// Ranges that are remembered to have been deregistered.
const SEEN: usize = 1024;

/// Looks for the worker's answer before others are let run in between: some ten microseconds ...
const LOOKS: u32 = 200;
/// ... and how often then, before a message asks instead.
const YIELDS: u32 = 200;

#[derive(Clone, Copy)]
struct Entry {
    wanted: Wanted,
    mr: *mut Mr,
}

struct State {
    /// Oldest first.
    entries: [Entry; MOST],
    count: usize,
    bytes: u64,
    /// Each where the low bits of its hash say.
    seen: [Seen; SEEN],
}

/// A registration that was deregistered and not kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Seen {
    /// Zero: none.
    hash: u32,
    /// How often it must be registered again before it is kept.
    due: u16,
    /// That, when its memory had changed the last time it was kept.
    penalty: u16,
}

/// How much longer it takes each time, so that programs which map their buffers anew for each registration lose nothing.
const PATIENCE: u16 = 8;
const MOST_PATIENCE: u16 = 512;

const NOT_SEEN: Seen = Seen { hash: 0, due: 0, penalty: 0 };

impl Seen {
    /// It was deregistered, and not kept.
    fn deregistered(&mut self, hash: u32) {
        *self = if self.hash == hash {
            Self { due: self.due.saturating_sub(1), ..*self }
        } else {
            Self { hash, ..NOT_SEEN }
        };
    }

    /// It was kept in vain.
    fn changed(&mut self, hash: u32) {
        let penalty = if self.hash == hash { (self.penalty.max(1) * PATIENCE).min(MOST_PATIENCE) } else { PATIENCE };
        *self = Self { hash, due: penalty, penalty };
    }

    fn comes_back(&self, hash: u32) -> bool {
        self.hash == hash && self.due == 0
    }
}

struct Global(UnsafeCell<State>);

// SAFETY: only touched with the process's control lock held.
unsafe impl Sync for Global {}

const NO_ENTRY: Entry =
    Entry { wanted: Wanted { addr: 0, length: 0, iova: 0, access: Access(0) }, mr: ptr::null_mut() };

static STATE: Global =
    Global(UnsafeCell::new(State { entries: [NO_ENTRY; MOST], count: 0, bytes: 0, seen: [NOT_SEEN; SEEN] }));

/// Not zero.
fn hash(wanted: &Wanted) -> u32 {
    const ODD: u64 = 0x9e37_79b9_7f4a_7c15;
    let mut hash = ODD;
    for word in [wanted.addr as u64, wanted.length as u64, wanted.iova, u64::from(wanted.access.0)] {
        hash = (hash ^ word).wrapping_mul(ODD);
        hash ^= hash >> 29;
    }
    (hash >> 16) as u32 | 1
}

impl State {
    fn remove(&mut self, index: usize) -> *mut Mr {
        let entry = self.entries[index];
        self.entries.copy_within(index + 1..self.count, index);
        self.count -= 1;
        self.bytes -= entry.wanted.bytes();
        entry.mr
    }

    fn take(&mut self, which: impl Fn(&Entry) -> bool) -> Option<*mut Mr> {
        // The latest first: who registers in turns has the one in question at the end or at the start.
        let index = self.entries[..self.count].iter().rposition(which)?;
        Some(self.remove(index))
    }

    fn place(wanted: &Wanted) -> usize {
        hash(wanted) as usize / 2 % SEEN
    }
}

/// Does something with the list, under the lock.
fn with<R>(generation: Generation, what: impl FnOnce(&mut State) -> R) -> R {
    let _held = generation.process().control.lock();
    // SAFETY: the control lock is held, and `what` does not call back.
    what(unsafe { &mut *STATE.0.get() })
}

/// A new connection begins: what is kept is of an old one. The caller holds the control lock.
pub fn forget() {
    // SAFETY: the control lock is held. The entries are not looked at: in a forked child they may be half written.
    let state = unsafe { &mut *STATE.0.get() };
    (state.count, state.bytes) = (0, 0);
}

fn word<'a>(mr: &Mr, connection: &'a Connection) -> &'a KeyWord {
    &connection.words[mr.first_key as usize & (connection.words.len() - 1)]
}

/// Whether the same was registered before, and has been deregistered.
pub(super) fn comes_back(generation: Generation, wanted: &Wanted) -> bool {
    with(generation, |state| state.seen[State::place(wanted)].comes_back(hash(wanted)))
}

/// Takes the region's key back, if the region is one to be kept. After this no access reaches it; false if it must be ended
/// the ordinary way, whether its key has been taken back or not.
///
/// # Safety
/// The region's device is open.
pub(super) unsafe fn withdraw(mr: &Mr) -> bool {
    if !mr.generation.is_current() || mr.generation.is_dead() {
        return false;
    }
    // SAFETY: by the caller's promise.
    let connection = unsafe { mr.context() }.connection;
    let wanted = mr.wanted();
    let (most_bytes, most) = connection.keep;
    // Of memory that was shared before nobody but its owner can say whether it stays what it was.
    if most == 0 || wanted.bytes() > most_bytes || !mr.adopted.is_empty() {
        return false;
    }
    if !mr.comes_back {
        with(mr.generation, |state| state.seen[State::place(&wanted)].deregistered(hash(&wanted)));
        return false;
    }
    let word = word(mr, &connection);
    word.withdraw(mr.incarnation, mr.base.lkey) && is_quiet(&connection) && word.is_withdrawn(mr.incarnation)
}

/// Waits until every access is over that was begun before. False if that takes too long.
fn is_quiet(connection: &Connection) -> bool {
    let question = connection.doorbells.ask();
    for look in 0..LOOKS + YIELDS {
        if connection.doorbells.is_answered(question) {
            return true;
        }
        if look < LOOKS && !connection.yield_at_once {
            core::hint::spin_loop();
        } else {
            sys::sched_yield();
        }
    }
    false
}

/// Keeps a region whose key was withdrawn, and gives up the oldest ones that are too much.
///
/// # Safety
/// As [`withdraw`].
pub(super) unsafe fn keep(mr: Box<Mr>) {
    let generation = mr.generation;
    // SAFETY: by the caller's promise.
    let (most_bytes, most) = unsafe { mr.context() }.connection.keep;
    let most = MOST.min(most as usize);
    let wanted = mr.wanted();
    let mut kept = Some(Box::into_raw(mr));
    loop {
        let surplus = with(generation, |state| {
            if state.count >= most || state.bytes + wanted.bytes() > most_bytes {
                return (state.count > 0).then(|| state.remove(0));
            }
            if let Some(mr) = kept.take() {
                state.entries[state.count] = Entry { wanted, mr };
                state.count += 1;
                state.bytes += wanted.bytes();
            }
            None
        });
        match surplus {
            // SAFETY: it was kept, by this function, and has been taken out.
            Some(surplus) => unsafe { end(Box::from_raw(surplus)) },
            None => break,
        }
    }
    if let Some(mr) = kept {
        // SAFETY: as above.
        unsafe { end(Box::from_raw(mr)) };
    }
}

/// Ends a region that was kept.
///
/// # Safety
/// As [`withdraw`].
unsafe fn end(mr: Box<Mr>) {
    // Where this fails the proxy has gone, and the pages with the connection.
    // SAFETY: by the caller's promise.
    let _ = unsafe { mr.end() };
}

/// The region that was kept of the same registration, under a new key; `None` if there is none that still is what it was.
///
/// # Safety
/// As [`withdraw`].
pub(super) unsafe fn restore(generation: Generation, pd: *mut ibv_pd, wanted: &Wanted) -> Option<Box<Mr>> {
    let same = |entry: &Entry| {
        entry.wanted == *wanted && {
            // SAFETY: what is kept is alive until it is taken out.
            let base: &ibv_mr = unsafe { &(*entry.mr).base };
            base.pd == pd
        }
    };
    let mr = with(generation, |state| if state.count == 0 { None } else { state.take(same) })?;
    // SAFETY: it was kept by `keep`, and has been taken out.
    let mut mr = unsafe { Box::from_raw(mr) };
    // SAFETY: by the caller's promise.
    let connection = unsafe { mr.context() }.connection;
    if pages::still_acquired(wanted.addr, wanted.length, wanted.is_written(), &mr.acquired) {
        let key = connection.keys.next(mr.first_key, &mut mr.turn);
        if word(&mr, &connection).restore(mr.incarnation, key) {
            (mr.base.lkey, mr.base.rkey) = (key, key);
            return Some(mr);
        }
    } else {
        with(generation, |state| state.seen[State::place(wanted)].changed(hash(wanted)));
    }
    // SAFETY: by the caller's promise.
    unsafe { end(mr) };
    None
}

/// Gives up what is kept of some registrations. False if there was nothing.
pub fn give_up(generation: Generation, which: impl Fn(&ibv_mr) -> bool) -> bool {
    let mut any = false;
    if !generation.is_current() {
        return false;
    }
    let wanted = |entry: &Entry| {
        // SAFETY: what is kept is alive until it is taken out.
        which(unsafe { &(*entry.mr).base })
    };
    while let Some(mr) = with(generation, |state| state.take(wanted)) {
        any = true;
        // SAFETY: it was kept by `keep`, and has been taken out; programs end their devices after what they made by them.
        unsafe { end(Box::from_raw(mr)) };
    }
    any
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(addr: usize, length: usize) -> Wanted {
        Wanted { addr, length, iova: addr as u64, access: Access(3) }
    }

    fn state(buffers: &[Wanted]) -> State {
        let mut state = State { entries: [NO_ENTRY; MOST], count: 0, bytes: 0, seen: [NOT_SEEN; SEEN] };
        for buffer in buffers {
            state.entries[state.count] = Entry { wanted: *buffer, mr: ptr::dangling_mut() };
            state.count += 1;
            state.bytes += buffer.bytes();
        }
        state
    }

    #[test]
    fn bytes_are_those_of_whole_pages() {
        assert_eq!(wanted(0x1000, 4096).bytes(), 4096);
        assert_eq!(wanted(0x1fff, 2).bytes(), 8192);
        assert_eq!(wanted(0x1001, 1).bytes(), 4096);
        // Nothing that ends there can be registered; it is only not to overflow.
        assert!(wanted(usize::MAX - 4096, 4096).bytes() >= 4096);
    }

    #[test]
    fn entries_leave_from_anywhere_and_the_others_keep_their_order() {
        let buffers: Vec<Wanted> = (1..6).map(|n| wanted(n << 12, n << 12)).collect();
        let mut state = state(&buffers);
        assert!(state.take(|entry| entry.wanted == wanted(0x1000, 1)).is_none());
        assert!(state.take(|entry| entry.wanted == buffers[2]).is_some());
        let left: Vec<usize> = state.entries[..state.count].iter().map(|entry| entry.wanted.addr >> 12).collect();
        assert_eq!((left, state.bytes), (vec![1, 2, 4, 5], 12 << 12));
        while state.count > 0 {
            state.remove(0);
        }
        assert_eq!(state.bytes, 0);
    }

    #[test]
    fn what_was_kept_in_vain_is_kept_later_and_later() {
        let mut seen = NOT_SEEN;
        assert!(!seen.comes_back(7));
        seen.deregistered(7);
        assert!(seen.comes_back(7) && !seen.comes_back(8));
        for rounds in [8, 64, 512, 512] {
            seen.changed(7);
            for round in 0..rounds {
                assert!(!seen.comes_back(7), "after {round} of {rounds}");
                seen.deregistered(7);
            }
            assert!(seen.comes_back(7));
        }
        // Another takes its place.
        seen.deregistered(9);
        assert!(seen.comes_back(9) && !seen.comes_back(7));
    }

    #[test]
    fn everything_that_makes_a_registration_another_makes_its_hash_another() {
        let one = wanted(0x7000, 4096);
        let others = [
            wanted(0x8000, 4096),
            wanted(0x7000, 4097),
            Wanted { iova: 0, ..one },
            Wanted { access: Access(1), ..one },
        ];
        assert!(others.iter().all(|other| hash(other) != hash(&one) && hash(other) != 0));
    }
}
