//! The container beside the attacker's: it exchanges data with the attacker, and has secrets that are not among them.

use super::exchange::{Endpoint, Exchange};
use crate::raw::{Objects, Raw, ring_bell};
use anyhow::{Context, Result, ensure};
use ringfence_protocol::completion::Completion;
use ringfence_protocol::control::{AllocRegion, Handle, MrReply, Op, PortInfo, PortQuery, RegMr, Segment};
use ringfence_protocol::doorbell::{SUMMARY_OFFSET, WORDS_OFFSET};
use ringfence_protocol::layout::RINGS_OFFSET;
use ringfence_protocol::ring::SLOT_BYTES;
use ringfence_protocol::verbs::{Access, Opcode, SendFlags, WcStatus};
use ringfence_protocol::work::{SendBase, SendFields, Sge};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::time::Duration;
use zerocopy::IntoBytes;

/// In a region of which nothing was ever sent anywhere.
pub const SECRET: &[u8; 32] = b"never sent, never read by others";
/// In a page of a region of which another page was sent.
pub const BESIDE: &[u8; 32] = b"of the same region, but not sent";
/// On the first page of a region that was sent, before its first byte.
pub const EDGE: &[u8; 32] = b"of the same page, not the region";
/// Bytes of the memory of each of the victim's regions.
pub const REGION: u64 = 4 * PAGE;
/// Where in its region [`BESIDE`] stands.
pub const BESIDE_AT: u64 = 2 * PAGE;

const PAGE: u64 = 4096;
const IOVA: u64 = 0x7000_0000;
const ACCESS: Access = Access(Access::LOCAL_WRITE.0 | Access::REMOTE_WRITE.0 | Access::REMOTE_READ.0);

/// An application with two queue pairs that are connected to another container's.
#[derive(Debug)]
pub struct Application {
    objects: Objects,
    /// By queue pair.
    sent: [u32; 2],
}

/// One of its queue pairs: each has its own, as a request whose memory never comes to be shared holds up those behind it.
#[derive(Clone, Copy, Debug)]
pub enum By {
    /// For what the peer's proxy takes as it should.
    First,
    /// For another.
    Second,
}

/// A region and its memory.
#[derive(Debug)]
pub struct Region {
    /// What was answered.
    pub mr: MrReply,
    memory: File,
    iova: u64,
}

impl Application {
    /// Its objects, at the container's own proxy.
    pub fn new() -> Result<Self> {
        let mut objects = Objects::make(ringfence_protocol::control::SOCKET_PATH.as_ref())?;
        objects.add_qp()?;
        objects.add_qp()?;
        Ok(Self { objects, sent: [0; 2] })
    }

    /// What a peer must know, with the region that it may write.
    pub fn endpoint(&mut self) -> Result<Endpoint> {
        let query = PortQuery { context: self.objects.context, port: 1, ..PortQuery::default() };
        let port: PortInfo = self.objects.raw.call(Op::QUERY_PORT, query.as_bytes())?.0;
        Ok(Endpoint {
            lid: port.lid.try_into()?,
            gid: self.objects.gid()?,
            qp_num: self.objects.qps[2].1.qp_num,
            rkey: self.objects.mr.rkey,
            iova: self.objects.iova,
        })
    }

    /// Connects the queue pairs. The peer's is connected to the first.
    pub fn join(&mut self, peer: &Endpoint) -> Result<()> {
        for by in [By::First, By::Second] {
            let handle = self.objects.qps[2 + by as usize].1.handle;
            self.objects.bring_up(handle, peer.qp_num, peer.gid, ACCESS)?;
        }
        Ok(())
    }

    /// A region with `text` at `at` of its memory, of which it is all but the first and the last `edge` bytes.
    pub fn register(&mut self, text: &[u8], at: u64, number: u64, edge: u64) -> Result<Region> {
        let raw = &mut self.objects.raw;
        let alloc = AllocRegion { context: self.objects.context, reserved: 0, bytes: REGION };
        let (handle, fds): (Handle, _) = raw.call(Op::ALLOC_REGION, alloc.as_bytes())?;
        let memory: File = fds.into_iter().next().context("a region without memory")?.into();
        memory.write_all_at(text, at)?;
        let iova = IOVA + number * REGION + edge;
        let (pd, length) = (self.objects.pd, REGION - 2 * edge);
        let register = RegMr { pd, access: ACCESS, iova, length, first_offset: edge, segments: 1, reserved: 0 };
        let segment = Segment { region: handle.handle, reserved: 0, offset: 0, length: REGION };
        let (mr, _) = raw.call(Op::REG_MR, &[register.as_bytes(), segment.as_bytes()].concat())?;
        Ok(Region { mr, memory, iova })
    }

