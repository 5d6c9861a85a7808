//! The rings of a link, with a neighbour at the other end that was taken over.

use super::super::foreign::{BOUNCE, a_bounce};
use super::*;
use crate::device::soft::bounce;
use crate::device::soft::link::SLOTS_AT;
use crate::device::soft::qp::WireSequence;
use crate::device::soft::wire::{Kind, Request, Response, kind};
use arbitrary::Unstructured;

/// Where the slots of the end that made the link begin, and those of the other.
const VICTIMS: usize = SLOTS_AT[0];
const NEIGHBOURS: usize = SLOTS_AT[1];
const LINK_SLOTS: u32 = crate::device::soft::link::SLOTS;

#[derive(Debug, Arbitrary)]
enum Action {
    /// Of the container.
    Post(Send),
    Receive(Vec<Element>),
    /// Of the neighbour: a request, with its source.
    Request(Asked, Vec<[u64; 8]>),
    /// An answer: kind, status, which request, what it says.
    Answer(u8, u8, u8, Element, u64),
    /// Any words.
    Write([u64; 8], Vec<[u64; 8]>),
    /// What it says it has read, and whether it sleeps.
    Consumed(u32),
    ConsumedAll,
    Asleep(bool),
    /// It confirms, refuses or takes back what was shared.
    Confirm,
    Refuse,
    Unshare,
    Turn,
    Turns,
}

#[derive(Debug, Arbitrary)]
struct Asked {
    opcode: u8,
    solicited: bool,
    pieces: u8,
    sequence: u8,
    target: Element,
    offset: u32,
    total: u32,
    operands: [u64; 2],
}

struct Scene {
    rig: Rig,
    qp: RigQp,
    ledger: Ledger,
    posted: usize,
    file: SealedFile,
    link: LinkId,
    /// Both of the neighbour.
    speaks: Producer<'static>,
    hears: Consumer<'static>,
    _mapping: Arc<Mapping>,
    ended: bool,
}

/// One input.
pub fn run(data: &[u8]) {
    let mut input = Unstructured::new(data);
    let mut scene = Scene::new(input.arbitrary().unwrap_or_default());
    let mut next_id = 1;
    while !input.is_empty()
        && let Ok(action) = input.arbitrary()
    {
        scene.act(action, next_id);
        next_id += 1;
        scene.settle();
    }
    scene.rig.plane.to_error(scene.qp.queue);
    scene.turns(20);
    scene.settle();
    scene.ledger.is_settled();
    is_untouched(&scene.rig);
}

impl Scene {
    fn new(choice: u8) -> Self {
        let mut rig = guarded(shaping(choice));
        let file = SealedFile::create("link", BYTES).unwrap();
        let mapping = Arc::new(Mapping::of(&file).unwrap());
        let (bell, theirs) = Bell::new(closer()).unwrap();
        let wake = Ringer::adopt(Foreign::new(theirs, closer())).unwrap();
        let link = Link::new(Ends { own: 1, port: 2 }, End::Initiator, Arc::clone(&mapping), Some(wake), bell);
        let link = rig.plane.add_link(link);
        let qp = rig.qp(0, 100);
        rig.ready(&qp, 200, Destination::Port(2));
        // The neighbour's memory, which its proxy has shared.
        let shown = Arc::new(Mapping::of(&SealedFile::create("shown", 8 * PAGE).unwrap()).unwrap());
        let lease = Budget::new(65_530).take_own(Amount { mappings: 1, bytes: 8 * PAGE as u64 }).unwrap();
        rig.plane
            .device
            .links
            .get_mut(link)
            .unwrap()
            .shares
            .insert(1, Share { mapping: shown, lease: lease.into(), writable: false });
        let speaks = Producer::new(crate::shared::ring_slots(&mapping, NEIGHBOURS, LINK_SLOTS), 0);
        let hears = Consumer::new(crate::shared::ring_slots(&mapping, VICTIMS, LINK_SLOTS), 0);
        let ledger = Ledger::default();
        Self { rig, qp, ledger, posted: 0, file, link, speaks, hears, _mapping: mapping, ended: false }
    }

