//! The rings, bells and key words under loom: every interleaving of both sides, at the size of the smallest interesting case.

// UNSAFETY: a cell whose use by two threads at a time is what loom looks for.
#![allow(unsafe_code)]

use crate::doorbell::{Doorbells, QueueBell};
use crate::grants::{self, Busy};
use crate::keys::{Incarnation, KeyWord};
use crate::layout::{Arm, CqHeader};
use crate::ring::{Consumer, Producer, Slot, Words};
use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::thread;

fn ring(slots: usize) -> Arc<[Slot]> {
    let slots: std::vec::Vec<Slot> = (0..slots).map(|_| Slot::default()).collect();
    Arc::from_std(std::sync::Arc::from(slots))
}

fn entry(value: u64) -> Words {
    [value; 8]
}

fn whole(words: &Words) -> bool {
    // The stamp takes the low bits of its word.
    words
        .iter()
        .enumerate()
        .all(|(index, word)| if index == 1 { word >> 16 == words[0] >> 16 } else { *word == words[0] })
}

#[test]
fn an_entry_is_seen_whole_or_not_at_all() {
    loom::model(|| {
        let slots = ring(2);
        let writer = {
            let slots = Arc::clone(&slots);
            thread::spawn(move || Producer::new(&slots, 0).push_extended(&entry(0xaa_0000), &[entry(0xbb_0000)]))
        };
        let consumer = Consumer::new(&slots, 0);
        if let Some(base) = consumer.peek() {
            assert!(whole(&base));
            let extension = consumer.extension(0).expect("extensions are written before their base");
            assert!(whole(&extension));
        }
        writer.join().unwrap();
    });
}

#[test]
fn the_next_lap_is_not_mistaken_for_this_one() {
    loom::model(|| {
        let slots = ring(2);
        Producer::new(&slots, 0).push(&entry(0x10_0000));
        let writer = {
            let slots = Arc::clone(&slots);
            thread::spawn(move || Producer::new(&slots, 2).push(&entry(0x20_0000)))
        };
        if let Some(words) = Consumer::new(&slots, 2).peek() {
            assert_eq!(words[0], 0x20_0000);
            assert!(whole(&words));
        }
        writer.join().unwrap();
    });
}

#[test]
fn a_worker_that_stops_polling_sees_the_entry_or_is_rung_for() {
    loom::model(|| {
        let slots = ring(2);
        let bell = Arc::new(QueueBell::default());
        bell.start_polling();
        let producer = {
            let (slots, bell) = (Arc::clone(&slots), Arc::clone(&bell));
            thread::spawn(move || {
                Producer::new(&slots, 0).push(&entry(1 << 16));
                bell.must_ring()
            })
        };
        bell.stop_polling();
        let seen = Consumer::new(&slots, 0).peek().is_some();
        assert!(producer.join().unwrap() || seen);
    });
}

#[test]
fn a_worker_that_falls_asleep_sees_the_bell_or_is_woken() {
    loom::model(|| {
        let bells = Arc::new(Doorbells::default());
        let producer = {
            let bells = Arc::clone(&bells);
            thread::spawn(move || bells.ring(65))
        };
        let may_sleep = bells.prepare_sleep();
        assert!(producer.join().unwrap() || !may_sleep);
    });
}

#[test]
fn no_bell_is_lost_between_two_takes() {
    loom::model(|| {
        let bells = Arc::new(Doorbells::default());
        let ringer = {
            let bells = Arc::clone(&bells);
            thread::spawn(move || {
                let _ = bells.ring(1);
                let _ = bells.ring(2);
            })
        };
        let mut taken = 0u64;
        bells.take(|queue| taken |= 1 << queue);
        ringer.join().unwrap();
        bells.take(|queue| taken |= 1 << queue);
        assert_eq!(taken, 0b110);
    });
}

#[test]
fn an_armed_queue_sees_the_completion_or_gets_an_event() {
    loom::model(|| {
        let slots = ring(2);
        let header = Arc::new(CqHeader::default());
        let proxy = {
            let (slots, header) = (Arc::clone(&slots), Arc::clone(&header));
            thread::spawn(move || {
                Producer::new(&slots, 0).push(&entry(1 << 16));
                header.disarm(false)
            })
        };
        header.arm(Arm::Any);
        let seen = Consumer::new(&slots, 0).peek().is_some();
        assert!(proxy.join().unwrap() || seen);
    });
}

