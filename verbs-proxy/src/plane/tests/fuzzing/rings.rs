//! Send and receive rings, of a container that talks to itself.

use super::*;
use arbitrary::Unstructured;
use ringfence_protocol::ring::Slot;

/// What the container does next.
#[derive(Debug, Arbitrary)]
enum Action {
    Post(bool, Send),
    Receive(bool, Vec<Element>),
    /// An entry of any words.
    Write(bool, [u64; 8], Vec<[u64; 8]>),
    WriteReceive(bool, [u64; 8], Vec<[u64; 8]>),
    /// A word of a ring, stamps included.
    Scribble(bool, u16, u64),
    /// What was polled.
    Consumed(u32),
    Turn,
    Turns,
    Ring(u8),
    Fail(bool),
    Reset(bool),
    /// The region is withdrawn, or comes back under its key.
    Withdraw,
    Restore,
}

/// More than that, and a completion queue of this size could overflow though all that is due is polled.
const MOST_POSTED: usize = 48;

struct End {
    qp: RigQp,
    ledger: Ledger,
    posted: usize,
}

/// One input.
pub fn run(data: &[u8]) {
    let mut input = Unstructured::new(data);
    let mut rig = guarded(shaping(input.arbitrary().unwrap_or_default()));
    let (a, b) = rig.pair();
    let mut ends = [a, b].map(|qp| End { qp, ledger: Ledger::default(), posted: 0 });
    // Whether the container has done nothing yet that a library would not, so that what is due to it is known.
    let mut honest = true;
    let mut next_id = 1;
    while !input.is_empty()
        && let Ok(action) = input.arbitrary()
    {
        act(&mut rig, &mut ends, &mut honest, &mut next_id, action);
        settle(&mut rig, &mut ends, honest);
    }
    for end in &ends {
        rig.plane.to_error(end.qp.queue);
        rig.plane.activate(end.qp.queue);
    }
    rig.turns();
    settle(&mut rig, &mut ends, honest);
    if honest {
        ends.iter().for_each(|end| end.ledger.is_settled());
    }
    is_untouched(&rig);
}

fn act(rig: &mut Rig, ends: &mut [End; 2], honest: &mut bool, next_id: &mut u64, action: Action) {
    let key = rig.key;
    match action {
        Action::Post(of, send) => {
            let end = &mut ends[usize::from(of)];
            let (base, more, signaled) = send.pack(*next_id, key, key);
            // What the queue pair was not made for breaks the protocol, whoever writes it.
            *honest &= send.elements.len() <= 4 && end.posted < MOST_POSTED;
            end.posted += 1;
            end.ledger.sends.push_back((*next_id, signaled));
            end.qp.send.push_extended(&base, &more);
            *next_id += 1;
        }
        Action::Receive(of, elements) => {
            let end = &mut ends[usize::from(of)];
            let (base, more) = receive(*next_id, &elements, key);
            *honest &= elements.len() <= 4 && end.posted < MOST_POSTED;
            end.posted += 1;
            end.ledger.receives.push_back(*next_id);
            end.qp.receive.push_extended(&base, &more);
            *next_id += 1;
        }
        Action::Write(of, base, more) => {
            *honest = false;
            ends[usize::from(of)].qp.send.push_extended(&base, &more[..more.len().min(20)]);
        }
        Action::WriteReceive(of, base, more) => {
            *honest = false;
            ends[usize::from(of)].qp.receive.push_extended(&base, &more[..more.len().min(20)]);
        }
        Action::Scribble(of, at, word) => {
            *honest = false;
            scribble(&ends[usize::from(of)].qp, usize::from(at), word);
        }
        Action::Consumed(position) => {
            *honest = false;
            rig._cq.header::<CqHeader>(0).set_consumed(position);
        }
        Action::Turn => {
            rig.plane.now += 1_000;
            rig.plane.activate(0);
            rig.plane.turn();
        }
        Action::Turns => {
            rig.plane.activate(0);
            rig.plane.activate(1);
            rig.turns();
        }
        Action::Ring(queue) => drop(rig.plane.doorbells.ring(u32::from(queue))),
        Action::Fail(of) => rig.plane.to_error(ends[usize::from(of)].qp.queue),
        Action::Reset(of) => {
            let end = &mut ends[usize::from(of)];
            rig.modify(&end.qp, QpState::RESET, 0, QpAttr::default(), None);
            let peer = if end.qp.number == 100 { 200 } else { 100 };
            rig.ready(&end.qp, peer, Destination::Own);
            // What completed before is still to be polled: afterwards nobody knows what is due.
            *honest = false;
        }
        Action::Withdraw => {
            // Requests of before may fail or succeed; either is one completion.
            let _ = rig.plane.regions.word(key).withdraw(rig.granted.incarnation, key);
        }
        Action::Restore => {
            let _ = rig.plane.regions.word(key).restore(rig.granted.incarnation, key);
        }
    }
}

fn settle(rig: &mut Rig, ends: &mut [End; 2], honest: bool) {
    if !honest {
        // Whatever was written into the queue's memory, it is for the container.
        rig.completions();
        return;
    }
    for completion in completions(rig) {
        let end = ends.iter_mut().find(|end| end.qp.number == completion.qp_num);
        let end = end.unwrap_or_else(|| panic!("{completion:?} is of no queue pair"));
        end.posted = end.posted.saturating_sub(1);
        end.ledger.settle(&completion);
    }
}

/// Any word of both rings, as a container can.
fn scribble(qp: &RigQp, at: usize, word: u64) {
    let slots: [&[Slot]; 2] = [
        crate::shared::ring_slots(&qp._mapping, RINGS_OFFSET, SLOTS),
        crate::shared::ring_slots(&qp._mapping, RINGS_OFFSET + SLOTS as usize * SLOT_BYTES, SLOTS),
    ];
    let slot = &slots[at / 8 / SLOTS as usize % 2][at / 8 % SLOTS as usize];
    slot.scribble(at % 8, word);
}
