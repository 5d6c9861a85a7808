//! Requests within one container.

use super::*;

#[test]
fn a_write_moves_bytes_and_completes() {
    let mut rig = Rig::new();
    let (mut a, _b) = rig.pair();
    rig.put(0, b"fence");
    post(&mut a, &rig.fields(Opcode::RDMA_WRITE, 0, 4096, 5));
    assert_eq!(rig.statuses(), [(1, WcStatus::SUCCESS)]);
    assert_eq!(rig.take(4096, 5), b"fence");
}

#[test]
fn a_send_fills_several_elements_and_carries_immediate_data() {
    let mut rig = Rig::new();
    let (mut a, mut b) = rig.pair();
    rig.put(0, b"0123456789");
    let base = ReceiveBase::pack(9, 2, rig.sge(8192, 3));
    b.receive.push_extended(&base.0, &[ringfence_protocol::work::pack_sges(&[rig.sge(9000, 100)])]);
    let fields = SendFields { imm: 77, ..rig.fields(Opcode::SEND_WITH_IMM, 0, 0, 10) };
    post(&mut a, &fields);
    rig.turns();
    let completions = rig.completions();
    let received = completions.iter().find(|c| c.opcode == WcOpcode::RECV).unwrap();
    assert_eq!((received.wr_id, received.byte_len, received.imm, received.src_qp), (9, 10, 77, 100));
    assert_eq!(rig.take(8192, 3), b"012");
    assert_eq!(rig.take(9000, 7), b"3456789");
}

#[test]
fn reads_and_atomics_fetch() {
    let mut rig = Rig::new();
    let (mut a, _b) = rig.pair();
    rig.put(4096, &40u64.to_ne_bytes());
    post(&mut a, &rig.fields(Opcode::RDMA_READ, 0, 4096, 8));
    post(&mut a, &SendFields { compare_add: 2, ..rig.fields(Opcode::FETCH_AND_ADD, 8, 4096, 8) });
    post(&mut a, &SendFields { compare_add: 42, swap: 7, ..rig.fields(Opcode::CMP_AND_SWP, 16, 4096, 8) });
    post(&mut a, &SendFields { compare_add: 42, swap: 8, ..rig.fields(Opcode::CMP_AND_SWP, 24, 4096, 8) });
    assert_eq!(rig.statuses(), [(1, WcStatus::SUCCESS); 4]);
    let fetched: Vec<u64> =
        rig.take(0, 32).chunks(8).map(|bytes| u64::from_ne_bytes(bytes.try_into().unwrap())).collect();
    assert_eq!(fetched, [40, 40, 42, 7]);
}

#[test]
fn a_foreign_lkey_is_a_local_protection_error_and_flushes_the_rest() {
    let mut rig = Rig::new();
    let (mut a, mut b) = rig.pair();
    b.receive.push(&ReceiveBase::pack(50, 1, rig.sge(0, 8)).0);
    let good = rig.fields(Opcode::RDMA_WRITE, 0, 64, 8);
    post(&mut a, &SendFields { wr_id: 1, flags: SendFlags(0), ..good });
    post(&mut a, &SendFields { wr_id: 2, sge: Sge { lkey: rig.key ^ 0x8000_0000, ..good.sge }, ..good });
    post(&mut a, &SendFields { wr_id: 3, flags: SendFlags(0), ..good });
    assert_eq!(rig.statuses(), [(2, WcStatus::LOC_PROT_ERR), (3, WcStatus::WR_FLUSH_ERR)]);
    post(&mut a, &SendFields { wr_id: 4, ..good });
    a.receive.push(&ReceiveBase::pack(5, 1, rig.sge(0, 8)).0);
    assert_eq!(rig.statuses(), [(4, WcStatus::WR_FLUSH_ERR), (5, WcStatus::WR_FLUSH_ERR)]);
}

