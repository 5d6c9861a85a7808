//! The rings and bells under loom: every interleaving of both sides, at the size of the smallest interesting case.

use crate::doorbell::{Doorbells, QueueBell};
use crate::layout::{Arm, CqHeader};
use crate::ring::{Consumer, Producer, Slot, Words};
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
