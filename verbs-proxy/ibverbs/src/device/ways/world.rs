//! A container with two queue pairs on a card, and what its control thread would do for it.

// UNSAFETY: rings at addresses of a mapping that the world keeps, and completions that the card's interface begins as zeros.
#![allow(unsafe_code)]

use super::super::{Ibverbs, Plane, drain, is_to_stop, stopped};
use super::card::{Fake, FakeQp};
use super::{Asked, Change, Step};
use crate::attributes::{self, Place};
use crate::card::{CardQp, Cq, Mr, Pd};
use crate::device::{Made, Task};
use ringfence_protocol::completion::Completion;
use ringfence_protocol::control::{ModifyQp, QpAttr};
use ringfence_protocol::keys::KeyWord;
use ringfence_protocol::layout::{CqHeader, RINGS_OFFSET, cq_bytes, qp_bytes};
use ringfence_protocol::ring::{Consumer, Producer, SLOT_BYTES, Slot};
use ringfence_protocol::verbs::{Access, QpAttrMask as Mask, QpState, SendFlags, WcOpcode, WcStatus};
use ringfence_protocol::work::{ReceiveBase, SendBase, SendFields, Sge, pack_sges};
use ringfence_proxy::device::Device;
use ringfence_proxy::launch::FIRST_PORT;
use ringfence_proxy::launch::counters::{FILE, Page};
use ringfence_proxy::memory::{Entrance, Granted, MemoryRegion, PdId, RegionTable, places};
use ringfence_proxy::plane::cq::CqIndex;
use ringfence_proxy::plane::qp::{Caps, NewQp, Owner};
use ringfence_proxy::plane::{CqEntry, Notice};
use ringfence_proxy::shared::{HeldSlice, Mapping, PAGE, SealedFile};
use ringfence_proxy::stats::Counters;
use ringfence_sched::Policy;
use rustix::io::Errno;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use tempfile::TempDir;

const PD: PdId = PdId(1);
const SLOTS: u32 = 256;
const IOVA: u64 = 0x10_0000;
const ALL: Access = Access(15);
const MEMORY: usize = 32 * PAGE;
const CAPS: Caps = Caps { max_send_wr: 64, max_recv_wr: 32, max_send_sge: 4, max_recv_sge: 4, max_inline: 64 };
/// Requests that a library would let be under way.
const MOST: usize = CAPS.max_send_wr as usize;

/// What is due to a queue pair's application.
#[derive(Debug, Default)]
struct Ledger {
    /// Identifiers and whether they are signaled, oldest first.
    sends: VecDeque<(u64, bool)>,
    receives: VecDeque<u64>,
}

impl Ledger {
    /// The completion is one that is due, and none before it was left out.
    fn settle(&mut self, completion: &Completion) {
        let wr_id = completion.wr_id;
        if completion.opcode.0 & WcOpcode::RECV.0 != 0 {
            return assert_eq!(self.receives.pop_front(), Some(wr_id), "a receive out of order: {completion:?}");
        }
        loop {
            let Some((due, signaled)) = self.sends.pop_front() else { panic!("{completion:?} is not due") };
            if due == wr_id {
                let said = signaled || completion.status != WcStatus::SUCCESS;
                return assert!(said, "an unsignaled request has completed: {completion:?}");
            }
            assert!(!signaled, "the request {due} has not completed, but {completion:?}");
        }
    }
}

struct End {
    number: u32,
    card: Arc<CardQp>,
    fake: FakeQp,
    send: Producer<'static>,
    receive: Producer<'static>,
    ledger: Ledger,
    news: Vec<String>,
}

pub(super) struct World {
    plane: Plane,
    ends: Vec<End>,
    entrance: Entrance,
    granted: Option<Granted>,
    key: u32,
    keys: u32,
    words: HeldSlice<KeyWord>,
    next_id: u64,
    memory: Arc<Mapping>,
    pd: Arc<Pd>,
    completions: Consumer<'static>,
    completions_of: Arc<Mapping>,
    _kept: Vec<Arc<Mapping>>,
    events: Vec<String>,
    /// Where it counts.
    counted: TempDir,
    /// Last: what was made in it has it.
    card: Fake,
}

fn mapping(bytes: usize) -> Arc<Mapping> {
    Arc::new(Mapping::of(&SealedFile::create("ways", bytes).unwrap()).unwrap())
}

fn slots(mapping: &Arc<Mapping>, offset: usize) -> &'static [Slot] {
    // SAFETY: within the mapping, which the world keeps for as long as it lasts; slots are atomics.
    unsafe { std::slice::from_raw_parts(mapping.base().add(offset).cast::<Slot>().as_ptr(), SLOTS as usize) }
}

