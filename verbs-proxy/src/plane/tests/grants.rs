//! Grants between two planes: what goes by them, what does not, and what is left when they are taken back.

mod counting;
mod reading;
mod unfounded;

use super::*;
use crate::device::soft::grants::giving::Wish;
use crate::device::soft::grants::using::GrantFault;
use crate::device::soft::grants::{BYTES as PAGE_BYTES, Grant};
use crate::device::soft::qp::Way;
use ringfence_launch::counters::Work;
use ringfence_protocol::grants::Page;
use ringfence_sched::HEADERS;
use std::sync::atomic::Ordering;

pub(super) const WRITABLE: u32 = 77;

fn lease() -> crate::fabric::budget::Lease {
    Budget::new(65_530).take_own(Amount { mappings: 1, bytes: MEMORY as u64 }).unwrap()
}

/// Two planes; rig 1 grants rig 0 whatever is wished for, at once.
pub(super) struct Scene {
    pub(super) two: TwoRigs,
    pub(super) a: RigQp,
    pub(super) b: RigQp,
    pages: [Arc<Mapping>; 2],
    grants: Vec<Grant>,
}

impl Scene {
    fn new() -> Self {
        Self::with(Rig::new(), Rig::new())
    }

    pub(super) fn with(one: Rig, other: Rig) -> Self {
        let (mut two, a, b) = TwoRigs::with_both(one, other);
        let page = || Arc::new(Mapping::of(&SealedFile::create("page", PAGE_BYTES).unwrap()).unwrap());
        let pages = [page(), page()];
        for index in 0..2 {
            let plane = &mut two.rigs[index].plane;
            let unlimited = plane.shaping.read_ahead().is_none();
            let link = plane.device.links.get_mut(two.links[index]).unwrap();
            link.grants.set_ours(pages[index].header(0), unlimited);
            link.grants.set_theirs(pages[1 - index].header(0), lease());
        }
        Self { two, a, b, pages, grants: Vec::new() }
    }

    fn page(&self, index: usize) -> crate::shared::Held<Page> {
        self.pages[index].header(0)
    }

    /// Shows rig 0 the other's memory, writable or not.
    fn show(&mut self, share: u32, writable: bool) {
        let mapping = Arc::clone(&self.two.rigs[1].shown);
        let [zero, one] = self.two.links;
        let entry = Share { mapping, lease: lease().into(), writable };
        self.two.rigs[0].plane.device.links.get_mut(zero).unwrap().shares.insert(share, entry);
        self.two.rigs[1].plane.device.links.get_mut(one).unwrap().shared.insert(share, Shared::CONFIRMED);
    }

    /// What the control threads do.
    pub(super) fn grant(&mut self, wish: Wish) -> Option<Grant> {
        let [zero, one] = self.two.links;
        let share = if wish.writes { WRITABLE } else { 1 };
        self.show(share, wish.writes);
        let grant = self.two.rigs[1].plane.give(one, &wish, share)?;
        self.two.rigs[0].plane.take_grant(zero, grant).unwrap();
        self.grants.push(grant);
        Some(grant)
    }

    fn turns(&mut self) {
        for _ in 0..100 {
            let wishes = self.two.some_turns();
            for wish in wishes {
                let _ = self.grant(wish);
            }
        }
    }

    /// Turns of the requester alone: what completes needs nobody else.
    fn alone(&mut self) -> Vec<(u64, WcStatus)> {
        self.two.rigs[0].statuses()
    }

    fn fields(&self, opcode: Opcode, local: u64, remote: u64, length: u32) -> SendFields {
        SendFields {
            rkey: self.two.rigs[1].key,
            compare_add: 3,
            swap: 9,
            ..self.two.rigs[0].fields(opcode, local, remote, length)
        }
    }

    fn post(&mut self, opcode: Opcode, local: u64, remote: u64, length: u32) {
        let fields = self.fields(opcode, local, remote, length);
        post(&mut self.a, &fields);
    }

