//! Requests to and from other proxies: what goes over a [`super::link`] and what its answers mean.

use super::intake::vendor;
use super::link::{Link, LinkFault};
use super::links::LinkId;
use super::qp::{Data, Peer, Qp, Wqe};
use super::respond::Verdict;
use super::shaping::OnWire;
use super::transmit::{self, Handed, sges};
use super::wire::{self, Kind, Request, Response};
use super::{Notice, Plane};
use crate::memory::{Piece, RegionTable};
use crate::pacing::{self, Nanos};
use crate::state;
use ringfence_protocol::ring::Words;
use ringfence_protocol::verbs::{Access, Opcode, QpState, WcStatus};
use ringfence_protocol::work::{self, Sge};

/// A neighbour that has lost its processor answers late, but is not gone.
pub(super) const MIN_REMOTE_TIMEOUT: Nanos = 50_000_000;
/// Nor one whose control thread has other regions to map first.
const MIN_SHARE_TIMEOUT: Nanos = 500_000_000;
/// Between the first two tries where no one will wake us: for memory that is to be shared ...
const SHARE_POLL: Nanos = 100_000;
/// ... and for room on the link; this long at most, for it is no one's fault.
const ROOM_POLL: Nanos = 25_000;
const LONGEST_ROOM_POLL: Nanos = 2_000_000;

impl Plane {
    /// The link for a piece of a queue pair that uses link `at`: another from now on, if that has been superseded and nothing is
    /// under way that could be overtaken.
    fn link_for(&mut self, queue: u32, index: usize, piece: &OnWire, at: LinkId) -> LinkId {
        let Some(link) = self.links.get(at) else { return at };
        if !link.superseded || index > 0 {
            return at;
        }
        let better = self.links.to(link.port).unwrap_or(at);
        match &mut self.qps[queue as usize] {
            Some(qp) if qp.pending[index].done == piece.offset => {
                qp.peer = Peer::Link(better);
                better
            }
            _ => at,
        }
    }

    /// Sends a piece to the proxy at the other end of link `at`.
    pub(super) fn send_request(&mut self, queue: u32, index: usize, piece: &OnWire, at: LinkId) -> Handed {
        let at = self.link_for(queue, index, piece, at);
        let Self { qps, regions, links, notices, .. } = self;
        let Some(qp) = &mut qps[queue as usize] else { return Handed::Stop };
        let Some(link) = links.get_mut(at) else {
            qp.peer = Peer::None;
            return self.settle(queue, index, piece, Verdict::Silent);
        };
        let wqe = &qp.pending[index];
        let mut extensions: Vec<Words> = Vec::new();
        let pieces = match pack_source(qp, wqe, piece, regions, link, &mut extensions) {
            Ok(pieces) => pieces,
            Err(Source::Fault(_)) if index > 0 => {
                // The region went after the request was admitted: it fails when those before it are complete.
                qp.rewind(index, piece.offset);
                qp.pending[index].admitted = false;
                return Handed::Stop;
            }
            Err(Source::Fault(vendor_err)) => return self.give_up(queue, index, WcStatus::LOC_PROT_ERR, vendor_err),
            Err(Source::NotShared(key, share)) => {
                if link.shared.insert(share, false).is_none() {
                    regions.lend(key);
                    notices.push(Notice::Share { link: at, share });
                }
                qp.rewind(index, piece.offset);
                qp.waits.share = true;
                // A neighbour that never confirms, or refuses, is one that never answers.
                self.await_answer(queue, MIN_SHARE_TIMEOUT);
                return Handed::Stop;
            }
        };
        let request = transmit::request(qp, wqe, piece, pieces);
        match link.request(&request, &extensions) {
            Ok(true) => {
                link.flush();
                if qp.waits.deadline == 0 {
                    self.await_answer(queue, MIN_REMOTE_TIMEOUT);
                }
                Handed::On
            }
            Ok(false) => {
                qp.rewind(index, piece.offset);
                let at = qp.put_off(self.now, ROOM_POLL, LONGEST_ROOM_POLL);
                qp.waits.until = at;
                self.alarm(at, queue);
                Handed::Stop
            }
            Err(fault) => {
                self.fail_link(at, fault);
                // Looked at again in the next turn, it finds another link or none.
                self.alarm(self.now, queue);
                Handed::Stop
            }
        }
    }

