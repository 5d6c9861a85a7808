//! Planes without a worker thread, a control thread or containers, and what a test does to them.

use super::*;

pub(super) const PD: PdId = PdId(1);
pub(super) const SLOTS: u32 = 64;
pub(super) const MEMORY: usize = 64 * PAGE;
pub(super) const IOVA: u64 = 0x10_0000;
pub(super) const ALL: Access = Access(15);
pub(super) const BULK: Policy = Policy { bandwidth: None, fetching: None, ops: None, weight: None, class: Class::Bulk };

pub(super) struct RigQp {
    pub(super) queue: u32,
    pub(super) number: u32,
    pub(super) send: Producer<'static>,
    pub(super) receive: Producer<'static>,
    pub(super) _mapping: Arc<Mapping>,
}

/// One container: a plane, one CQ and one region of memory.
pub(super) struct Rig<D: Device = Soft> {
    pub(super) plane: crate::plane::Plane<D>,
    pub(super) completions: Consumer<'static>,
    pub(super) _cq: Arc<Mapping>,
    pub(super) memory: Arc<Mapping>,
    pub(super) file: SealedFile,
    /// What neighbours see of the region.
    pub(super) shown: Arc<Mapping>,
    pub(super) entrance: Entrance,
    pub(super) granted: Granted,
    pub(super) key: u32,
    pub(super) events: Vec<EventType>,
}

impl Rig {
    pub(super) fn new() -> Self {
        Self::shaped(&Policy::default(), None)
    }

    pub(super) fn shaped(policy: &Policy, link: Option<(WireClock, BitRate)>) -> Self {
        Self::on(policy, Soft::new(link.map(|(clock, rate)| ModelledLink::new(clock, rate))))
    }

    pub(super) fn pair(&mut self) -> (RigQp, RigQp) {
        let (a, b) = (self.qp(0, 100), self.qp(1, 200));
        self.ready(&a, b.number, Destination::Own);
        self.ready(&b, a.number, Destination::Own);
        (a, b)
    }
}

impl<D: Device> Rig<D> {
    pub(super) fn on(policy: &Policy, device: D) -> Self {
        let doorbells = Arc::new(Mapping::of(&SealedFile::create("bells", PAGE).unwrap()).unwrap()).header(0);
        let (regions, mut entrance) = RegionTable::alone(64);
        let tally = Counters::private().unwrap().tally;
        let mut plane = crate::plane::Plane::new(doorbells, regions, policy, tally, device, 0);
        let cq = Arc::new(Mapping::of(&SealedFile::create("cq", cq_bytes(SLOTS)).unwrap()).unwrap());
        let owner = Owner { connection: 1, context: 1 };
        plane.cqs.push(Some(Box::new(CqEntry { cq: Cq::new(Arc::clone(&cq), SLOTS, None, 7), owner })));
        let file = SealedFile::create("memory", MEMORY).unwrap();
        let memory = Arc::new(Mapping::of(&file).unwrap());
        let region = MemoryRegion::new(Arc::clone(&memory), 0, MEMORY as u64, IOVA, PD, ALL, 1).unwrap();
        let (region, shown) = (region.shown(0..MEMORY as u64), Arc::clone(&memory));
        let granted = entrance.insert(region, crate::control::session::random).unwrap();
        let completions = Consumer::new(crate::shared::ring_slots(&cq, RINGS_OFFSET, SLOTS), 0);
        Self {
            plane,
            completions,
            _cq: cq,
            memory,
            file,
            shown,
            entrance,
            granted,
            key: granted.key,
            events: Vec::new(),
        }
    }

