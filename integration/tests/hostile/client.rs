//! A program of a container that keeps many queue pairs busy, without the library.

use anyhow::{Context, Result, ensure};
use ringfence_integration::raw::{Raw, ring_bell};
use ringfence_protocol::completion::Completion;
use ringfence_protocol::control::{
    AllocRegion, CqReply, CreateCq, CreateQp, Handle, Index, ModifyQp, MrReply, NO_HANDLE, Op, OpenReply, PortInfo,
    PortQuery, QpAttr, QpReply, RegMr, Segment,
};
use ringfence_protocol::doorbell::{SUMMARY_OFFSET, WORDS_OFFSET};
use ringfence_protocol::layout::RINGS_OFFSET;
use ringfence_protocol::ring::{SLOT_BYTES, Words};
use ringfence_protocol::verbs::{Access, Opcode, QpAttrMask as Mask, QpState, QpType, SendFlags, WcStatus};
use ringfence_protocol::work::{ReceiveBase, SendBase, SendFields, Sge};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};
use zerocopy::IntoBytes;

const IOVA: u64 = 0x1000_0000;
const ALL: Access = Access(15);

/// A connection with its objects.
pub struct Client {
    raw: Raw,
    doorbells: File,
    wake: OwnedFd,
    context: u32,
    pd: u32,
    cq: u32,
    completions: File,
    slots: u32,
    polled: u32,
    /// The port's.
    pub lid: u16,
    queues: Vec<Queue>,
    /// Bits of the queues in their words of the doorbells.
    bells: [u64; 64],
}

struct Queue {
    file: File,
    reply: QpReply,
    sent: u32,
    received: u32,
}

/// A registered region.
pub struct Memory {
    pub file: File,
    pub key: MrReply,
}

/// The other end of a connection, and the local ACK timeout.
#[derive(Clone, Copy)]
pub struct Other {
    pub lid: u16,
    pub qp_num: u32,
    pub timeout: u32,
}

fn only(fds: Vec<OwnedFd>) -> Result<OwnedFd> {
    fds.into_iter().next().context("a reply without its descriptor")
}

/// The words with the stamp of the lap in which they are written at `position` of `slots`.
fn stamped(mut words: Words, position: u32, slots: u32) -> Words {
    words[1] = (words[1] & !0xffff) | (u64::from(position / slots) + 1) & 0xffff;
    words
}

impl Client {
    /// `entries`: of the completion queue.
    pub fn new(socket: &Path, entries: u32) -> Result<Self> {
        let (mut raw, fds) = Raw::greet(socket)?;
        let [doorbells, wake] =
            <[OwnedFd; 2]>::try_from(fds).map_err(|fds| anyhow::anyhow!("{} descriptors", fds.len()))?;
        let (open, _events): (OpenReply, _) = raw.call(Op::OPEN, Index { index: 0, reserved: 0 }.as_bytes())?;
        let context = open.context;
        let (pd, _): (Handle, _) = raw.call(Op::ALLOC_PD, Handle { handle: context, reserved: 0 }.as_bytes())?;
        let create = CreateCq { context, cqe: entries, channel: NO_HANDLE, ..CreateCq::default() };
        let (cq, fds): (CqReply, _) = raw.call(Op::CREATE_CQ, create.as_bytes())?;
        let query = PortQuery { context, port: 1, ..PortQuery::default() };
        let (port, _): (PortInfo, _) = raw.call(Op::QUERY_PORT, query.as_bytes())?;
        Ok(Self {
            raw,
            doorbells: doorbells.into(),
            wake,
            context,
            pd: pd.handle,
            cq: cq.handle,
            completions: only(fds)?.into(),
            slots: cq.slots,
            polled: 0,
            lid: u16::try_from(port.lid)?,
            queues: Vec::new(),
            bells: [0; 64],
        })
    }