    /// Sees that an answer which does not come is missed, unless that is seen to.
    fn await_answer(&mut self, queue: u32, least: Nanos) {
        let now = self.now;
        let Some(qp) = &mut self.qps[queue as usize] else { return };
        if qp.waits.deadline == 0
            && let Some(timeout) = state::ack_timeout_nanos(qp.attr.timeout)
        {
            let at = now + timeout.max(least);
            qp.waits.deadline = at;
            self.alarm(at, queue);
        }
    }

    /// Takes one message off a link. False if there was none.
    pub(super) fn receive(&mut self, at: LinkId) -> Result<bool, LinkFault> {
        let Some(link) = self.links.get_mut(at) else { return Ok(false) };
        let Some(words) = link.peek() else { return Ok(false) };
        if wire::kind(&words) != Kind::REQUEST {
            link.advance(1);
            link.outstanding = link.outstanding.saturating_sub(1);
            self.on_response(at, &Response::unpack(&words));
            return Ok(true);
        }
        let request = Request::unpack(&words);
        let port = link.port;
        let extensions = request.extensions().ok_or(LinkFault::Malformed)?;
        let mut inline = Vec::new();
        let known = read_source(link, &request, extensions, &mut self.from, &mut inline)?;
        link.advance(1 + extensions);
        let verdict = if !known {
            // Its memory region was deregistered while the request was under way.
            Verdict::Nak(WcStatus::REM_OP_ERR)
        } else if let Some((share, key)) = self.must_share(at, &request) {
            if let Some(link) = self.links.get_mut(at)
                && link.shared.insert(share, false).is_none()
            {
                self.regions.lend(key);
                self.notices.push(Notice::Share { link: at, share });
            }
            return self.answer(at, &request, Kind::LATER, WcStatus::SUCCESS, 0, 0).map(|()| true);
        } else {
            self.respond(port, &request)
        };
        let (kind, status, share, value) = match verdict {
            Verdict::Ack => (Kind::ACK, WcStatus::SUCCESS, 0, 0),
            Verdict::Silent => (Kind::DROPPED, WcStatus::SUCCESS, 0, 0),
            Verdict::Rnr(timer) => (Kind::RNR, WcStatus::SUCCESS, 0, u64::from(timer)),
            Verdict::Nak(status) => (Kind::NAK, status, 0, 0),
            Verdict::Value(former) => (Kind::ATOMIC, WcStatus::SUCCESS, 0, former),
            Verdict::Data(piece, key) => match self.regions.get(key) {
                Some(region) => (Kind::GRANT, WcStatus::SUCCESS, region.share, region.mapping_offset(&piece)),
                None => (Kind::NAK, WcStatus::REM_OP_ERR, 0, 0),
            },
        };
        self.answer(at, &request, kind, status, share, value).map(|()| true)
    }

