//! Requests of other proxies: what comes over a [`super::link`], in turns, and how it is answered.

use super::express::remote_rights;
use super::link::{LinkFault, Room};
use super::links::LinkId;
use super::qp::Acknowledge;
use super::respond::{Named, Verdict};
use super::source::Origin;
use super::wire::{self, Kind, Request, Response};
use super::{Notice, Plane, Qp, Soft, Task};
use crate::pacing::Nanos;
use crate::plane::claim::fetches;
use ringfence_protocol::verbs::{Access, EventType, Opcode, WcStatus};

/// What one link may cost in a turn, in bytes that are copied: as much as one piece, so that whoever else sends to this container
/// waits for no more than that of each link.
const TURN: u32 = wire::LONGEST;
/// What each slot of a message costs besides: 64 requests of nothing are as long as a piece.
const MESSAGE: u32 = TURN / 64;

/// What is said to a requester besides which of its requests it is about.
#[derive(Clone, Copy, Debug)]
struct Answer {
    kind: Kind,
    status: WcStatus,
    share: u32,
    value: u64,
    generation: u64,
}

impl Answer {
    fn of(kind: Kind) -> Self {
        Self { kind, status: WcStatus::SUCCESS, share: 0, value: 0, generation: 0 }
    }

    fn refusal(status: WcStatus) -> Self {
        Self { status, ..Self::of(Kind::NAK) }
    }
}

impl Plane {
    /// Gives each link its turn.
    pub(crate) fn serve_links(&mut self) -> bool {
        let mut worked = false;
        for place in 0..self.device.links.places() {
            let Some(at) = self.device.links.at(place) else { continue };
            match self.serve_link(at) {
                Ok(served) => worked |= served,
                Err(fault) => self.fail_link(at, fault),
            }
            // Of a link that has just ended, some are left. They are nobody's: what is not acknowledged is asked for again.
            for queue in self.device.acknowledges.drain(..) {
                if let Some(qp) = &mut self.qps[queue as usize] {
                    qp.device.responder.owed = None;
                }
            }
        }
        worked
    }

    /// Takes messages off a link, so many that no neighbour holds up others, nor the own container, for longer than some
    /// microseconds; what is said of all of them is said once. False if there was none.
    fn serve_link(&mut self, at: LinkId) -> Result<bool, LinkFault> {
        let mut left = TURN;
        while left > 0 {
            match self.receive(at)? {
                Some(cost) => left = left.saturating_sub(cost),
                None => break,
            }
        }
        if left == TURN {
            return Ok(false);
        }
        for index in 0..self.device.acknowledges.len() {
            self.acknowledge(at, self.device.acknowledges[index])?;
        }
        if let Some(link) = self.device.links.get_mut(at) {
            link.publish();
            link.end_turn();
            link.flush();
        }
        Ok(true)
    }

    /// Takes one message off a link; what it took of the link's turn, or nothing if there was none.
    fn receive(&mut self, at: LinkId) -> Result<Option<u32>, LinkFault> {
        let Some(link) = self.device.links.get_mut(at) else { return Ok(None) };
        let Some(words) = link.peek() else { return Ok(None) };
        if wire::kind(&words) == Kind::MORE {
            link.advance(1);
            self.renew_reads(at);
            return Ok(Some(MESSAGE));
        }
        if wire::kind(&words) != Kind::REQUEST {
            link.advance(1);
            let response = Response::unpack(&words);
            link.outstanding = link.outstanding.saturating_sub(response.covers.max(1));
            self.on_response(at, &response);
            let copied = if response.kind == Kind::DATA { response.bytes } else { 0 };
            return Ok(Some(MESSAGE.saturating_add(copied)));
        }
        let request = Request::unpack(&words);
        let port = link.port;
        let extensions = request.extensions().ok_or(LinkFault::Malformed)?;
        let cost = (MESSAGE * (1 + extensions)).saturating_add(request.bytes);
        self.device.incoming.read(link, &request, extensions)?;
        link.advance(1 + extensions);
        self.execute(at, port, &request).map(|()| Some(cost))
    }