#[test]
fn a_remote_access_violation_ends_both_queue_pairs() {
    let mut rig = Rig::new();
    let (mut a, mut b) = rig.pair();
    b.receive.push(&ReceiveBase::pack(50, 1, rig.sge(0, 8)).0);
    post(&mut a, &rig.fields(Opcode::RDMA_WRITE, 0, MEMORY as u64 - 4, 8));
    let mut statuses = rig.statuses();
    statuses.sort();
    assert_eq!(statuses, [(1, WcStatus::REM_ACCESS_ERR), (50, WcStatus::WR_FLUSH_ERR)]);
    assert_eq!(rig.events, [EventType::QP_ACCESS_ERR]);
    post(&mut a, &SendFields { wr_id: 2, ..rig.fields(Opcode::RDMA_WRITE, 0, 64, 8) });
    assert_eq!(rig.statuses(), [(2, WcStatus::WR_FLUSH_ERR)]);
}

#[test]
fn two_links_between_two_proxies_become_one() {
    let (mut two, mut a, mut b) = TwoRigs::new();
    let mapping = Arc::new(Mapping::of(&SealedFile::create("link", BYTES).unwrap()).unwrap());
    let mut second = Vec::new();
    for (index, end) in [End::Acceptor, End::Initiator].into_iter().enumerate() {
        let port = 2 - index as u16;
        second.push(two.rigs[index].plane.add_link(link(3 - port, port, end, &mapping)));
    }
    // Each end answers for its queue pair over the link that it made itself.
    two.rigs[1].plane.qps[0].as_mut().unwrap().device.peer = Peer::Link(second[1]);
    two.rigs[0].put(0, b"x");
    let remote = two.rigs[1].key;
    post(&mut a, &SendFields { rkey: remote, ..two.rigs[0].fields(Opcode::RDMA_WRITE, 0, 64, 1) });
    two.turns();
    assert_eq!(two.rigs[0].statuses(), [(1, WcStatus::SUCCESS)]);
    assert_eq!(two.rigs[1].take(64, 1), b"x");
    // Several at once: the first goes where nothing can overtake it, and the rest follow.
    let remote = two.rigs[0].key;
    for wr_id in 1..=3 {
        post(&mut b, &SendFields { wr_id, rkey: remote, ..two.rigs[1].fields(Opcode::RDMA_WRITE, 64, 128, 1) });
    }
    two.turns();
    assert_eq!(two.rigs[1].statuses(), [1, 2, 3].map(|wr_id| (wr_id, WcStatus::SUCCESS)));
    assert_eq!(two.rigs[0].take(128, 1), b"x");
    let peer = |rig: &Rig| rig.plane.qps[0].as_ref().unwrap().device.peer;
    assert_eq!(two.rigs.each_ref().map(peer), two.links.map(Peer::Link));
    // The link of the lower LID goes: the other is as good as it was.
    for (index, rig) in two.rigs.iter_mut().enumerate() {
        drop(rig.plane.remove_link(two.links[index]).unwrap());
        assert!(!rig.plane.device.links.get(second[index]).unwrap().superseded);
        assert_eq!(peer(rig), Peer::Link(second[index]));
    }
}

#[test]
fn a_message_longer_than_the_receive_is_refused_on_both_sides() {
    let mut rig = Rig::new();
    let (mut a, mut b) = rig.pair();
    b.receive.push(&ReceiveBase::pack(50, 1, rig.sge(0, 8)).0);
    post(&mut a, &rig.fields(Opcode::SEND, 64, 0, 9));
    let mut statuses = rig.statuses();
    statuses.sort();
    assert_eq!(statuses, [(1, WcStatus::REM_INV_REQ_ERR), (50, WcStatus::LOC_LEN_ERR)]);
}

#[test]
fn a_send_waits_for_a_receive_and_gives_up_after_its_retries() {
    let mut rig = Rig::new();
    let (mut a, mut b) = rig.pair();
    post(&mut a, &rig.fields(Opcode::SEND, 0, 0, 8));
    rig.plane.turn();
    b.receive.push(&ReceiveBase::pack(50, 1, rig.sge(64, 8)).0);
    assert_eq!(rig.statuses(), [(50, WcStatus::SUCCESS), (1, WcStatus::SUCCESS)]);
    post(&mut a, &rig.fields(Opcode::SEND, 0, 0, 8));
    assert_eq!(rig.statuses(), [(1, WcStatus::RNR_RETRY_EXC_ERR)]);
}