impl World {
    pub(super) fn new(policy: &Policy) -> Self {
        let card = Fake::new();
        let (pd, cq) = (Pd::new(&card.card).unwrap(), Cq::new(&card.card, 8192, 0).unwrap());
        let made = Made::new(Mutex::default());
        let device = Ibverbs::new(Arc::clone(&card.card), Arc::clone(&made)).unwrap();
        let words = places(64) as usize;
        let keys = mapping(words * 8);
        let (regions, entrance) = RegionTable::new(keys.headers(0, words));
        let counted = tempfile::tempdir().unwrap();
        let tally = Counters::create(counted.path()).unwrap().tally;
        let mut plane = Plane::new(mapping(PAGE).header(0), regions, policy, tally, device, 0);
        let completions = mapping(cq_bytes(SLOTS));
        let owner = Owner { connection: 1, context: 1 };
        let entry =
            CqEntry { cq: ringfence_proxy::plane::cq::Cq::new(Arc::clone(&completions), SLOTS, None, 7), owner };
        plane.cqs.push(Some(Box::new(entry)));
        let (mut kept, mut ends) = (Vec::new(), Vec::new());
        for queue in 0..2 {
            let qp = CardQp::new(&pd, &cq, &CAPS).unwrap();
            made.lock().unwrap().insert(qp.number, Arc::clone(&qp));
            let ring = mapping(qp_bytes(SLOTS, SLOTS));
            let new = NewQp {
                number: qp.number,
                queue,
                pd: PD,
                cookie: queue,
                event_cookie: 0,
                owner,
                send_cq: CqIndex(0),
                recv_cq: CqIndex(0),
                sq_sig_all: false,
                caps: CAPS,
                send_slots: SLOTS,
                receive_slots: SLOTS,
            };
            plane.add_qp(&new, Arc::clone(&ring));
            ends.push(End {
                number: qp.number,
                fake: card.of(&qp),
                card: qp,
                send: Producer::new(slots(&ring, RINGS_OFFSET), 0),
                receive: Producer::new(slots(&ring, RINGS_OFFSET + SLOTS as usize * SLOT_BYTES), 0),
                ledger: Ledger::default(),
                news: Vec::new(),
            });
            kept.push(ring);
        }
        let mut world = Self {
            plane,
            ends,
            entrance,
            granted: None,
            key: 0,
            keys: 0,
            words: keys.headers(0, words),
            next_id: 0,
            memory: mapping(MEMORY),
            pd,
            completions: Consumer::new(slots(&completions, RINGS_OFFSET), 0),
            completions_of: completions,
            _kept: kept,
            events: Vec::new(),
            counted,
            card,
        };
        world.register();
        (0..2).for_each(|queue| world.ready(queue));
        world
    }

    pub(super) fn forget_the_short_way(&mut self) {
        self.plane.device.long_way_only = true;
    }

    pub(super) fn went_short(&self) -> usize {
        self.plane.device.went_short
    }

    pub(super) fn take(&mut self, step: &Step) {
        for _ in 0..step.receives {
            self.receive(step.queue);
        }
        step.asked.iter().for_each(|asked| self.post(step.queue, asked));
        if !step.at_once {
            self.turns();
        }
        self.change(step.queue, step.change);
        self.turns();
    }

    fn id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    fn sge(&self, at: u32, length: u32) -> Sge {
        Sge { addr: IOVA + u64::from(at), length, lkey: self.key }
    }

    fn receive(&mut self, queue: usize) {
        let (id, sge) = (self.id(), self.sge(0, 64));
        let end = &mut self.ends[queue];
        if end.ledger.receives.len() < CAPS.max_recv_wr as usize {
            end.receive.push(&ReceiveBase::pack(id, 1, sge).0);
            end.ledger.receives.push_back(id);
        }
    }

    fn post(&mut self, queue: usize, asked: &Asked) {
        let id = self.id();
        let Asked { opcode, at, bytes, flags, wrong, two } = *asked;
        let (mut sge, other) = (self.sge(at, bytes), self.sge(0, 16));
        sge.lkey ^= u32::from(wrong) << 31;
        let fields = SendFields {
            wr_id: id,
            opcode,
            flags: SendFlags(flags),
            sges: 1 + u8::from(two),
            remote_addr: 0x77_0000 + u64::from(at) * 8,
            rkey: 0x4711,
            imm: 77,
            compare_add: 3,
            sge,
            ..SendFields::default()
        };
        let end = &mut self.ends[queue];
        if end.ledger.sends.len() >= MOST {
            return;
        }
        if flags & SendFlags::INLINE.0 != 0 {
            let fields = SendFields { sges: 0, inline_bytes: bytes as u16, ..fields };
            end.send.push(&SendBase::pack_inline(&fields, &[id, !id, id << 9, 5]).0);
        } else if two {
            end.send.push_extended(&SendBase::pack(&fields).0, &[pack_sges(&[other])]);
        } else {
            end.send.push(&SendBase::pack(&fields).0);
        }
        end.ledger.sends.push_back((id, flags & SendFlags::SIGNALED.0 != 0));
    }

