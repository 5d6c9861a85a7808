//! Memory that the container shares among its processes itself, and takes away when it likes.

use super::*;
use crate::control::adopted::RegionFile;
use crate::control::lent::Lent;
use crate::device::soft::bounce::{self, Bounce};
use crate::device::soft::wire::LONGEST;
use crate::fabric::neighbours::SharedRun;
use crate::shared::{ForeignFile, Holes, Run, RunFile};
use proptest::prelude::*;
use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, ftruncate, memfd_create};
use rustix::mm::ProtFlags;
use std::collections::VecDeque;

const FOREIGN: u64 = 0x800_0000;

/// A file of the container's, registered.
struct Foreign {
    file: ForeignFile,
    key: u32,
}

impl Foreign {
    /// All of it are pages.
    fn in_plane_of(rig: &mut Rig) -> Self {
        let fd = memfd_create("foreign", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&fd, MEMORY as u64).unwrap();
        fallocate(&fd, FallocateFlags::empty(), 0, MEMORY as u64).unwrap();
        let file = ForeignFile::adopt(fd).unwrap();
        let holes = Holes::new().unwrap();
        let run = Run { file: RunFile::Foreign(&file, &holes), offset: 0, bytes: MEMORY };
        let mapping = Mapping::of_runs(&[run], ProtFlags::READ | ProtFlags::WRITE, true).unwrap();
        let region = MemoryRegion::new(Arc::new(mapping), 0, MEMORY as u64, FOREIGN, PD, ALL, 2).unwrap();
        let key = rig.entrance.insert(region, crate::control::session::random).unwrap().key;
        Self { file, key }
    }

    fn sge(&self, offset: u64, length: u32) -> Sge {
        Sge { addr: FOREIGN + offset, length, lkey: self.key }
    }

    fn put(&self, offset: u64, bytes: &[u8]) {
        rustix::io::pwrite(&self.file, bytes, offset).unwrap();
    }

    fn take(&self, offset: u64, bytes: usize) -> Vec<u8> {
        let mut buffer = vec![0; bytes];
        rustix::io::pread(&self.file, &mut buffer[..], offset).unwrap();
        buffer
    }

    /// Takes its pages from this one on away, one way or the other.
    fn shrink(&self, pages: usize, punch: bool) {
        let from = (pages * PAGE) as u64;
        if punch {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            fallocate(&self.file, flags, from, MEMORY as u64 - from).unwrap();
        } else {
            ftruncate(&self.file, from).unwrap();
        }
    }
}

/// From `from` to `to` at the other end, each with an offset.
fn fields(opcode: Opcode, from: (&Foreign, u64), to: (&Foreign, u64), length: u32) -> SendFields {
    SendFields {
        wr_id: 1,
        opcode,
        flags: SendFlags::SIGNALED,
        sges: 1,
        remote_addr: FOREIGN + to.1,
        rkey: to.0.key,
        sge: from.0.sge(from.1, length),
        ..SendFields::default()
    }
}

#[test]
fn every_operation_works_on_it_within_a_proxy() {
    let mut rig = Rig::new();
    let (mut a, mut b) = rig.pair();
    let memory = Foreign::in_plane_of(&mut rig);
    let pattern: Vec<u8> = (0..50_000u32).map(|i| (i * 5 / 3) as u8).collect();
    memory.put(0, &pattern);
    memory.put(160_000, &7u64.to_ne_bytes());
    // A small one goes the inlined road.
    post(&mut a, &fields(Opcode::RDMA_WRITE, (&memory, 1), (&memory, 60_001), 5));
    post(&mut a, &fields(Opcode::RDMA_WRITE, (&memory, 0), (&memory, 70_000), 50_000));
    b.receive.push(&ReceiveBase::pack(9, 1, memory.sge(130_000, 20_000)).0);
    post(&mut a, &fields(Opcode::SEND, (&memory, 10), (&memory, 0), 20_000));
    post(&mut a, &fields(Opcode::RDMA_READ, (&memory, 200_000), (&memory, 3), 40_000));
    let add = fields(Opcode::FETCH_AND_ADD, (&memory, 170_000), (&memory, 160_000), 8);
    post(&mut a, &SendFields { compare_add: 5, ..add });
    let statuses = rig.statuses();
    assert!(statuses.len() == 6 && statuses.iter().all(|(_, status)| *status == WcStatus::SUCCESS), "{statuses:?}");
    assert_eq!(memory.take(60_001, 5), pattern[1..6]);
    assert!(memory.take(70_000, 50_000) == pattern);
    assert!(memory.take(130_000, 20_000) == pattern[10..20_010]);
    assert!(memory.take(200_000, 40_000) == pattern[3..40_003]);
    assert_eq!(
        (memory.take(170_000, 8), memory.take(160_000, 8)),
        (7u64.to_ne_bytes().into(), 12u64.to_ne_bytes().into())
    );
}

