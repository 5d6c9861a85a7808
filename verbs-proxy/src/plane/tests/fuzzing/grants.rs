//! Two planes that reach each other's memory by grants, and whoever rewrites the pages of the grants under their hands: says that
//! he grants what he does not, or takes it back in between; that he is copying for ever; that he has done more than there is.
//! What is said between them comes late, twice, out of order, or not at all.

use super::*;
use crate::device::soft::grants::giving::Wish;
use crate::device::soft::grants::{BYTES as PAGE_BYTES, Grant};
use arbitrary::Unstructured;

/// What each calls the memory that the other can write to ...
const WRITABLE: u32 = 77;
/// ... and some more of it, in which there is nothing that matters.
const SCRAP: u32 = 88;
const SCRAP_BYTES: usize = 4 * PAGE;
/// More than any revocation leaves.
const MANY_TICKETS: usize = 32;

#[derive(Debug, Arbitrary)]
enum Action {
    /// Of the one container or the other: some alike.
    Post(bool, u8, Send),
    Receive(bool, Vec<Element>),
    /// A word of a page of grants; most are of the first slots, and of generations that there may have been.
    Scribble(bool, u16, u64),
    /// Says what is granted: the wish that was heard first, or last. It may be heard again.
    Give(bool, bool),
    /// A grant reaches the other end, and may do so again.
    Tell(bool, bool),
    Forget(bool),
    /// A grant of scrap.
    Claim(bool, Claim),
    Deregister(bool),
    Register(bool),
    Unshare(bool, bool),
    Rights(bool, u8),
    Strike(bool),
    Revoke(bool),
    /// Whoever takes grants back stops waiting.
    TakeTickets(bool),
    Reset,
    /// One turn of one of them, or many of both.
    Turn(bool, u16),
    Turns,
}

#[derive(Debug, Arbitrary)]
struct Claim {
    slot: u16,
    generation: u8,
    access: u8,
    iova: u32,
    length: u32,
    tame: bool,
}

struct Side {
    qp: RigQp,
    ledger: Ledger,
    posted: usize,
    registered: bool,
    /// Of this side's memory.
    wishes: Vec<Wish>,
    grants: Vec<Grant>,
}

struct Scene {
    two: TwoRigs,
    sides: [Side; 2],
    pages: [SealedFile; 2],
    next_id: u64,
}

/// One input.
pub fn run(data: &[u8]) {
    let mut input = Unstructured::new(data);
    let policies: [u8; 2] = input.arbitrary().unwrap_or_default();
    let mut scene = Scene::new(policies);
    // In one of two everything is granted already.
    if policies[0] & 128 == 0 {
        scene.warm();
    }
    while !input.is_empty()
        && let Ok(action) = input.arbitrary()
    {
        scene.act(action);
        scene.settle();
    }
    scene.end();
}

impl Scene {
    fn new([one, other]: [u8; 2]) -> Self {
        let (mut two, a, b) = TwoRigs::with_both(guarded(shaping(one)), guarded(shaping(other)));
        let pages = [(); 2].map(|()| SealedFile::create("page", PAGE_BYTES).unwrap());
        let mapped = pages.each_ref().map(|file| Arc::new(Mapping::of(file).unwrap()));
        for index in 0..2 {
            let scrap = Arc::new(Mapping::of(&SealedFile::create("scrap", SCRAP_BYTES).unwrap()).unwrap());
            let plane = &mut two.rigs[index].plane;
            let unlimited = plane.shaping.read_ahead().is_none();
            let link = plane.device.links.get_mut(two.links[index]).unwrap();
            link.grants.set_ours(mapped[index].header(0), unlimited);
            link.grants.set_theirs(mapped[1 - index].header(0), lease());
            link.shares.insert(SCRAP, Share { mapping: scrap, lease: lease().into(), writable: true });
        }
        let side = |qp| Side {
            qp,
            ledger: Ledger::default(),
            posted: 0,
            registered: true,
            wishes: Vec::new(),
            grants: Vec::new(),
        };
        Self { two, sides: [side(a), side(b)], pages, next_id: 1 }
    }