    /// Posts a WRITE of the region's first bytes to the peer.
    pub fn write(&mut self, by: By, region: &Region, peer: &Endpoint) -> Result<()> {
        let (file, reply) = &self.objects.qps[2 + by as usize];
        let sent = &mut self.sent[by as usize];
        // More than goes in a message, so that the region is shared.
        let sge = Sge { addr: region.iova, length: 1024, lkey: region.mr.lkey };
        let mut fields = SendFields { opcode: Opcode::RDMA_WRITE, sges: 1, sge, ..SendFields::default() };
        (fields.flags, fields.remote_addr, fields.rkey) = (SendFlags::SIGNALED, peer.iova, peer.rkey);
        let mut words = SendBase::pack(&fields).0;
        ensure!(*sent < reply.send_slots, "the send ring's first lap is over");
        // The stamp of the ring's first lap.
        words[1] |= 1;
        file.write_all_at(words.as_bytes(), (RINGS_OFFSET + *sent as usize * SLOT_BYTES) as u64)?;
        *sent += 1;
        let word = reply.queue / 64 % 64;
        self.objects
            .doorbells
            .write_all_at(&(1u64 << (reply.queue % 64)).to_le_bytes(), WORDS_OFFSET + u64::from(word) * 8)?;
        self.objects.doorbells.write_all_at(&(1u64 << word).to_le_bytes(), SUMMARY_OFFSET)?;
        ring_bell(&self.objects.wake)?;
        Ok(())
    }

    /// How the first completion that has come says that its request ended.
    pub fn first_completion(&self) -> Result<Option<WcStatus>> {
        let mut slot = [0; SLOT_BYTES];
        self.objects.cq.read_exact_at(&mut slot, RINGS_OFFSET as u64)?;
        let words = std::array::from_fn(|word| u64::from_ne_bytes(std::array::from_fn(|byte| slot[word * 8 + byte])));
        Ok(slot.iter().any(|byte| *byte != 0).then(|| Completion::unpack(&words).status))
    }
}

/// Its life: sends a little, then guards its memory until it is told to stop. Says at the end what it found.
pub fn run(exchange: &Exchange) -> Result<()> {
    let mut application = Application::new()?;
    let secret = application.register(SECRET, 0, 0, 0)?;
    let first = application.register(b"sent", 0, 1, 0)?;
    exchange.say("victim", &application.endpoint()?.words())?;
    let attacker = Endpoint::of(&exchange.hear("attacker")?)?;
    application.join(&attacker)?;
    exchange.say("victim-joined", &[])?;
    exchange.hear("attacker-joined")?;
    application.write(By::First, &first, &attacker)?;
    let mut completion = None;
    crate::command::wait_until("the first WRITE to complete", Duration::from_secs(10), || {
        completion = application.first_completion().ok().flatten();
        completion.is_some()
    })?;
    ensure!(completion == Some(WcStatus::SUCCESS), "the first WRITE completed with {completion:?}");
    exchange.say("linked", &[])?;

    exchange.hear("send-another")?;
    // So that the attacker already waits.
    std::thread::sleep(Duration::from_millis(200));
    let shared = application.register(BESIDE, BESIDE_AT, 2, 0)?;
    application.write(By::First, &shared, &attacker)?;
    let edged = application.register(EDGE, 0, 3, EDGE.len() as u64)?;
    edged.memory.write_all_at(EDGE, REGION - EDGE.len() as u64)?;
    let mut is_sent = false;
    let guard = || -> Result<()> {
        for (region, text, at) in [(&secret, &SECRET[..], 0), (&shared, &BESIDE[..], BESIDE_AT), (&edged, &EDGE[..], 0)]
        {
            let mut found = vec![0; text.len()];
            region.memory.read_exact_at(&mut found, at)?;
            ensure!(found == text, "HARMED: memory says {:?}", String::from_utf8_lossy(&found));
        }
        Ok(())
    };
    let mut harmed = Ok(());
    while !exchange.0.join("stop").exists() {
        harmed = harmed.and_then(|()| guard());
        if !is_sent && exchange.0.join("send-edged").exists() {
            std::thread::sleep(Duration::from_millis(200));
            application.write(By::Second, &edged, &attacker)?;
            is_sent = true;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    harmed?;
    // Its proxy serves it as before.
    let (_raw, _fds): (Raw, Vec<OwnedFd>) = Raw::greet(ringfence_protocol::control::SOCKET_PATH.as_ref())?;
    drop(Objects::make(ringfence_protocol::control::SOCKET_PATH.as_ref())?);
    println!("unharmed");
    Ok(())
}