    pub(super) fn qp(&mut self, queue: u32, number: u32) -> RigQp {
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
            send_cq: CqIndex(0),
            recv_cq: CqIndex(0),
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

    pub(super) fn modify(&mut self, qp: &RigQp, state: QpState, mask: u32, attr: QpAttr, to: Option<D::Destination>) {
        let attr = QpAttr { mask: mask | Mask::STATE.0, state, ..attr };
        let request = ModifyQp {
            send_position: qp.send.position(),
            receive_position: qp.receive.position(),
            attr,
            ..ModifyQp::default()
        };
        self.plane.modify_qp(qp.queue, &request, to).unwrap();
    }

    pub(super) fn ready(&mut self, qp: &RigQp, dest_qp_num: u32, to: D::Destination) {
        self.ready_from(qp, dest_qp_num, to, [0, 0]);
    }

    /// The same with the numbers of the first request of either way: to it, and of its own.
    pub(super) fn ready_from(&mut self, qp: &RigQp, dest_qp_num: u32, to: D::Destination, [rq_psn, sq_psn]: [u32; 2]) {
        let init = QpAttr { port: 1, access: ALL, ..QpAttr::default() };
        self.modify(qp, QpState::INIT, Mask::PKEY_INDEX.0 | Mask::PORT.0 | Mask::ACCESS_FLAGS.0, init, None);
        let rtr =
            QpAttr { path_mtu: 5, dest_qp_num, rq_psn, max_dest_rd_atomic: 4, min_rnr_timer: 1, ..QpAttr::default() };
        let mask = Mask::AV.0 | Mask::PATH_MTU.0 | Mask::DEST_QPN.0 | Mask::RQ_PSN.0 | Mask::MAX_DEST_RD_ATOMIC.0;
        self.modify(qp, QpState::RTR, mask | Mask::MIN_RNR_TIMER.0, rtr, Some(to));
        let rts = QpAttr { timeout: 14, retry_cnt: 1, rnr_retry: 1, sq_psn, max_rd_atomic: 4, ..QpAttr::default() };
        let mask = Mask::TIMEOUT.0 | Mask::RETRY_CNT.0 | Mask::RNR_RETRY.0 | Mask::SQ_PSN.0 | Mask::MAX_QP_RD_ATOMIC.0;
        self.modify(qp, QpState::RTS, mask, rts, None);
    }

    pub(super) fn sge(&self, offset: u64, length: u32) -> Sge {
        Sge { addr: IOVA + offset, length, lkey: self.key }
    }

    pub(super) fn fields(&self, opcode: Opcode, local: u64, remote: u64, length: u32) -> SendFields {
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

    pub(super) fn turns(&mut self) {
        for _ in 0..50 {
            self.plane.now += 100_000;
            self.plane.turn();
            for notice in self.plane.take_notices() {
                if let crate::plane::Notice::Event { event, .. } = notice {
                    self.events.push(event);
                }
            }
        }
    }

    pub(super) fn completions(&mut self) -> Vec<Completion> {
        let mut list = Vec::new();
        while let Some(words) = self.completions.peek() {
            list.push(Completion::unpack(&words));
            self.completions.advance(1);
        }
        list
    }

    pub(super) fn statuses(&mut self) -> Vec<(u64, WcStatus)> {
        self.turns();
        self.completions().iter().map(|completion| (completion.wr_id, completion.status)).collect()
    }

    pub(super) fn put(&self, offset: u64, bytes: &[u8]) {
        rustix::io::pwrite(&self.file, bytes, offset).unwrap();
    }

    pub(super) fn take(&self, offset: u64, bytes: usize) -> Vec<u8> {
        let mut buffer = vec![0; bytes];
        rustix::io::pread(&self.file, &mut buffer[..], offset).unwrap();
        buffer
    }
}

pub(super) fn post(qp: &mut RigQp, fields: &SendFields) {
    qp.send.push(&SendBase::pack(fields).0);
}

/// Two planes and a link between them; shares are granted at once.
pub(super) struct TwoRigs {
    pub(super) rigs: [Rig; 2],
    pub(super) links: [LinkId; 2],
}

/// All links of the process share one: it is a thread, which lasts as long.
pub(super) fn closer() -> &'static Closer {
    static CLOSER: OnceLock<Closer> = OnceLock::new();
    CLOSER.get_or_init(|| Closer::start("test", 1 << 16).unwrap())
}

/// A link that is open, with nobody at its bell.
pub(super) fn link(own: u16, port: u16, end: End, mapping: &Arc<Mapping>) -> Link {
    let (bell, theirs) = Bell::new(closer()).unwrap();
    let wake = Ringer::adopt(Foreign::new(theirs, closer())).unwrap();
    Link::new(Ends { own, port }, end, Arc::clone(mapping), Some(wake), bell)
}

impl TwoRigs {
    pub(super) fn new() -> (Self, RigQp, RigQp) {
        Self::with(Rig::new())
    }

    pub(super) fn with(rig: Rig) -> (Self, RigQp, RigQp) {
        Self::with_both(rig, Rig::new())
    }

    pub(super) fn with_both(rig: Rig, other: Rig) -> (Self, RigQp, RigQp) {
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

    pub(super) fn turns(&mut self) {
        for _ in 0..100 {
            self.some_turns();
        }
    }

    /// One of each; what may be granted.
    pub(super) fn some_turns(&mut self) -> Vec<Wish> {
        let mut wishes = Vec::new();
        for index in 0..2 {
            self.rigs[index].plane.now += 10_000;
            self.rigs[index].plane.turn();
            wishes.extend(self.hear(index));
        }
        wishes
    }

    /// What a control thread does when it hears from its worker, but for what may be granted.
    pub(super) fn hear(&mut self, index: usize) -> Vec<Wish> {
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

    pub(super) fn share(&mut self, from: usize) {
        let mapping = Arc::clone(&self.rigs[from].shown);
        let lease = Budget::new(65_530).take_own(Amount { mappings: 1, bytes: MEMORY as u64 }).unwrap();
        let (own, other) = (self.links[from], self.links[1 - from]);
        self.rigs[1 - from]
            .plane
            .device
            .links
            .get_mut(other)
            .unwrap()
            .shares
            .insert(1, Share { mapping, lease: lease.into(), writable: false });
        self.rigs[1 - from].plane.share_arrived(other);
        self.rigs[from].plane.device.links.get_mut(own).unwrap().shared.insert(1, Shared::CONFIRMED);
        self.rigs[from].plane.share_arrived(own);
    }
}