    fn change(&mut self, queue: usize, change: Change) {
        let fake = self.ends[queue].fake;
        match change {
            Change::Nothing => {}
            Change::CarriedOut(count) => self.card.carry_out(fake, count, false),
            Change::Failed(count) => self.card.carry_out(fake, count, true),
            Change::Arrived(count) => (0..count).for_each(|_| self.card.receive(fake)),
            Change::Refuses(after, passes) => {
                self.card.refuse(fake, after, if passes { Errno::NOMEM } else { Errno::INVAL });
            }
            Change::ToError => self.plane.to_error(queue as u32),
            Change::Reset => {
                // What has completed is polled before, so that it is known what is due.
                self.turns();
                self.ends[queue].card.take_to(QpState::RESET).unwrap();
                self.modify(queue, QpState::RESET, 0, QpAttr::default());
                drain(&mut self.plane, 0);
                self.poll();
                self.ends[queue].ledger = Ledger::default();
                self.ready(queue);
            }
            Change::Drain if self.state(queue) == QpState::RTS => {
                self.modify(queue, QpState::SQD, 0, QpAttr::default())
            }
            Change::Resume if self.state(queue) == QpState::SQD => {
                self.modify(queue, QpState::RTS, 0, QpAttr::default())
            }
            Change::Drain | Change::Resume => {}
            Change::Withdraw => {
                if let Some(granted) = self.granted {
                    let _ = self.word().withdraw(granted.incarnation, self.key);
                }
            }
            Change::Restore => {
                if let Some(granted) = self.granted {
                    let _ = self.word().restore(granted.incarnation, self.key);
                }
            }
            Change::Deregister => {
                if let Some(granted) = self.granted.take() {
                    drop(self.plane.regions.remove(granted));
                }
            }
            Change::Register => self.register(),
        }
    }

    fn register(&mut self) {
        if self.granted.is_none() {
            self.keys += 1;
            let keys = self.keys;
            let region = MemoryRegion::new(Arc::clone(&self.memory), 0, MEMORY as u64, IOVA, PD, ALL, 1).unwrap();
            let mr = Mr::new(&self.pd, &region).unwrap();
            let region = region.registered(mr.lkey(), Box::new(mr));
            let granted = self.entrance.insert(region, || keys).unwrap();
            (self.granted, self.key) = (Some(granted), granted.key);
        }
    }

    /// The region's key word: its place is in the low bits of the key.
    fn word(&self) -> &KeyWord {
        &self.words[self.key as usize & (self.words.len() - 1)]
    }

    fn state(&self, queue: usize) -> QpState {
        self.plane.qps[queue].as_ref().unwrap().state
    }

    fn modify(&mut self, queue: usize, state: QpState, mask: u32, attr: QpAttr) {
        let End { send, receive, .. } = &self.ends[queue];
        let attr = QpAttr { mask: mask | Mask::STATE.0, state, ..attr };
        let (send_position, receive_position) = (send.position(), receive.position());
        let request = ModifyQp { attr, send_position, receive_position, ..ModifyQp::default() };
        self.plane.modify_qp(queue as u32, &request, Some(())).unwrap();
    }

    /// From RESET to RTS, on the card and here.
    fn ready(&mut self, queue: usize) {
        let init = QpAttr { port: 1, access: ALL, ..QpAttr::default() };
        let mut rtr = QpAttr { path_mtu: 5, dest_qp_num: 9, max_dest_rd_atomic: 4, min_rnr_timer: 1, ..init };
        (rtr.av.is_global, rtr.av.port) = (1, 1);
        let rts = QpAttr { timeout: 14, retry_cnt: 7, rnr_retry: 7, max_rd_atomic: 4, ..rtr };
        let rtr_mask = Mask::AV.0 | Mask::PATH_MTU.0 | Mask::DEST_QPN.0 | Mask::RQ_PSN.0 | Mask::MAX_DEST_RD_ATOMIC.0;
        let rts_mask =
            Mask::TIMEOUT.0 | Mask::RETRY_CNT.0 | Mask::RNR_RETRY.0 | Mask::SQ_PSN.0 | Mask::MAX_QP_RD_ATOMIC.0;
        for (state, attr, mask) in [
            (QpState::INIT, init, Mask::PKEY_INDEX.0 | Mask::PORT.0 | Mask::ACCESS_FLAGS.0),
            (QpState::RTR, rtr, rtr_mask | Mask::MIN_RNR_TIMER.0),
            (QpState::RTS, rts, rts_mask),
        ] {
            let attr = QpAttr { mask: mask | Mask::STATE.0, state, ..attr };
            let card = &self.ends[queue].card;
            card.modify(
                &mut attributes::queue_pair(&attr, state, Place { port: FIRST_PORT.get(), source: 1, pkey: 0 }),
                attr.mask,
            )
            .unwrap();
            self.modify(queue, state, mask, attr);
        }
    }