    /// Executes the request that `device.incoming` has the source of, and sees that it is answered.
    fn execute(&mut self, at: LinkId, port: u16, request: &Request) -> Result<(), LinkFault> {
        let queue = self.by_number.get(&request.to).copied();
        let verdict = if self.must_prepare(at, request)? {
            return self.answer(at, queue, request, Answer::of(Kind::LATER));
        } else if let Err(wait) = self.may_be_fetched(at, request) {
            self.tally.read_deferred();
            return self.answer(at, queue, request, Answer { value: wait.max(1), ..Answer::of(Kind::LATER) });
        } else {
            queue.map_or(Verdict::Silent, |queue| self.respond_as(queue, port, request, Origin::Link(at)))
        };
        if matches!(verdict, Verdict::Ack | Verdict::Data(..) | Verdict::Value(_)) {
            self.offer(at, request);
        }
        if request.opcode == Opcode::RDMA_READ && matches!(verdict, Verdict::Ack) {
            // A READ of nothing is a packet out of here nevertheless.
            self.shaping.was_read(port, 0);
        }
        let answer = match (verdict, queue) {
            (Verdict::Ack, Some(queue)) => return self.owe(at, queue, request),
            (Verdict::Ack | Verdict::Silent, _) => Answer::of(Kind::DROPPED),
            (Verdict::Unnamed, _) => Answer::of(Kind::LATER),
            (Verdict::Rnr(timer), _) => Answer { value: u64::from(timer), ..Answer::of(Kind::RNR) },
            (Verdict::Nak(status), _) => Answer::refusal(status),
            (Verdict::Value(former), _) => Answer { value: former, ..Answer::of(Kind::ATOMIC) },
            (Verdict::Data(data), queue) => self.show_data(at, queue, request, data)?,
            // Its memory region was deregistered while the request was under way.
            (Verdict::Lost(_), _) => Answer::refusal(WcStatus::REM_OP_ERR),
        };
        if matches!(answer.kind, Kind::DATA | Kind::ATOMIC) {
            // Before it is charged: at a rate that binds nothing is left afterwards, and each READ would have to ask.
            if self.shaping.reads_ahead_with() {
                self.renew_reads(at);
            }
            self.shaping.was_read(port, request.bytes);
            self.renew_reads(at);
        }
        self.answer(at, queue, request, answer)
    }

    /// Has the acknowledge of a request wait for those behind it, which one may be for all.
    fn owe(&mut self, at: LinkId, queue: u32, request: &Request) -> Result<(), LinkFault> {
        let Request { from: to, sequence, offset, bytes, .. } = *request;
        let former = self.qps[queue as usize].as_ref().and_then(|qp| qp.device.responder.owed);
        let covers = match former {
            // Not one that was executed before, and is asked for again.
            Some(owed) if owed.to == to && !sequence.is_before(owed.sequence) => owed.covers + 1,
            Some(_) => {
                self.acknowledge(at, queue)?;
                1
            }
            None => 1,
        };
        if let Some(qp) = &mut self.qps[queue as usize]
            && qp.device.responder.owed.replace(Acknowledge { to, sequence, offset, bytes, covers }).is_none()
        {
            self.device.acknowledges.push(queue);
        }
        Ok(())
    }

    /// Sends the acknowledge that a queue pair owes.
    fn acknowledge(&mut self, at: LinkId, queue: u32) -> Result<(), LinkFault> {
        let Some(qp) = &mut self.qps[queue as usize] else { return Ok(()) };
        let Some(Acknowledge { to, sequence, offset, bytes, covers }) = qp.device.responder.owed.take() else {
            return Ok(());
        };
        let from = qp.number;
        let Some(link) = self.device.links.get_mut(at) else { return Ok(()) };
        let Answer { kind, status, share, value, generation } = Answer::of(Kind::ACK);
        link.respond(&Response { kind, to, from, sequence, offset, bytes, status, share, value, generation, covers })
    }

