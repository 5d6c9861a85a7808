//! What a request costs the worker, with a card that carries it out at once and without an application: run by hand, where
//! `LD_LIBRARY_PATH` names the directory of the card that is not there, as a program that is not static (`link.sh` has the flags), with
//! `--release --ignored --nocapture`.

use super::{Ibverbs, Plane};
use crate::attributes::{self, Place};
use crate::card::{Card, CardQp, Cq, Mr, Pd};
use crate::device::Made;
use ringfence_protocol::completion::Completion;
use ringfence_protocol::control::{ModifyQp, QpAttr};
use ringfence_protocol::doorbell::Doorbells;
use ringfence_protocol::layout::{CqHeader, RINGS_OFFSET, cq_bytes, qp_bytes};
use ringfence_protocol::ring::{Consumer, Producer, Slot};
use ringfence_protocol::verbs::{Access, Opcode, QpAttrMask as Mask, QpState, SendFlags, WcStatus};
use ringfence_protocol::work::{SendBase, SendFields, Sge};
use ringfence_proxy::launch::FIRST_PORT;
use ringfence_proxy::memory::{MemoryRegion, PdId, RegionTable, places};
use ringfence_proxy::plane::CqEntry;
use ringfence_proxy::plane::cq::{Cq as PlaneCq, CqIndex};
use ringfence_proxy::plane::qp::{Caps, NewQp, Owner};
use ringfence_proxy::shared::{Held, Mapping, PAGE, SealedFile};
use ringfence_proxy::stats::Counters;
use ringfence_sched::Policy;
use rustix::time::{ClockId, clock_gettime};
use std::sync::{Arc, Mutex};

const PD: PdId = PdId(1);
const SLOTS: u32 = 256;
const IOVA: u64 = 0x10_0000;
const ALL: Access = Access(15);

/// Of this thread, in nanoseconds: the machine may be busy with other things.
fn cpu_time() -> f64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec as f64 * 1e9 + time.tv_nsec as f64
}

fn mapping(bytes: usize) -> Arc<Mapping> {
    Arc::new(Mapping::of(&SealedFile::create("speed", bytes).unwrap()).unwrap())
}

fn slots(mapping: &Arc<Mapping>, offset: usize, count: u32) -> &'static [Slot] {
    // SAFETY: within the mapping, which the caller keeps for as long as the test lasts; slots are atomics.
    unsafe { std::slice::from_raw_parts(mapping.base().add(offset).cast::<Slot>().as_ptr(), count as usize) }
}

/// One queue pair of a container that is connected to another of its own.
struct Rig {
    plane: Plane,
    send: Producer<'static>,
    completions: Consumer<'static>,
    header: Held<CqHeader>,
    fields: SendFields,
    _kept: Vec<Arc<Mapping>>,
}