/// What both ends of a queue pair hear of a request of `length` bytes from page `from` to page `to` when the pages from `keep` on are gone.
fn without(opcode: Opcode, length: u32, from: u64, to: u64, keep: usize) -> (Vec<(u64, WcStatus)>, Vec<EventType>) {
    let mut seen = Vec::new();
    for punch in [false, true] {
        let mut rig = Rig::new();
        let (mut a, mut b) = rig.pair();
        let memory = Foreign::in_plane_of(&mut rig);
        let page = |number| number * PAGE as u64;
        b.receive.push(&ReceiveBase::pack(9, 1, memory.sge(page(to), 2 * length)).0);
        memory.shrink(keep, punch);
        post(&mut a, &fields(opcode, (&memory, page(from)), (&memory, page(to)), length));
        seen.push((rig.statuses(), rig.events.clone()));
        assert!(memory.file.bytes_now().unwrap() <= MEMORY as u64);
    }
    let last = seen.pop().unwrap();
    assert!(seen.iter().all(|other| *other == last), "shrinking and punching differ: {seen:?}, {last:?}");
    last
}

#[test]
fn memory_that_is_gone_is_an_error_of_whose_it_is() {
    let ends = |opcode, length, from, to| {
        let (statuses, mut events) = without(opcode, length, from, to, 20);
        events.retain(|event| *event != EventType::COMM_EST);
        (statuses.into_iter().filter(|(_, status)| *status != WcStatus::WR_FLUSH_ERR).collect::<Vec<_>>(), events)
    };
    use EventType as E;
    use WcStatus as S;
    for length in [8, 60_000] {
        // The requester's own.
        for opcode in [Opcode::RDMA_WRITE, Opcode::SEND] {
            assert_eq!(
                ends(opcode, length, 30, 0),
                (vec![(1, S::LOC_PROT_ERR)], vec![]),
                "{opcode:?} of {length} bytes"
            );
        }
        assert_eq!(ends(Opcode::RDMA_READ, length, 30, 0).0[0], (1, S::LOC_PROT_ERR));
        // The responder's.
        assert_eq!(ends(Opcode::RDMA_WRITE, length, 0, 30), (vec![(1, S::REM_ACCESS_ERR)], vec![E::QP_ACCESS_ERR]));
        assert_eq!(ends(Opcode::SEND, length, 0, 30).0, [(9, S::LOC_PROT_ERR), (1, S::REM_OP_ERR)]);
        assert_eq!(ends(Opcode::RDMA_READ, length, 0, 30), (vec![(1, S::REM_ACCESS_ERR)], vec![E::QP_ACCESS_ERR]));
    }
    assert_eq!(ends(Opcode::FETCH_AND_ADD, 8, 0, 30), (vec![(1, S::REM_ACCESS_ERR)], vec![E::QP_ACCESS_ERR]));
    assert_eq!(ends(Opcode::CMP_AND_SWP, 8, 30, 0).0, [(1, S::LOC_PROT_ERR)]);
}

/// What the other end calls the buffer of [`a_bounce`].
pub(super) const BOUNCE: u32 = 78;

