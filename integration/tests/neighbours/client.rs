//! A program of a container that says what it likes to its proxy, with many queue pairs.

use anyhow::{Context, Result, bail, ensure};
use ringfence_integration::raw::{Raw, ring_bell};
use ringfence_protocol::completion::Completion;
use ringfence_protocol::control::{
    AllocRegion, CqReply, CreateCq, CreateQp, Handle, Index, ModifyQp, MrReply, NO_HANDLE, Op, OpenReply, PortInfo,
    PortQuery, QpAttr, QpReply, RegMr, Segment,
};
use ringfence_protocol::doorbell::{SUMMARY_OFFSET, WORDS_OFFSET};
use ringfence_protocol::layout::RINGS_OFFSET;
use ringfence_protocol::ring::{SLOT_BYTES, Words};
use ringfence_protocol::verbs::{Access, Opcode, QpAttrMask as Mask, QpState, QpType, SendFlags};
use ringfence_protocol::work::{SendBase, SendFields, Sge};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};
use zerocopy::IntoBytes;

const PAGE: u64 = 4096;

/// Runs that one message to register a region has room for.
pub const RUNS_PER_MESSAGE: u64 = 160;

/// A connection with its objects.
pub struct Client {
    raw: Raw,
    doorbells: File,
    wake: OwnedFd,
    context: u32,
    pd: u32,
    cq: u32,
    completions: File,
    polled: u64,
    /// The port's.
    pub lid: u16,
    qps: Vec<Queue>,
    regions: Vec<OwnedFd>,
    next_iova: u64,
}

struct Queue {
    file: File,
    reply: QpReply,
    posted: u32,
}

/// A registered region.
#[derive(Clone, Copy, Debug)]
pub struct Key {
    pub handle: u32,
    pub lkey: u32,
    pub rkey: u32,
    pub iova: u64,
}

fn only(fds: Vec<OwnedFd>) -> Result<OwnedFd> {
    fds.into_iter().next().context("a reply without its descriptor")
}

