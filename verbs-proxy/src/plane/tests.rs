//! The data plane driven by hand: a rig plays the container's library on the same rings.

// Of the rig, fuzzers do not need everything.
#![cfg_attr(not(test), allow(dead_code, unused_imports))]

mod foreign;
pub(crate) mod fuzzing;
#[cfg(test)]
mod grants;
mod keys;
mod links;
#[cfg(test)]
mod out_of_step;
mod shares;
mod speed;
#[cfg(test)]
mod ways;

use super::CqEntry;
use super::bell::{Bell, Foreign, Ringer};
use super::cq::Cq;
use super::qp::{Caps, NewQp, Owner};
use super::shaping::Shaping;
use crate::closer::Closer;
use crate::device::Device;
use crate::device::soft::Destination;
use crate::device::soft::grants::giving::Wish;
use crate::device::soft::link::{BYTES, End, Link, LinkFault, Share};
use crate::device::soft::links::LinkId;
use crate::device::soft::modelled::ModelledLink;
use crate::device::soft::qp::Peer;
use crate::device::soft::{Notice, Plane, Soft, Task};
use crate::fabric::budget::{Amount, Budget};
use crate::fabric::clock::WireClock;
use crate::memory::{Entrance, Granted, MemoryRegion, PdId, RegionTable};
use crate::shared::{Mapping, PAGE, SealedFile};
use crate::stats::Counters;
use ringfence_protocol::completion::Completion;
use ringfence_protocol::control::{ModifyQp, QpAttr};
use ringfence_protocol::layout::{RINGS_OFFSET, cq_bytes, qp_bytes};
use ringfence_protocol::ring::{Consumer, Producer, SLOT_BYTES};
use ringfence_protocol::verbs::{
    Access, EventType, Opcode, QpAttrMask as Mask, QpState, SendFlags, WcOpcode, WcStatus,
};
use ringfence_protocol::work::{ReceiveBase, SendBase, SendFields, Sge};
use ringfence_sched::{BitRate, Class, OpRate, Policy};
use std::sync::Arc;

const PD: PdId = PdId(1);
const SLOTS: u32 = 64;
const MEMORY: usize = 64 * PAGE;
const IOVA: u64 = 0x10_0000;
const ALL: Access = Access(15);
const BULK: Policy = Policy { bandwidth: None, fetching: None, ops: None, weight: None, class: Class::Bulk };

struct RigQp {
    queue: u32,
    number: u32,
    send: Producer<'static>,
    receive: Producer<'static>,
    _mapping: Arc<Mapping>,
}

/// One container: a plane, one CQ and one region of memory.
struct Rig<D: Device = Soft> {
    plane: super::Plane<D>,
    completions: Consumer<'static>,
    _cq: Arc<Mapping>,
    memory: Arc<Mapping>,
    file: SealedFile,
    entrance: Entrance,
    granted: Granted,
    key: u32,
    events: Vec<EventType>,
}

impl Rig {
    fn new() -> Self {
        Self::shaped(&Policy::default(), None)
    }

    fn shaped(policy: &Policy, link: Option<(WireClock, BitRate)>) -> Self {
        Self::on(policy, Soft::new(link.map(|(clock, rate)| ModelledLink::new(clock, rate))))
    }

    fn pair(&mut self) -> (RigQp, RigQp) {
        let (a, b) = (self.qp(0, 100), self.qp(1, 200));
        self.ready(&a, b.number, Destination::Own);
        self.ready(&b, a.number, Destination::Own);
        (a, b)
    }
}

impl<D: Device> Rig<D> {
    fn on(policy: &Policy, device: D) -> Self {
        let doorbells = Arc::new(Mapping::of(&SealedFile::create("bells", PAGE).unwrap()).unwrap()).header(0);
        let (regions, mut entrance) = RegionTable::alone(64);
        let tally = Counters::private().unwrap().tally;
        let mut plane = super::Plane::new(doorbells, regions, policy, tally, device, 0);
        let cq = Arc::new(Mapping::of(&SealedFile::create("cq", cq_bytes(SLOTS)).unwrap()).unwrap());
        let owner = Owner { connection: 1, context: 1 };
        plane.cqs.push(Some(Box::new(CqEntry { cq: Cq::new(Arc::clone(&cq), SLOTS, None, 7), owner })));
        let file = SealedFile::create("memory", MEMORY).unwrap();
        let memory = Arc::new(Mapping::of(&file).unwrap());
        let region = MemoryRegion::new(Arc::clone(&memory), 0, MEMORY as u64, IOVA, PD, ALL, 1).unwrap();
        let granted = entrance.insert(region, super::super::control::session::random).unwrap();
        let completions = Consumer::new(crate::shared::ring_slots(&cq, RINGS_OFFSET, SLOTS), 0);
        Self { plane, completions, _cq: cq, memory, file, entrance, granted, key: granted.key, events: Vec::new() }
    }