/// A buffer for what a neighbour must not map, and the neighbour's mapping of it.
pub(super) fn a_bounce() -> (Bounce, Share) {
    let (file, _) = Lent::create("bounce", bounce::BYTES, Vec::new(), closer(), None, 0).unwrap();
    let (ours, theirs) = (Mapping::of(&file).unwrap(), Arc::new(Mapping::of(&file).unwrap()));
    let lease = || Budget::new(65_530).take_own(Amount { mappings: 1, bytes: bounce::BYTES as u64 }).unwrap();
    let run = SharedRun { file: Arc::new(RegionFile::Lent(file)), offset: 0, bytes: bounce::BYTES as u64 };
    (Bounce::new(BOUNCE, run, ours, lease()), Share { mapping: theirs, lease: lease().into(), writable: false })
}

impl TwoRigs {
    /// What the control thread does.
    pub(super) fn bounce(&mut self, from: usize) {
        let (own, other) = (self.links[from], self.links[1 - from]);
        let link = self.rigs[from].plane.device.links.get_mut(own).unwrap();
        assert!(link.bounce.is_none(), "it is asked for once");
        let (bounce, share) = a_bounce();
        link.bounce = Some(bounce);
        link.shared.insert(BOUNCE, Shared::CONFIRMED);
        self.rigs[1 - from].plane.device.links.get_mut(other).unwrap().shares.insert(BOUNCE, share);
        self.rigs[from].plane.share_arrived(own);
    }
}

#[test]
fn a_neighbour_gets_its_bytes_and_never_the_memory() {
    let (mut two, mut a, mut b) = TwoRigs::new();
    let [left, right] = &mut two.rigs;
    let (near, far) = (Foreign::in_plane_of(left), Foreign::in_plane_of(right));
    let length = 100_000u32;
    // More than the buffer holds, and as much as the rig's completion queue does.
    for round in 0..21u8 {
        let pattern: Vec<u8> = (0..length).map(|i| (i * 5 / 3) as u8 ^ round).collect();
        near.put(0, &pattern);
        far.put(0, &pattern[1..]);
        b.receive.push(&ReceiveBase::pack(9, 1, far.sge(110_000, 2000)).0);
        post(&mut a, &fields(Opcode::RDMA_WRITE, (&near, 0), (&far, 120_001), length));
        post(&mut a, &fields(Opcode::SEND, (&near, 20), (&far, 0), 2000));
        post(&mut a, &fields(Opcode::RDMA_READ, (&near, 120_000), (&far, 0), length - 1));
        two.turns();
        assert_eq!(two.rigs[0].statuses(), [(1, WcStatus::SUCCESS); 3], "round {round}");
        assert_eq!(two.rigs[1].statuses(), [(9, WcStatus::SUCCESS)]);
        assert!(far.take(120_001, length as usize) == pattern);
        assert!(far.take(110_000, 2000) == pattern[20..2020]);
        assert!(near.take(120_000, length as usize - 1) == pattern[1..]);
    }
    for index in 0..2 {
        let link = two.rigs[index].plane.device.links.get(two.links[index]).unwrap();
        assert_eq!((link.shared.len(), link.outstanding), (1, 0), "only the buffer is shared");
    }
}

#[test]
fn a_request_of_own_and_foreign_memory_goes_in_one_piece() {
    let (mut two, mut a, _b) = TwoRigs::new();
    let near = Foreign::in_plane_of(&mut two.rigs[0]);
    near.put(5, b"foreign");
    two.rigs[0].put(9, b"own ");
    let list = [two.rigs[0].sge(9, 4), near.sge(5, 7)];
    let write =
        SendFields { sges: 2, sge: list[0], rkey: two.rigs[1].key, ..two.rigs[0].fields(Opcode::RDMA_WRITE, 0, 64, 4) };
    a.send.push_extended(&SendBase::pack(&write).0, &[ringfence_protocol::work::pack_sges(&list[1..])]);
    two.turns();
    assert_eq!(two.rigs[0].statuses(), [(1, WcStatus::SUCCESS)]);
    assert_eq!(two.rigs[1].take(64, 11), b"own foreign");
}