fn rig(policy: &Policy) -> Rig {
    let card = Arc::new(Card::open("test0", FIRST_PORT).unwrap());
    let (pd, cq) = (Pd::new(&card).unwrap(), Cq::new(&card, 8192, 0).unwrap());
    let made = Made::new(Mutex::default());
    let device = Ibverbs::new(Arc::clone(&card), Arc::clone(&made)).unwrap();
    let words = places(64) as usize;
    let keys = mapping(words * 8);
    let (regions, mut entrance) = RegionTable::new(keys.headers(0, words));
    let bells: Held<Doorbells> = mapping(PAGE).header(0);
    let mut plane = Plane::new(bells, regions, policy, Counters::private().unwrap().tally, device, 0);
    let (completions, memory) = (mapping(cq_bytes(SLOTS)), mapping(PAGE));
    let owner = Owner { connection: 1, context: 1 };
    let entry = CqEntry { cq: PlaneCq::new(Arc::clone(&completions), SLOTS, None, 7), owner };
    plane.cqs.push(Some(Box::new(entry)));
    let region = MemoryRegion::new(Arc::clone(&memory), 0, PAGE as u64, IOVA, PD, ALL, 1).unwrap();
    let mr = Mr::new(&pd, &region).unwrap();
    let (lkey, rkey) = (mr.lkey(), mr.rkey());
    let granted = entrance.insert(region.registered(lkey, Box::new(mr)), || 0x1234_5601).unwrap();
    let caps = Caps { max_send_wr: 128, max_recv_wr: 4, max_send_sge: 4, max_recv_sge: 4, max_inline: 64 };
    let qps: Vec<Arc<CardQp>> = (0..2).map(|_| CardQp::new(&pd, &cq, &caps).unwrap()).collect();
    let mut rings = Vec::new();
    for (queue, (qp, peer)) in [(&qps[0], &qps[1]), (&qps[1], &qps[0])].into_iter().enumerate() {
        made.lock().unwrap().insert(qp.number, Arc::clone(qp));
        let queue = queue as u32;
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
            caps,
            send_slots: SLOTS,
            receive_slots: SLOTS,
        };
        plane.add_qp(&new, Arc::clone(&ring));
        rings.push(ring);
        let init = QpAttr { port: 1, access: ALL, ..QpAttr::default() };
        let mut rtr = QpAttr { path_mtu: 5, dest_qp_num: peer.number, max_dest_rd_atomic: 4, min_rnr_timer: 1, ..init };
        (rtr.av.is_global, rtr.av.port) = (1, 1);
        let rts = QpAttr { timeout: 14, retry_cnt: 7, rnr_retry: 7, max_rd_atomic: 4, ..rtr };
        let init_mask = Mask::PKEY_INDEX.0 | Mask::PORT.0 | Mask::ACCESS_FLAGS.0;
        let rtr_mask = Mask::AV.0 | Mask::PATH_MTU.0 | Mask::DEST_QPN.0 | Mask::RQ_PSN.0 | Mask::MAX_DEST_RD_ATOMIC.0;
        let rts_mask =
            Mask::TIMEOUT.0 | Mask::RETRY_CNT.0 | Mask::RNR_RETRY.0 | Mask::SQ_PSN.0 | Mask::MAX_QP_RD_ATOMIC.0;
        let ways = [
            (QpState::INIT, init, init_mask),
            (QpState::RTR, rtr, rtr_mask | Mask::MIN_RNR_TIMER.0),
            (QpState::RTS, rts, rts_mask),
        ];
        for (state, attr, mask) in ways {
            let attr = QpAttr { mask: mask | Mask::STATE.0, state, ..attr };
            qp.modify(
                &mut attributes::queue_pair(&attr, state, Place { port: FIRST_PORT.get(), source: 1, pkey: 0 }),
                attr.mask,
            )
            .unwrap();
            plane.modify_qp(queue, &ModifyQp { attr, ..ModifyQp::default() }, Some(())).unwrap();
        }
    }
    let sge = Sge { addr: IOVA, length: 8, lkey: granted.key };
    let fields =
        SendFields { opcode: Opcode::RDMA_WRITE, sges: 1, remote_addr: IOVA + 64, rkey, sge, ..SendFields::default() };
    rings.extend([keys, Arc::clone(&completions), memory]);
    Rig {
        plane,
        send: Producer::new(slots(&rings[0], RINGS_OFFSET, SLOTS), 0),
        completions: Consumer::new(slots(&completions, RINGS_OFFSET, SLOTS), 0),
        header: completions.header(0),
        fields,
        _kept: rings,
    }
}

impl Rig {
    /// Posts so many, of which the last is signaled, and takes its completion. Turns of the worker until then.
    fn round(&mut self, count: u32) -> u32 {
        for index in 0..count {
            let flags = if index + 1 == count { SendFlags::SIGNALED } else { SendFlags(0) };
            self.send.push(&SendBase::pack(&SendFields { flags, ..self.fields }).0);
        }
        let mut turns = 0;
        loop {
            if self.plane.needs_time() {
                self.plane.now += 1000;
            }
            self.plane.turn();
            turns += 1;
            if let Some(words) = self.completions.peek() {
                assert_eq!(Completion::unpack(&words).status, WcStatus::SUCCESS);
                self.completions.advance(1);
                self.header.set_consumed(self.completions.position());
                return turns;
            }
            assert!(turns < 1000, "no completion");
        }
    }
}

#[test]
#[ignore = "measures"]
fn what_a_write_costs_the_worker() {
    const WRITES: u32 = 640_000;
    let bound = Policy {
        bandwidth: ringfence_sched::BitRate::new(1_000_000_000_000),
        ops: ringfence_sched::OpRate::new(1_000_000_000),
        class: ringfence_sched::Class::Latency,
        ..Policy::default()
    };
    for (name, policy) in [("without a policy", Policy::default()), ("under policy", bound)] {
        let mut rig = rig(&policy);
        for count in [1, 32] {
            let (mut turns, rounds) = (0, WRITES / count);
            let best = (0..9)
                .map(|_| {
                    let start = cpu_time();
                    turns = (0..rounds).map(|_| rig.round(count)).sum::<u32>();
                    (cpu_time() - start) / f64::from(rounds * count)
                })
                .fold(f64::MAX, f64::min);
            println!(
                "{count} WRITEs of 8 bytes {name}: {best:.1} ns each, {} turns",
                f64::from(turns) / f64::from(rounds)
            );
        }
    }
}
