//! Requests that wait for their container's rates, or for their receiver.

use super::*;

#[test]
fn senders_whose_receiver_is_never_ready_cost_little() {
    let mut rig = Rig::new();
    let pairs: Vec<_> =
        (0..20).map(|index| (rig.qp(2 * index, 1000 + 2 * index), rig.qp(2 * index + 1, 1001 + 2 * index))).collect();
    for (mut a, b) in pairs {
        rig.ready(&a, b.number, Destination::Own);
        rig.ready(&b, a.number, Destination::Own);
        rig.plane.qps[a.queue as usize].as_mut().unwrap().attr.rnr_retry = 7;
        post(&mut a, &rig.fields(Opcode::SEND, 0, 0, 8));
    }
    let mut wakes = 0;
    rig.plane.now = 1;
    while rig.plane.now < 1_000_000_000 {
        while rig.plane.turn() {}
        rig.plane.now = rig.plane.wake_at().unwrap();
        wakes += 1;
    }
    // All of them together, every eight milliseconds.
    assert!(wakes < 300, "{wakes} wakes in a second");
}

#[test]
fn operations_are_capped_whatever_way_they_go() {
    // 1,000 a second, with a burst of 8.
    let mut rig = Rig::shaped(&Policy { ops: OpRate::new(1_000), ..Policy::default() }, None);
    let (mut a, _b) = rig.pair();
    for _ in 0..30 {
        post(&mut a, &rig.fields(Opcode::RDMA_WRITE, 0, 4096, 8));
    }
    rig.plane.activate(a.queue);
    let mut done = 0;
    for millisecond in 1..=10 {
        rig.plane.now = millisecond * 1_000_000;
        for _ in 0..5 {
            rig.plane.turn();
        }
        done += rig.completions().len();
        assert!(done <= 8 + millisecond as usize, "{done} after {millisecond} ms");
    }
    assert!(done >= 17, "{done}");
    assert!(rig.plane.wake_at().is_some_and(|at| at <= 11_000_000));
}

#[test]
fn what_the_rates_have_in_hand_goes_without_a_clock() {
    let policy =
        Policy { bandwidth: BitRate::new(1_000_000_000_000), ops: OpRate::new(1_000_000_000), ..Policy::default() };
    let mut rig = Rig::shaped(&policy, None);
    let (mut a, _b) = rig.pair();
    post(&mut a, &rig.fields(Opcode::RDMA_WRITE, 0, 4096, 8));
    assert!(!rig.plane.needs_time());
    rig.plane.activate(a.queue);
    rig.plane.turn();
    assert_eq!(rig.completions().len(), 1);
    assert!(!rig.plane.needs_time());
}

#[test]
fn a_queue_that_had_to_wait_is_worked_for_and_waits_no_longer_than_needed() {
    let mut rig = Rig::shaped(&Policy { ops: OpRate::new(1_000_000), ..Policy::default() }, None);
    let (mut a, _b) = rig.pair();
    rig.plane.activate(a.queue);
    rig.plane.now = 1;
    // More than is in hand, at one time.
    let mut posted = 0;
    while !rig.plane.shaping.any_parked() {
        assert!(posted < 1_000, "nothing is held back");
        post(&mut a, &SendFields { flags: SendFlags(0), ..rig.fields(Opcode::RDMA_WRITE, 0, 4096, 8) });
        posted += 1;
        rig.plane.turn();
    }
    for _ in 0..8 {
        post(&mut a, &rig.fields(Opcode::RDMA_WRITE, 0, 4096, 8));
    }
    // A worker that finds no work for a while sleeps; here it has some.
    rig.plane.now = 2;
    assert!(rig.plane.turn());
    assert_eq!(rig.completions().len(), 8);
    assert!(!rig.plane.shaping.any_parked());
}

#[test]
fn a_queue_pair_in_error_is_flushed_though_its_share_is_closed() {
    let mut rig = Rig::shaped(&Policy { bandwidth: BitRate::new(1), ..Policy::default() }, None);
    let (mut a, _b) = rig.pair();
    for wr_id in 1..=3 {
        post(&mut a, &SendFields { wr_id, ..rig.fields(Opcode::RDMA_WRITE, 0, 40_000, 20_000) });
    }
    rig.plane.activate(a.queue);
    rig.plane.now = 1;
    rig.plane.turn();
    // The first had the burst; what comes after waits for days.
    assert!(rig.plane.shaping.any_parked());
    rig.plane.to_error(a.queue);
    let statuses = rig.statuses();
    assert!(statuses.iter().any(|(_, status)| *status == WcStatus::WR_FLUSH_ERR), "{statuses:?}");
    assert_eq!(statuses.last().map(|(wr_id, _)| *wr_id), Some(3));
    assert!(!rig.plane.shaping.any_parked());
}

#[test]
fn a_read_waits_for_the_rate_of_the_container_that_it_reads_from() {
    // 8 Mbit/s: 16 KiB at once, and a MB per second afterwards.
    let (mut two, mut a, _b) = TwoRigs::new();
    two.rigs[1].plane.shaping =
        Shaping::new(&Policy { bandwidth: BitRate::new(8_000_000), ..Policy::default() }, None, 0);
    let remote = two.rigs[1].key;
    let pattern: Vec<u8> = (0..20_000u32).map(|i| (i * 5 / 3) as u8).collect();
    two.rigs[1].put(0, &pattern);
    for wr_id in 1..=3 {
        let read = two.rigs[0].fields(Opcode::RDMA_READ, 40_000, 0, 20_000);
        post(&mut a, &SendFields { wr_id, rkey: remote, ..read });
    }
    two.rigs[0].plane.activate(a.queue);
    two.turns();
    // A millisecond has passed. The second owes 3.6 ms first, and the third 20 ms more.
    let mut done = two.rigs[0].completions().len();
    assert_eq!(done, 1);
    let mut needed = Vec::new();
    while done < 3 {
        two.turns();
        let now = two.rigs[0].plane.now;
        assert!(now < 60_000_000, "{done} after {now} ns");
        let more = two.rigs[0].completions();
        assert!(more.iter().all(|completion| completion.status == WcStatus::SUCCESS));
        needed.extend(more.iter().map(|_| now));
        done += more.len();
    }
    assert!(needed[0] >= 3_000_000 && needed[1] >= 23_000_000, "{needed:?}");
    assert!(two.rigs[0].take(40_000, 20_000) == pattern);
}