    /// Requests of each kind have gone both ways, and all grants have come.
    fn warm(&mut self) {
        for opcode in [Opcode::RDMA_WRITE, Opcode::RDMA_READ].repeat(3) {
            for of in 0..2 {
                let wr_id = self.id();
                let [lkey, rkey] = [of, 1 - of].map(|side| self.two.rigs[side].key);
                let sge = Sge { addr: IOVA, length: 8, lkey };
                let of_it = SendFields { wr_id, opcode, flags: SendFlags::SIGNALED, sges: 1, ..SendFields::default() };
                let side = &mut self.sides[of];
                side.posted += 1;
                side.ledger.sends.push_back((wr_id, true));
                post(&mut side.qp, &SendFields { remote_addr: IOVA, rkey, sge, ..of_it });
            }
            self.turns(40);
            self.settle();
            for of in 0..2 {
                while !self.sides[of].wishes.is_empty() {
                    self.give(of, false);
                    self.tell(of, true);
                    self.sides[of].wishes.remove(0);
                }
            }
        }
        let given = self.sides.each_ref().map(|side| side.grants.len());
        assert_eq!(given, [2, 2], "not all that was used has been granted");
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Post(of, times, send) => {
                for _ in 0..times % 6 + 1 {
                    self.post(usize::from(of), &send);
                }
            }
            Action::Receive(of, elements) => {
                let (of, id) = (usize::from(of), self.id());
                let side = &mut self.sides[of];
                if elements.len() <= 4 && side.posted < 24 {
                    let (base, more) = receive(id, &elements, self.two.rigs[of].key);
                    side.posted += 1;
                    side.ledger.receives.push_back(id);
                    side.qp.receive.push_extended(&base, &more);
                }
            }
            Action::Scribble(of, at, word) => {
                // Three in four near the beginning, where both write.
                let places = if at >> 14 == 3 { PAGE_BYTES } else { 512 } / 8;
                let word = if word >> 62 == 0 { word % 8 } else { word };
                let at = (usize::from(at) % places * 8) as u64;
                rustix::io::pwrite(&self.pages[usize::from(of)], &word.to_ne_bytes(), at).unwrap();
            }
            Action::Give(of, last) => self.give(usize::from(of), last),
            Action::Tell(of, last) => self.tell(usize::from(of), last),
            Action::Forget(of) => {
                let side = &mut self.sides[usize::from(of)];
                (side.wishes, side.grants) = (Vec::new(), Vec::new());
            }
            Action::Claim(of, claim) => self.claim(usize::from(of), &claim),
            Action::Deregister(of) => self.deregister(usize::from(of)),
            Action::Register(of) => self.register(usize::from(of)),
            Action::Unshare(of, writable) => {
                let share = if writable { WRITABLE } else { 1 };
                let of = usize::from(of);
                drop(self.with_link(1 - of, |link| {
                    link.grants.using.forget_share(share);
                    link.shares.remove(&share)
                }));
                self.with_link(of, |link| link.shared.remove(&share));
            }
            Action::Rights(of, access) => {
                let rig = &mut self.two.rigs[usize::from(of)];
                let attr = QpAttr { access: Access(u32::from(access % 16)), ..QpAttr::default() };
                if rig.plane.qps[0].as_ref().is_some_and(|qp| qp.state == QpState::RTS) {
                    rig.modify(&self.sides[usize::from(of)].qp, QpState::RTS, Mask::ACCESS_FLAGS.0, attr, None);
                }
            }
            Action::Strike(of) => self.two.rigs[usize::from(of)].plane.strike(self.two.links[usize::from(of)]),
            Action::Revoke(of) => self.two.rigs[usize::from(of)].plane.revoke_queue(0),
            Action::TakeTickets(of) => {
                let tickets = self.two.rigs[usize::from(of)].plane.take_tickets();
                assert!(tickets.len() <= MANY_TICKETS, "{} tickets", tickets.len());
            }
            Action::Reset => self.reset(),
            Action::Turn(of, micros) => self.turn(usize::from(of), u64::from(micros) * 1000),
            Action::Turns => self.turns(20),
        }
    }

    fn id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    fn with_link<R>(&mut self, of: usize, run: impl FnOnce(&mut Link) -> R) -> R {
        run(self.two.rigs[of].plane.device.links.get_mut(self.two.links[of]).expect("the links of this scene stay"))
    }

    fn post(&mut self, of: usize, send: &Send) {
        let id = self.id();
        let remote = self.two.rigs[1 - of].key;
        let side = &mut self.sides[of];
        if send.elements.len() <= 4 && side.posted < 24 {
            let (base, more, signaled) = send.pack(id, self.two.rigs[of].key, remote);
            side.posted += 1;
            side.ledger.sends.push_back((id, signaled));
            side.qp.send.push_extended(&base, &more);
        }
    }

    /// What a control thread does when it hears of a wish.
    fn give(&mut self, of: usize, last: bool) {
        let wishes = &self.sides[of].wishes;
        let Some(wish) = (if last { wishes.last() } else { wishes.first() }).copied() else { return };
        let (plane, link) = (&mut self.two.rigs[of].plane, self.two.links[of]);
        if plane.wished_for(link, &wish).is_none() {
            return;
        }
        assert!(self.sides[of].registered, "what is wished for is no region: {wish:?}");
        let share = if wish.writes { WRITABLE } else { 1 };
        let entry =
            Share { mapping: Arc::clone(&self.two.rigs[of].shown), lease: lease().into(), writable: wish.writes };
        drop(self.with_link(1 - of, |link| link.shares.insert(share, entry)));
        self.with_link(of, |link| link.shared.insert(share, Shared::CONFIRMED));
        let Some(grant) = self.two.rigs[of].plane.give(link, &wish, share) else { return };
        let shown = (IOVA + (SHOWN.start - FIRST) as u64, SHOWN.len() as u64);
        assert_eq!((grant.iova, grant.length), shown, "{grant:?}");
        assert_eq!(grant.access & !ALL.0, 0, "{grant:?}");
        let side = &mut self.sides[of];
        if side.grants.len() < 64 {
            side.grants.push(grant);
        }
        if side.wishes.len() > 8 {
            side.wishes.remove(0);
        }
    }

    fn tell(&mut self, of: usize, last: bool) {
        let grants = &self.sides[of].grants;
        let Some(grant) = (if last { grants.last() } else { grants.first() }).copied() else { return };
        // Memory that is not shared any more makes the claim one of no sense.
        let _ = self.two.rigs[1 - of].plane.take_grant(self.two.links[1 - of], grant);
    }

    fn claim(&mut self, of: usize, claim: &Claim) {
        let Claim { slot, generation, access, iova, length, tame } = *claim;
        let numbers = [100, 200];
        let length = if tame { u64::from(length) % SCRAP_BYTES as u64 + 1 } else { u64::from(length) << 20 };
        let grant = Grant {
            slot: u32::from(slot) % 1025,
            generation: u64::from(generation % 8),
            to: numbers[of],
            from: numbers[1 - of],
            key: self.two.rigs[of].key,
            access: u32::from(access),
            iova: if tame { IOVA + u64::from(iova) % LENGTH as u64 } else { u64::from(iova) << 32 | u64::from(iova) },
            length,
            share: SCRAP,
        };
        let _ = self.two.rigs[1 - of].plane.take_grant(self.two.links[1 - of], grant);
    }

    fn deregister(&mut self, of: usize) {
        if std::mem::take(&mut self.sides[of].registered) {
            let rig = &mut self.two.rigs[of];
            drop(rig.plane.regions.remove(rig.granted));
            rig.plane.revoke_region(1);
        }
    }

    fn register(&mut self, of: usize) {
        if !std::mem::replace(&mut self.sides[of].registered, true) {
            register(&mut self.two.rigs[of]);
        }
    }

    /// Both begin anew, as two programs that agree on it.
    fn reset(&mut self) {
        for of in 0..2 {
            let (port, number) = (2 - of as u16, [200, 100][of]);
            let side = &mut self.sides[of];
            (side.ledger, side.posted) = (Ledger::default(), 0);
            let rig = &mut self.two.rigs[of];
            rig.modify(&side.qp, QpState::RESET, 0, QpAttr::default(), None);
            rig.ready(&side.qp, number, Destination::Port(port));
        }
    }

    fn turns(&mut self, count: usize) {
        for _ in 0..count {
            (0..2).for_each(|of| self.turn(of, 5_000_000));
        }
    }

    fn turn(&mut self, of: usize, nanos: u64) {
        let plane = &mut self.two.rigs[of].plane;
        plane.now += nanos;
        plane.activate(0);
        plane.turn();
        let notices: Vec<Notice> = plane.take_notices().collect();
        for notice in notices {
            match notice {
                Notice::Device(Task::Share { .. }) if self.sides[of].registered => self.two.share(of),
                Notice::Device(Task::Bounce { .. }) => self.two.bounce(of),
                Notice::Device(Task::Grant { wish, .. }) => self.sides[of].wishes.push(wish),
                Notice::Device(Task::Fault { fault, .. }) => panic!("nobody has broken the link's protocol: {fault}"),
                Notice::Device(Task::Share { .. }) | Notice::Event { .. } => {}
            }
        }
        let wishes = &mut self.sides[of].wishes;
        let many = wishes.len().saturating_sub(32);
        wishes.drain(..many);
    }

    fn settle(&mut self) {
        for (rig, side) in self.two.rigs.iter_mut().zip(&mut self.sides) {
            for completion in completions(rig) {
                side.posted = side.posted.saturating_sub(1);
                side.ledger.settle(&completion);
            }
        }
    }

    fn end(&mut self) {
        for of in 0..2 {
            self.two.rigs[of].plane.to_error(0);
        }
        self.turns(20);
        self.settle();
        for of in 0..2 {
            self.sides[of].ledger.is_settled();
            is_untouched(&self.two.rigs[of]);
            let page = self.two.rigs[of].plane.tally.page();
            // Whatever the other end says that it has done, within what it can have: there were no hours.
            assert!(page.received.iter().all(|work| work.operations < 1 << 50), "{:?}", page.received);
        }
    }
}

fn lease() -> crate::fabric::budget::Lease {
    Budget::new(65_530).take_own(Amount { mappings: 1, bytes: MEMORY as u64 }).unwrap()
}
