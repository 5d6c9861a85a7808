//! A client of the control socket without the preload library: it says what the library never would.

use anyhow::{Context, Result, bail, ensure};
use ringfence_protocol::control::{
    AllocRegion, CqReply, CreateCq, CreateQp, Handle, Hello, HelloReply, Index, MAGIC, MAX_DATAGRAM, ModifyQp, MrReply,
    NO_HANDLE, Op, OpenReply, QpAttr, QpReply, RegMr, ReplyHeader, RequestHeader, Segment,
};
use ringfence_protocol::verbs::{Access, QpAttrMask, QpState, QpType};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, recvmsg, sendmsg, socket_with, sockopt,
};
use std::fs::File;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The most descriptors that Linux passes with one datagram.
pub const SCM_MAX_FDS: usize = 253;

/// One connection.
#[derive(Debug)]
pub struct Raw {
    socket: OwnedFd,
    sequence: u32,
}

/// Rings a worker's bell. A full one rings already.
pub fn ring_bell(bell: &OwnedFd) -> Result<(), Errno> {
    match rustix::net::send(bell, &[1], SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
        Ok(_) | Err(Errno::AGAIN) => Ok(()),
        Err(error) => Err(error),
    }
}

/// A datagram and what came with it.
pub type Received = (Vec<u8>, Vec<OwnedFd>);

impl Raw {
    /// Connects; nothing is said yet. A reply may take two seconds.
    pub fn connect(path: &Path) -> Result<Self> {
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        connect(&socket, &SocketAddrUnix::new(path)?)
            .with_context(|| format!("cannot connect to {}", path.display()))?;
        let limit = Some(Duration::from_secs(2));
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, limit)?;
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, limit)?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Connects and says hello.
    pub fn greet(path: &Path) -> Result<(Self, Vec<OwnedFd>)> {
        let mut raw = Self::connect(path)?;
        let hello = Hello { version: ringfence_protocol::VERSION, reserved: 0 };
        let (_, fds): (HelloReply, _) = raw.call(Op::HELLO, hello.as_bytes())?;
        Ok((raw, fds))
    }

    /// Sends a datagram as it is.
    pub fn send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>], flags: SendFlags) -> Result<(), Errno> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(SCM_MAX_FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(fds));
        }
        sendmsg(&self.socket, &[IoSlice::new(bytes)], &mut control, flags | SendFlags::NOSIGNAL).map(drop)
    }

    /// The next datagram; `None` if the proxy has closed the connection.
    pub fn receive(&self) -> Result<Option<Received>, Errno> {
        let mut bytes = vec![0; MAX_DATAGRAM];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(SCM_MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received =
            match recvmsg(&self.socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, RecvFlags::CMSG_CLOEXEC) {
                Err(Errno::CONNRESET) => return Ok(None),
                result => result?,
            };
        let mut fds = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        bytes.truncate(received.bytes);
        Ok((received.bytes > 0).then_some((bytes, fds)))
    }

    /// Descriptors in what the proxy has sent and we have not received.
    pub fn unread_descriptors(&self) -> Result<usize> {
        let path = format!("/proc/self/fdinfo/{}", self.socket.as_raw_fd());
        let info = std::fs::read_to_string(path)?;
        let count =
            info.lines().find_map(|line| line.strip_prefix("scm_fds:")).context("no scm_fds, since Linux 5.6")?;
        Ok(count.trim().parse()?)
    }

    /// A request as its bytes.
    #[must_use]
    pub fn request(op: Op, sequence: u32, body: &[u8]) -> Vec<u8> {
        let header = RequestHeader { magic: MAGIC, op, sequence, reserved: 0 };
        [header.as_bytes(), body].concat()
    }

    /// Asks and awaits success.
    pub fn call<R: FromBytes + KnownLayout + Immutable>(&mut self, op: Op, body: &[u8]) -> Result<(R, Vec<OwnedFd>)> {
        self.sequence += 1;
        self.send(&Self::request(op, self.sequence, body), &[], SendFlags::empty())?;
        let Some((bytes, fds)) = self.receive()? else { bail!("{op:?}: the proxy closed the connection") };
        let (header, rest) = ReplyHeader::read_from_prefix(&bytes)
            .map_err(|_| anyhow::anyhow!("{op:?}: a reply of {} bytes", bytes.len()))?;
        ensure!(header.sequence == self.sequence, "{op:?}: reply to {} instead of {}", header.sequence, self.sequence);
        ensure!(header.errno == 0, "{op:?}: {}", std::io::Error::from_raw_os_error(header.errno.cast_signed()));
        let body = R::read_from_bytes(rest).map_err(|_| anyhow::anyhow!("{op:?}: a body of {} bytes", rest.len()))?;
        Ok((body, fds))
    }

    fn command(&mut self, op: Op, body: &[u8]) -> Result<()> {
        self.call::<[u8; 0]>(op, body).map(drop)
    }
}

