//! A world of two queue pairs that are connected to each other, in one container or in two.
//!
//! Each end has its half of every memory, so that what one posts and the other's requests have no order to keep; and while one has
//! something under way the other posts nothing.

use super::super::grants::{Scene, WRITABLE};
use super::super::ledger::Ledger;
use super::*;
use ringfence_launch::counters::Page;
use ringfence_protocol::layout::CqHeader;
use std::collections::BTreeMap;

/// The half of the memory that belongs to an end.
const HALF: u64 = MEMORY as u64 / 2;
const _: () = assert!(HALF > 60_000 + 30_000 + 32);

/// Requests that lie in a ring, of which a library would let no more wait: a queue pair that is drained takes none.
const MOST_UNREAD: u32 = SLOTS - MOST as u32;

/// How many of a ring the plane has not taken in.
fn unread(ring: &Producer<'_>, plane: &Consumer<'_>) -> u32 {
    ring.position().wrapping_sub(plane.position())
}

enum Place {
    Alone(Box<Rig>, [RigQp; 2]),
    Neighbours(Box<Scene>),
}

/// What an application hears of one queue pair's queue, in order: whose, receives or not, and everything that a completion says.
type News = BTreeMap<(u32, bool), Vec<String>>;

/// Both ends and everything between them.
pub(super) struct World {
    place: Place,
    policy: Policy,
    now: u64,
    next_id: u64,
    /// Which end has posted something that has no answer yet.
    busy: Option<usize>,
    /// There is no link.
    parted: bool,
    /// Neighbours were parted, so that nobody knows what they have not told each other.
    untold: bool,
    registered: [bool; 2],
    keys: u32,
    /// What is due to each end.
    ledgers: [Ledger; 2],
    news: News,
}

impl World {
    fn new(place: Place, policy: &Policy) -> Self {
        let mut world = Self {
            place,
            policy: *policy,
            now: 0,
            next_id: 1,
            busy: None,
            parted: false,
            untold: false,
            registered: [true; 2],
            keys: 1,
            ledgers: Default::default(),
            news: News::new(),
        };
        for end in 0..2 {
            // Keys that are the same in every world.
            world.deregister(end);
            world.register(end);
            world.rig(end).put(0, &(0..MEMORY as u32).map(|at| (at * 7 / 5) as u8).collect::<Vec<_>>());
        }
        world
    }

    /// One container.
    pub(super) fn alone(policy: &Policy) -> Self {
        let mut rig = Rig::shaped(policy, None);
        let (a, b) = rig.pair();
        Self::new(Place::Alone(Box::new(rig), [a, b]), policy)
    }

    /// Two, of which the second grants the first what it may.
    pub(super) fn of_neighbours(policy: &Policy) -> Self {
        let scene = Scene::with(Rig::shaped(policy, None), Rig::shaped(policy, None));
        Self::new(Place::Neighbours(Box::new(scene)), policy)
    }

    pub(super) fn forget_the_short_way(&mut self) {
        (0..2).for_each(|end| self.rig(end).plane.device.long_way_only = true);
    }

    fn rigs(&self) -> usize {
        if matches!(self.place, Place::Alone(..)) { 1 } else { 2 }
    }

    /// The container of an end.
    fn rig(&mut self, end: usize) -> &mut Rig {
        match &mut self.place {
            Place::Alone(rig, _) => rig,
            Place::Neighbours(scene) => &mut scene.two.rigs[end],
        }
    }

    fn qp(&mut self, end: usize) -> &mut RigQp {
        match &mut self.place {
            Place::Alone(_, ends) => &mut ends[end],
            Place::Neighbours(scene) => match end {
                0 => &mut scene.a,
                _ => &mut scene.b,
            },
        }
    }

    /// Both, to change the one by the other.
    fn with<R>(&mut self, end: usize, run: impl FnOnce(&mut Rig, &mut RigQp) -> R) -> R {
        match &mut self.place {
            Place::Alone(rig, ends) => run(rig, &mut ends[end]),
            Place::Neighbours(scene) => match end {
                0 => run(&mut scene.two.rigs[0], &mut scene.a),
                _ => run(&mut scene.two.rigs[1], &mut scene.b),
            },
        }
    }

    fn destination(&self, end: usize) -> Destination {
        match self.place {
            Place::Alone(..) => Destination::Own,
            Place::Neighbours(_) => Destination::Port(2 - end as u16),
        }
    }