    fn answer(
        &mut self,
        at: LinkId,
        request: &Request,
        kind: Kind,
        status: WcStatus,
        share: u32,
        value: u64,
    ) -> Result<(), LinkFault> {
        let Some(link) = self.links.get_mut(at) else { return Ok(()) };
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
        })
    }

    /// Whether a READ asks for memory that its proxy cannot reach yet: the region's name and key.
    fn must_share(&self, at: LinkId, request: &Request) -> Option<(u32, u32)> {
        if request.opcode != Opcode::RDMA_READ || request.total == 0 {
            return None;
        }
        let link = self.links.get(at)?;
        let qp = self.qps[*self.by_number.get(&request.to)? as usize].as_ref()?;
        let allowed = qp.responds()
            && qp.attr.dest_qp_num == request.from
            && qp.port == link.port
            && qp.attr.access.contains(Access::REMOTE_READ);
        let total = u64::from(request.total);
        if !allowed || self.regions.admit(request.rkey, qp.pd, request.remote_addr, total, Access::REMOTE_READ).is_err()
        {
            return None;
        }
        let region = self.regions.get(request.rkey)?;
        (link.shared.get(&region.share) != Some(&true)).then_some((region.share, request.rkey))
    }

    fn on_response(&mut self, at: LinkId, response: &Response) {
        let Some(&queue) = self.by_number.get(&response.to) else { return };
        let Some(qp) = &mut self.qps[queue as usize] else { return };
        if qp.peer != Peer::Link(at) || qp.attr.dest_qp_num != response.from || qp.state == QpState::ERR {
            return;
        }
        // Only the answer that is due counts; others belong to pieces that were sent twice.
        let Some(wqe) = qp.pending.front().filter(|wqe| wqe.sequence == response.sequence) else { return };
        let end = response.offset.checked_add(response.bytes);
        if response.offset != wqe.done || end.is_none_or(|end| end > wqe.total || (end > wqe.sent && wqe.total > 0)) {
            return;
        }
        let (opcode, total) = (wqe.opcode, wqe.total);
        let piece = OnWire {
            finish: 0,
            queue,
            incarnation: qp.incarnation,
            epoch: qp.epoch,
            sequence: response.sequence,
            offset: response.offset,
            bytes: response.bytes,
        };
        let atomic = matches!(opcode, Opcode::CMP_AND_SWP | Opcode::FETCH_AND_ADD);
        let verdict = match response.kind {
            Kind::ACK if !atomic && (opcode != Opcode::RDMA_READ || total == 0) => Verdict::Ack,
            Kind::GRANT if opcode == Opcode::RDMA_READ => {
                let link = self.links.get(at);
                match link.and_then(|link| link.shared_piece(response.share, response.value, response.bytes)) {
                    Some(data) => Verdict::Data(data, 0),
                    None => Verdict::Nak(WcStatus::BAD_RESP_ERR),
                }
            }
            Kind::ATOMIC if atomic => Verdict::Value(response.value),
            Kind::RNR => Verdict::Rnr(response.value as u32 % 32),
            Kind::NAK => Verdict::Nak(match response.status {
                WcStatus::REM_ACCESS_ERR | WcStatus::REM_INV_REQ_ERR => response.status,
                _ => WcStatus::REM_OP_ERR,
            }),
            Kind::LATER => {
                // The share comes by another way, and may have come already.
                qp.rewind(0, response.offset);
                let at = qp.put_off(self.now, SHARE_POLL, pacing::LONGEST_PAUSE);
                qp.waits.until = at;
                self.alarm(at, queue);
                return;
            }
            // The deadline decides.
            Kind::DROPPED => return,
            _ => Verdict::Nak(WcStatus::BAD_RESP_ERR),
        };
        if self.settle(queue, 0, &piece, verdict) == Handed::On {
            self.extend_deadline(queue);
            self.activate(queue);
        }
    }

    fn extend_deadline(&mut self, queue: u32) {
        let now = self.now;
        let Some(qp) = &mut self.qps[queue as usize] else { return };
        let waiting = qp.pending.front().is_some_and(|wqe| wqe.sent_all || wqe.sent > wqe.done);
        qp.waits.deadline = match state::ack_timeout_nanos(qp.attr.timeout) {
            // The alarm that is already set finds the new deadline and sets itself again.
            Some(timeout) if waiting => now + timeout.max(MIN_REMOTE_TIMEOUT),
            _ => 0,
        };
    }

    /// Memory was shared over this link, in either direction: whoever waited for that goes on.
    pub fn share_arrived(&mut self, at: LinkId) {
        for queue in 0..self.qps.len() {
            let Some(qp) = &mut self.qps[queue] else { continue };
            if qp.peer == Peer::Link(at) && std::mem::take(&mut qp.waits.share) {
                self.activate(queue as u32);
            }
        }
    }
}

