//! Memory that messages name belongs to its application again when the queue pair or the region has gone: nothing that is written to
//! it afterwards leaves. What a READ is answered with is what was there when it was.

use super::*;
use crate::device::soft::bounce;
use crate::device::soft::wire::{self, Request};
use ringfence_protocol::grants::Busy;

const LENGTH: usize = 50_000;
const FORMER: &[u8; LENGTH] = &[1; LENGTH];
const SECRET: u8 = 9;

/// Both sides' memory is shared, and something is under way over the link; at `from` are the data.
struct Scene {
    two: TwoRigs,
    a: RigQp,
    b: RigQp,
    from: usize,
}

/// What is under way.
#[derive(Clone, Copy, Debug)]
enum Under {
    /// A request of rig 0's, whose data rig 1 has not looked at.
    Request(Opcode),
    /// A READ of rig 0's, which has been answered: it has not looked at the data.
    Read,
}

const REQUESTS: [Under; 3] =
    [Under::Request(Opcode::SEND), Under::Request(Opcode::RDMA_WRITE), Under::Request(Opcode::RDMA_WRITE_WITH_IMM)];

impl Scene {
    fn new(under: Under) -> Self {
        let (mut two, a, b) = TwoRigs::new();
        two.share(0);
        two.share(1);
        let mut scene = Self { two, a, b, from: usize::from(matches!(under, Under::Read)) };
        let opcode = match under {
            Under::Request(opcode) => opcode,
            Under::Read => Opcode::RDMA_READ,
        };
        let rigs = &scene.two.rigs;
        rigs[scene.from].put(0, FORMER);
        scene.b.receive.push(&ReceiveBase::pack(2, 1, rigs[1].sge(100_000, LENGTH as u32)).0);
        let fields = match under {
            Under::Read => rigs[0].fields(opcode, 100_000, 0, LENGTH as u32),
            Under::Request(_) => rigs[0].fields(opcode, 0, 100_000, LENGTH as u32),
        };
        post(&mut scene.a, &SendFields { rkey: rigs[1].key, ..fields });
        scene.turn(0);
        if scene.from == 1 {
            // For the buffer; then again.
            scene.turn(1);
            scene.two.hear(1);
            for _ in 0..4 {
                scene.two.rigs[0].plane.now += 1_000_000;
                scene.turn(0);
            }
            scene.turn(1);
        }
        scene
    }

    fn turn(&mut self, rig: usize) {
        let plane = &mut self.two.rigs[rig].plane;
        plane.now += 1000;
        plane.activate(0);
        plane.turn();
    }

    /// Of the end that the data are of.
    fn own(&mut self) -> (&mut Rig, &RigQp) {
        (&mut self.two.rigs[self.from], if self.from == 0 { &self.a } else { &self.b })
    }

    fn reading(&self, rig: usize) -> &Busy {
        self.two.rigs[rig].plane.device.links.get(self.two.links[rig]).unwrap().reading()
    }

    fn arrived(&self) -> Vec<u8> {
        self.two.rigs[1 - self.from].take(100_000, LENGTH)
    }
}

