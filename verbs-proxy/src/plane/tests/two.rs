//! Requests between two containers.

use super::*;

#[test]
fn every_operation_works_between_two_proxies() {
    let (mut two, mut a, mut b) = TwoRigs::new();
    let remote = two.rigs[1].key;
    let to_remote =
        |rig: &Rig, opcode, local, at, length| SendFields { rkey: remote, ..rig.fields(opcode, local, at, length) };
    let pattern: Vec<u8> = (0..30_000u32).map(|i| (i * 5 / 3) as u8).collect();
    two.rigs[0].put(0, &pattern);

    post(&mut a, &to_remote(&two.rigs[0], Opcode::RDMA_WRITE, 0, 40_000, 30_000));
    b.receive.push(&ReceiveBase::pack(60, 1, two.rigs[1].sge(80_000, 30_000)).0);
    post(&mut a, &to_remote(&two.rigs[0], Opcode::SEND, 0, 0, 30_000));
    post(&mut a, &to_remote(&two.rigs[0], Opcode::RDMA_READ, 120_000, 40_000, 30_000));
    two.rigs[1].put(4096, &5u64.to_ne_bytes());
    let add = to_remote(&two.rigs[0], Opcode::FETCH_AND_ADD, 160_000, 4096, 8);
    post(&mut a, &SendFields { compare_add: 6, ..add });
    let inline = SendFields {
        flags: SendFlags(SendFlags::SIGNALED.0 | SendFlags::INLINE.0),
        sges: 0,
        inline_bytes: 8,
        ..to_remote(&two.rigs[0], Opcode::RDMA_WRITE, 0, 5000, 0)
    };
    a.send.push(&SendBase::pack_inline(&inline, &[u64::from_ne_bytes(*b"inlined!"), 0, 0, 0]).0);
    two.turns();

    assert_eq!(two.rigs[0].statuses(), [(1, WcStatus::SUCCESS); 5]);
    assert_eq!(two.rigs[1].statuses(), [(60, WcStatus::SUCCESS)]);
    assert!(two.rigs[1].take(40_000, 30_000) == pattern);
    assert!(two.rigs[1].take(80_000, 30_000) == pattern);
    assert!(two.rigs[0].take(120_000, 30_000) == pattern);
    assert_eq!(two.rigs[0].take(160_000, 8), 5u64.to_ne_bytes());
    assert_eq!(two.rigs[1].take(4096, 8), 11u64.to_ne_bytes());
    assert_eq!(two.rigs[1].take(5000, 8), b"inlined!");
    assert_eq!(two.rigs[0].plane.device.links.get(two.links[0]).unwrap().outstanding, 0);
}

#[test]
fn a_receiver_of_another_proxy_that_is_not_ready_is_tried_again_in_order() {
    let (mut two, mut a, mut b) = TwoRigs::new();
    two.rigs[0].put(0, b"abcd");
    for offset in 0..4 {
        post(&mut a, &SendFields { wr_id: offset, ..two.rigs[0].fields(Opcode::SEND, offset, 0, 1) });
    }
    // The retries of one RNR episode; each message that gets through starts a new one.
    two.rigs[0].plane.turn();
    two.share(0);
    two.rigs[0].plane.turn();
    two.rigs[1].plane.turn();
    for wr_id in 0..4 {
        b.receive.push(&ReceiveBase::pack(wr_id, 1, two.rigs[1].sge(wr_id, 1)).0);
    }
    two.turns();
    assert_eq!(two.rigs[0].statuses(), (0..4).map(|id| (id, WcStatus::SUCCESS)).collect::<Vec<_>>());
    assert_eq!(two.rigs[1].take(0, 4), b"abcd");
}

#[test]
fn a_violation_of_another_proxys_memory_ends_both_ends() {
    let (mut two, mut a, _b) = TwoRigs::new();
    post(&mut a, &two.rigs[0].fields(Opcode::RDMA_READ, 0, 0, 8));
    two.turns();
    // The key is the requester's own, which means nothing at the other proxy.
    assert_eq!(two.rigs[0].statuses(), [(1, WcStatus::REM_ACCESS_ERR)]);
    assert_eq!(two.rigs[1].events.last(), Some(&EventType::QP_ACCESS_ERR));
}