    /// Requests of each kind go by the responder, and grants come.
    fn warm(&mut self) {
        for opcode in [Opcode::RDMA_WRITE, Opcode::RDMA_READ].repeat(3) {
            self.post(opcode, 0, 50_000, 8);
            self.turns();
        }
        assert_eq!(self.two.rigs[0].completions().len(), 6);
        assert_eq!(self.grants.len(), 2, "{:?}", self.grants);
    }

    fn used(&self) -> u64 {
        self.page(0).used.0.work.iter().map(|work| work.operations.load(Ordering::Relaxed)).sum()
    }

    /// What the counters of both sides say of requests of this kind, from the requester to the responder.
    fn counted(&mut self, opcode: Opcode) -> [Work; 2] {
        let plane = &mut self.two.rigs[1].plane;
        plane.now += 1_000_000_000;
        plane.turn();
        let pages = self.two.rigs.each_ref().map(|rig| rig.plane.tally.page());
        let place = usize::from(opcode.0);
        assert!(pages[1].sent[place] == Work::default() && pages[0].received[place] == Work::default());
        [pages[0].sent[place], pages[1].received[place]]
    }
}

#[test]
fn the_first_of_a_kind_go_the_long_way_and_the_next_need_nobody() {
    let mut scene = Scene::new();
    scene.warm();
    assert_eq!(scene.used(), 0);
    let pattern: Vec<u8> = (0..60_000u32).map(|i| (i * 7 / 3) as u8).collect();
    scene.two.rigs[0].put(0, &pattern);
    for bytes in [1, 4, 8, 100, 4096, 30_000, 60_000] {
        scene.post(Opcode::RDMA_WRITE, 0, 70_000, bytes);
        assert_eq!(scene.alone(), [(1, WcStatus::SUCCESS)], "{bytes} bytes");
        assert_eq!(scene.two.rigs[1].take(70_000, bytes as usize), pattern[..bytes as usize]);
        scene.post(Opcode::RDMA_READ, 140_000, 70_000, bytes);
        assert_eq!(scene.alone(), [(1, WcStatus::SUCCESS)], "{bytes} bytes");
        assert_eq!(scene.two.rigs[0].take(140_000, bytes as usize), pattern[..bytes as usize]);
    }
    assert_eq!(scene.used(), 14);
    scene.two.rigs[1].put(4096, &5u64.to_ne_bytes());
    for (opcode, before) in [(Opcode::FETCH_AND_ADD, 5u64), (Opcode::CMP_AND_SWP, 8), (Opcode::FETCH_AND_ADD, 8)] {
        scene.post(opcode, 800, 4096, 8);
        assert_eq!(scene.alone(), [(1, WcStatus::SUCCESS)]);
        assert_eq!(scene.two.rigs[0].take(800, 8), before.to_ne_bytes());
    }
    assert_eq!(scene.two.rigs[1].take(4096, 8), 11u64.to_ne_bytes());
    // Three of the READs, and the atomics, are charged as a packet's headers.
    let read = scene.page(0).used.0.read.load(Ordering::Relaxed);
    assert_eq!((scene.used(), read), (17, 94_209 - 13 + 6 * HEADERS.0));
}

