//! What a link carries in a turn, and what is said about it.

use super::*;
use crate::device::soft::qp::WireSequence;
use crate::device::soft::wire::{self, Kind, Request, Response};
use crate::shared::{Run, RunFile};
use rustix::mm::ProtFlags;

/// A write of `length` bytes to the other rig's memory.
fn write(two: &TwoRigs, length: u32) -> SendFields {
    SendFields { rkey: two.rigs[1].key, ..two.rigs[0].fields(Opcode::RDMA_WRITE, 0, 0, length) }
}

fn turn(two: &mut TwoRigs, rig: usize) {
    two.rigs[rig].plane.now += 1;
    two.rigs[rig].plane.activate(0);
    two.rigs[rig].plane.turn();
}

/// Hands over everything that was posted.
fn send_all(two: &mut TwoRigs) {
    for _ in 0..4 {
        turn(two, 0);
    }
}

/// The messages that came to a rig and that it has not looked at.
fn messages(two: &mut TwoRigs, rig: usize) -> Vec<[u64; 8]> {
    let link = two.rigs[rig].plane.device.links.get_mut(two.links[rig]).unwrap();
    let mut list = Vec::new();
    while let Some(words) = link.peek() {
        let slots = match wire::kind(&words) {
            Kind::REQUEST => 1 + Request::unpack(&words).extensions().unwrap(),
            _ => 1,
        };
        link.advance(slots);
        list.push(words);
    }
    list
}

#[test]
fn requests_that_come_together_are_acknowledged_together() {
    let (mut two, mut a, mut b) = TwoRigs::new();
    two.rigs[0].put(0, b"abc");
    for wr_id in 0..20 {
        b.receive.push(&ReceiveBase::pack(wr_id, 1, two.rigs[1].sge(wr_id * 8, 3)).0);
        post(&mut a, &SendFields { wr_id, ..two.rigs[0].fields(Opcode::SEND, 0, 0, 3) });
    }
    send_all(&mut two);
    turn(&mut two, 1);
    let answers = messages(&mut two, 0);
    let [answer] = &answers[..] else { panic!("{} answers", answers.len()) };
    let answer = Response::unpack(answer);
    assert_eq!((answer.kind, answer.sequence, answer.covers), (Kind::ACK, WireSequence(19), 20));
    // Nothing was said of them to the requester; they are asked for again, and acknowledged again.
    assert!(two.rigs[0].completions().is_empty());
    two.rigs[0].plane.now += 1_000_000_000;
    two.turns();
    assert_eq!(two.rigs[0].statuses(), (0..20).map(|id| (id, WcStatus::SUCCESS)).collect::<Vec<_>>());
    assert_eq!(two.rigs[1].statuses(), (0..20).map(|id| (id, WcStatus::SUCCESS)).collect::<Vec<_>>());
    assert_eq!(two.rigs[1].take(19 * 8, 3), b"abc");
}

#[test]
fn an_acknowledge_never_stands_for_data() {
    let (mut two, mut a, _b) = TwoRigs::new();
    let read = SendFields { wr_id: 7, rkey: two.rigs[1].key, ..two.rigs[0].fields(Opcode::RDMA_READ, 0, 0, 8) };
    post(&mut a, &read);
    post(&mut a, &write(&two, 8));
    turn(&mut two, 0);
    let requests = messages(&mut two, 1);
    assert_eq!(requests.len(), 2);
    let link = two.rigs[1].plane.device.links.get_mut(two.links[1]).unwrap();
    let lie = Response {
        kind: Kind::ACK,
        to: 100,
        from: 200,
        sequence: WireSequence(1),
        offset: 0,
        bytes: 8,
        status: WcStatus::SUCCESS,
        share: 0,
        value: 0,
        generation: 0,
        covers: u32::MAX,
    };
    link.respond(&lie).unwrap();
    two.turns();
    // They are asked for again, and so is what is behind them.
    assert_eq!(two.rigs[0].statuses(), [(7, WcStatus::SUCCESS), (1, WcStatus::SUCCESS)]);
}