    /// What it waits for a rate makes how far it gets a matter of time.
    fn is_capped(&self) -> bool {
        self.policy != Policy::default()
    }

    pub(super) fn take(&mut self, step: &Step) {
        if self.busy.is_some_and(|busy| busy != step.end) {
            self.settle();
        }
        for (at, bytes) in &step.receives {
            let (id, half) = (self.id(), self.half(step.end));
            let posted = self.with(1 - step.end, |rig, qp| {
                let has_room =
                    unread(&qp.receive, &rig.plane.qps[qp.queue as usize].as_ref().unwrap().receive) < MOST_UNREAD;
                if has_room {
                    qp.receive.push(&ReceiveBase::pack(id, 1, rig.sge(half + u64::from(*at), *bytes)).0);
                }
                has_room
            });
            if posted {
                self.ledgers[1 - step.end].receives.push_back(id);
            }
        }
        step.requests.iter().for_each(|request| self.post(step.end, request));
        self.busy = Some(step.end);
        match step.until {
            Until::Posted => {}
            Until::Gone if !self.is_capped() => self.turns(),
            Until::Gone | Until::Settled => self.settle(),
        }
        if self.is_capped() && !matches!(step.change, Change::Nothing) {
            self.settle();
        }
        self.change(step.change);
        // What the change did, and what is posted before the next, must not depend on how far either world had come.
        if !matches!(step.change, Change::Nothing) || step.until != Until::Settled {
            self.turns();
            self.settle();
        }
    }

    fn id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    fn half(&self, end: usize) -> u64 {
        end as u64 * HALF
    }

    fn post(&mut self, end: usize, request: &Request) {
        let (id, half) = (self.id(), self.half(end));
        let rkey = self.rig(1 - end).key;
        let Request { opcode, local, remote, bytes, flags, wrong } = *request;
        let inline = flags & SendFlags::INLINE.0 != 0;
        let posted = self.with(end, |rig, qp| {
            if unread(&qp.send, &rig.plane.qps[qp.queue as usize].as_ref().unwrap().send) >= MOST_UNREAD {
                return false;
            }
            let mut fields = SendFields {
                wr_id: id,
                flags: SendFlags(flags),
                rkey,
                imm: 77,
                compare_add: 3,
                swap: id,
                ..rig.fields(opcode, half + u64::from(local), half + u64::from(remote), bytes)
            };
            match wrong {
                Wrong::Nothing => {}
                Wrong::LocalKey => fields.sge.lkey ^= 0x8000_0000,
                Wrong::RemoteKey => fields.rkey ^= 0x8000_0000,
                Wrong::Range => fields.remote_addr = IOVA + MEMORY as u64 - 4,
            }
            if inline {
                let fields = SendFields { sges: 0, inline_bytes: bytes as u16, ..fields };
                qp.send.push(&SendBase::pack_inline(&fields, &[id, !id, id << 9, 5]).0);
            } else {
                post(qp, &fields);
            }
            true
        });
        if posted {
            self.ledgers[end].sends.push_back((id, flags & SendFlags::SIGNALED.0 != 0));
        }
    }

    fn change(&mut self, change: Change) {
        match change {
            Change::Nothing => {}
            Change::Fail(end) => self.with(end, |rig, qp| rig.plane.to_error(qp.queue)),
            Change::Reset(end) => self.reset(end),
            Change::ResetBoth => (0..2).for_each(|end| self.reset(end)),
            Change::Drain(end) => self.modify(end, QpState::RTS, QpState::SQD, 0, ALL),
            Change::Resume(end) => self.modify(end, QpState::SQD, QpState::RTS, 0, ALL),
            Change::Access(end, access) => {
                self.modify(end, QpState::RTS, QpState::RTS, Mask::ACCESS_FLAGS.0, Access(access));
            }
            Change::Withdraw(end) => self.with(end, |rig, _| {
                let _ = rig.plane.regions.word(rig.key).withdraw(rig.granted.incarnation, rig.key);
            }),
            Change::Restore(end) => self.with(end, |rig, _| {
                let _ = rig.plane.regions.word(rig.key).restore(rig.granted.incarnation, rig.key);
            }),
            Change::Deregister(end) => self.deregister(end),
            Change::Register(end) => self.register(end),
            Change::Remake(end) => {
                self.with(end, |rig, qp| {
                    drop(rig.plane.remove_qp(qp.queue));
                    *qp = rig.qp(qp.queue, qp.number);
                });
                self.ledgers[end] = Ledger::default();
                self.ready(end);
            }
            Change::Part => self.part(),
            Change::Join => self.join(),
        }
    }