    /// Memory that nobody has touched, registered at the same address in every client.
    pub fn memory(&mut self, bytes: u64) -> Result<Memory> {
        let alloc = AllocRegion { context: self.context, reserved: 0, bytes };
        let (region, fds): (Handle, _) = self.raw.call(Op::ALLOC_REGION, alloc.as_bytes())?;
        let register = RegMr { pd: self.pd, access: ALL, iova: IOVA, length: bytes, segments: 1, ..RegMr::default() };
        let segment = Segment { region: region.handle, reserved: 0, offset: 0, length: bytes };
        let (key, _) = self.raw.call(Op::REG_MR, &[register.as_bytes(), segment.as_bytes()].concat())?;
        Ok(Memory { file: only(fds)?.into(), key })
    }

    /// Another queue pair.
    pub fn qp(&mut self, depth: u32) -> Result<usize> {
        let create = CreateQp {
            pd: self.pd,
            send_cq: self.cq,
            recv_cq: self.cq,
            qp_type: QpType::RC,
            max_send_wr: depth,
            max_recv_wr: depth,
            max_send_sge: 1,
            max_recv_sge: 1,
            cookie: self.queues.len() as u32,
            ..CreateQp::default()
        };
        let (reply, fds): (QpReply, _) = self.raw.call(Op::CREATE_QP, create.as_bytes())?;
        self.bells[reply.queue as usize / 64] |= 1 << (reply.queue % 64);
        self.queues.push(Queue { file: only(fds)?.into(), reply, sent: 0, received: 0 });
        Ok(self.queues.len() - 1)
    }

    pub fn number(&self, qp: usize) -> u32 {
        self.queues[qp].reply.qp_num
    }

    /// To RTS.
    pub fn connect(&mut self, qp: usize, to: Other) -> Result<()> {
        let mut init = QpAttr { state: QpState::INIT, port: 1, access: ALL, ..QpAttr::default() };
        init.mask = (Mask::STATE | Mask::PKEY_INDEX | Mask::PORT | Mask::ACCESS_FLAGS).0;
        let mut rtr = QpAttr {
            state: QpState::RTR,
            path_mtu: 5,
            dest_qp_num: to.qp_num,
            max_dest_rd_atomic: 16,
            min_rnr_timer: 1,
            ..QpAttr::default()
        };
        (rtr.av.dlid, rtr.av.port) = (to.lid, 1);
        rtr.mask = (Mask::STATE | Mask::AV | Mask::PATH_MTU | Mask::DEST_QPN | Mask::RQ_PSN).0
            | (Mask::MAX_DEST_RD_ATOMIC | Mask::MIN_RNR_TIMER).0;
        let rts = QpAttr { state: QpState::RTS, timeout: to.timeout, ..QpAttr::default() };
        let mut rts = QpAttr { retry_cnt: 7, rnr_retry: 7, max_rd_atomic: 16, ..rts };
        rts.mask = (Mask::STATE | Mask::TIMEOUT | Mask::RETRY_CNT | Mask::RNR_RETRY).0
            | (Mask::SQ_PSN | Mask::MAX_QP_RD_ATOMIC).0;
        [init, rtr, rts].into_iter().try_for_each(|attr| self.modify(qp, attr))
    }

    pub fn reset(&mut self, qp: usize) -> Result<()> {
        self.modify(qp, QpAttr { state: QpState::RESET, mask: Mask::STATE.0, ..QpAttr::default() })
    }

    fn modify(&mut self, qp: usize, attr: QpAttr) -> Result<()> {
        let Queue { reply, sent, received, .. } = &self.queues[qp];
        let modify =
            ModifyQp { handle: reply.handle, send_position: *sent, receive_position: *received, attr, reserved: 0 };
        let changed = self.raw.call::<[u8; 0]>(Op::MODIFY_QP, modify.as_bytes());
        changed.with_context(|| format!("to {:?}", attr.state)).map(drop)
    }

    fn write(file: &File, ring: u64, slots: u32, position: u32, words: Words) -> Result<()> {
        let at = ring + u64::from(position % slots) * SLOT_BYTES as u64;
        let words = stamped(words, position, slots);
        // The stamp goes last: whoever sees it sees the rest.
        file.write_all_at(words[..1].as_bytes(), at)?;
        file.write_all_at(words[2..].as_bytes(), at + 16)?;
        Ok(file.write_all_at(words[1].as_bytes(), at + 8)?)
    }