    fn act(&mut self, action: Action, next_id: u64) {
        let key = self.rig.key;
        match action {
            Action::Post(send) => {
                // What a library would write: here the neighbour is the one that lies.
                if send.elements.len() <= 4 && self.posted < 24 {
                    let (base, more, signaled) = send.pack(next_id, key, key);
                    self.posted += 1;
                    self.ledger.sends.push_back((next_id, signaled));
                    self.qp.send.push_extended(&base, &more);
                    self.rig.plane.activate(self.qp.queue);
                }
            }
            Action::Receive(elements) => {
                if elements.len() <= 4 && self.posted < 24 {
                    let (base, more) = receive(next_id, &elements, key);
                    self.posted += 1;
                    self.ledger.receives.push_back(next_id);
                    self.qp.receive.push_extended(&base, &more);
                }
            }
            Action::Request(asked, source) => {
                let request = Request {
                    to: 100,
                    from: 200,
                    opcode: Opcode(asked.opcode % 16),
                    solicited: asked.solicited,
                    pieces: asked.pieces,
                    sequence: WireSequence(asked.sequence.into()),
                    imm: 7,
                    offset: Element::bytes(asked.offset),
                    bytes: Element::bytes(asked.target.length),
                    total: Element::bytes(asked.total),
                    remote_addr: Element::address(asked.target.at),
                    rkey: asked.target.key(key),
                    // The generation of names, if it names any: most hold.
                    compare_add: if matches!(asked.pieces, 1..=32) { asked.operands[0] % 2 } else { asked.operands[0] },
                    swap: asked.operands[1],
                };
                self.speaks.push_extended(&request.pack(), &source[..source.len().min(20)]);
            }
            Action::Answer(kind, status, sequence, piece, value) => {
                let response = Response {
                    kind: Kind(kind % 10),
                    to: 100,
                    from: 200,
                    sequence: WireSequence(sequence.into()),
                    offset: Element::bytes(piece.at),
                    bytes: Element::bytes(piece.length),
                    status: WcStatus(status),
                    share: u32::from(piece.key % 4),
                    value,
                    // Most names hold.
                    generation: u64::from(value >> 62 == 3),
                    covers: (value >> 48) as u32 % 300,
                };
                self.speaks.push(&response.pack());
            }
            Action::Write(base, more) => self.speaks.push_extended(&base, &more[..more.len().min(20)]),
            Action::Consumed(position) => self.head(0, position),
            Action::ConsumedAll => self.head(0, self.hears.position()),
            Action::Asleep(asleep) => self.head(64, u32::from(asleep)),
            Action::Confirm => self.with_link(|link| {
                link.shared.values_mut().for_each(|shared| shared.confirmed = true);
            }),
            Action::Refuse => self.with_link(|link| {
                if link.shared.get(&1).is_some_and(|shared| !shared.confirmed) {
                    link.unshare(Some(1));
                }
            }),
            Action::Unshare => self.with_link(|link| drop(link.shares.remove(&1))),
            Action::Turn => self.turn(10_000),
            Action::Turns => self.turns(20),
        }
        self.rig.plane.share_arrived(self.link);
    }

    fn with_link(&mut self, change: impl FnOnce(&mut Link)) {
        if let Some(link) = self.rig.plane.device.links.get_mut(self.link) {
            change(link);
        }
    }

    /// A word in the head of the victim's ring, which is the neighbour's to write.
    fn head(&self, at: u64, word: u32) {
        rustix::io::pwrite(&self.file, &word.to_ne_bytes(), at).unwrap();
    }

    fn turns(&mut self, count: usize) {
        (0..count).for_each(|_| self.turn(5_000_000));
    }

    fn turn(&mut self, nanos: u64) {
        self.rig.plane.now += nanos;
        self.rig.plane.activate(self.qp.queue);
        self.rig.plane.turn();
        let mut bounces = false;
        for notice in self.rig.plane.take_notices() {
            match notice {
                Notice::Device(Task::Fault { link, .. }) => {
                    assert!(link == self.link && !self.ended, "a link ends twice");
                    self.ended = true;
                }
                Notice::Device(Task::Share { .. }) | Notice::Device(Task::Grant { .. }) => {
                    assert!(!self.ended, "something for a link that ended")
                }
                Notice::Device(Task::Bounce { .. }) => {
                    assert!(!self.ended, "a buffer for a link that ended");
                    bounces = true;
                }
                Notice::Event { .. } => {}
            }
        }
        if bounces {
            // The neighbour says by itself that it has mapped it.
            self.with_link(|link| {
                link.bounce.get_or_insert_with(|| a_bounce().0);
                link.shared.insert(BOUNCE, Shared::ASKED);
            });
        }
        assert_eq!(
            self.ended,
            self.rig.plane.device.links.get(self.link).is_none_or(|_| self.rig.plane.device.links.is_empty())
        );
    }

    /// Looks at what the container and the neighbour were told.
    fn settle(&mut self) {
        for completion in completions(&mut self.rig) {
            assert_eq!(completion.qp_num, 100);
            self.posted = self.posted.saturating_sub(1);
            self.ledger.settle(&completion);
        }
        while let Some(words) = self.hears.peek() {
            let mut slots = 1;
            match kind(&words) {
                Kind::REQUEST => {
                    let request = Request::unpack(&words);
                    slots += request.extensions().expect("ours are within the limits");
                    assert!(u64::from(request.offset) + u64::from(request.bytes) <= u64::from(request.total.max(1)));
                }
                Kind::DATA => {
                    let response = Response::unpack(&words);
                    let end = response.value.checked_add(u64::from(response.bytes));
                    let inside = response.share == BOUNCE && end.is_some_and(|end| end <= bounce::BYTES as u64);
                    assert!(inside, "what is shown is not in the buffer: {response:?}");
                }
                _ => {}
            }
            self.hears.advance(slots);
        }
    }
}