    fn modify(&mut self, end: usize, from: QpState, to: QpState, mask: u32, access: Access) {
        self.with(end, |rig, qp| {
            if rig.plane.qps[qp.queue as usize].as_ref().unwrap().state == from {
                rig.modify(qp, to, mask, QpAttr { access, ..QpAttr::default() }, None);
            }
        });
    }

    fn reset(&mut self, end: usize) {
        self.with(end, |rig, qp| rig.modify(qp, QpState::RESET, 0, QpAttr::default(), None));
        // Everything that had completed was polled: nothing of before may come now.
        self.ledgers[end] = Ledger::default();
        self.ready(end);
    }

    fn ready(&mut self, end: usize) {
        let (to, peer) = (self.destination(end), self.qp(1 - end).number);
        self.with(end, |rig, qp| rig.ready(qp, peer, to));
    }

    fn deregister(&mut self, end: usize) {
        if !std::mem::take(&mut self.registered[end % self.rigs()]) {
            return;
        }
        self.with(end, |rig, _| {
            drop(rig.plane.regions.remove(rig.granted));
            rig.plane.revoke_region(1);
        });
        let Place::Neighbours(scene) = &mut self.place else { return };
        if self.parted {
            return;
        }
        let links = scene.two.links;
        for name in [1, WRITABLE] {
            scene.two.rigs[end].plane.device.links.get_mut(links[end]).unwrap().shared.remove(&name);
            let other = scene.two.rigs[1 - end].plane.device.links.get_mut(links[1 - end]).unwrap();
            other.grants.using.forget_share(name);
            other.shares.remove(&name);
        }
    }

    fn register(&mut self, end: usize) {
        if std::mem::replace(&mut self.registered[end % self.rigs()], true) {
            return;
        }
        self.keys += 1;
        let keys = self.keys;
        self.with(end, |rig, _| {
            let region = MemoryRegion::new(Arc::clone(&rig.memory), 0, MEMORY as u64, IOVA, PD, ALL, 1).unwrap();
            rig.granted = rig.entrance.insert(region.shown(0..MEMORY as u64), || keys).unwrap();
            rig.key = rig.granted.key;
        });
    }

    fn part(&mut self) {
        let Place::Neighbours(scene) = &mut self.place else { return };
        if !std::mem::replace(&mut self.parted, true) {
            self.untold = true;
            for (rig, link) in scene.two.rigs.iter_mut().zip(scene.two.links) {
                drop(rig.plane.remove_link(link));
            }
        }
    }

    fn join(&mut self) {
        let Place::Neighbours(scene) = &mut self.place else { return };
        if std::mem::take(&mut self.parted) {
            let mapping = Arc::new(Mapping::of(&SealedFile::create("link", BYTES).unwrap()).unwrap());
            for (index, end) in [End::Acceptor, End::Initiator].into_iter().enumerate() {
                let port = 2 - index as u16;
                scene.two.links[index] = scene.two.rigs[index].plane.add_link(link(3 - port, port, end, &mapping));
            }
        }
    }

    /// One turn of everybody. True if something moved.
    fn turn(&mut self) -> bool {
        let mut worked = false;
        for index in 0..self.rigs() {
            let now = self.now;
            let plane = &mut self.rig(index).plane;
            plane.now = now;
            worked |= plane.turn();
            match &mut self.place {
                Place::Alone(rig, _) => drop(rig.plane.take_notices()),
                Place::Neighbours(scene) => {
                    for wish in scene.two.hear(index) {
                        if index == 1 && !self.parted {
                            let _ = scene.grant(wish);
                        }
                    }
                }
            }
            self.poll(index);
        }
        worked
    }

    /// So many turns at one time that whatever need not wait has gone.
    fn turns(&mut self) {
        self.now += 1_000;
        self.wake();
        for _ in 0..4 * MOST {
            self.turn();
        }
    }

    fn wake(&mut self) {
        for end in 0..2 {
            self.with(end, |rig, qp| rig.plane.activate(qp.queue));
        }
    }