#[test]
fn several_elements_and_the_long_way_in_between_keep_their_order() {
    let mut scene = Scene::new();
    scene.warm();
    let two = &scene.two;
    let list = SendFields { sges: 2, sge: two.rigs[0].sge(100, 3), ..scene.fields(Opcode::RDMA_WRITE, 0, 9001, 0) };
    scene.two.rigs[0].put(100, b"abc");
    scene.two.rigs[0].put(300, b"defgh");
    let rest = ringfence_protocol::work::pack_sges(&[scene.two.rigs[0].sge(300, 5)]);
    scene.a.send.push_extended(&SendBase::pack(&list).0, &[rest]);
    assert_eq!(scene.alone(), [(1, WcStatus::SUCCESS)]);
    assert_eq!(scene.two.rigs[1].take(9001, 8), b"abcdefgh");
    // Then one that needs the responder, and others behind it that do not.
    for round in 0..5 {
        scene.b.receive.push(&ReceiveBase::pack(60, 1, scene.two.rigs[1].sge(80_000, 100)).0);
        scene.post(Opcode::SEND, 0, 0, 30);
        for _ in 0..3 {
            scene.post(Opcode::RDMA_WRITE, 0, 9000, 8);
            scene.post(Opcode::FETCH_AND_ADD, 800, 4096, 8);
        }
        scene.turns();
        let statuses: Vec<_> = scene.two.rigs[0].completions().iter().map(|done| done.status).collect();
        assert_eq!(statuses, [WcStatus::SUCCESS; 7], "round {round}");
        assert_eq!(scene.two.rigs[1].completions().len(), 1);
        // With nothing under way it is a grant again.
        let before = scene.used();
        scene.post(Opcode::RDMA_WRITE, 0, 9000, 8);
        assert_eq!(scene.alone(), [(1, WcStatus::SUCCESS)]);
        assert_eq!(scene.used(), before + 1);
    }
    assert_eq!(scene.two.rigs[1].take(4096, 8), 45u64.to_ne_bytes());
}

/// A queue pair that always has something under way would never come to its grants; one that needs the responder now and then
/// must not be held up for them.
#[test]
fn a_queue_that_is_never_empty_comes_to_its_grants() {
    let mut scene = Scene::new();
    scene.warm();
    // What is under way by the responder when a grant comes.
    scene.b.receive.push(&ReceiveBase::pack(60, 1, scene.two.rigs[1].sge(80_000, 100)).0);
    scene.post(Opcode::SEND, 0, 0, 30);
    let before = scene.used();
    for _ in 0..50 {
        scene.post(Opcode::RDMA_WRITE, 0, 9000, 8);
    }
    // The requester claims what it can before the responder answers.
    scene.two.rigs[0].turns();
    scene.turns();
    assert_eq!(scene.two.rigs[0].completions().len(), 51);
    let by_grant = scene.used() - before;
    assert!((10..=24).contains(&by_grant), "{by_grant} of 50");
}

#[test]
fn what_a_grant_does_not_cover_is_refused_by_the_responder() {
    let end = MEMORY as u64;
    for (opcode, at, bytes) in
        [(Opcode::RDMA_WRITE, end - 4, 8), (Opcode::RDMA_READ, end, 1), (Opcode::RDMA_WRITE, u64::MAX - IOVA - 3, 8)]
    {
        let mut scene = Scene::new();
        scene.warm();
        scene.post(opcode, 0, at, bytes);
        scene.turns();
        let statuses: Vec<_> = scene.two.rigs[0].completions().iter().map(|done| done.status).collect();
        assert_eq!(statuses, [WcStatus::REM_ACCESS_ERR]);
        assert!(scene.page(1).slots.iter().all(|slot| slot.holds(0)), "its queue pair is in error: no grant is left");
    }
    let mut scene = Scene::new();
    scene.warm();
    scene.post(Opcode::FETCH_AND_ADD, 0, 4097, 8);
    scene.turns();
    let statuses: Vec<_> = scene.two.rigs[0].completions().iter().map(|done| done.status).collect();
    assert_eq!(statuses, [WcStatus::REM_INV_REQ_ERR]);
}