#[test]
fn a_turn_of_a_link_is_no_longer_than_a_piece_and_what_is_on_the_way() {
    let (mut two, mut a, _b) = TwoRigs::new();
    two.share(0);
    let pieces = |two: &TwoRigs| two.rigs[1].plane.qps[0].as_ref().unwrap().device.responder.sequence.0;
    for _ in 0..6 {
        post(&mut a, &write(&two, 50_000));
    }
    send_all(&mut two);
    for before in [0, 2, 4] {
        assert_eq!(pieces(&two), before);
        turn(&mut two, 1);
    }
    assert_eq!(pieces(&two), 6);
    // Slots count as well.
    two.turns();
    for _ in 0..32 {
        post(&mut a, &write(&two, 500));
    }
    send_all(&mut two);
    turn(&mut two, 1);
    // Each takes ten of 64.
    assert_eq!(pieces(&two), 6 + 7);
    two.turns();
    assert_eq!(pieces(&two), 38);
    // What is longer than a piece is cut by the requester.
    post(&mut a, &write(&two, 200_000));
    turn(&mut two, 0);
    let lengths: Vec<u32> = messages(&mut two, 1).iter().map(|words| Request::unpack(words).bytes).collect();
    assert_eq!(lengths, [wire::LONGEST, wire::LONGEST, wire::LONGEST, 200_000 - 3 * wire::LONGEST]);
}

#[test]
fn a_neighbour_that_asks_for_more_at_once_breaks_the_protocol() {
    let (mut two, _a, _b) = TwoRigs::new();
    two.share(0);
    let bytes = wire::LONGEST + 1;
    let request = Request {
        to: 200,
        from: 100,
        opcode: Opcode::RDMA_WRITE,
        pieces: 1,
        bytes,
        total: bytes,
        remote_addr: IOVA,
        rkey: two.rigs[1].key,
        ..Request::default()
    };
    let source = ringfence_protocol::work::pack_sges(&[Sge { addr: 0, length: bytes, lkey: 1 }]);
    assert!(two.rigs[0].plane.device.links.get_mut(two.links[0]).unwrap().request(&request, &[source]).unwrap());
    turn(&mut two, 1);
    let notices: Vec<Notice> = two.rigs[1].plane.take_notices().collect();
    assert_eq!(notices, [Notice::Device(Task::Fault { link: two.links[1], fault: LinkFault::Malformed })]);
}

#[test]
fn what_a_link_that_ends_leaves_unsaid_is_said_over_the_next() {
    let (mut two, mut a, _b) = TwoRigs::new();
    post(&mut a, &write(&two, 8));
    turn(&mut two, 0);
    // Behind it, what ends the link in the same turn.
    let malformed = Request { pieces: 33, ..Request::default() };
    assert!(two.rigs[0].plane.device.links.get_mut(two.links[0]).unwrap().request(&malformed, &[]).unwrap());
    turn(&mut two, 1);
    assert_eq!(two.rigs[1].plane.take_notices().count(), 1);
    assert!(two.rigs[1].plane.qps[0].as_ref().unwrap().device.responder.owed.is_none());
    let mapping = Arc::new(Mapping::of(&SealedFile::create("link", BYTES).unwrap()).unwrap());
    for (index, end) in [End::Initiator, End::Acceptor].into_iter().enumerate() {
        drop(two.rigs[index].plane.remove_link(two.links[index]));
        let port = 2 - index as u16;
        two.links[index] = two.rigs[index].plane.add_link(link(3 - port, port, end, &mapping));
    }
    two.turns();
    assert_eq!(two.rigs[0].statuses(), [(1, WcStatus::SUCCESS)]);
}

#[test]
fn what_is_dropped_waits_for_the_retry_timer_and_then_goes_one_by_one() {
    let (mut two, mut a, _b) = TwoRigs::new();
    // Nobody has this number.
    two.rigs[1].plane.remove_qp(0);
    for _ in 0..20 {
        post(&mut a, &write(&two, 8));
    }
    send_all(&mut two);
    assert_eq!(messages(&mut two, 1).len(), 20);
    // As the other end would, had it been looking.
    let dropped = |sequence| Response {
        kind: Kind::DROPPED,
        to: 100,
        from: 200,
        sequence: WireSequence(sequence),
        offset: 0,
        bytes: 8,
        status: WcStatus::SUCCESS,
        share: 0,
        value: 0,
        generation: 0,
        covers: 1,
    };
    for sequence in 0..20 {
        two.rigs[1].plane.device.links.get_mut(two.links[1]).unwrap().respond(&dropped(sequence)).unwrap();
    }
    let start = two.rigs[0].plane.now;
    let mut tries = 0;
    while two.rigs[0].plane.now < start + 60_000_000 {
        two.rigs[0].plane.now += 1_000_000;
        two.rigs[0].plane.activate(0);
        two.rigs[0].plane.turn();
        tries += messages(&mut two, 1).len();
    }
    assert_eq!(tries, 0, "within the retry timer of 67 ms");
    two.rigs[0].plane.now += 20_000_000;
    turn(&mut two, 0);
    assert_eq!(messages(&mut two, 1).len(), 1);
}