/// A region whose memory the worker may touch only while its word has the key, and the container only when it has not.
struct Region {
    bells: Doorbells,
    word: KeyWord,
    memory: UnsafeCell<()>,
}

// SAFETY: nothing is read from or written to the cell; loom reports when two threads have it at a time.
unsafe impl Sync for Region {}

const KEY: u32 = 9;

impl Region {
    fn registered() -> (Arc<Self>, Incarnation) {
        let region = Self { bells: Doorbells::default(), word: KeyWord::default(), memory: UnsafeCell::new(()) };
        let incarnation = Incarnation::new(1);
        region.word.grant(incarnation, KEY);
        (Arc::new(region), incarnation)
    }

    /// One turn of the worker: an access, if the key is good.
    fn turn(&self, last: &mut u64) {
        self.bells.answer(last);
        if self.word.answers_to(KEY) {
            self.memory.with_mut(|_| ());
        }
    }
}

/// What the container does to take the key back, once: it may not go on without the answer.
fn deregister(region: &Region, incarnation: Incarnation) {
    assert!(region.word.withdraw(incarnation, KEY));
    let question = region.bells.ask();
    if region.bells.is_answered(question) {
        assert!(region.word.is_withdrawn(incarnation));
        region.memory.with_mut(|_| ());
    }
}

#[test]
fn after_an_answer_no_access_is_under_way_or_begins() {
    loom::model(|| {
        let (region, incarnation) = Region::registered();
        let worker = {
            let region = Arc::clone(&region);
            thread::spawn(move || {
                let mut last = 0;
                for _ in 0..3 {
                    region.turn(&mut last);
                }
            })
        };
        deregister(&region, incarnation);
        worker.join().unwrap();
    });
}

#[test]
fn nor_when_the_worker_sleeps_instead_of_answering() {
    loom::model(|| {
        let (region, incarnation) = Region::registered();
        let worker = {
            let region = Arc::clone(&region);
            thread::spawn(move || {
                let mut last = 0;
                region.turn(&mut last);
                let _ = region.bells.prepare_sleep();
                region.bells.awake();
                region.turn(&mut last);
            })
        };
        deregister(&region, incarnation);
        worker.join().unwrap();
    });
}

#[test]
fn a_region_is_either_revoked_or_restored() {
    loom::model(|| {
        let (region, incarnation) = Region::registered();
        assert!(region.word.withdraw(incarnation, KEY));
        let proxy = {
            let region = Arc::clone(&region);
            thread::spawn(move || region.word.revoke(incarnation))
        };
        let restored = region.word.restore(incarnation, KEY + 1);
        assert!(proxy.join().unwrap() != restored);
    });
}

/// A grant is taken back while its holder copies: whoever finds the holder idle, or waits until it is, has the memory for itself.
#[test]
fn nothing_is_copied_after_a_grant_was_taken_back() {
    struct Shared {
        busy: Busy,
        slot: grants::Slot,
        memory: UnsafeCell<u64>,
    }
    // SAFETY: loom's cell finds two threads that use it at a time, which is the test.
    unsafe impl Sync for Shared {}
    loom::model(|| {
        let shared =
            Arc::new(Shared { busy: Busy::default(), slot: grants::Slot::default(), memory: UnsafeCell::new(0) });
        shared.slot.grant(1);
        let requester = {
            let shared = Arc::clone(&shared);
            thread::spawn(move || {
                shared.busy.enter();
                if shared.slot.holds(1) {
                    // SAFETY: as above.
                    shared.memory.with_mut(|memory| unsafe { *memory += 1 });
                }
                shared.busy.leave();
            })
        };
        shared.slot.revoke();
        grants::settled();
        let seen = shared.busy.word();
        if Busy::says(seen) {
            while shared.busy.word() == seen {
                thread::yield_now();
            }
        }
        // SAFETY: as above.
        shared.memory.with_mut(|memory| unsafe { *memory += 1 });
        requester.join().unwrap();
    });
}