#[test]
fn memory_that_is_gone_is_told_across_proxies() {
    let case = |opcode, from: u64, to: u64| {
        let (mut two, mut a, _b) = TwoRigs::new();
        let [left, right] = &mut two.rigs;
        let (near, far) = (Foreign::in_plane_of(left), Foreign::in_plane_of(right));
        near.shrink(5, false);
        far.shrink(5, true);
        let page = |number| number * PAGE as u64;
        post(&mut a, &fields(opcode, (&near, page(from)), (&far, page(to)), 8));
        two.turns();
        let status = two.rigs[0].statuses()[0].1;
        (status, two.rigs[1].events.contains(&EventType::QP_ACCESS_ERR))
    };
    assert_eq!(case(Opcode::RDMA_WRITE, 6, 0), (WcStatus::LOC_PROT_ERR, false));
    assert_eq!(case(Opcode::RDMA_WRITE, 0, 6), (WcStatus::REM_ACCESS_ERR, true));
    assert_eq!(case(Opcode::RDMA_READ, 6, 0), (WcStatus::LOC_PROT_ERR, false));
    assert_eq!(case(Opcode::RDMA_READ, 0, 6), (WcStatus::REM_ACCESS_ERR, true));
    assert_eq!(case(Opcode::FETCH_AND_ADD, 0, 6), (WcStatus::REM_ACCESS_ERR, true));
}

#[test]
fn a_neighbour_that_does_not_read_makes_nothing_but_its_own_requests_wait() {
    let (mut two, mut a, _b) = TwoRigs::new();
    let near = Foreign::in_plane_of(&mut two.rigs[0]);
    two.rigs[0].plane.qps[0].as_mut().unwrap().attr.timeout = 0;
    let rkey = two.rigs[1].key;
    let write = |wr_id| SendFields {
        wr_id,
        rkey,
        remote_addr: IOVA,
        ..fields(Opcode::RDMA_WRITE, (&near, 0), (&near, 0), 3 * LONGEST)
    };
    post(&mut a, &write(0));
    two.turns();
    for wr_id in 1..31 {
        post(&mut a, &write(wr_id));
    }
    for _ in 0..1000 {
        two.rigs[0].plane.now += 100_000;
        two.rigs[0].plane.activate(a.queue);
        two.rigs[0].plane.turn();
    }
    // As many as the buffer holds are under way, but for one piece's room that is left to what the neighbour READs, and what is left at
    // the end of the buffer.
    let link = two.rigs[0].plane.device.links.get(two.links[0]).unwrap();
    assert_eq!(link.outstanding as usize, bounce::BYTES / LONGEST as usize - 2);
    assert!(link.bounce.as_ref().unwrap().room(LONGEST, 0).is_some());
    for _ in 0..50 {
        two.turns();
    }
    assert_eq!(two.rigs[0].statuses(), (0..31).map(|id| (id, WcStatus::SUCCESS)).collect::<Vec<_>>());
}

proptest! {
    #[test]
    fn places_in_use_never_overlap(steps in prop::collection::vec((1u32..=LONGEST, 0usize..4), 1..200)) {
        let (file, _) = Lent::create("bounce", bounce::BYTES, Vec::new(), closer(), None, 0).unwrap();
        let mapping = Mapping::of(&file).unwrap();
        let lease = Budget::new(65_530).take_own(Amount { mappings: 1, bytes: 1 }).unwrap();
        let run = SharedRun { file: Arc::new(RegionFile::Lent(file)), offset: 0, bytes: bounce::BYTES as u64 };
        let mut buffer = Bounce::new(1, run, mapping, lease);
        // Positions wrap around.
        let mut message = u32::MAX - 100;
        let mut used: VecDeque<(u32, std::ops::Range<u64>)> = VecDeque::new();
        for (bytes, read) in steps {
            if let Some(place) = buffer.room(bytes, 0) {
                let range = place.offset()..place.offset() + u64::from(bytes);
                prop_assert!(range.end <= bounce::BYTES as u64);
                prop_assert!(used.iter().all(|(_, other)| other.end <= range.start || range.end <= other.start));
                buffer.hold(place, message);
                used.push_back((message, range));
                message = message.wrapping_add(2);
            } else {
                let held: u64 = used.iter().map(|(_, range)| range.end - range.start).sum();
                prop_assert!(held + 2 * u64::from(LONGEST) > bounce::BYTES as u64, "{held} bytes fill it");
            }
            for _ in 0..read {
                if let Some((message, _)) = used.pop_front() {
                    buffer.release(message.wrapping_add(1));
                }
            }
        }
    }
}