#[test]
fn whoever_ends_what_was_granted_takes_it_back() {
    type End = fn(&mut Scene);
    let ends: [(&str, End, WcStatus); 5] = [
        (
            "deregistered",
            |scene| {
                let granted = scene.two.rigs[1].granted;
                drop(scene.two.rigs[1].plane.regions.remove(granted));
                scene.two.rigs[1].plane.revoke_region(1);
            },
            WcStatus::REM_ACCESS_ERR,
        ),
        (
            "reset",
            |scene| {
                let b = &scene.b;
                scene.two.rigs[1].modify(b, QpState::RESET, 0, QpAttr::default(), None);
            },
            WcStatus::RETRY_EXC_ERR,
        ),
        (
            "in error",
            |scene| {
                let b = &scene.b;
                scene.two.rigs[1].modify(b, QpState::ERR, 0, QpAttr::default(), None);
            },
            WcStatus::RETRY_EXC_ERR,
        ),
        ("destroyed", |scene| drop(scene.two.rigs[1].plane.remove_qp(scene.b.queue)), WcStatus::RETRY_EXC_ERR),
        (
            "without rights",
            |scene| {
                let b = &scene.b;
                let attr = QpAttr { access: Access::REMOTE_READ, ..QpAttr::default() };
                scene.two.rigs[1].modify(b, QpState::RTS, Mask::ACCESS_FLAGS.0, attr, None);
            },
            WcStatus::REM_ACCESS_ERR,
        ),
    ];
    for (name, end, expected) in ends {
        let mut scene = Scene::new();
        scene.warm();
        scene.two.rigs[1].put(9000, &[7; 8]);
        end(&mut scene);
        assert!(scene.page(1).slots.iter().all(|slot| slot.holds(0)), "{name}");
        assert!(scene.two.rigs[1].plane.take_tickets().is_empty(), "{name}: nobody was busy");
        scene.post(Opcode::RDMA_WRITE, 0, 9000, 8);
        for _ in 0..300 {
            scene.two.rigs[0].plane.now += 10_000_000;
            scene.turns();
        }
        let statuses: Vec<_> = scene.two.rigs[0].completions().iter().map(|done| done.status).collect();
        assert_eq!(statuses, [expected], "{name}");
        assert_eq!(scene.two.rigs[1].take(9000, 8), [7; 8], "{name}");
    }
}

#[test]
fn a_requester_that_is_copying_is_waited_for() {
    let mut scene = Scene::new();
    scene.warm();
    let page = scene.page(0);
    page.used.0.busy.enter();
    scene.two.rigs[1].plane.to_error(0);
    let tickets = scene.two.rigs[1].plane.take_tickets();
    assert_eq!(tickets.len(), 1);
    assert!(!tickets[0].is_over());
    page.used.0.busy.leave();
    assert!(tickets[0].is_over());
    page.used.0.busy.enter();
    assert!(tickets[0].is_over(), "it is about something else");
}

#[test]
fn a_requester_that_is_found_stopped_again_and_again_gets_nothing_for_a_while() {
    let mut scene = Scene::new();
    scene.warm();
    let one = scene.two.links[1];
    let given = |scene: &Scene| scene.page(1).slots.iter().filter(|slot| !slot.holds(0)).count();
    for _ in 0..3 {
        scene.two.rigs[1].plane.strike(one);
    }
    assert_eq!(given(&scene), 2);
    scene.two.rigs[1].plane.strike(one);
    assert_eq!(given(&scene), 0);
    let write = |scene: &mut Scene| {
        for _ in 0..4 {
            scene.post(Opcode::RDMA_WRITE, 0, 9000, 8);
            scene.turns();
            assert_eq!(scene.two.rigs[0].completions().len(), 1);
        }
        given(scene)
    };
    assert_eq!(write(&mut scene), 0);
    scene.two.rigs[1].plane.now += 1_000_000_000;
    assert_eq!(write(&mut scene), 1);
}

#[test]
fn what_cannot_be_granted_now_is_asked_for_again_after_a_while() {
    let mut scene = Scene::new();
    let [_, one] = scene.two.links;
    let mut wishes = Vec::new();
    let write = |scene: &mut Scene, wishes: &mut Vec<Wish>| {
        scene.post(Opcode::RDMA_WRITE, 0, 9000, 8);
        (0..100).for_each(|_| wishes.extend(scene.two.some_turns()));
        assert_eq!(scene.two.rigs[0].completions().len(), 1);
    };
    (0..8).for_each(|_| write(&mut scene, &mut wishes));
    let [wish] = wishes[..] else { panic!("asked for once: {wishes:?}") };
    scene.two.rigs[1].plane.forget_wish(one, &wish);
    (0..8).for_each(|_| write(&mut scene, &mut wishes));
    assert_eq!(wishes, [wish], "at once");
    scene.two.rigs[1].plane.now += 50_000_000;
    (0..8).for_each(|_| write(&mut scene, &mut wishes));
    assert_eq!(wishes, [wish, wish]);
    assert!(scene.grant(wish).is_some());
    scene.post(Opcode::RDMA_WRITE, 0, 9000, 8);
    assert_eq!(scene.alone(), [(1, WcStatus::SUCCESS)]);
}