    /// Answers a request, after all that its queue pair, if it has one, owes for those before it.
    fn answer(&mut self, at: LinkId, queue: Option<u32>, request: &Request, answer: Answer) -> Result<(), LinkFault> {
        if let Some(queue) = queue {
            self.acknowledge(at, queue)?;
        }
        let Some(link) = self.device.links.get_mut(at) else { return Ok(()) };
        let Answer { kind, status, share, value, generation } = answer;
        link.respond(&Response {
            kind,
            to: request.from,
            from: request.to,
            sequence: request.sequence,
            offset: request.offset,
            bytes: request.bytes,
            status,
            share,
            value,
            generation,
            covers: 1,
        })
    }

    /// The queue pair of ours that a READ or an atomic is for, if it may make any.
    fn fetched_from(&self, at: LinkId, request: &Request) -> Option<&Qp> {
        if !fetches(request.opcode) {
            return None;
        }
        let link = self.device.links.get(at)?;
        let qp = self.qps[*self.by_number.get(&request.to)? as usize].as_deref()?;
        let allowed = qp.responds()
            && qp.attr.dest_qp_num == request.from
            && qp.device.port == link.port
            && remote_rights(qp, request.opcode).is_some();
        allowed.then_some(qp)
    }

    /// Whether the container's rate lets out what a READ or an atomic asks for; else how long its requester should wait.
    fn may_be_fetched(&mut self, at: LinkId, request: &Request) -> Result<(), Nanos> {
        let Some(port) = self.fetched_from(at, request).map(|qp| qp.device.port) else { return Ok(()) };
        self.shaping.may_be_read(port, request.bytes, self.now)
    }

    /// Whether a READ must come again, as there is no room for its data in the buffer that the other end reads; then that is seen to.
    fn must_prepare(&mut self, at: LinkId, request: &Request) -> Result<bool, LinkFault> {
        let reads = request.opcode == Opcode::RDMA_READ;
        let names = reads && request.total > 0;
        let Some(pd) = self.fetched_from(at, request).filter(|_| names).map(|qp| qp.pd) else { return Ok(false) };
        let Self { device: Soft { links, .. }, regions, notices, .. } = self;
        let Some(link) = links.get_mut(at) else { return Ok(false) };
        let total = u64::from(request.total);
        if regions.admit(request.rkey, pd, request.remote_addr, total, Access::REMOTE_READ).is_err() {
            return Ok(false);
        }
        let room = link.bounce_room(request.bytes, 0)?;
        if room == Room::NotShared && !std::mem::replace(&mut link.bounce_asked, true) {
            notices.push(Notice::Device(Task::Bounce { link: at }));
        }
        Ok(!matches!(room, Room::At(_)))
    }

    /// Answers a READ: its data are as they are now, whatever the container does to its memory, its queue pair or its region before
    /// the other end takes them. Requests behind it may tell the container's application that it can.
    fn show_data(
        &mut self,
        at: LinkId,
        queue: Option<u32>,
        request: &Request,
        data: Named,
    ) -> Result<Answer, LinkFault> {
        // The buffer is in use until the next message has been read, which must be this answer.
        if let Some(queue) = queue {
            self.acknowledge(at, queue)?;
        }
        let refused = Answer::refusal(WcStatus::REM_OP_ERR);
        let Self { regions, device: Soft { links, .. }, .. } = self;
        // The container can have taken the region back since the responder looked.
        let (Ok(piece), Some(link)) = (data.find(regions), links.get_mut(at)) else { return Ok(refused) };
        let (Room::At(place), Some(bounce)) = (link.bounce_room(request.bytes, 0)?, &link.bounce) else {
            return Ok(refused);
        };
        if bounce.fill(place, &[piece]).is_ok() {
            let share = bounce.share;
            let generation = link.answer_from(place);
            return Ok(Answer { share, value: place.offset(), generation, ..Answer::of(Kind::DATA) });
        }
        if let Some(&queue) = self.by_number.get(&request.to) {
            self.refuse(queue, WcStatus::REM_ACCESS_ERR, EventType::QP_ACCESS_ERR);
        }
        Ok(Answer::refusal(WcStatus::REM_ACCESS_ERR))
    }
}
