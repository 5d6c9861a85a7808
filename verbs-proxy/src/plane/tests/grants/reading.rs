//! READs by grants from a container whose rate is limited: what it lets go in advance, and what of the rate they get.

use super::*;
use ringfence_protocol::layout::CqHeader;

#[test]
fn reads_beyond_what_the_other_end_lets_out_ask() {
    let policy = Policy { bandwidth: BitRate::new(1_000_000_000), ..Policy::default() };
    let mut scene = Scene::with(Rig::new(), Rig::shaped(&policy, None));
    scene.warm();
    let allowed = scene.page(1).allowance.0.load(Ordering::Relaxed);
    assert!((16_384..1 << 20).contains(&allowed), "{allowed}");
    let mut read = 0;
    while read + 4096 <= allowed {
        scene.post(Opcode::RDMA_READ, 0, 0, 4096);
        assert_eq!(scene.alone(), [(1, WcStatus::SUCCESS)]);
        read += 4096;
    }
    scene.post(Opcode::RDMA_READ, 0, 0, 4096);
    assert_eq!(scene.alone(), []);
    scene.turns();
    assert_eq!(scene.two.rigs[0].completions().len(), 1);
    assert!(scene.page(1).allowance.0.load(Ordering::Relaxed) > allowed, "it was renewed");
    // A requester that says it has read what it may not is not believed to have more.
    scene.page(0).used.0.read.store(u64::MAX, Ordering::Relaxed);
    scene.post(Opcode::RDMA_READ, 0, 0, 4096);
    scene.turns();
    assert!(scene.page(1).allowance.0.load(Ordering::Relaxed) < 1 << 22);
}

#[test]
fn more_may_be_read_before_nothing_is_left() {
    let policy = Policy { bandwidth: BitRate::new(1_000_000_000), ..Policy::default() };
    let mut scene = Scene::with(Rig::new(), Rig::shaped(&policy, None));
    scene.warm();
    let allowed = |scene: &Scene| scene.page(1).allowance.0.load(Ordering::Relaxed);
    let portion = allowed(&scene);
    let mut read = 0;
    while read < portion / 2 + 8192 {
        assert_eq!(allowed(&scene), portion, "not asked for before half of it is read");
        scene.post(Opcode::RDMA_READ, 0, 0, 4096);
        assert_eq!(scene.alone(), [(1, WcStatus::SUCCESS)]);
        read += 4096 + 64;
    }
    scene.turns();
    let more = allowed(&scene);
    assert!(more > portion, "{more}");
    // Who asks again and again gets no more than who does not.
    let zero = scene.two.links[0];
    for _ in 0..1000 {
        scene.two.rigs[0].plane.device.links.get_mut(zero).unwrap().ask_for_more();
        scene.two.some_turns();
    }
    assert_eq!(allowed(&scene), more);
}

/// READs 100 ms long with 32 under way; for 10 ms of them, from the third time 20 ms on, neither end has a processor. What completed in
/// each 20 ms, and how many of them by a grant.
fn read_for_a_while(rate: u64, bytes: u32) -> ([u64; 5], u64) {
    const STEP: u64 = 10_000;
    let policy = Policy { bandwidth: BitRate::new(rate), ..Policy::default() };
    let mut scene = Scene::with(Rig::new(), Rig::shaped(&policy, None));
    scene.warm();
    let (start, before) = (scene.two.rigs[0].plane.now, scene.used());
    let (mut under_way, mut completed) = (0, [0; 5]);
    for since in (0..100_000_000).step_by(STEP as usize) {
        while under_way < 32 {
            scene.post(Opcode::RDMA_READ, 0, 50_000, bytes);
            scene.two.rigs[0].plane.activate(scene.a.queue);
            under_way += 1;
        }
        let away = (42_000_000..52_000_000).contains(&since);
        for index in 0..2 {
            scene.two.rigs[index].plane.now = start + since + STEP;
            if !away {
                scene.two.rigs[index].plane.turn();
                assert!(scene.two.hear(index).is_empty(), "there are grants for all");
            }
        }
        let got = scene.two.rigs[0].completions();
        assert!(got.iter().all(|completion| completion.status == WcStatus::SUCCESS));
        let polled = scene.two.rigs[0].completions.position();
        scene.two.rigs[0]._cq.header::<CqHeader>(0).set_consumed(polled);
        under_way -= got.len();
        completed[(since / 20_000_000) as usize] += got.len() as u64;
    }
    (completed, scene.used() - before)
}

#[test]
fn readers_at_the_rate_get_it_and_seldom_ask() {
    for (rate, bytes) in [(100_000_000, 4096), (1_000_000_000, 4096), (1_000_000_000, 16_384)] {
        let (completed, by_grants) = read_for_a_while(rate, bytes);
        let due = rate as f64 / 8.0 / 50.0 / f64::from(bytes);
        // But for the first, in which the burst is spent; a portion can be on the other side of an edge.
        for got in &completed[1..] {
            assert!((*got as f64 - due).abs() <= due * 0.03 + 3.0, "{completed:?} of {bytes} at {rate}, {due} each");
        }
        let all: u64 = completed.iter().sum();
        assert!(by_grants * 2 > all, "{by_grants} of {all} by grants, of {bytes} at {rate}");
    }
}
