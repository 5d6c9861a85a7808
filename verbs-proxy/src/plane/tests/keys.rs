//! Keys that the container takes back by itself.

use super::*;
use crate::memory::AccessFault;

#[test]
fn a_withdrawn_region_is_out_of_reach_from_the_answer_on() {
    let mut rig = Rig::new();
    let (mut a, _b) = rig.pair();
    let write = rig.fields(Opcode::RDMA_WRITE, 0, 64, 8);
    post(&mut a, &write);
    assert_eq!(rig.statuses(), [(1, WcStatus::SUCCESS)]);
    assert!(rig.plane.regions.word(rig.key).withdraw(rig.granted.incarnation, rig.key));
    let question = rig.plane.doorbells.ask();
    assert!(!rig.plane.doorbells.is_answered(question));
    rig.plane.turn();
    assert!(rig.plane.doorbells.is_answered(question));
    post(&mut a, &SendFields { wr_id: 2, ..write });
    assert_eq!(rig.statuses(), [(2, WcStatus::LOC_PROT_ERR)]);
}

#[test]
fn a_restored_region_is_reached_by_its_new_key_only() {
    let mut rig = Rig::new();
    let (mut a, _b) = rig.pair();
    let word = rig.plane.regions.word(rig.key);
    assert!(word.withdraw(rig.granted.incarnation, rig.key));
    let key = rig.key ^ 0x8000_0000;
    assert!(word.restore(rig.granted.incarnation, key));
    let write = rig.fields(Opcode::RDMA_WRITE, 0, 64, 8);
    post(&mut a, &SendFields { sge: Sge { lkey: key, ..write.sge }, rkey: key, ..write });
    post(&mut a, &SendFields { wr_id: 2, sge: Sge { lkey: key, ..write.sge }, ..write });
    let mut statuses = rig.statuses();
    statuses.sort();
    assert_eq!(statuses, [(1, WcStatus::SUCCESS), (2, WcStatus::REM_ACCESS_ERR)]);
}

#[test]
fn a_request_that_waits_for_its_turn_finds_the_key_gone() {
    let policy = Policy { bandwidth: BitRate::new(8_000), ..Policy::default() };
    let mut rig = Rig::shaped(&policy, None);
    let (mut a, _b) = rig.pair();
    // The first takes all that the rate lets out at once, so that the second waits.
    for wr_id in 1..3 {
        post(&mut a, &SendFields { wr_id, ..rig.fields(Opcode::RDMA_WRITE, 0, 20_000, 16 << 10) });
    }
    rig.plane.now += 1;
    rig.plane.turn();
    assert!(rig.plane.regions.word(rig.key).withdraw(rig.granted.incarnation, rig.key));
    for _ in 0..1000 {
        rig.plane.now += 1_000_000_000;
        rig.plane.turn();
    }
    let statuses: Vec<WcStatus> = rig.completions().iter().map(|completion| completion.status).collect();
    assert_eq!(statuses, [WcStatus::SUCCESS, WcStatus::LOC_PROT_ERR]);
}

#[test]
fn what_a_neighbour_reads_takes_a_message_to_end() {
    // The requester's region is shared for a WRITE, the responder's when READs may be granted it.
    for (opcode, lender) in [(Opcode::RDMA_WRITE, 0), (Opcode::RDMA_READ, 1)] {
        let (mut two, mut a, _b) = TwoRigs::new();
        let remote = two.rigs[1].key;
        for _ in 0..3 {
            post(&mut a, &SendFields { rkey: remote, ..two.rigs[0].fields(opcode, 0, 8192, 4096) });
            two.turns();
            assert_eq!(two.rigs[0].statuses(), [(1, WcStatus::SUCCESS)]);
            if opcode == Opcode::RDMA_WRITE {
                break;
            }
        }
        for (index, rig) in two.rigs.iter().enumerate() {
            let withdrawn = rig.plane.regions.word(rig.key).withdraw(rig.granted.incarnation, rig.key);
            assert_eq!(withdrawn, index != lender, "{opcode:?}: region {index}");
        }
    }
}

#[test]
fn a_source_that_goes_on_the_way_is_no_affair_of_the_responders() {
    for opcode in [Opcode::SEND, Opcode::RDMA_WRITE_WITH_IMM] {
        let clock = WireClock::private().unwrap();
        let mut rig = Rig::shaped(&Policy::default(), BitRate::new(1_000_000).map(|rate| (clock, rate)));
        let (mut a, mut b) = rig.pair();
        let region = MemoryRegion::new(Arc::clone(&rig.memory), 0, MEMORY as u64, IOVA, PD, ALL, 2).unwrap();
        let source = rig.entrance.insert(region, super::super::super::control::session::random).unwrap();
        b.receive.push(&ReceiveBase::pack(50, 1, rig.sge(8192, 64)).0);
        let fields = rig.fields(opcode, 0, 8192, 64);
        post(&mut a, &SendFields { sge: Sge { lkey: source.key, ..fields.sge }, ..fields });
        rig.plane.now += 1;
        rig.plane.turn();
        assert!(rig.plane.device.modelled.as_ref().unwrap().is_busy());
        assert!(rig.plane.regions.remove(source).is_some());
        rig.turns();
        let ends: Vec<_> = rig.completions().iter().map(|end| (end.wr_id, end.status, end.vendor_err)).collect();
        assert_eq!(ends, [(1, WcStatus::LOC_PROT_ERR, AccessFault::Key as u16)], "{opcode:?}");
        assert_eq!(rig.plane.qps[b.queue as usize].as_ref().unwrap().state, QpState::RTS);
        assert_eq!(rig.events, []);
    }
}

#[test]
fn memory_that_a_neighbour_takes_back_on_the_way_fails_its_own_request() {
    let (mut two, mut a, b) = TwoRigs::new();
    two.share(0);
    post(&mut a, &SendFields { rkey: two.rigs[1].key, ..two.rigs[0].fields(Opcode::RDMA_WRITE, 0, 8192, 4096) });
    two.rigs[0].plane.now += 1;
    two.rigs[0].plane.activate(a.queue);
    two.rigs[0].plane.turn();
    let (at, link) = (two.links[1], &mut two.rigs[1].plane.device.links);
    assert!(link.get_mut(at).unwrap().shares.remove(&1).is_some());
    two.turns();
    assert_eq!(two.rigs[0].statuses(), [(1, WcStatus::REM_OP_ERR)]);
    assert_eq!(two.rigs[1].plane.qps[b.queue as usize].as_ref().unwrap().state, QpState::RTS);
    assert_eq!(two.rigs[1].events, []);
}