#[test]
fn atomics_wait_for_the_rate_of_the_container_whose_memory_they_fetch() {
    let policy = Policy { bandwidth: BitRate::new(8 * 64 * 1000), ..Policy::default() };
    let (mut two, mut a, _b) = TwoRigs::with_both(Rig::new(), Rig::shaped(&policy, None));
    let key = two.rigs[1].key;
    let executed = |two: &TwoRigs| two.rigs[1].plane.qps[0].as_ref().unwrap().device.responder.sequence.0;
    let (mut posted, start) = (0, two.rigs[0].plane.now);
    // The bucket holds 16 KiB, and an answer counts as 64 bytes.
    const IN_HAND: u32 = 256;
    while executed(&two) < IN_HAND + 60 {
        while posted < executed(&two) + 4 {
            let fields = two.rigs[0].fields(Opcode::FETCH_AND_ADD, 0, 64, 8);
            post(&mut a, &SendFields { rkey: key, compare_add: 1, flags: SendFlags(0), ..fields });
            posted += 1;
        }
        for rig in &mut two.rigs {
            rig.plane.now += 50_000;
            rig.plane.activate(0);
            rig.plane.turn();
        }
        assert!(two.rigs[0].plane.now < start + 10_000_000_000);
    }
    let took = two.rigs[0].plane.now - start;
    assert!((30_000_000..300_000_000).contains(&took), "{took} ns for 60 more at a thousand per second");
}

#[test]
fn reads_of_nothing_by_several_queue_pairs_go_over_the_rate_by_the_burst_only() {
    // Fifteen and five eighths of 64 bytes in a second.
    let policy = Policy { bandwidth: BitRate::new(8_000), ..Policy::default() };
    let (mut two, first, _b) = TwoRigs::with_both(Rig::new(), Rig::shaped(&policy, None));
    let (mut requesters, mut responders) = (vec![first], Vec::new());
    for index in 1..6 {
        let (a, b) = (two.rigs[0].qp(index, 100 + index), two.rigs[1].qp(index, 200 + index));
        two.rigs[0].ready(&a, b.number, Destination::Port(2));
        two.rigs[1].ready(&b, a.number, Destination::Port(1));
        requesters.push(a);
        responders.push(b);
    }
    let key = two.rigs[1].key;
    let executed =
        |two: &TwoRigs, queue: u32| two.rigs[1].plane.qps[queue as usize].as_ref().unwrap().device.responder.sequence.0;
    let (mut posted, start) = ([0; 6], two.rigs[0].plane.now);
    let count = |two: &TwoRigs| (0..6).map(|queue| u64::from(executed(two, queue))).sum::<u64>();
    let (mut burst, mut seconds) = (0, 0);
    while seconds < 40 {
        for (queue, a) in requesters.iter_mut().enumerate() {
            while posted[queue] < executed(&two, queue as u32) + 4 {
                let fields = two.rigs[0].fields(Opcode::RDMA_READ, 0, 0, 0);
                post(a, &SendFields { rkey: key, sges: 0, flags: SendFlags(0), ..fields });
                posted[queue] += 1;
            }
        }
        for rig in &mut two.rigs {
            rig.plane.now += 500_000;
            (0..6).for_each(|queue| rig.plane.activate(queue));
            rig.plane.turn();
        }
        seconds = (two.rigs[0].plane.now - start) / 1_000_000_000;
        // What goes at once: 16 KiB, and a quarter of it more without a clock.
        let allowed = 20 * 1024 / 64 + (two.rigs[1].plane.now - start) * 1_000 / 64 / 1_000_000_000 + 1;
        assert!(count(&two) <= allowed, "{} of {allowed} after {seconds} s", count(&two));
        if seconds < 5 {
            burst = count(&two);
        }
    }
    let later = count(&two) - burst;
    assert!((535..=548).contains(&later), "{later} in 35 s");
}

#[test]
fn a_wait_begins_when_it_is_told_and_not_when_the_turn_did() {
    let mut rig = Rig::new();
    let (mut a, _b) = rig.pair();
    // Nothing has asked for the time since zero; it is a second later.
    rig.plane.clock = |_| 1_000_000_000;
    post(&mut a, &rig.fields(Opcode::SEND, 0, 0, 1));
    rig.plane.activate(a.queue);
    rig.plane.turn();
    assert_eq!(rig.plane.qps[0].as_ref().unwrap().waits.until, 1_000_010_000);
    assert_eq!(rig.plane.wake_at(), Some(1_000_010_000));
}