#[test]
fn a_queue_pair_made_anew_under_the_same_numbers_gets_nothing_of_the_old_one() {
    let clock = WireClock::private().unwrap();
    let rig = Rig::shaped(&Policy::default(), BitRate::new(1_000_000).map(|rate| (clock, rate)));
    let (mut two, mut a, _b) = TwoRigs::with(rig);
    let inline = |rig: &Rig, inline_bytes| SendFields {
        flags: SendFlags(SendFlags::SIGNALED.0 | SendFlags::INLINE.0),
        sges: 0,
        inline_bytes,
        ..rig.fields(Opcode::RDMA_WRITE, 0, 5000, 0)
    };
    let fields = SendFields { rkey: two.rigs[1].key, ..inline(&two.rigs[0], 32) };
    a.send.push(&SendBase::pack_inline(&fields, &[1; 4]).0);
    two.rigs[0].plane.activate(a.queue);
    two.rigs[0].plane.turn();
    assert!(two.rigs[0].plane.device.modelled.as_ref().unwrap().is_busy());
    // The same bell number, QP number and epoch, and a shorter request.
    two.rigs[0].plane.remove_qp(a.queue);
    let mut again = two.rigs[0].qp(a.queue, a.number);
    two.rigs[0].ready(&again, 200, Destination::Port(2));
    let fields = SendFields { rkey: two.rigs[1].key, ..inline(&two.rigs[0], 8) };
    again.send.push(&SendBase::pack_inline(&fields, &[2, 0, 0, 0]).0);
    two.turns();
    two.turns();
    assert_eq!(two.rigs[0].statuses(), [(1, WcStatus::SUCCESS)]);
    assert_eq!(two.rigs[1].take(5000, 16), [2u64.to_ne_bytes(), [0; 8]].concat());
}

#[test]
fn a_link_that_has_gone_is_not_taken_for_the_one_in_its_place() {
    let (mut two, _a, _b) = TwoRigs::new();
    let mapping = Arc::new(Mapping::of(&SealedFile::create("link", BYTES).unwrap()).unwrap());
    let plane = &mut two.rigs[0].plane;
    let old = two.links[0];
    drop(plane.remove_link(old).unwrap());
    let new = plane.add_link(link(1, 3, End::Acceptor, &mapping));
    assert!(plane.device.links.get(old).is_none() && plane.device.links.get_mut(old).is_none());
    assert!(plane.remove_link(old).is_none());
    plane.share_arrived(old);
    assert_eq!(plane.device.links.get(new).unwrap().port, 3);
    assert_eq!(plane.qps[0].as_ref().unwrap().device.peer, Peer::None);
}

#[test]
fn memory_that_is_never_shared_is_a_request_without_an_answer() {
    let (mut two, mut a, _b) = TwoRigs::new();
    post(&mut a, &SendFields { rkey: two.rigs[1].key, ..two.rigs[0].fields(Opcode::RDMA_WRITE, 0, 8192, 4096) });
    let plane = &mut two.rigs[0].plane;
    let mut asked = 0;
    for _ in 0..200 {
        plane.now += 10_000_000;
        plane.turn();
        asked += plane.take_notices().filter(|notice| matches!(notice, Notice::Device(Task::Share { .. }))).count();
    }
    assert_eq!(asked, 1);
    let ends: Vec<WcStatus> = two.rigs[0].completions().iter().map(|completion| completion.status).collect();
    assert_eq!(ends, [WcStatus::RETRY_EXC_ERR]);
}

#[test]
fn whoever_waits_for_shared_memory_goes_on_when_the_link_does_not() {
    let (mut two, mut a, _b) = TwoRigs::new();
    post(&mut a, &SendFields { rkey: two.rigs[1].key, ..two.rigs[0].fields(Opcode::RDMA_WRITE, 0, 8192, 4096) });
    two.rigs[0].plane.now += 1;
    two.rigs[0].plane.turn();
    assert!(two.rigs[0].plane.qps[0].as_ref().unwrap().waits.device);
    let mapping = Arc::new(Mapping::of(&SealedFile::create("link", BYTES).unwrap()).unwrap());
    for (index, end) in [End::Acceptor, End::Initiator].into_iter().enumerate() {
        drop(two.rigs[index].plane.remove_link(two.links[index]).unwrap());
        let port = 2 - index as u16;
        two.links[index] = two.rigs[index].plane.add_link(link(3 - port, port, end, &mapping));
    }
    two.turns();
    assert_eq!(two.rigs[0].statuses(), [(1, WcStatus::SUCCESS)]);
}

#[test]
fn what_went_over_a_link_that_ended_goes_again_over_the_next() {
    let (mut two, mut a, _b) = TwoRigs::new();
    two.rigs[0].put(0, b"y");
    two.share(0);
    post(&mut a, &SendFields { rkey: two.rigs[1].key, ..two.rigs[0].fields(Opcode::RDMA_WRITE, 0, 64, 1) });
    two.rigs[0].plane.now += 1;
    two.rigs[0].plane.activate(a.queue);
    two.rigs[0].plane.turn();
    assert_eq!(two.rigs[0].plane.device.links.get(two.links[0]).unwrap().outstanding, 1);
    // Without a timeout nothing but the new link can bring it back.
    two.rigs[0].plane.qps[0].as_mut().unwrap().attr.timeout = 0;
    let mapping = Arc::new(Mapping::of(&SealedFile::create("link", BYTES).unwrap()).unwrap());
    for (index, end) in [End::Acceptor, End::Initiator].into_iter().enumerate() {
        drop(two.rigs[index].plane.remove_link(two.links[index]).unwrap());
        let port = 2 - index as u16;
        two.links[index] = two.rigs[index].plane.add_link(link(3 - port, port, end, &mapping));
    }
    two.turns();
    assert_eq!(two.rigs[0].statuses(), [(1, WcStatus::SUCCESS)]);
    assert_eq!(two.rigs[1].take(64, 1), b"y");
}