    fn qp(&mut self, queue: u32, number: u32) -> RigQp {
        let bytes = qp_bytes(SLOTS, SLOTS);
        let mapping = Arc::new(Mapping::of(&SealedFile::create("qp", bytes).unwrap()).unwrap());
        let caps = Caps { max_send_wr: 32, max_recv_wr: 32, max_send_sge: 4, max_recv_sge: 4, max_inline: 64 };
        let new = NewQp {
            number,
            queue,
            pd: PD,
            cookie: queue,
            event_cookie: u64::from(number),
            owner: Owner { connection: 1, context: 1 },
            send_cq: 0,
            recv_cq: 0,
            sq_sig_all: false,
            caps,
            send_slots: SLOTS,
            receive_slots: SLOTS,
        };
        self.plane.add_qp(&new, Arc::clone(&mapping));
        let receive_at = RINGS_OFFSET + SLOTS as usize * SLOT_BYTES;
        RigQp {
            queue,
            number,
            send: Producer::new(crate::shared::ring_slots(&mapping, RINGS_OFFSET, SLOTS), 0),
            receive: Producer::new(crate::shared::ring_slots(&mapping, receive_at, SLOTS), 0),
            _mapping: mapping,
        }
    }

    fn modify(&mut self, qp: &RigQp, state: QpState, mask: u32, attr: QpAttr, to: Option<D::Destination>) {
        let attr = QpAttr { mask: mask | Mask::STATE.0, state, ..attr };
        let request = ModifyQp {
            send_position: qp.send.position(),
            receive_position: qp.receive.position(),
            attr,
            ..ModifyQp::default()
        };
        self.plane.modify_qp(qp.queue, &request, to).unwrap();
    }

    fn ready(&mut self, qp: &RigQp, dest_qp_num: u32, to: D::Destination) {
        let init = QpAttr { port: 1, access: ALL, ..QpAttr::default() };
        self.modify(qp, QpState::INIT, Mask::PKEY_INDEX.0 | Mask::PORT.0 | Mask::ACCESS_FLAGS.0, init, None);
        let rtr = QpAttr { path_mtu: 5, dest_qp_num, max_dest_rd_atomic: 4, min_rnr_timer: 1, ..QpAttr::default() };
        let mask = Mask::AV.0 | Mask::PATH_MTU.0 | Mask::DEST_QPN.0 | Mask::RQ_PSN.0 | Mask::MAX_DEST_RD_ATOMIC.0;
        self.modify(qp, QpState::RTR, mask | Mask::MIN_RNR_TIMER.0, rtr, Some(to));
        let rts = QpAttr { timeout: 14, retry_cnt: 1, rnr_retry: 1, max_rd_atomic: 4, ..QpAttr::default() };
        let mask = Mask::TIMEOUT.0 | Mask::RETRY_CNT.0 | Mask::RNR_RETRY.0 | Mask::SQ_PSN.0 | Mask::MAX_QP_RD_ATOMIC.0;
        self.modify(qp, QpState::RTS, mask, rts, None);
    }

    fn sge(&self, offset: u64, length: u32) -> Sge {
        Sge { addr: IOVA + offset, length, lkey: self.key }
    }

    fn fields(&self, opcode: Opcode, local: u64, remote: u64, length: u32) -> SendFields {
        SendFields {
            wr_id: 1,
            opcode,
            flags: SendFlags::SIGNALED,
            sges: 1,
            remote_addr: IOVA + remote,
            rkey: self.key,
            sge: self.sge(local, length),
            ..SendFields::default()
        }
    }

    fn turns(&mut self) {
        for _ in 0..50 {
            self.plane.now += 100_000;
            self.plane.turn();
            for notice in self.plane.take_notices() {
                if let super::Notice::Event { event, .. } = notice {
                    self.events.push(event);
                }
            }
        }
    }