/// Objects made by hand, with the memory that the proxy shares for them: two queue pairs joined to each other.
#[derive(Debug)]
pub struct Objects {
    /// The connection that owns them.
    pub raw: Raw,
    /// Doorbell memory.
    pub doorbells: File,
    /// The worker's bell.
    pub wake: OwnedFd,
    /// The completion queue's memory.
    pub cq: File,
    /// The queue pairs' memory and what was answered about them.
    pub qps: Vec<(File, QpReply)>,
    /// A memory region.
    pub mr: MrReply,
    /// Where work requests find the region.
    pub iova: u64,
    /// The context.
    pub context: u32,
    /// The protection domain.
    pub pd: u32,
    /// The completion queue.
    pub cq_handle: u32,
}

/// Bytes of the region of [`Objects`].
pub const REGION_BYTES: u64 = 1 << 16;

impl Objects {
    /// Makes them and joins the queue pairs.
    pub fn make(path: &Path) -> Result<Self> {
        Self::make_all(path, false).map(|(objects, _)| objects)
    }

    /// The same, and a completion channel for the queue's events.
    pub fn with_channel(path: &Path) -> Result<(Self, OwnedFd)> {
        let (objects, channel) = Self::make_all(path, true)?;
        Ok((objects, channel.context("a channel was asked for")?))
    }

    fn make_all(path: &Path, with_channel: bool) -> Result<(Self, Option<OwnedFd>)> {
        let (mut raw, fds) = Raw::greet(path)?;
        let [doorbells, wake] =
            <[OwnedFd; 2]>::try_from(fds).map_err(|fds| anyhow::anyhow!("{} descriptors", fds.len()))?;
        let (open, _events): (OpenReply, _) = raw.call(Op::OPEN, Index { index: 0, reserved: 0 }.as_bytes())?;
        let context = Handle { handle: open.context, reserved: 0 };
        let (pd, _): (Handle, _) = raw.call(Op::ALLOC_PD, context.as_bytes())?;
        let alloc = AllocRegion { context: open.context, reserved: 0, bytes: REGION_BYTES };
        let (region, _memory): (Handle, _) = raw.call(Op::ALLOC_REGION, alloc.as_bytes())?;
        let iova = 0x1000_0000;
        let access = Access::LOCAL_WRITE | Access::REMOTE_WRITE | Access::REMOTE_READ | Access::REMOTE_ATOMIC;
        let register =
            RegMr { pd: pd.handle, access, iova, length: REGION_BYTES, first_offset: 0, segments: 1, reserved: 0 };
        let segment = Segment { region: region.handle, reserved: 0, offset: 0, length: REGION_BYTES };
        let (mr, _) = raw.call(Op::REG_MR, &[register.as_bytes(), segment.as_bytes()].concat())?;
        let (channel, events) = if with_channel {
            let (channel, fds): (Handle, _) = raw.call(Op::CREATE_COMP_CHANNEL, context.as_bytes())?;
            (channel.handle, Some(only(fds)?))
        } else {
            (NO_HANDLE, None)
        };
        let create = CreateCq { context: open.context, cqe: 256, channel, ..CreateCq::default() };
        let (cq, fds): (CqReply, _) = raw.call(Op::CREATE_CQ, create.as_bytes())?;
        let mut objects = Self {
            raw,
            doorbells: doorbells.into(),
            wake,
            cq: only(fds)?.into(),
            qps: Vec::new(),
            mr,
            iova,
            context: open.context,
            pd: pd.handle,
            cq_handle: cq.handle,
        };
        for _ in 0..2 {
            objects.add_qp()?;
        }
        let numbers = [objects.qps[0].1.qp_num, objects.qps[1].1.qp_num];
        let gid = objects.gid()?;
        for (index, peer) in [(0, numbers[1]), (1, numbers[0])] {
            objects.bring_up(objects.qps[index].1.handle, peer, gid, access)?;
        }
        Ok((objects, events))
    }