#[test]
fn memory_whose_pages_can_be_taken_away_is_copied_for_neighbours() {
    for (opcode, lender) in [(Opcode::RDMA_WRITE, 0), (Opcode::RDMA_READ, 1)] {
        let (mut two, mut a, _b) = TwoRigs::new();
        let pattern: Vec<u8> = (0..90_000u32).map(|i| (i * 7 / 3) as u8).collect();
        two.rigs[lender].put(0, &pattern);
        let key = two.rigs[lender].key;
        let link = two.links[lender];
        two.rigs[lender].plane.withhold(link, key);
        let rkey = two.rigs[1].key;
        let (local, remote) = if lender == 0 { (0, 120_000) } else { (120_000, 0) };
        post(&mut a, &SendFields { rkey, ..two.rigs[0].fields(opcode, local, remote, 90_000) });
        two.turns();
        assert_eq!(two.rigs[0].statuses(), [(1, WcStatus::SUCCESS)]);
        assert!(two.rigs[1 - lender].take(120_000, 90_000) == pattern);
        let shared = &two.rigs[lender].plane.device.links.get(link).unwrap().shared;
        assert_eq!(shared.len(), 1, "only the buffer is shared");
        assert!(!shared.contains_key(&1));
    }
}

#[test]
fn what_lies_on_the_edges_of_a_region_is_copied_for_neighbours_and_the_rest_is_shown() {
    let (mut two, mut a, _b) = TwoRigs::new();
    let rig = &mut two.rigs[0];
    drop(rig.plane.regions.remove(rig.granted));
    let region = MemoryRegion::new(Arc::clone(&rig.memory), 100, MEMORY as u64 - 200, IOVA, PD, ALL, 1).unwrap();
    let region = region.shown(PAGE as u64..(MEMORY - PAGE) as u64);
    rig.key = rig.entrance.insert(region, crate::control::session::random).unwrap().key;
    let run = Run { file: RunFile::Sealed(&rig.file), offset: PAGE, bytes: MEMORY - 2 * PAGE };
    rig.shown = Arc::new(Mapping::of_runs(&[run], ProtFlags::READ, false).unwrap());
    let pattern: Vec<u8> = (0..90_000u32).map(|i| (i * 7 / 3) as u8).collect();
    rig.put(100, &pattern);
    let link = two.links[0];
    let shared = |two: &TwoRigs| {
        let link = two.rigs[0].plane.device.links.get(link).unwrap();
        (link.shared.contains_key(&1), link.bounce.is_some())
    };
    // On the first page, on others, and on both kinds.
    let first = PAGE as u32 - 100;
    let cases = [
        (0, first, (false, true)),
        (4096, 4096, (true, true)),
        (first - 1, 513, (true, true)),
        (0, 90_000, (true, true)),
    ];
    for (at, bytes, expected) in cases {
        if at == 4096 {
            mixed_before_it_is_shared(&mut two, &mut a, first - 1);
        }
        let (rkey, fields) = (two.rigs[1].key, two.rigs[0].fields(Opcode::RDMA_WRITE, u64::from(at), 120_000, bytes));
        post(&mut a, &SendFields { rkey, ..fields });
        two.turns();
        assert_eq!(two.rigs[0].statuses(), [(1, WcStatus::SUCCESS)]);
        let at = at as usize;
        assert!(two.rigs[1].take(120_000, bytes as usize) == pattern[at..at + bytes as usize], "{bytes} at {at}");
        assert_eq!(shared(&two), expected, "{bytes} at {at}");
    }
    // No more is copied than what lies on the first page.
    let (rkey, fields) = (two.rigs[1].key, two.rigs[0].fields(Opcode::RDMA_WRITE, 0, 120_000, 60_000));
    post(&mut a, &SendFields { rkey, ..fields });
    send_all(&mut two);
    let received = two.rigs[1].plane.device.links.get_mut(two.links[1]).unwrap();
    assert_eq!(Request::unpack(&received.peek().unwrap()).pieces, 2);
    let named = received.extension(0).unwrap();
    let lengths = [0, 1]
        .map(|index| ringfence_protocol::work::extension_sge(&named, index))
        .map(|sge| (sge.lkey == 1, sge.length));
    assert_eq!(lengths, [(false, first), (true, 60_000 - first)]);
    two.turns();
    assert_eq!(two.rigs[0].statuses(), [(1, WcStatus::SUCCESS)]);
    // A list, of which parts are shown: its elements are in order.
    let list = [(70_000, 600), (10, 5000), (8000, 1)].map(|(at, length)| two.rigs[0].sge(at, length));
    let fields = SendFields { sges: 3, sge: list[0], rkey, ..two.rigs[0].fields(Opcode::RDMA_WRITE, 0, 150_000, 0) };
    let rest = ringfence_protocol::work::pack_sges(&list[1..]);
    a.send.push_extended(&ringfence_protocol::work::SendBase::pack(&fields).0, &[rest]);
    two.turns();
    assert_eq!(two.rigs[0].statuses(), [(1, WcStatus::SUCCESS)]);
    assert!(
        two.rigs[1].take(150_000, 5601)
            == [&pattern[70_000..70_600], &pattern[10..5010], &pattern[8000..8001]].concat()
    );
    // One that would be longer than a message can say is copied.
    two.rigs[0].plane.qps.iter_mut().flatten().for_each(|qp| qp.caps.max_send_sge = 32);
    let at = first as usize - 100;
    let list: Vec<_> = (0..20).map(|index| two.rigs[0].sge(at as u64 + index, 200)).collect();
    let fields = SendFields { sges: 20, sge: list[0], rkey, ..two.rigs[0].fields(Opcode::RDMA_WRITE, 0, 0, 0) };
    let rest: Vec<_> = list[1..].chunks(3).map(ringfence_protocol::work::pack_sges).collect();
    a.send.push_extended(&ringfence_protocol::work::SendBase::pack(&fields).0, &rest);
    two.turns();
    assert_eq!(two.rigs[0].statuses(), [(1, WcStatus::SUCCESS)]);
    let expected: Vec<u8> = (0..20).flat_map(|index| pattern[at + index..at + index + 200].to_vec()).collect();
    assert!(two.rigs[1].take(0, 4000) == expected);
}