enum Source {
    /// A local key does not hold any more.
    Fault(u16),
    /// The region with this key and name is not shared with the neighbour yet.
    NotShared(u32, u32),
}

/// Packs the source of a piece for another proxy: the data if they were inline, else where they are.
fn pack_source(
    qp: &Qp,
    wqe: &Wqe,
    piece: &OnWire,
    regions: &RegionTable,
    link: &Link,
    extensions: &mut Vec<Words>,
) -> Result<u8, Source> {
    if wqe.fetches() || piece.bytes == 0 {
        return Ok(0);
    }
    if let Data::Inline(data) = &wqe.data {
        let data = &data[piece.offset as usize..(piece.offset + piece.bytes) as usize];
        for part in data.chunks(work::EXTENSION_INLINE as usize) {
            let mut words = [0u64; 7];
            zerocopy::IntoBytes::as_mut_bytes(&mut words)[..part.len()].copy_from_slice(part);
            extensions.push(work::pack_inline(&words));
        }
        return Ok(wire::INLINE);
    }
    let (mut offset, mut bytes) = (u64::from(piece.offset), u64::from(piece.bytes));
    let mut list: Vec<Sge> = Vec::new();
    for sge in sges(&wqe.data).iter().filter(|sge| sge.length > 0) {
        let skipped = offset.min(u64::from(sge.length));
        offset -= skipped;
        let length = (u64::from(sge.length) - skipped).min(bytes);
        if length == 0 {
            continue;
        }
        bytes -= length;
        let memory = regions
            .admit(sge.lkey, qp.pd, sge.addr + skipped, length, Access(0))
            .map_err(|fault| Source::Fault(fault as u16))?;
        let region = regions.get(sge.lkey).ok_or(Source::Fault(vendor::REMOTE))?;
        if link.shared.get(&region.share) != Some(&true) {
            return Err(Source::NotShared(sge.lkey, region.share));
        }
        list.push(Sge { addr: region.mapping_offset(&memory), length: length as u32, lkey: region.share });
    }
    extensions.extend(list.chunks(work::SGES_PER_EXTENSION as usize).map(work::pack_sges));
    Ok(list.len() as u8)
}

/// The source of a request from another proxy. False if it names memory that is not shared (any more).
fn read_source(
    link: &Link,
    request: &Request,
    extensions: u32,
    from: &mut Vec<Piece>,
    inline: &mut Vec<u8>,
) -> Result<bool, LinkFault> {
    from.clear();
    if request.pieces == wire::INLINE {
        for index in 0..extensions {
            let words = work::extension_inline(&link.extension(index).ok_or(LinkFault::Malformed)?);
            inline.extend_from_slice(zerocopy::IntoBytes::as_bytes(&words));
        }
        inline.truncate(request.bytes as usize);
        from.push(Piece::of_own(inline));
        return Ok(true);
    }
    let mut total = 0;
    for index in 0..u32::from(request.pieces) {
        let words = link.extension(index / work::SGES_PER_EXTENSION).ok_or(LinkFault::Malformed)?;
        let sge = work::extension_sge(&words, index % work::SGES_PER_EXTENSION);
        let Some(piece) = link.shared_piece(sge.lkey, sge.addr, sge.length) else { return Ok(false) };
        total += u64::from(sge.length);
        from.push(piece);
    }
    let fetches = matches!(request.opcode, Opcode::RDMA_READ | Opcode::CMP_AND_SWP | Opcode::FETCH_AND_ADD);
    if !fetches && total != u64::from(request.bytes) {
        return Err(LinkFault::Malformed);
    }
    Ok(true)
}
