//! Keys that the container takes back by itself.

use super::*;

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
    // The requester's region is shared for a WRITE, the responder's for a READ.
    for (opcode, lender) in [(Opcode::RDMA_WRITE, 0), (Opcode::RDMA_READ, 1)] {
        let (mut two, mut a, _b) = TwoRigs::new();
        let remote = two.rigs[1].key;
        post(&mut a, &SendFields { rkey: remote, ..two.rigs[0].fields(opcode, 0, 8192, 4096) });
        two.turns();
        assert_eq!(two.rigs[0].statuses(), [(1, WcStatus::SUCCESS)]);
        for (index, rig) in two.rigs.iter().enumerate() {
            let withdrawn = rig.plane.regions.word(rig.key).withdraw(rig.granted.incarnation, rig.key);
            assert_eq!(withdrawn, index != lender, "{opcode:?}: region {index}");
        }
    }
}