#[test]
fn a_link_that_breaks_the_protocol_is_reported_and_left() {
    let (mut two, _a, _b) = TwoRigs::new();
    // An answer to nothing, and a request with more pieces than there can be.
    let malformed = crate::device::soft::wire::Request { pieces: 33, ..crate::device::soft::wire::Request::default() };
    two.rigs[1].plane.device.links.get_mut(two.links[1]).unwrap().request(&malformed, &[]).unwrap();
    two.rigs[0].plane.turn();
    let notices: Vec<Notice> = two.rigs[0].plane.take_notices().collect();
    assert_eq!(notices, [Notice::Device(Task::Fault { link: two.links[0], fault: LinkFault::Malformed })]);
    assert!(two.rigs[0].plane.device.links.is_empty());
    assert_eq!(two.rigs[0].plane.qps[0].as_ref().unwrap().device.peer, Peer::None);
    assert!(two.rigs[0].plane.remove_link(two.links[0]).is_some());
}

#[test]
fn requests_are_numbered_from_what_both_ends_were_told() {
    // Of two SENDs before and one after its requester alone was made anew.
    const FIRST: u32 = 0x00ff_ffff;
    let made_anew = |two: &mut TwoRigs, a: &mut RigQp, b: &mut RigQp, first, to: Destination, rig: usize| {
        let send = |two: &TwoRigs, wr_id| SendFields { wr_id, ..two.rigs[0].fields(Opcode::SEND, 0, 0, 8) };
        let receive = |two: &TwoRigs, wr_id| ReceiveBase::pack(wr_id, 1, two.rigs[rig].sge(wr_id * 8, 8)).0;
        (7..10).for_each(|wr_id| b.receive.push(&receive(two, wr_id)));
        (1..3).for_each(|wr_id| post(a, &send(two, wr_id)));
        two.turns();
        two.rigs[0].modify(a, QpState::RESET, 0, QpAttr::default(), None);
        two.rigs[0].ready_from(a, b.number, to, [5, first]);
        post(a, &send(two, 3));
        for _ in 0..20 {
            two.rigs[0].plane.now += 100_000_000;
            two.turns();
        }
        let of = |completion: &Completion| (completion.wr_id, completion.status);
        let mut done: Vec<_> = two.rigs[0].completions().iter().map(of).collect();
        if rig == 1 {
            done.extend(two.rigs[1].completions().iter().map(of));
        }
        let before = [1, 2, 7, 8];
        assert!(before.iter().all(|id| done.contains(&(*id, WcStatus::SUCCESS))), "{done:?}");
        done.retain(|(wr_id, _)| !before.contains(wr_id));
        done
    };
    let arrives = vec![(3, WcStatus::SUCCESS), (9, WcStatus::SUCCESS)];
    for (first, expected) in [
        // What is expected next; behind it, which is taken for a repeated request, as by an adapter; and ahead of it.
        (1, arrives),
        (0, vec![(3, WcStatus::SUCCESS)]),
        (2, vec![(3, WcStatus::RETRY_EXC_ERR)]),
        (0x007f_ffff, vec![(3, WcStatus::RETRY_EXC_ERR)]),
    ] {
        let (mut two, mut a, mut b) = TwoRigs::new();
        for (rig, qp, to) in [(0, &a, Destination::Port(2)), (1, &b, Destination::Port(1))] {
            two.rigs[rig].modify(qp, QpState::RESET, 0, QpAttr::default(), None);
            two.rigs[rig].ready_from(qp, 300 - qp.number, to, if rig == 0 { [5, FIRST] } else { [FIRST, 5] });
        }
        let mut done = made_anew(&mut two, &mut a, &mut b, first, Destination::Port(2), 1);
        done.sort_by_key(|(wr_id, _)| *wr_id);
        assert_eq!(done, expected, "{first:#x}");

        let (mut two, ..) = TwoRigs::new();
        let (mut a, mut b) = (two.rigs[0].qp(1, 101), two.rigs[0].qp(2, 202));
        two.rigs[0].ready_from(&a, 202, Destination::Own, [5, FIRST]);
        two.rigs[0].ready_from(&b, 101, Destination::Own, [FIRST, 5]);
        let mut done = made_anew(&mut two, &mut a, &mut b, first, Destination::Own, 0);
        done.sort_by_key(|(wr_id, _)| *wr_id);
        assert_eq!(done, expected, "{first:#x}, within a container");
    }
}