#[test]
fn a_request_that_was_begun_by_a_grant_is_repeated_whole() {
    // 60,000 bytes at a rate that makes pieces of 4 KiB.
    let policy = Policy { bandwidth: BitRate::new(40_000_000), ..Policy::default() };
    let mut scene = Scene::with(Rig::shaped(&policy, None), Rig::new());
    scene.warm();
    let pattern: Vec<u8> = (0..60_000u32).map(|i| (i * 7 / 3) as u8 | 1).collect();
    scene.two.rigs[0].put(0, &pattern);
    scene.post(Opcode::RDMA_WRITE, 0, 70_000, 60_000);
    while scene.two.rigs[1].take(70_000 + 10_000, 1) == [0] {
        scene.two.rigs[0].plane.now += 10_000;
        scene.two.rigs[0].plane.turn();
    }
    assert_eq!(scene.two.rigs[0].plane.qps[0].as_ref().unwrap().pending[0].device, Way::ByGrant);
    let attr = QpAttr { access: ALL, ..QpAttr::default() };
    let b = &scene.b;
    scene.two.rigs[1].modify(b, QpState::RTS, Mask::ACCESS_FLAGS.0, attr, None);
    for _ in 0..40 {
        scene.turns();
    }
    assert_eq!(scene.two.rigs[0].completions().len(), 1);
    assert_eq!(scene.two.rigs[1].take(70_000, 60_000), pattern);
    assert_eq!(scene.used(), 0);
    // What was done twice counts once.
    assert_eq!(scene.counted(Opcode::RDMA_WRITE), [Work { operations: 4, bytes: 60_024 }; 2]);
    // And the numbers of both sides still agree.
    for _ in 0..2 {
        scene.post(Opcode::FETCH_AND_ADD, 800, 4096, 8);
        scene.turns();
        assert_eq!(scene.two.rigs[0].completions().len(), 1);
    }
}

#[test]
fn grants_that_make_no_sense_are_refused_and_those_too_late_are_of_no_use() {
    let mut scene = Scene::new();
    scene.warm();
    let [zero, _] = scene.two.links;
    let grant = scene.grants[0];
    let plane = &mut scene.two.rigs[0].plane;
    let memory = |share, length| GrantFault::Memory { share, length };
    for (wrong, fault) in [
        (Grant { slot: 1024, ..grant }, GrantFault::Slot(1024)),
        (Grant { slot: u32::MAX, ..grant }, GrantFault::Slot(u32::MAX)),
        (Grant { generation: 0, ..grant }, GrantFault::Generation),
        (Grant { share: 5, ..grant }, memory(5, MEMORY as u64)),
        (Grant { length: 0, ..grant }, memory(WRITABLE, 0)),
        (Grant { length: MEMORY as u64 + 1, ..grant }, memory(WRITABLE, MEMORY as u64 + 1)),
        (Grant { length: u64::MAX, ..grant }, memory(WRITABLE, u64::MAX)),
        (Grant { share: 1, ..grant }, GrantFault::ReadOnly(1)),
    ] {
        assert_eq!(plane.take_grant(zero, wrong), Err(fault), "{wrong:?}");
    }
    // Of queue pairs that are not connected so, any number of them.
    for from in 0..10_000 {
        plane.take_grant(zero, Grant { from, to: 1, ..grant }).unwrap();
    }
    // The same slot twice, under other names, with addresses at the end of all.
    for (key, iova) in [(5, u64::MAX - 3), (6, 0), (grant.key, grant.iova)] {
        plane.take_grant(zero, Grant { key, iova, ..grant }).unwrap();
    }
    scene.post(Opcode::RDMA_WRITE, 0, 9000, 8);
    assert_eq!(scene.alone(), [(1, WcStatus::SUCCESS)]);
    assert_eq!(scene.used(), 1);
    // One that was taken back before it came.
    scene.two.rigs[1].plane.revoke_region(1);
    scene.two.rigs[0].plane.take_grant(zero, grant).unwrap();
    scene.post(Opcode::RDMA_WRITE, 0, 9000, 8);
    assert_eq!(scene.alone(), []);
    scene.turns();
    assert_eq!((scene.two.rigs[0].completions().len(), scene.used()), (1, 1));
}