#[test]
fn requests_to_nobody_are_given_up_after_their_timeouts() {
    let mut rig = Rig::new();
    let (mut a, b) = rig.pair();
    rig.plane.remove_qp(b.queue);
    post(&mut a, &rig.fields(Opcode::RDMA_WRITE, 0, 64, 8));
    assert_eq!(rig.statuses(), []);
    // Timeout 14 is 67 ms, and there is one retry.
    rig.plane.now += 70_000_000;
    assert_eq!(rig.statuses(), []);
    rig.plane.now += 70_000_000;
    assert_eq!(rig.statuses(), [(1, WcStatus::RETRY_EXC_ERR)]);
}

#[test]
fn a_queue_pair_has_one_alarm_however_often_it_waits() {
    let mut rig = Rig::new();
    let (mut a, b) = rig.pair();
    for _ in 0..20 {
        post(&mut a, &rig.fields(Opcode::SEND, 0, 0, 8));
        rig.plane.turn();
        assert_eq!(rig.plane.timers.len(), 1);
        rig.modify(&a, QpState::RESET, 0, QpAttr::default(), None);
        rig.ready(&a, b.number, Destination::Own);
    }
    rig.plane.remove_qp(a.queue);
    assert_eq!(rig.plane.timers.len(), 0);
}

#[test]
fn an_alarm_set_for_later_does_not_keep_an_earlier_one_from_going_off() {
    let (mut two, mut a, mut b) = TwoRigs::new();
    for _ in 0..20 {
        // Each begins and ends a wait for an answer, which lasts 67 ms if there is none.
        post(&mut a, &SendFields { rkey: two.rigs[1].key, ..two.rigs[0].fields(Opcode::RDMA_WRITE, 0, 0, 8) });
        two.turns();
        assert_eq!(two.rigs[0].statuses(), [(1, WcStatus::SUCCESS)]);
        assert!(two.rigs[0].plane.timers.len() <= 1);
    }
    // Not ready: tried again after 10 microseconds.
    post(&mut a, &two.rigs[0].fields(Opcode::SEND, 0, 0, 8));
    two.rigs[0].plane.turn();
    two.rigs[1].plane.turn();
    b.receive.push(&ReceiveBase::pack(50, 1, two.rigs[1].sge(64, 8)).0);
    two.turns();
    assert_eq!(two.rigs[0].statuses(), [(1, WcStatus::SUCCESS)]);
    assert_eq!(two.rigs[1].statuses(), [(50, WcStatus::SUCCESS)]);
}

#[test]
fn malformed_entries_take_the_queue_pair_down_and_nothing_else() {
    for fields in [
        SendFields { sges: 33, ..SendFields::default() },
        SendFields { sges: 5, ..SendFields::default() },
        SendFields { flags: SendFlags::INLINE, inline_bytes: 65, ..SendFields::default() },
        // Its extension was never written.
        SendFields { sges: 4, ..SendFields::default() },
    ] {
        let mut rig = Rig::new();
        let (mut a, mut b) = rig.pair();
        post(&mut a, &fields);
        assert_eq!(rig.statuses()[0].1, WcStatus::LOC_QP_OP_ERR, "{fields:?}");
        post(&mut b, &rig.fields(Opcode::RDMA_WRITE, 0, 64, 8));
        for _ in 0..2 {
            rig.turns();
            rig.plane.now += 70_000_000;
        }
        assert_eq!(rig.statuses(), [(1, WcStatus::RETRY_EXC_ERR)]);
    }
}

#[test]
fn an_unknown_opcode_is_a_local_operation_error() {
    for opcode in [Opcode::LOCAL_INV, Opcode::BIND_MW, Opcode::SEND_WITH_INV, Opcode(77)] {
        let mut rig = Rig::new();
        let (mut a, _b) = rig.pair();
        post(&mut a, &rig.fields(opcode, 0, 64, 8));
        assert_eq!(rig.statuses(), [(1, WcStatus::LOC_QP_OP_ERR)], "{opcode:?}");
    }
}