#[test]
fn what_is_written_after_its_queue_pair_or_region_has_gone_stays() {
    type End = (&'static str, fn(&mut Rig, &RigQp));
    let ends: [End; 5] = [
        ("RESET", |rig, qp| rig.modify(qp, QpState::RESET, 0, QpAttr::default(), None)),
        ("ERR", |rig, qp| rig.modify(qp, QpState::ERR, 0, QpAttr::default(), None)),
        ("destroyed", |rig, qp| drop(rig.plane.remove_qp(qp.queue))),
        ("failed", |rig, _| match rig.plane.qps[0].as_ref().unwrap().pending.len() {
            0 => rig.plane.to_error(0),
            _ => rig.plane.fail(0, WcStatus::RETRY_EXC_ERR, 0),
        }),
        ("deregistered", |rig, _| {
            drop(rig.plane.regions.remove(rig.granted));
            rig.plane.revoke_region(1);
        }),
    ];
    for under in REQUESTS.into_iter().chain([Under::Read]) {
        for (name, end) in ends {
            let mut scene = Scene::new(under);
            let (rig, qp) = scene.own();
            end(rig, qp);
            assert!(rig.plane.take_tickets().is_empty(), "{under:?}, {name}: nobody was busy");
            rig.put(0, &[SECRET; LENGTH]);
            scene.two.turns();
            if matches!(under, Under::Read) {
                assert_eq!(scene.two.rigs[0].statuses(), [(1, WcStatus::SUCCESS)], "{name}");
                assert!(scene.arrived() == FORMER, "{name}");
            } else {
                assert!(scene.arrived() == [0; LENGTH], "{under:?}, {name}");
            }
        }
        let mut scene = Scene::new(under);
        scene.two.turns();
        assert!(scene.arrived() == FORMER, "{under:?}: what nobody ended arrives");
    }
}

#[test]
fn a_read_brings_what_was_there_before_the_requests_behind_it() {
    let (mut two, mut a, mut b) = TwoRigs::new();
    two.share(0);
    let key = two.rigs[1].key;
    let fields =
        |two: &TwoRigs, opcode, length| SendFields { rkey: key, ..two.rigs[0].fields(opcode, 100_000, 0, length) };
    two.rigs[1].put(0, FORMER);
    b.receive.push(&ReceiveBase::pack(2, 1, two.rigs[1].sge(150_000, 8)).0);
    post(&mut a, &fields(&two, Opcode::RDMA_READ, LENGTH as u32));
    post(&mut a, &SendFields { wr_id: 3, ..fields(&two, Opcode::SEND, 8) });
    let mut received = false;
    for _ in 0..200 {
        for index in 0..2 {
            two.rigs[index].plane.now += 10_000;
            two.rigs[index].plane.turn();
            two.hear(index);
            if index == 1 && !received && !two.rigs[1].completions().is_empty() {
                // Its application knows from the message that the READ before it has been executed.
                received = true;
                two.rigs[1].put(0, &[SECRET; LENGTH]);
            }
        }
    }
    assert!(received);
    assert_eq!(two.rigs[0].statuses(), [(1, WcStatus::SUCCESS), (3, WcStatus::SUCCESS)]);
    assert!(two.rigs[0].take(100_000, LENGTH) == FORMER);
}

#[test]
fn a_read_succeeds_though_what_is_behind_it_is_refused() {
    let (mut two, mut a, _b) = TwoRigs::new();
    let read = |two: &TwoRigs| two.rigs[0].fields(Opcode::RDMA_READ, 100_000, 0, LENGTH as u32);
    let key = two.rigs[1].key;
    two.rigs[1].put(0, FORMER);
    post(&mut a, &SendFields { rkey: key, ..read(&two) });
    post(&mut a, &SendFields { wr_id: 2, rkey: key ^ 0x100, ..read(&two) });
    two.turns();
    assert_eq!(two.rigs[0].statuses(), [(1, WcStatus::SUCCESS), (2, WcStatus::REM_ACCESS_ERR)]);
    assert!(two.rigs[0].take(100_000, LENGTH) == FORMER);
}

#[test]
fn the_data_of_a_read_stay_until_its_answer_is_read_whatever_is_said_before_it() {
    let (mut two, mut a, _b) = TwoRigs::new();
    two.bounce(1);
    let fields = |two: &TwoRigs, opcode, length| SendFields {
        rkey: two.rigs[1].key,
        ..two.rigs[0].fields(opcode, 100_000, 0, length)
    };
    // The acknowledge of the one goes with the answer to the other.
    post(&mut a, &fields(&two, Opcode::RDMA_WRITE, 8));
    post(&mut a, &fields(&two, Opcode::RDMA_READ, LENGTH as u32));
    for rig in &mut two.rigs {
        rig.plane.now += 1000;
        rig.plane.activate(0);
        rig.plane.turn();
    }
    let link = two.rigs[1].plane.device.links.get_mut(two.links[1]).unwrap();
    let bounce = link.bounce.as_mut().unwrap();
    let all = bounce::BYTES as u32;
    for messages in 0..2 {
        bounce.release(messages);
        assert_eq!(bounce.room(all, 0), None, "{messages} of two messages have been read");
    }
    bounce.release(2);
    assert!(bounce.room(all, 0).is_some());
}

#[test]
fn a_link_that_ends_leaves_nothing_named() {
    for under in REQUESTS {
        let mut scene = Scene::new(under);
        let (from, links) = (scene.from, scene.two.links);
        drop(scene.two.rigs[from].plane.remove_link(links[from]).unwrap());
        scene.two.rigs[from].put(0, &[SECRET; LENGTH]);
        scene.turn(1 - from);
        assert!(scene.arrived() == [0; LENGTH], "{under:?}");
    }
}

#[test]
fn an_answer_is_lost_if_its_link_ends_before_it_is_read() {
    let mut scene = Scene::new(Under::Read);
    let (from, links) = (scene.from, scene.two.links);
    let ended = scene.two.rigs[from].plane.remove_link(links[from]).unwrap();
    // As the warden empties the buffer, or it comes to be something else.
    let buffer = ended.bounce.as_ref().unwrap();
    rustix::io::pwrite(buffer.run.file.own().unwrap(), &[SECRET; LENGTH], 0).unwrap();
    scene.turn(1 - from);
    assert!(scene.two.rigs[0].completions().is_empty(), "nobody has said what the data are");
    assert!(scene.arrived() == [0; LENGTH]);
    for _ in 0..20 {
        scene.two.rigs[0].plane.now += 100_000_000;
        scene.turn(0);
    }
    assert_eq!(scene.two.rigs[0].statuses(), [(1, WcStatus::RETRY_EXC_ERR)]);
}

#[test]
fn a_neighbour_that_is_copying_is_waited_for() {
    for under in REQUESTS {
        let mut scene = Scene::new(under);
        scene.reading(1 - scene.from).enter();
        let (rig, _) = scene.own();
        rig.plane.to_error(0);
        let tickets = rig.plane.take_tickets();
        assert_eq!(tickets.len(), 1, "{under:?}");
        rig.plane.now += 1_000_000;
        rig.plane.turn();
        assert!(rig.completions().is_empty() && !tickets[0].is_over());
        scene.reading(1 - scene.from).leave();
        assert!(tickets[0].is_over());
        let (rig, _) = scene.own();
        assert!(rig.statuses().iter().all(|(_, status)| *status == WcStatus::WR_FLUSH_ERR));
        assert_eq!(rig.plane.device.wake_at(), rig.plane.device.looks.wake_at(), "nothing is waited for any more");
    }
}

#[test]
fn a_receive_that_fails_says_so_when_nothing_is_under_way_any_more() {
    let mut scene = Scene::new(Under::Request(Opcode::SEND));
    let rig = &scene.two.rigs[0];
    scene.a.receive.push(&ReceiveBase::pack(7, 1, rig.sge(200_000, 8)).0);
    // Rig 1 sends something, and has not looked at what it was sent itself.
    let message = Request {
        to: 100,
        from: 200,
        opcode: Opcode::SEND,
        pieces: wire::INLINE,
        bytes: 9,
        total: 9,
        ..Request::default()
    };
    let link = scene.two.rigs[1].plane.device.links.get_mut(scene.two.links[1]).unwrap();
    assert!(link.request(&message, &[]).unwrap());
    scene.reading(1).enter();
    scene.turn(0);
    scene.turn(0);
    assert_eq!(scene.two.rigs[0].plane.qps[0].as_ref().unwrap().state, QpState::ERR);
    let done = |rig: &mut Rig| rig.completions().iter().map(|done| (done.wr_id, done.status)).collect::<Vec<_>>();
    assert_eq!(done(&mut scene.two.rigs[0]), []);
    scene.reading(1).leave();
    scene.turn(0);
    scene.turn(0);
    assert_eq!(done(&mut scene.two.rigs[0]), [(7, WcStatus::LOC_LEN_ERR), (1, WcStatus::WR_FLUSH_ERR)]);
}

#[test]
fn a_neighbour_that_is_stopped_holds_nothing_up_for_long() {
    let mut scene = Scene::new(Under::Request(Opcode::SEND));
    scene.reading(1).enter();
    let rig = &mut scene.two.rigs[0];
    rig.plane.fail(0, WcStatus::RETRY_EXC_ERR, 0);
    let until = rig.plane.device.wake_at().unwrap();
    assert!(until <= rig.plane.now + 20_000_000);
    rig.plane.now = until - 1;
    rig.plane.turn();
    assert!(rig.completions().is_empty());
    rig.plane.now = until;
    assert_eq!(rig.statuses(), [(1, WcStatus::RETRY_EXC_ERR)]);
}

#[test]
fn a_neighbour_that_is_stopped_again_and_again_is_hardly_waited_for() {
    let mut scene = Scene::new(Under::Request(Opcode::SEND));
    scene.reading(1).enter();
    let link = scene.two.links[0];
    let rig = &mut scene.two.rigs[0];
    for struck in 0..8 {
        rig.plane.device.links.get_mut(link).unwrap().generation(100);
        drop(rig.qp(1, 164));
        drop(rig.plane.remove_qp(1));
        let [ticket] = &rig.plane.take_tickets()[..] else { panic!("one ticket") };
        assert_eq!(ticket.brief, struck > 3);
        rig.plane.strike(link);
    }
    rig.plane.now += 1_000_000_000;
    rig.plane.device.links.get_mut(link).unwrap().generation(100);
    drop(rig.qp(1, 164));
    drop(rig.plane.remove_qp(1));
    assert!(!rig.plane.take_tickets()[0].brief, "it is believed again");
}

#[test]
fn what_waits_for_a_neighbour_ends_with_its_queue_pair() {
    let mut scene = Scene::new(Under::Request(Opcode::RDMA_WRITE));
    scene.reading(1).enter();
    let rig = &mut scene.two.rigs[0];
    rig.plane.to_error(0);
    rig.modify(&scene.a, QpState::RESET, 0, QpAttr::default(), None);
    rig.ready(&scene.a, 200, Destination::Port(2));
    scene.reading(1).leave();
    let rig = &mut scene.two.rigs[0];
    post(&mut scene.a, &SendFields { wr_id: 5, ..rig.fields(Opcode::RDMA_WRITE, 0, 0, 8) });
    rig.plane.to_error(0);
    assert_eq!(rig.statuses(), [(5, WcStatus::WR_FLUSH_ERR)]);
}

#[test]
fn another_queue_pair_that_loses_its_names_with_it_names_again_and_loses_no_retry() {
    for under in REQUESTS {
        let mut scene = Scene::new(under);
        let (rig, _) = scene.own();
        let of_this_one = rig.plane.qps[0].as_ref().unwrap().number;
        // One of the same word ends.
        let other = rig.qp(1, of_this_one + 64);
        drop(rig.plane.remove_qp(other.queue));
        scene.two.rigs[0].plane.qps[0].as_mut().unwrap().retries = 0;
        scene.two.turns();
        assert_eq!(scene.two.rigs[0].statuses(), [(1, WcStatus::SUCCESS)], "{under:?}");
        assert!(scene.arrived() == FORMER, "{under:?}");
        let link = scene.two.rigs[scene.from].plane.device.links.get_mut(scene.two.links[scene.from]).unwrap();
        assert_eq!(link.generation(of_this_one), 1, "{under:?}: it named again");
    }
}

#[test]
fn a_region_that_is_not_under_way_ends_no_names() {
    let mut scene = Scene::new(Under::Request(Opcode::SEND));
    let rig = &mut scene.two.rigs[0];
    rig.plane.revoke_region(2);
    let link = rig.plane.device.links.get_mut(scene.two.links[0]).unwrap();
    assert_eq!(link.generation(100), 0);
    scene.two.turns();
    assert_eq!(scene.two.rigs[0].statuses(), [(1, WcStatus::SUCCESS)]);
}

#[test]
fn words_that_a_neighbour_scribbles_over_harm_nobody_else() {
    let mut scene = Scene::new(Under::Request(Opcode::SEND));
    // It says that it is busy for ever, and that our names have ended.
    scene.reading(1).enter();
    scene.two.rigs[1].plane.device.links.get(scene.two.links[1]).unwrap().scribble_names(77);
    let rig = &mut scene.two.rigs[0];
    for _ in 0..100 {
        rig.plane.to_error(0);
        assert!(rig.plane.take_tickets().len() <= 1);
    }
    rig.plane.now += 20_000_000;
    assert_eq!(rig.statuses(), [(1, WcStatus::WR_FLUSH_ERR)]);
}