#[test]
fn a_page_that_is_scribbled_on_harms_nobody() {
    let mut scene = Scene::new();
    scene.warm();
    let mut expected = scene.two.rigs[1].take(0, MEMORY);
    for (round, word) in [0, 1, u64::MAX, scene.grants[0].generation].into_iter().cycle().take(40).enumerate() {
        for slot in &scene.page(1).slots {
            slot.grant(word);
        }
        let data = [round as u8 + 1; 8];
        scene.two.rigs[0].put(0, &data);
        scene.post(Opcode::RDMA_WRITE, 0, 9000, 8);
        scene.turns();
        assert_eq!(scene.alone(), [(1, WcStatus::SUCCESS)], "round {round}");
        expected[9000..9008].copy_from_slice(&data);
        assert!(scene.two.rigs[1].take(0, MEMORY) == expected, "round {round}: something else was written");
    }
    // The requester's own words are claims to the responder.
    let page = scene.page(0);
    for word in [u64::MAX, 1, 2] {
        page.used.0.read.store(word, Ordering::Relaxed);
        page.used.0.busy.enter();
        scene.two.rigs[1].plane.revoke_queue(0);
        assert!(scene.two.rigs[1].plane.take_tickets().len() <= 1);
    }
}

/// `cargo test --release -p ringfence-proxy plane::tests::grants::measure -- --ignored --nocapture`
#[test]
#[ignore = "a measurement"]
fn measure() {
    const BATCH: usize = 32;
    let best = |plane: &mut Plane, qp: &mut RigQp, fields: &SendFields| {
        let time = |plane: &mut Plane, qp: &mut RigQp| {
            (0..BATCH).for_each(|_| post(qp, fields));
            let start = std::time::Instant::now();
            plane.turn();
            start.elapsed().as_nanos() as f64 / BATCH as f64
        };
        let mut times: Vec<f64> = (0..50_000).map(|_| time(plane, qp)).collect();
        times.sort_by(f64::total_cmp);
        times[times.len() / 4]
    };
    for (opcode, bytes) in [
        (Opcode::RDMA_WRITE, 8),
        (Opcode::RDMA_READ, 8),
        (Opcode::FETCH_AND_ADD, 8),
        (Opcode::RDMA_WRITE, 64),
        (Opcode::RDMA_WRITE, 4096),
        (Opcode::RDMA_READ, 4096),
    ] {
        let mut scene = Scene::new();
        scene.warm();
        let fields = SendFields { flags: SendFlags(0), ..scene.fields(opcode, 0, 8192, bytes) };
        let by_grant = best(&mut scene.two.rigs[0].plane, &mut scene.a, &fields);
        assert!(scene.used() >= 1_600_000);
        if opcode != Opcode::RDMA_WRITE {
            // The road is not inlined for it within a container.
            println!("{opcode:?}, {bytes} bytes: {by_grant:.1} ns by a grant");
            continue;
        }
        let mut rig = Rig::new();
        let (mut a, _b) = rig.pair();
        let fields = SendFields { flags: SendFlags(0), ..rig.fields(opcode, 0, 8192, bytes) };
        let inside = best(&mut rig.plane, &mut a, &fields);
        println!("{opcode:?}, {bytes} bytes: {by_grant:.1} ns by a grant, {inside:.1} ns within the container");
    }
}