#[test]
fn a_full_completion_queue_is_an_error_and_not_an_overwrite() {
    let mut rig = Rig::new();
    let (mut a, _b) = rig.pair();
    for wr_id in 0..u64::from(SLOTS) + 1 {
        post(&mut a, &SendFields { wr_id, ..rig.fields(Opcode::RDMA_WRITE, 0, 64, 8) });
        rig.turns();
    }
    assert_eq!(rig.events, [EventType::CQ_ERR]);
    let ids: Vec<u64> = rig.completions().iter().map(|completion| completion.wr_id).collect();
    assert_eq!(ids, (0..u64::from(SLOTS)).collect::<Vec<_>>());
}

#[test]
fn a_reset_queue_pair_forgets_and_works_again() {
    let mut rig = Rig::new();
    let (mut a, b) = rig.pair();
    post(&mut a, &rig.fields(Opcode::SEND, 0, 0, 8));
    rig.plane.turn();
    for qp in [&a, &b] {
        rig.modify(qp, QpState::RESET, 0, QpAttr::default(), None);
    }
    assert_eq!(rig.statuses(), []);
    rig.ready(&a, b.number, Destination::Own);
    rig.ready(&b, a.number, Destination::Own);
    post(&mut a, &rig.fields(Opcode::RDMA_WRITE, 0, 64, 8));
    assert_eq!(rig.statuses(), [(1, WcStatus::SUCCESS)]);
}

#[test]
fn large_requests_of_every_kind_are_split_and_arrive_whole_through_a_shaped_plane() {
    let clock = WireClock::private().unwrap();
    let policy = Policy { bandwidth: BitRate::new(8_000_000_000), ..BULK };
    let mut rig = Rig::shaped(&policy, BitRate::new(10_000_000_000).map(|rate| (clock, rate)));
    let (mut a, mut b) = rig.pair();
    let pattern: Vec<u8> = (0..100_000u32).map(|i| (i * 7 / 3) as u8).collect();
    rig.put(0, &pattern);
    let length = pattern.len() as u32;
    post(&mut a, &rig.fields(Opcode::RDMA_WRITE, 0, 110_000, length));
    assert_eq!(rig.statuses(), [(1, WcStatus::SUCCESS)]);
    assert!(rig.take(110_000, pattern.len()) == pattern);
    b.receive.push(&ReceiveBase::pack(2, 1, rig.sge(120_001, length)).0);
    post(&mut a, &rig.fields(Opcode::SEND, 0, 0, length));
    assert_eq!(rig.statuses(), [(2, WcStatus::SUCCESS), (1, WcStatus::SUCCESS)]);
    assert!(rig.take(120_001, pattern.len()) == pattern);
    post(&mut a, &rig.fields(Opcode::RDMA_READ, 130_003, 0, length));
    assert_eq!(rig.statuses(), [(1, WcStatus::SUCCESS)]);
    assert!(rig.take(130_003, pattern.len()) == pattern);
}

#[test]
fn a_piece_larger_than_what_is_left_of_the_share_waits_for_its_turn() {
    let clock = WireClock::private().unwrap();
    // 12,500 bytes may be on this link at once, in pieces of 1,024 and headers.
    let mut rig = Rig::shaped(&BULK, BitRate::new(1_000_000_000).map(|rate| (clock, rate)));
    let (mut a, _b) = rig.pair();
    for length in [6_000, 6_250, 6_250] {
        post(&mut a, &rig.fields(Opcode::RDMA_WRITE, 0, 100_000, length));
    }
    // The second finds less left than it has; looking again before anything has arrived changes nothing.
    for _ in 0..3 {
        rig.plane.now += 1_000;
        rig.plane.turn();
    }
    assert_eq!(rig.statuses(), [(1, WcStatus::SUCCESS); 3]);
}