    /// So many that whatever need not wait for the card has gone.
    fn turns(&mut self) {
        for queue in 0..2 {
            self.plane.activate(queue);
            self.plane.device.rung(queue);
        }
        for _ in 0..24 {
            self.plane.now += 1_000;
            self.plane.turn();
            let notices: Vec<_> = self.plane.take_notices().collect();
            for notice in notices {
                match notice {
                    Notice::Device(Task::Stop { queue, incarnation, .. }) => {
                        if is_to_stop(&self.plane, queue, incarnation) {
                            self.ends[queue as usize].card.take_to(QpState::ERR).unwrap();
                            stopped(&mut self.plane, queue, incarnation);
                        }
                    }
                    Notice::Device(Task::Gone { .. }) => panic!("the card has not gone"),
                    Notice::Event { event, .. } => self.events.push(format!("{event:?}")),
                }
            }
            self.poll();
        }
    }

    fn poll(&mut self) {
        while let Some(words) = self.completions.peek() {
            let completion = Completion::unpack(&words);
            self.completions.advance(1);
            let end = self.ends.iter_mut().find(|end| end.number == completion.qp_num);
            let end = end.unwrap_or_else(|| panic!("{completion:?} is of no queue pair"));
            end.ledger.settle(&completion);
            end.news.push(format!("{completion:?}"));
        }
        self.completions_of.header::<CqHeader>(0).set_consumed(self.completions.position());
    }

    /// The card carries out what it has, and both queue pairs fail: then nothing is due any more.
    pub(super) fn end(&mut self) {
        for _ in 0..20 {
            (0..2).for_each(|queue| self.card.carry_out(self.ends[queue].fake, usize::MAX, false));
            self.turns();
        }
        (0..2).for_each(|queue| self.plane.to_error(queue));
        (0..3).for_each(|_| self.turns());
        for End { ledger, .. } in &self.ends {
            let left = ledger.sends.iter().find(|(_, signaled)| *signaled);
            assert_eq!(left, None, "a signaled request has never completed");
            assert!(ledger.receives.is_empty(), "these have never completed: {:?}", ledger.receives);
        }
        assert_eq!(self.page().completions_lost, 0);
    }

    /// What the card was given since it was asked last, by queue pair.
    pub(super) fn posted(&mut self) -> Vec<Vec<String>> {
        (0..2).map(|queue| self.card.posted(self.ends[queue].fake)).collect()
    }

    /// Completions since it was asked last, by queue pair.
    pub(super) fn news(&mut self) -> Vec<Vec<String>> {
        self.ends.iter_mut().map(|end| std::mem::take(&mut end.news)).collect()
    }

    /// States, and asynchronous events.
    pub(super) fn states(&mut self) -> (Vec<QpState>, Vec<String>) {
        ((0..2).map(|queue| self.state(queue)).collect(), std::mem::take(&mut self.events))
    }

    fn page(&self) -> Page {
        Page::read(&std::fs::read(self.counted.path().join(FILE)).unwrap()).unwrap()
    }

    /// What is counted of requests.
    pub(super) fn counters(&self) -> String {
        let page = self.page();
        format!("{:?} {:?} {:?}", page.sent, page.received, page.errors)
    }

    /// Requests that have said how long they waited.
    pub(super) fn gone(&self) -> u64 {
        self.page().delays.iter().sum()
    }

    /// What is held of the card when everything has its answer. Of the rates nothing is: what was spent of them is earned again.
    pub(super) fn held(&self) -> (usize, String) {
        for qp in self.plane.qps.iter().flatten() {
            assert!(qp.pending.is_empty() && qp.in_flight == 0 && !qp.parked);
        }
        assert!(!self.plane.shaping.any_parked());
        (self.plane.device.given, format!("{:?}", self.plane.device.load))
    }
}