/// A piece of which the neighbour may see a part goes by the buffer as long as it does not see that, which is asked for; after a refusal
/// not at once again.
fn mixed_before_it_is_shared(two: &mut TwoRigs, a: &mut RigQp, at: u32) {
    for refused in [false, true] {
        let (rkey, fields) = (two.rigs[1].key, two.rigs[0].fields(Opcode::RDMA_WRITE, u64::from(at), 120_000, 600));
        post(a, &SendFields { rkey, ..fields });
        turn(two, 0);
        let asks = |notice: &Notice| matches!(notice, Notice::Device(Task::Share { share: 1, .. }));
        assert_eq!(two.rigs[0].plane.take_notices().filter(asks).count(), usize::from(!refused));
        let received = two.rigs[1].plane.device.links.get_mut(two.links[1]).unwrap();
        assert_eq!(Request::unpack(&received.peek().unwrap()).pieces, 1);
        let link = two.links[0];
        two.rigs[0].plane.unshare(link, Some(1));
        two.turns();
        assert_eq!(two.rigs[0].statuses(), [(1, WcStatus::SUCCESS)]);
        let shared = &two.rigs[0].plane.device.links.get(link).unwrap().shared;
        assert!(!shared.contains_key(&1), "{refused}");
    }
}

#[test]
fn pages_that_a_neighbour_copies_from_are_there_when_it_is_told_of_them() {
    let (mut two, mut a, _b) = TwoRigs::new();
    two.share(0);
    let made = |two: &TwoRigs| rustix::fs::fstat(&two.rigs[0].file).unwrap().st_blocks as usize * 512 / PAGE;
    assert_eq!(made(&two), 0);
    post(&mut a, &write(&two, 5 * PAGE as u32));
    send_all(&mut two);
    assert_eq!(made(&two), 5);
    two.turns();
    assert_eq!(two.rigs[0].statuses(), [(1, WcStatus::SUCCESS)]);
}

#[test]
fn memory_that_could_not_be_shared_at_once_is_asked_for_again() {
    let (mut two, mut a, _b) = TwoRigs::new();
    post(&mut a, &write(&two, 4096));
    let asked = |two: &mut TwoRigs| {
        turn(two, 0);
        two.rigs[0].plane.take_notices().filter(|notice| matches!(notice, Notice::Device(Task::Share { .. }))).count()
    };
    assert_eq!(asked(&mut two), 1);
    let link = two.links[0];
    two.rigs[0].plane.unshare(link, Some(1));
    assert_eq!(asked(&mut two), 0);
    two.rigs[0].plane.now += 150_000_000;
    assert_eq!(asked(&mut two), 1);
    two.share(0);
    two.turns();
    assert_eq!(two.rigs[0].statuses(), [(1, WcStatus::SUCCESS)]);
}