    /// Posts a request so many times, of which the last is signaled, and rings.
    pub fn post(&mut self, qp: usize, fields: &SendFields, times: u32) -> Result<()> {
        let Queue { file, reply, sent, .. } = &mut self.queues[qp];
        for left in (0..times).rev() {
            let flags = if left == 0 { SendFlags::SIGNALED } else { SendFlags(0) };
            let words = SendBase::pack(&SendFields { flags, ..*fields }).0;
            Self::write(file, RINGS_OFFSET as u64, reply.send_slots, *sent, words)?;
            *sent = sent.wrapping_add(1);
        }
        self.ring()
    }

    /// Posts a receive request.
    pub fn receive(&mut self, qp: usize, memory: &Memory, length: u32) -> Result<()> {
        let Queue { file, reply, received, .. } = &mut self.queues[qp];
        let ring = RINGS_OFFSET as u64 + u64::from(reply.send_slots) * SLOT_BYTES as u64;
        let sge = Sge { addr: IOVA, length, lkey: memory.key.lkey };
        Self::write(file, ring, reply.receive_slots, *received, ReceiveBase::pack(0, 1, sge).0)?;
        *received = received.wrapping_add(1);
        self.ring()
    }

    /// Rings for all queues, as the bits of others cannot be kept without memory that is shared.
    fn ring(&self) -> Result<()> {
        let mut summary = 0u64;
        for (word, bits) in self.bells.iter().enumerate().filter(|(_, bits)| **bits != 0) {
            self.doorbells.write_all_at(bits.as_bytes(), WORDS_OFFSET + word as u64 * 8)?;
            summary |= 1 << word;
        }
        self.doorbells.write_all_at(summary.as_bytes(), SUMMARY_OFFSET)?;
        let mut asleep = 0u32;
        self.doorbells.read_exact_at(asleep.as_mut_bytes(), 0)?;
        if asleep != 0 {
            ring_bell(&self.wake)?;
        }
        Ok(())
    }

    /// The next completion, if there is one; its cookie is the queue pair.
    pub fn poll(&mut self) -> Result<Option<Completion>> {
        let mut words: Words = [0; 8];
        let at = RINGS_OFFSET as u64 + u64::from(self.polled % self.slots) * SLOT_BYTES as u64;
        self.completions.read_exact_at(words.as_mut_bytes(), at)?;
        if words != stamped(words, self.polled, self.slots) {
            return Ok(None);
        }
        self.polled = self.polled.wrapping_add(1);
        self.completions.write_all_at(self.polled.as_bytes(), 0)?;
        Ok(Some(Completion::unpack(&words)))
    }

    /// The next completion, which must be a success.
    pub fn success(&mut self, within: Duration) -> Result<Completion> {
        let end = Instant::now() + within;
        loop {
            if let Some(completion) = self.poll()? {
                ensure!(completion.status == WcStatus::SUCCESS, "{completion:?}");
                return Ok(completion);
            }
            ensure!(Instant::now() < end, "no completion within {within:?}");
            std::thread::yield_now();
        }
    }
}

/// A request between the regions of two clients, at the beginning of each.
pub fn request(opcode: Opcode, length: u32, local: &Memory, remote: &Memory) -> SendFields {
    SendFields {
        opcode,
        sges: 1,
        sge: Sge { addr: IOVA, length, lkey: local.key.lkey },
        remote_addr: IOVA,
        rkey: remote.key.rkey,
        ..SendFields::default()
    }
}

/// Connects a queue pair of each with the other's.
pub fn join(a: &mut Client, b: &mut Client, depth: u32) -> Result<(usize, usize)> {
    let (qa, qb) = (a.qp(depth)?, b.qp(depth)?);
    let (to_b, to_a) = (b.number(qb), a.number(qa));
    a.connect(qa, Other { lid: b.lid, qp_num: to_b, timeout: 14 })?;
    b.connect(qb, Other { lid: a.lid, qp_num: to_a, timeout: 14 })?;
    Ok((qa, qb))
}

/// A queue pair that is connected to itself.
pub fn own(client: &mut Client, depth: u32) -> Result<usize> {
    let qp = client.qp(depth)?;
    let qp_num = client.number(qp);
    client.connect(qp, Other { lid: client.lid, qp_num, timeout: 14 })?;
    Ok(qp)
}