impl Client {
    pub fn new(socket: &Path) -> Result<Self> {
        let (mut raw, fds) = Raw::greet(socket)?;
        let [doorbells, wake] =
            <[OwnedFd; 2]>::try_from(fds).map_err(|fds| anyhow::anyhow!("{} descriptors", fds.len()))?;
        let (open, _events): (OpenReply, _) = raw.call(Op::OPEN, Index { index: 0, reserved: 0 }.as_bytes())?;
        let context = open.context;
        let (pd, _): (Handle, _) = raw.call(Op::ALLOC_PD, Handle { handle: context, reserved: 0 }.as_bytes())?;
        let create = CreateCq { context, cqe: 1024, channel: NO_HANDLE, ..CreateCq::default() };
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
            polled: 0,
            lid: u16::try_from(port.lid)?,
            qps: Vec::new(),
            regions: Vec::new(),
            next_iova: 0x1000_0000,
        })
    }

    /// Another queue pair's place.
    pub fn qp(&mut self) -> Result<usize> {
        let create = CreateQp {
            pd: self.pd,
            send_cq: self.cq,
            recv_cq: self.cq,
            qp_type: QpType::RC,
            max_send_wr: 32,
            max_recv_wr: 1,
            max_send_sge: 1,
            max_recv_sge: 1,
            ..CreateQp::default()
        };
        let (reply, fds) = self.raw.call(Op::CREATE_QP, create.as_bytes())?;
        self.qps.push(Queue { file: only(fds)?.into(), reply, posted: 0 });
        Ok(self.qps.len() - 1)
    }

    pub fn number(&self, qp: usize) -> u32 {
        self.qps[qp].reply.qp_num
    }

    /// To RTS, with answers missed after half a second at most.
    pub fn connect(&mut self, qp: usize, lid: u16, dest_qp_num: u32) -> Result<()> {
        self.bring_up(qp, lid, dest_qp_num, 10)
    }

    /// To RTS, with answers waited for without end.
    pub fn connect_for_ever(&mut self, qp: usize, lid: u16, dest_qp_num: u32) -> Result<()> {
        self.bring_up(qp, lid, dest_qp_num, 0)
    }

    fn bring_up(&mut self, qp: usize, lid: u16, dest_qp_num: u32, timeout: u32) -> Result<()> {
        let access = Access::LOCAL_WRITE | Access::REMOTE_WRITE | Access::REMOTE_READ | Access::REMOTE_ATOMIC;
        let mut init = QpAttr { state: QpState::INIT, port: 1, access, ..QpAttr::default() };
        init.mask = (Mask::STATE | Mask::PKEY_INDEX | Mask::PORT | Mask::ACCESS_FLAGS).0;
        let mut rtr = QpAttr {
            state: QpState::RTR,
            path_mtu: 5,
            dest_qp_num,
            max_dest_rd_atomic: 4,
            min_rnr_timer: 1,
            ..QpAttr::default()
        };
        (rtr.av.dlid, rtr.av.port) = (lid, 1);
        rtr.mask = (Mask::STATE | Mask::AV | Mask::PATH_MTU | Mask::DEST_QPN | Mask::RQ_PSN).0
            | (Mask::MAX_DEST_RD_ATOMIC | Mask::MIN_RNR_TIMER).0;
        let rts = QpState::RTS;
        let mut rts = QpAttr { state: rts, timeout, retry_cnt: 1, rnr_retry: 7, max_rd_atomic: 4, ..QpAttr::default() };
        rts.mask = (Mask::STATE | Mask::TIMEOUT | Mask::RETRY_CNT | Mask::RNR_RETRY).0
            | (Mask::SQ_PSN | Mask::MAX_QP_RD_ATOMIC).0;
        [init, rtr, rts].into_iter().try_for_each(|attr| self.modify(qp, attr))
    }

    pub fn reset(&mut self, qp: usize) -> Result<()> {
        let attr = QpAttr { state: QpState::RESET, mask: Mask::STATE.0, ..QpAttr::default() };
        self.modify(qp, attr)
    }

    fn modify(&mut self, qp: usize, attr: QpAttr) -> Result<()> {
        let queue = &self.qps[qp];
        let modify = ModifyQp { handle: queue.reply.handle, send_position: queue.posted, attr, ..ModifyQp::default() };
        let changed = self.raw.call::<[u8; 0]>(Op::MODIFY_QP, modify.as_bytes());
        changed.with_context(|| format!("to {:?}", attr.state)).map(drop)
    }

    /// Pages of memory.
    pub fn region(&mut self, pages: u64) -> Result<u32> {
        let alloc = AllocRegion { context: self.context, reserved: 0, bytes: pages * PAGE };
        let (region, fds): (Handle, _) = self.raw.call(Op::ALLOC_REGION, alloc.as_bytes())?;
        self.regions.push(only(fds)?);
        Ok(region.handle)
    }

    /// The file of a region of pages, which the proxy keeps until this client ends.
    pub fn file(&mut self, pages: u64) -> Result<File> {
        self.region(pages)?;
        self.last_file()
    }

    /// Gives memory back, of which regions may be left.
    pub fn free(&mut self, region: u32) -> Result<()> {
        self.raw.call::<[u8; 0]>(Op::FREE_REGION, Handle { handle: region, reserved: 0 }.as_bytes()).map(drop)
    }

    /// `ibv_dereg_mr`.
    pub fn deregister(&mut self, key: Key) -> Result<()> {
        self.raw.call::<[u8; 0]>(Op::DEREG_MR, Handle { handle: key.handle, reserved: 0 }.as_bytes()).map(drop)
    }

    /// The descriptor of the region that was made last.
    pub fn last_file(&self) -> Result<File> {
        Ok(File::from(self.regions.last().context("no region")?.try_clone()?))
    }

    /// Every other page of a region (of twice as many), each of which is a run of its own; two for all of a region of two.
    pub fn register_runs(&mut self, region: u32, runs: u64) -> Result<Key> {
        let step = if runs == 2 { 1 } else { 2 };
        self.register(region, runs, 1, step)
    }

    /// All of a region of pages, as one run.
    pub fn register_whole(&mut self, region: u32, pages: u64) -> Result<Key> {
        self.register(region, 1, pages, pages)
    }

    /// Runs of pages, of which one begins every `step` pages.
    fn register(&mut self, region: u32, runs: u64, pages: u64, step: u64) -> Result<Key> {
        let access = Access::LOCAL_WRITE | Access::REMOTE_WRITE | Access::REMOTE_READ;
        let iova = self.next_iova;
        let length = runs * pages * PAGE;
        self.next_iova += length.next_multiple_of(0x100_0000);
        let segments =
            (0..runs).map(|run| Segment { region, reserved: 0, offset: run * step * PAGE, length: pages * PAGE });
        let register = RegMr { pd: self.pd, access, iova, length, segments: u32::try_from(runs)?, ..RegMr::default() };
        let mut body = register.as_bytes().to_vec();
        segments.for_each(|segment| body.extend(segment.as_bytes()));
        let (mr, _): (MrReply, _) = self.raw.call(Op::REG_MR, &body)?;
        Ok(Key { handle: mr.handle, lkey: mr.lkey, rkey: mr.rkey, iova })
    }

    /// A WRITE from a region to one that does not exist.
    pub fn write(&self, key: Key) -> SendFields {
        SendFields {
            opcode: Opcode::RDMA_WRITE,
            flags: SendFlags::SIGNALED,
            sges: 1,
            // Longer than what goes in a message.
            sge: Sge { addr: key.iova, length: 4096, lkey: key.lkey },
            ..SendFields::default()
        }
    }

    /// Posts a request, and rings for it.
    pub fn post(&mut self, qp: usize, fields: &SendFields) -> Result<()> {
        let queue = &mut self.qps[qp];
        ensure!(queue.posted < queue.reply.send_slots, "this client goes round no ring twice");
        let at = (RINGS_OFFSET + queue.posted as usize * SLOT_BYTES) as u64;
        let mut words: Words = SendBase::pack(fields).0;
        words[1] &= !0xffff;
        queue.file.write_all_at(words.as_bytes(), at)?;
        // The stamp of the first lap goes last.
        queue.file.write_all_at(&(words[1] | 1).to_ne_bytes(), at + 8)?;
        queue.posted += 1;
        let queue = queue.reply.queue;
        let word = u64::from(queue / 64);
        self.doorbells.write_all_at(&(1u64 << (queue % 64)).to_ne_bytes(), WORDS_OFFSET + word * 8)?;
        self.doorbells.write_all_at(&(1u64 << word).to_ne_bytes(), SUMMARY_OFFSET)?;
        ring_bell(&self.wake)?;
        Ok(())
    }

    /// The next completion.
    pub fn completion(&mut self, within: Duration) -> Result<Completion> {
        let end = Instant::now() + within;
        loop {
            let mut words: Words = [0; 8];
            self.completions
                .read_exact_at(words.as_mut_bytes(), RINGS_OFFSET as u64 + self.polled * SLOT_BYTES as u64)?;
            if words[1] & 0xffff != 0 {
                self.polled += 1;
                return Ok(Completion::unpack(&words));
            }
            if Instant::now() > end {
                bail!("no completion within {within:?}");
            }
            std::thread::sleep(Duration::from_micros(200));
        }
    }
}