    /// Makes one more queue pair.
    pub fn add_qp(&mut self) -> Result<()> {
        let create = CreateQp {
            pd: self.pd,
            send_cq: self.cq_handle,
            recv_cq: self.cq_handle,
            qp_type: QpType::RC,
            max_send_wr: 64,
            max_recv_wr: 64,
            max_send_sge: 4,
            max_recv_sge: 4,
            max_inline: 128,
            ..CreateQp::default()
        };
        let (reply, fds) = self.raw.call(Op::CREATE_QP, create.as_bytes())?;
        self.qps.push((only(fds)?.into(), reply));
        Ok(())
    }

    /// The port's own GID.
    pub fn gid(&mut self) -> Result<[u8; 16]> {
        use ringfence_protocol::control::{GidInfo, PortQuery};
        let query = PortQuery { context: self.context, port: 1, ..PortQuery::default() };
        Ok(self.raw.call::<GidInfo>(Op::QUERY_GID, query.as_bytes())?.0.gid)
    }

    /// Brings a queue pair to RTS, connected to the queue pair `peer` at `gid`.
    pub fn bring_up(&mut self, handle: u32, peer: u32, gid: [u8; 16], access: Access) -> Result<()> {
        use QpAttrMask as M;
        let mut init = QpAttr { state: QpState::INIT, port: 1, access, ..QpAttr::default() };
        init.mask = (M::STATE | M::PKEY_INDEX | M::PORT | M::ACCESS_FLAGS).0;
        let mut rtr = QpAttr {
            state: QpState::RTR,
            path_mtu: 3,
            dest_qp_num: peer,
            max_dest_rd_atomic: 4,
            min_rnr_timer: 1,
            ..QpAttr::default()
        };
        rtr.av.dgid = gid;
        rtr.av.is_global = 1;
        rtr.av.port = 1;
        rtr.av.hop_limit = 64;
        rtr.mask =
            (M::STATE | M::AV | M::PATH_MTU | M::DEST_QPN | M::RQ_PSN | M::MAX_DEST_RD_ATOMIC | M::MIN_RNR_TIMER).0;
        let mut rts = QpAttr {
            state: QpState::RTS,
            timeout: 10,
            retry_cnt: 2,
            rnr_retry: 7,
            max_rd_atomic: 4,
            ..QpAttr::default()
        };
        rts.mask = (M::STATE | M::TIMEOUT | M::RETRY_CNT | M::RNR_RETRY | M::SQ_PSN | M::MAX_QP_RD_ATOMIC).0;
        for attr in [init, rtr, rts] {
            let modify = ModifyQp { handle, attr, ..ModifyQp::default() };
            self.raw.command(Op::MODIFY_QP, modify.as_bytes()).with_context(|| format!("to {:?}", attr.state))?;
        }
        Ok(())
    }
}

fn only(fds: Vec<OwnedFd>) -> Result<OwnedFd> {
    let count = fds.len();
    fds.into_iter().next().filter(|_| count == 1).with_context(|| format!("{count} descriptors instead of one"))
}
