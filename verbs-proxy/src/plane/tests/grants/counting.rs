//! What goes by grants, in the counters of both sides.

use super::*;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::collections::HashMap;

#[test]
fn what_goes_by_grants_is_counted_on_both_sides() {
    let mut scene = Scene::new();
    scene.warm();
    let mut expected = HashMap::new();
    let mut expect = |opcode: Opcode, bytes: u64| {
        let work: &mut Work = expected.entry(opcode).or_insert_with(Work::default);
        work.operations += 1;
        work.bytes += bytes;
    };
    (0..3).for_each(|_| expect(Opcode::RDMA_WRITE, 8));
    (0..3).for_each(|_| expect(Opcode::RDMA_READ, 8));
    for round in 0..9 {
        for (opcode, bytes) in [
            (Opcode::RDMA_WRITE, 8),
            (Opcode::RDMA_WRITE, 5000 + round),
            (Opcode::RDMA_READ, 60_000),
            (Opcode::RDMA_READ, 4),
            (Opcode::FETCH_AND_ADD, 8),
            (Opcode::CMP_AND_SWP, 8),
        ] {
            scene.post(opcode, 64, 8192, bytes);
            expect(opcode, bytes.into());
        }
        assert_eq!(scene.alone().len(), 6, "round {round}");
    }
    assert_eq!(scene.used(), 54);
    for (opcode, expected) in expected {
        assert_eq!(scene.counted(opcode), [expected; 2], "{opcode:?}");
    }
    let delays = scene.two.rigs[0].plane.tally.page().delays;
    assert_eq!(delays.iter().sum::<u64>(), 60);
}

/// The responder looks, if it is time; whether it will be woken to look again.
fn look(scene: &mut Scene) -> bool {
    let plane = &mut scene.two.rigs[1].plane;
    plane.now += 100_000_000;
    plane.turn();
    plane.device.looks.wake_at().is_some()
}

/// Whether the responder was rung for, which wakes it.
fn rung(scene: &mut Scene) -> bool {
    // What rig 0 rings comes back to it.
    let [zero, _] = scene.two.links;
    let bell = &scene.two.rigs[0].plane.device.links.get(zero).unwrap().bell;
    let rung = poll(&mut [PollFd::new(bell, PollFlags::IN)], Some(&Timespec::default())) == Ok(1);
    if rung {
        scene.two.rigs.iter_mut().for_each(|rig| Soft::woken(&mut rig.plane));
    }
    rung
}

#[test]
fn a_responder_is_woken_to_count_once_and_sleeps_on_when_nothing_moves() {
    let mut scene = Scene::new();
    scene.warm();
    while look(&mut scene) {}
    assert!(!scene.page(1).watched.0.get());
    rung(&mut scene);
    scene.two.rigs[0].plane.now += 1_000_000_000;
    let write = |scene: &mut Scene| {
        scene.post(Opcode::RDMA_WRITE, 0, 9000, 8);
        scene.two.rigs[0].plane.activate(0);
        scene.two.rigs[0].plane.turn();
        assert_eq!(scene.two.rigs[0].completions().len(), 1);
    };
    write(&mut scene);
    assert!(rung(&mut scene), "nobody is told to count");
    write(&mut scene);
    assert!(!rung(&mut scene), "rung again and again");
    // It looks at once, then until nothing has moved twice.
    scene.two.rigs[1].plane.now += 1_000;
    scene.two.rigs[1].plane.turn();
    assert!(scene.page(1).watched.0.get());
    scene.two.rigs[0].plane.now += 1_000_000_000;
    write(&mut scene);
    assert!(!rung(&mut scene), "it looks anyway");
    assert!(look(&mut scene) && look(&mut scene) && !look(&mut scene));
    assert!(!scene.page(1).watched.0.get());
    assert_eq!(scene.counted(Opcode::RDMA_WRITE), [Work { operations: 6, bytes: 48 }; 2]);
}

#[test]
fn a_responder_is_woken_when_there_is_something_to_count_and_not_before() {
    // Pieces of 16 KiB, of which the rate lets one go at a time.
    let policy = Policy { bandwidth: BitRate::new(100_000_000), ..Policy::default() };
    let mut scene = Scene::with(Rig::shaped(&policy, None), Rig::new());
    scene.warm();
    while look(&mut scene) {}
    rung(&mut scene);
    let before = scene.counted(Opcode::RDMA_WRITE)[1];
    scene.two.rigs[0].plane.now += 1_000_000_000;
    scene.post(Opcode::RDMA_WRITE, 0, 65_536, 60_000);
    scene.two.rigs[0].plane.activate(0);
    let mut pieces = 0;
    while scene.two.rigs[0].completions().is_empty() {
        assert!(!rung(&mut scene), "rung for {pieces} pieces of a request that is not complete");
        assert!(pieces < 100, "it never completes");
        scene.two.rigs[0].plane.now += 1_000_000;
        scene.two.rigs[0].plane.turn();
        pieces += 1;
    }
    assert!(pieces > 2, "it goes in {pieces} turns");
    assert!(rung(&mut scene), "nobody is told to count");
    scene.two.rigs[1].plane.now += 1_000;
    scene.two.rigs[1].plane.turn();
    let after = scene.counted(Opcode::RDMA_WRITE)[1];
    assert_eq!((after.operations, after.bytes), (before.operations + 1, before.bytes + 60_000));
}

#[test]
fn claims_count_as_far_as_they_can_be_true() {
    let mut scene = Scene::new();
    scene.warm();
    scene.two.rigs[1].plane.turn();
    let before = scene.counted(Opcode::RDMA_WRITE)[1];
    let page = scene.page(0);
    for claim in [u64::MAX, 1 << 40, 0, u64::MAX / 2, 5] {
        for work in &page.used.0.work {
            work.operations.store(claim, Ordering::Relaxed);
            work.bytes.store(claim, Ordering::Relaxed);
        }
        scene.counted(Opcode::RDMA_WRITE);
    }
    let [_, after] = scene.counted(Opcode::RDMA_WRITE);
    // Five looks, a second each.
    assert!(after.operations - before.operations <= 5 * 250_000_000, "{after:?}");
    assert!(after.bytes - before.bytes <= 5 * 64_000_000_000, "{after:?}");
    let received = scene.two.rigs[1].plane.tally.page().received;
    let others = [1, 2, 3, 7].map(|place| received[place]);
    assert_eq!(others, [Work::default(); 4], "what does not go by grants");
    // Without a grant nothing is believed at all.
    scene.two.rigs[1].plane.revoke_queue(0);
    let last = scene.counted(Opcode::RDMA_WRITE);
    page.used.0.count(Opcode::RDMA_WRITE, 1000, 1000);
    assert_eq!(scene.counted(Opcode::RDMA_WRITE), last);
}