    fn completions(&mut self) -> Vec<Completion> {
        let mut list = Vec::new();
        while let Some(words) = self.completions.peek() {
            list.push(Completion::unpack(&words));
            self.completions.advance(1);
        }
        list
    }

    fn statuses(&mut self) -> Vec<(u64, WcStatus)> {
        self.turns();
        self.completions().iter().map(|completion| (completion.wr_id, completion.status)).collect()
    }

    fn put(&self, offset: u64, bytes: &[u8]) {
        rustix::io::pwrite(&self.file, bytes, offset).unwrap();
    }

    fn take(&self, offset: u64, bytes: usize) -> Vec<u8> {
        let mut buffer = vec![0; bytes];
        rustix::io::pread(&self.file, &mut buffer[..], offset).unwrap();
        buffer
    }
}

fn post(qp: &mut RigQp, fields: &SendFields) {
    qp.send.push(&SendBase::pack(fields).0);
}

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

/// Two planes and a link between them; shares are granted at once.
struct TwoRigs {
    rigs: [Rig; 2],
    links: [LinkId; 2],
}

/// A link that is open, with nobody at its bell.
fn link(own: u16, port: u16, end: End, mapping: &Arc<Mapping>) -> Link {
    let closer = Closer::start("test", 16).unwrap();
    let (bell, theirs) = Bell::new(&closer).unwrap();
    let wake = Ringer::adopt(Foreign::new(theirs, &closer)).unwrap();
    Link::new(own, port, end, Arc::clone(mapping), Some(wake), bell)
}

impl TwoRigs {
    fn new() -> (Self, RigQp, RigQp) {
        Self::with(Rig::new())
    }

    fn with(rig: Rig) -> (Self, RigQp, RigQp) {
        Self::with_both(rig, Rig::new())
    }

    fn with_both(rig: Rig, other: Rig) -> (Self, RigQp, RigQp) {
        let mapping = Arc::new(Mapping::of(&SealedFile::create("link", BYTES).unwrap()).unwrap());
        let mut rigs = [rig, other];
        let mut ids = Vec::new();
        for (index, end) in [End::Initiator, End::Acceptor].into_iter().enumerate() {
            let port = 2 - index as u16;
            ids.push(rigs[index].plane.add_link(link(3 - port, port, end, &mapping)));
        }
        let (a, b) = (rigs[0].qp(0, 100), rigs[1].qp(0, 200));
        rigs[0].ready(&a, 200, Destination::Port(2));
        rigs[1].ready(&b, 100, Destination::Port(1));
        (Self { rigs, links: ids.try_into().unwrap() }, a, b)
    }

    fn turns(&mut self) {
        for _ in 0..100 {
            self.some_turns();
        }
    }

    /// One of each; what may be granted.
    fn some_turns(&mut self) -> Vec<Wish> {
        let mut wishes = Vec::new();
        for index in 0..2 {
            self.rigs[index].plane.now += 10_000;
            self.rigs[index].plane.turn();
            wishes.extend(self.hear(index));
        }
        wishes
    }

    /// What a control thread does when it hears from its worker, but for what may be granted.
    fn hear(&mut self, index: usize) -> Vec<Wish> {
        let mut wishes = Vec::new();
        let notices: Vec<Notice> = self.rigs[index].plane.take_notices().collect();
        for notice in notices {
            match notice {
                Notice::Event { event, .. } => self.rigs[index].events.push(event),
                Notice::Device(Task::Share { .. }) => self.share(index),
                Notice::Device(Task::Bounce { .. }) => self.bounce(index),
                Notice::Device(Task::Grant { wish, .. }) => wishes.push(wish),
                Notice::Device(Task::Fault { fault, .. }) => panic!("{fault}"),
            }
        }
        wishes
    }

    fn share(&mut self, from: usize) {
        let mapping = Arc::clone(&self.rigs[from].memory);
        let lease = Budget::new(65_530).take_own(Amount { mappings: 1, bytes: MEMORY as u64 }).unwrap();
        let (own, other) = (self.links[from], self.links[1 - from]);
        self.rigs[1 - from]
            .plane
            .device
            .links
            .get_mut(other)
            .unwrap()
            .shares
            .insert(1, Share { mapping, lease, writable: false });
        self.rigs[1 - from].plane.share_arrived(other);
        self.rigs[from].plane.device.links.get_mut(own).unwrap().shared.insert(1, true);
        self.rigs[from].plane.share_arrived(own);
    }
}

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