    /// Until everything has its answer.
    fn settle(&mut self) {
        self.wake();
        let mut idle = 0;
        for _ in 0..50_000 {
            self.now += 1_000;
            idle = if self.turn() { 0 } else { idle + 1 };
            if idle < 3 {
                continue;
            }
            let wake = (0..self.rigs()).filter_map(|index| self.rig(index).plane.wake_at()).min();
            match wake {
                Some(at) => self.now = self.now.max(at),
                None => {
                    self.busy = None;
                    return;
                }
            }
        }
        panic!("it never ends");
    }

    /// Both queue pairs fail, and nothing is due any more.
    pub(super) fn end(&mut self) {
        self.settle();
        (0..2).for_each(|end| self.with(end, |rig, qp| rig.plane.to_error(qp.queue)));
        self.settle();
        self.now += 10_000_000_000;
        self.settle();
        for ledger in &self.ledgers {
            ledger.is_settled();
            assert!(ledger.receives.is_empty(), "these have never completed: {:?}", ledger.receives);
        }
        for index in 0..self.rigs() {
            assert_eq!(self.rig(index).plane.tally.page().completions_lost, 0);
        }
    }

    fn poll(&mut self, index: usize) {
        let rig = self.rig(index);
        let list = rig.completions();
        rig._cq.header::<CqHeader>(0).set_consumed(rig.completions.position());
        for completion in list {
            let end = (0..2).find(|end| self.qp(*end).number == completion.qp_num);
            let end = end.unwrap_or_else(|| panic!("{completion:?} is of no queue pair"));
            assert_eq!(end % self.rigs(), index, "{completion:?} came to the other end");
            self.ledgers[end].settle(&completion);
            let receives = completion.opcode.0 & WcOpcode::RECV.0 != 0;
            self.news.entry((completion.qp_num, receives)).or_default().push(format!("{completion:?}"));
        }
    }

    /// Completions since it was asked last.
    pub(super) fn news(&mut self) -> News {
        std::mem::take(&mut self.news)
    }

    /// States, and asynchronous events.
    pub(super) fn states(&mut self) -> Vec<(QpState, Vec<EventType>)> {
        let state = |rig: &mut Rig, qp: &mut RigQp| {
            (rig.plane.qps[qp.queue as usize].as_ref().unwrap().state, std::mem::take(&mut rig.events))
        };
        (0..2).map(|end| self.with(end, state)).collect()
    }

    pub(super) fn memory(&mut self) -> Vec<Vec<u8>> {
        (0..self.rigs()).map(|index| self.rig(index).take(0, MEMORY)).collect()
    }

    /// What is counted of requests.
    pub(super) fn counters(&mut self) -> Vec<String> {
        let untold = self.untold;
        let counted = |page: Page| {
            // When somebody waits depends on how much goes in a turn; that everybody was counted once does not.
            let gone: u64 = page.delays.iter().sum();
            // What was done by grants is counted by their giver when it looks, which it does no more after a parting.
            let received = (!untold).then_some(page.received);
            let Page { sent, errors, rnr_received, rnr_sent, timeouts, repeated, completions_lost, .. } = page;
            format!(
                "{sent:?} {received:?} {errors:?} {gone} {rnr_received} {rnr_sent} {timeouts} {repeated} {completions_lost}"
            )
        };
        (0..self.rigs()).map(|index| counted(self.rig(index).plane.tally.page())).collect()
    }

    /// What the rates allow a while after everything has its answer, which is as much as they ever do.
    pub(super) fn quotas(&mut self) -> Vec<Option<ringfence_sched::Allowance>> {
        self.now += 10_000_000_000;
        let now = self.now;
        let quota = |rig: &mut Rig| {
            let plane = &mut rig.plane;
            for qp in plane.qps.iter().flatten() {
                assert!(qp.pending.is_empty() && qp.in_flight == 0 && !qp.parked);
            }
            for link in plane.device.links.iter() {
                assert_eq!(link.outstanding, 0);
            }
            assert!(!plane.shaping.any_parked());
            plane.shaping.refill(now);
            plane.shaping.in_hand()
        };
        (0..self.rigs()).map(|index| quota(self.rig(index))).collect()
    }

    /// What may go without a clock, if none was read since the world began.
    pub(super) fn in_hand(&mut self) -> Option<ringfence_sched::Allowance> {
        self.rig(0).plane.shaping.in_hand()
    }

    pub(super) fn went_short(&mut self) -> usize {
        (0..self.rigs()).map(|index| self.rig(index).plane.device.went_short).sum()
    }
}
