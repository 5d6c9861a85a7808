//! One connection of an application process: its objects, and the control verbs on them.

use super::device::SoftDevice;
use super::handles::Handles;
use super::node::Node;
use super::quota::Resource;
use crate::fabric::neighbours::{Backing, SharedRun, amount};
use crate::fabric::ports::QPN_SHIFT;
use crate::memory::{MemoryRegion, PdId};
use crate::plane::CqEntry;
use crate::plane::cq::Cq;
use crate::plane::qp::{Caps, NewQp, Owner};
use crate::plane::setup::Destination;
use crate::shared::{Mapping, PAGE, Run, SealedFile};
use ringfence_protocol::control::*;
use ringfence_protocol::verbs::{Access, QpAttrMask, QpType};
use ringfence_protocol::{VERSION, layout, ring, work};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::mm::ProtFlags;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::pipe::{PipeFlags, pipe_with};
use std::sync::Arc;
use zerocopy::{FromBytes, IntoBytes};

/// Mappings up to this size have their page tables filled when they are made; larger ones as they are used.
const POPULATE: u64 = 256 << 20;

#[derive(Debug)]
struct Context {
    events: OwnedFd,
}

#[derive(Debug)]
struct Pd {
    id: PdId,
    context: u32,
    users: u32,
}

#[derive(Debug)]
struct Region {
    file: Arc<SealedFile>,
    context: u32,
}

#[derive(Debug)]
struct Mr {
    key: u32,
    share: u32,
    pd: u32,
    bytes: u64,
}

#[derive(Debug)]
struct Channel {
    events: Arc<OwnedFd>,
    context: u32,
    users: u32,
}

#[derive(Debug)]
struct CqObject {
    index: usize,
    context: u32,
    channel: Option<u32>,
    users: u32,
}

#[derive(Debug)]
struct QpObject {
    queue: u32,
    pd: u32,
    send_cq: u32,
    recv_cq: u32,
}

/// An answer: the reply's body, and the descriptors beside it.
#[derive(Debug, Default)]
pub struct Answer {
    /// Body.
    pub body: Vec<u8>,
    /// Descriptors, which the reply takes along.
    pub fds: Vec<Arc<OwnedFd>>,
}

impl Answer {
    fn of(body: impl IntoBytes + zerocopy::Immutable) -> Self {
        Self { body: body.as_bytes().to_vec(), fds: Vec::new() }
    }

    fn with(mut self, fd: Arc<OwnedFd>) -> Self {
        self.fds.push(fd);
        self
    }
}

/// Why a request gets no answer: the client broke the protocol, and its connection ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PeerFault {
    /// The first word is not ours.
    #[error("no request of this protocol")]
    Magic,
    /// Not the size that its op demands.
    #[error("op {op} with {bytes} bytes")]
    Size {
        /// `RequestHeader::op`.
        op: u32,
        /// Bytes of the datagram.
        bytes: usize,
    },
    /// Longer than any request, or descriptors where none are expected.
    #[error("an oversized datagram or unexpected descriptors")]
    Surplus,
    /// There is no such op.
    #[error("unknown op {0}")]
    Op(u32),
    /// Something before HELLO, or HELLO twice.
    #[error("op {0} out of order")]
    Order(u32),
    /// It does not read its replies.
    #[error("it does not read its replies")]
    Deaf,
}

/// The objects of one connection.
#[derive(Debug)]
pub struct Session {
    id: u64,
    greeted: bool,
    contexts: Handles<Context>,
    pds: Handles<Pd>,
    regions: Handles<Region>,
    /// Freed, but memory regions made from them keep their pages.
    kept: Vec<Arc<SealedFile>>,
    mrs: Handles<Mr>,
    channels: Handles<Channel>,
    cqs: Handles<CqObject>,
    qps: Handles<QpObject>,
}

fn parse<T: FromBytes + zerocopy::KnownLayout + zerocopy::Immutable>(op: Op, body: &[u8]) -> Result<T, PeerFault> {
    T::read_from_bytes(body).map_err(|_| PeerFault::Size { op: op.0, bytes: body.len() })
}

impl Session {
    /// A connection without objects.
    #[must_use]
    pub fn new(id: u64) -> Self {
        Self {
            id,
            greeted: false,
            contexts: Handles::default(),
            pds: Handles::default(),
            regions: Handles::default(),
            kept: Vec::new(),
            mrs: Handles::default(),
            channels: Handles::default(),
            cqs: Handles::default(),
            qps: Handles::default(),
        }
    }

    /// Serves one request.
    pub fn serve(&mut self, op: Op, body: &[u8], node: &mut Node) -> Result<Result<Answer, Errno>, PeerFault> {
        if self.greeted == (op == Op::HELLO) {
            return Err(PeerFault::Order(op.0));
        }
        let handle = |body| parse::<Handle>(op, body).map(|handle| handle.handle);
        Ok(match op {
            Op::HELLO => self.hello(&parse(op, body)?, node),
            Op::DEVICE => {
                let index: Index = parse(op, body)?;
                if index.index == 0 { Ok(Answer::of(node.device.info())) } else { Err(Errno::NODEV) }
            }
            Op::OPEN => self.open(&parse(op, body)?, node),
            Op::CLOSE => self.close(handle(body)?, node),
            Op::QUERY_PORT => {
                let query: PortQuery = parse(op, body)?;
                self.port(&query).map(|()| Answer::of(node.device.port(node.port.lid())))
            }
            Op::QUERY_GID => {
                let query: PortQuery = parse(op, body)?;
                self.port(&query).and_then(|()| node.gid(query.index)).map(Answer::of)
            }
            Op::ALLOC_PD => self.alloc_pd(handle(body)?, node),
            Op::DEALLOC_PD => self.dealloc_pd(handle(body)?, node),
            Op::ALLOC_REGION => self.alloc_region(&parse(op, body)?, node),
            Op::FREE_REGION => self.free_region(handle(body)?, node),
            Op::REG_MR => {
                let head = size_of::<RegMr>().min(body.len());
                let request: RegMr = parse(op, &body[..head])?;
                if request.segments > MAX_SEGMENTS
                    || body.len() - head != request.segments as usize * size_of::<Segment>()
                {
                    return Err(PeerFault::Size { op: op.0, bytes: body.len() });
                }
                let segments: Vec<Segment> = body[head..]
                    .chunks_exact(size_of::<Segment>())
                    .filter_map(|bytes| Segment::read_from_bytes(bytes).ok())
                    .collect();
                self.reg_mr(&request, &segments, node)
            }
            Op::DEREG_MR => self.dereg_mr(handle(body)?, node),
            Op::CREATE_COMP_CHANNEL => self.create_channel(handle(body)?, node),
            Op::DESTROY_COMP_CHANNEL => self.destroy_channel(handle(body)?, node),
            Op::CREATE_CQ => self.create_cq(&parse(op, body)?, node),
            Op::DESTROY_CQ => self.destroy_cq(handle(body)?, node),
            Op::RESIZE_CQ => self.resize_cq(&parse(op, body)?, node),
            Op::CREATE_QP => self.create_qp(&parse(op, body)?, node),
            Op::MODIFY_QP => self.modify_qp(&parse(op, body)?, node),
            Op::QUERY_QP => self.query_qp(handle(body)?, node),
            Op::DESTROY_QP => self.destroy_qp(handle(body)?, node),
            _ => return Err(PeerFault::Op(op.0)),
        })
    }

    fn hello(&mut self, hello: &Hello, node: &Node) -> Result<Answer, Errno> {
        if hello.version != VERSION {
            return Err(Errno::PROTO);
        }
        self.greeted = true;
        let reply = HelloReply { version: VERSION, devices: 1, processors: node.processors, reserved: 0 };
        Ok(Answer::of(reply).with(Arc::clone(&node.doorbell_file)).with(Arc::clone(&node.bell)))
    }

    fn open(&mut self, index: &Index, node: &mut Node) -> Result<Answer, Errno> {
        if index.index != 0 {
            return Err(Errno::NODEV);
        }
        node.quota.take(Resource::Other, 1)?;
        let flags = SocketFlags::CLOEXEC;
        let pair = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None);
        let (ours, theirs) = pair.inspect_err(|_| node.quota.give(Resource::Other, 1))?;
        let context = self.contexts.insert(Context { events: ours });
        let reply = OpenReply { context, ..node.device.attributes(&node.quota) };
        Ok(Answer::of(reply).with(Arc::new(theirs)))
    }

    fn close(&mut self, context: u32, node: &mut Node) -> Result<Answer, Errno> {
        self.contexts.remove(context)?;
        node.quota.give(Resource::Other, 1);
        self.destroy_where(|of| of == context, node);
        Ok(Answer::default())
    }

    fn port(&mut self, query: &PortQuery) -> Result<(), Errno> {
        self.contexts.get(query.context)?;
        if query.port == 1 { Ok(()) } else { Err(Errno::INVAL) }
    }

    fn alloc_pd(&mut self, context: u32, node: &mut Node) -> Result<Answer, Errno> {
        self.contexts.get(context)?;
        node.quota.take(Resource::Other, 1)?;
        let handle = self.pds.insert(Pd { id: node.next_pd(), context, users: 0 });
        Ok(Answer::of(Handle { handle, reserved: 0 }))
    }

    fn dealloc_pd(&mut self, handle: u32, node: &mut Node) -> Result<Answer, Errno> {
        if self.pds.get(handle)?.users > 0 {
            return Err(Errno::BUSY);
        }
        self.pds.remove(handle)?;
        node.quota.give(Resource::Other, 1);
        Ok(Answer::default())
    }

    fn alloc_region(&mut self, request: &AllocRegion, node: &mut Node) -> Result<Answer, Errno> {
        self.contexts.get(request.context)?;
        if request.bytes == 0 || !request.bytes.is_multiple_of(PAGE as u64) {
            return Err(Errno::INVAL);
        }
        let bytes = usize::try_from(request.bytes).map_err(|_| Errno::NOMEM)?;
        node.quota.take(Resource::Region, 1)?;
        if let Err(error) = node.quota.take(Resource::RegionBytes, request.bytes) {
            node.quota.give(Resource::Region, 1);
            return Err(error);
        }
        let file = SealedFile::create("ringfence-mr", bytes)
            .and_then(|file| Ok((Arc::new(rustix::io::fcntl_dupfd_cloexec(&file, 0)?), file)))
            .inspect_err(|_| give_region(request.bytes, node));
        let (fd, file) = file?;
        let handle = self.regions.insert(Region { file: Arc::new(file), context: request.context });
        Ok(Answer::of(Handle { handle, reserved: 0 }).with(fd))
    }

    fn free_region(&mut self, handle: u32, node: &mut Node) -> Result<Answer, Errno> {
        let region = self.regions.remove(handle)?;
        self.kept.push(region.file);
        self.give_unused(node);
        Ok(Answer::default())
    }

    /// Gives freed regions back to the quota once nothing is made from them any more.
    fn give_unused(&mut self, node: &mut Node) {
        self.kept.retain(|file| {
            let used = Arc::strong_count(file) > 1;
            if !used {
                give_region(file.bytes() as u64, node);
            }
            used
        });
    }

    fn reg_mr(&mut self, request: &RegMr, segments: &[Segment], node: &mut Node) -> Result<Answer, Errno> {
        let known = Access::LOCAL_WRITE
            | Access::REMOTE_WRITE
            | Access::REMOTE_READ
            | Access::REMOTE_ATOMIC
            | Access::RELAXED_ORDERING;
        let access = request.access;
        // Remote rights to write need the local right (InfiniBand Architecture Specification, 11.2.8.2).
        let writes = access.0 & (Access::REMOTE_WRITE | Access::REMOTE_ATOMIC).0 != 0;
        if access.0 & !known.0 != 0 || (writes && !access.contains(Access::LOCAL_WRITE)) {
            return Err(if access.0 & !known.0 & 0x0fff != 0 { Errno::OPNOTSUPP } else { Errno::INVAL });
        }
        if request.length == 0 || request.first_offset >= PAGE as u64 || segments.is_empty() {
            return Err(Errno::INVAL);
        }
        let pd = self.pds.get(request.pd)?;
        let pd_id = pd.id;
        let mut runs = Vec::with_capacity(segments.len());
        for segment in segments {
            let file = Arc::clone(&self.regions.get(segment.region)?.file);
            let end = segment.offset.checked_add(segment.length).ok_or(Errno::INVAL)?;
            if !(segment.offset | segment.length).is_multiple_of(PAGE as u64)
                || segment.length == 0
                || end > file.bytes() as u64
            {
                return Err(Errno::INVAL);
            }
            runs.push(SharedRun { file, offset: segment.offset, bytes: segment.length });
        }
        // No page more than the region needs: mapping costs memory that only its length is charged for.
        let needed =
            request.first_offset.checked_add(request.length).and_then(|end| end.checked_next_multiple_of(PAGE as u64));
        if runs.iter().try_fold(0u64, |sum, run| sum.checked_add(run.bytes)) != needed || needed.is_none() {
            return Err(Errno::INVAL);
        }
        node.quota.take(Resource::Mr, 1)?;
        if let Err(error) = node.quota.take(Resource::MrBytes, request.length) {
            node.quota.give(Resource::Mr, 1);
            return Err(error);
        }
        let registered = register(request, pd_id, runs, node).inspect_err(|_| {
            node.quota.give(Resource::Mr, 1);
            node.quota.give(Resource::MrBytes, request.length);
        });
        let (key, share) = registered?;
        self.pds.get(request.pd)?.users += 1;
        let handle = self.mrs.insert(Mr { key, share, pd: request.pd, bytes: request.length });
        Ok(Answer::of(MrReply { handle, lkey: key, rkey: key, reserved: 0 }))
    }

    fn dereg_mr(&mut self, handle: u32, node: &mut Node) -> Result<Answer, Errno> {
        let mr = self.mrs.remove(handle)?;
        if let Ok(pd) = self.pds.get(mr.pd) {
            pd.users -= 1;
        }
        node.quota.give(Resource::Mr, 1);
        node.quota.give(Resource::MrBytes, mr.bytes);
        let key = mr.key;
        // Unmapped here: taking page tables down may take milliseconds, which the worker does not have.
        drop(node.worker.call(move |plane| plane.regions.remove(key)));
        node.forget_share(key, mr.share);
        self.give_unused(node);
        Ok(Answer::default())
    }

    fn create_channel(&mut self, context: u32, node: &mut Node) -> Result<Answer, Errno> {
        self.contexts.get(context)?;
        node.quota.take(Resource::Other, 1)?;
        let pipe = pipe_with(PipeFlags::CLOEXEC).and_then(|(read, write)| {
            rustix::io::ioctl_fionbio(&write, true)?;
            Ok((read, write))
        });
        let (read, write) = pipe.inspect_err(|_| node.quota.give(Resource::Other, 1))?;
        let handle = self.channels.insert(Channel { events: Arc::new(write), context, users: 0 });
        Ok(Answer::of(Handle { handle, reserved: 0 }).with(Arc::new(read)))
    }

    fn destroy_channel(&mut self, handle: u32, node: &mut Node) -> Result<Answer, Errno> {
        if self.channels.get(handle)?.users > 0 {
            return Err(Errno::BUSY);
        }
        self.channels.remove(handle)?;
        node.quota.give(Resource::Other, 1);
        Ok(Answer::default())
    }

    fn cq_memory(cqe: u32) -> Result<(SealedFile, Arc<Mapping>, u32), Errno> {
        if cqe == 0 || cqe > SoftDevice::MAX_CQE {
            return Err(Errno::INVAL);
        }
        let slots = ring::slots_for(cqe, 1).ok_or(Errno::INVAL)?;
        let file = SealedFile::create("ringfence-cq", layout::cq_bytes(slots))?;
        let mapping = Arc::new(Mapping::of(&file)?);
        Ok((file, mapping, slots))
    }

    fn create_cq(&mut self, request: &CreateCq, node: &mut Node) -> Result<Answer, Errno> {
        self.contexts.get(request.context)?;
        if request.vector != 0 {
            return Err(Errno::INVAL);
        }
        let channel = match request.channel {
            NO_HANDLE => None,
            handle => Some(Arc::clone(&self.channels.get(handle)?.events)),
        };
        node.quota.take(Resource::Cq, 1)?;
        let (file, mapping, slots) = Self::cq_memory(request.cqe).inspect_err(|_| node.quota.give(Resource::Cq, 1))?;
        let owner = Owner { connection: self.id, context: request.context };
        let cq = Cq::new(mapping, slots, channel, request.cookie);
        let index = node.worker.call(move |plane| {
            let entry = Some(Box::new(CqEntry { cq, owner }));
            match plane.cqs.iter().position(Option::is_none) {
                Some(index) => {
                    plane.cqs[index] = entry;
                    index
                }
                None => {
                    plane.cqs.push(entry);
                    plane.cqs.len() - 1
                }
            }
        });
        let channel = (request.channel != NO_HANDLE).then_some(request.channel);
        if let Some(channel) = channel {
            self.channels.get(channel)?.users += 1;
        }
        let handle = self.cqs.insert(CqObject { index, context: request.context, channel, users: 0 });
        Ok(Answer::of(CqReply { handle, cqe: slots, slots, switch: 0 }).with(Arc::new(file.into_fd())))
    }

    fn destroy_cq(&mut self, handle: u32, node: &mut Node) -> Result<Answer, Errno> {
        if self.cqs.get(handle)?.users > 0 {
            return Err(Errno::BUSY);
        }
        let cq = self.cqs.remove(handle)?;
        if let Some(channel) = cq.channel
            && let Ok(channel) = self.channels.get(channel)
        {
            channel.users -= 1;
        }
        node.quota.give(Resource::Cq, 1);
        let index = cq.index;
        drop(node.worker.call(move |plane| plane.cqs.get_mut(index).and_then(Option::take)));
        Ok(Answer::default())
    }

    fn resize_cq(&mut self, request: &ResizeCq, node: &mut Node) -> Result<Answer, Errno> {
        let index = self.cqs.get(request.handle)?.index;
        let (file, mapping, slots) = Self::cq_memory(request.cqe)?;
        let switch = node.worker.call(move |plane| {
            plane.cqs.get_mut(index).and_then(Option::as_mut).map(|entry| entry.cq.move_to(mapping, slots))
        });
        let switch = switch.ok_or(Errno::INVAL)?;
        Ok(Answer::of(CqReply { handle: request.handle, cqe: slots, slots, switch }).with(Arc::new(file.into_fd())))
    }

    fn create_qp(&mut self, request: &CreateQp, node: &mut Node) -> Result<Answer, Errno> {
        if request.qp_type != QpType::RC {
            return Err(Errno::OPNOTSUPP);
        }
        let depth = node.limits.max_qp_depth;
        if request.max_send_wr > depth
            || request.max_recv_wr > depth
            || request.max_send_sge > work::MAX_SGE
            || request.max_recv_sge > work::MAX_SGE
            || request.max_inline > work::MAX_INLINE
        {
            return Err(Errno::INVAL);
        }
        let (pd, context) = self.pds.get(request.pd).map(|pd| (pd.id, pd.context))?;
        let send_cq = self.cqs.get(request.send_cq)?.index;
        let recv_cq = self.cqs.get(request.recv_cq)?.index;
        let caps = Caps {
            max_send_wr: request.max_send_wr.max(1),
            max_recv_wr: request.max_recv_wr.max(1),
            max_send_sge: request.max_send_sge.max(1),
            max_recv_sge: request.max_recv_sge.max(1),
            max_inline: request.max_inline.max(work::BASE_INLINE),
        };
        let per_send = work::send_slots_per_request(caps.max_send_sge, caps.max_inline);
        let per_receive = work::receive_slots_per_request(caps.max_recv_sge);
        let send_slots = ring::slots_for(caps.max_send_wr, per_send).ok_or(Errno::INVAL)?;
        let receive_slots = ring::slots_for(caps.max_recv_wr, per_receive).ok_or(Errno::INVAL)?;
        node.quota.take(Resource::Qp, 1)?;
        let made = (|| {
            let file = SealedFile::create("ringfence-qp", layout::qp_bytes(send_slots, receive_slots))?;
            let mapping = Arc::new(Mapping::of(&file)?);
            let queue = node.queues.take().ok_or(Errno::NOMEM)?;
            Ok((file, mapping, queue))
        })();
        let (file, mapping, queue) = made.inspect_err(|_: &Errno| node.quota.give(Resource::Qp, 1))?;
        let new = NewQp {
            number: 0,
            queue,
            pd,
            cookie: request.cookie,
            event_cookie: request.event_cookie,
            owner: Owner { connection: self.id, context },
            send_cq,
            recv_cq,
            sq_sig_all: request.sq_sig_all != 0,
            caps,
            send_slots,
            receive_slots,
        };
        let port = u32::from(node.port.lid()) << QPN_SHIFT;
        let number = node.worker.call(move |plane| {
            // By chance, so that a queue pair cannot be guessed from another.
            let number = loop {
                let number = port | (random() & ((1 << QPN_SHIFT) - 1));
                if !plane.by_number.contains_key(&number) {
                    break number;
                }
            };
            plane.add_qp(&NewQp { number, ..new }, mapping);
            number
        });
        self.pds.get(request.pd)?.users += 1;
        self.cqs.get(request.send_cq)?.users += 1;
        self.cqs.get(request.recv_cq)?.users += 1;
        let (send_cq, recv_cq) = (request.send_cq, request.recv_cq);
        let handle = self.qps.insert(QpObject { queue, pd: request.pd, send_cq, recv_cq });
        let reply = QpReply {
            handle,
            qp_num: number,
            queue,
            send_slots,
            receive_slots,
            max_send_wr: caps.max_send_wr,
            max_recv_wr: caps.max_recv_wr,
            max_send_sge: caps.max_send_sge,
            max_recv_sge: caps.max_recv_sge,
            max_inline: caps.max_inline,
            reserved: [0; 2],
        };
        Ok(Answer::of(reply).with(Arc::new(file.into_fd())))
    }

    fn modify_qp(&mut self, request: &ModifyQp, node: &mut Node) -> Result<Answer, Errno> {
        let queue = self.qps.get(request.handle)?.queue;
        let destination = if request.attr.mask & QpAttrMask::AV.0 == 0 {
            None
        } else {
            node.resolve(&request.attr.av, request.attr.dest_qp_num)
        };
        let request = *request;
        node.worker.call(move |plane| plane.modify_qp(queue, &request, destination))?;
        // Not before: neighbours are listened to only for the queue pairs that are connected to them.
        if let Some(Destination::Port(lid)) = destination {
            node.link_to(lid);
        }
        Ok(Answer::default())
    }

    fn query_qp(&mut self, handle: u32, node: &mut Node) -> Result<Answer, Errno> {
        let queue = self.qps.get(handle)?.queue;
        node.worker.call(move |plane| plane.query_qp(queue)).map(Answer::of)
    }

    fn destroy_qp(&mut self, handle: u32, node: &mut Node) -> Result<Answer, Errno> {
        let qp = self.qps.remove(handle)?;
        if let Ok(pd) = self.pds.get(qp.pd) {
            pd.users -= 1;
        }
        for cq in [qp.send_cq, qp.recv_cq] {
            if let Ok(cq) = self.cqs.get(cq) {
                cq.users -= 1;
            }
        }
        node.quota.give(Resource::Qp, 1);
        drop(node.worker.call(move |plane| plane.remove_qp(qp.queue)));
        node.queues.give(qp.queue);
        Ok(Answer::default())
    }

    /// Where asynchronous events of a context go.
    pub fn events(&mut self, context: u32) -> Option<&OwnedFd> {
        self.contexts.get(context).ok().map(|context| &context.events)
    }

    /// Destroys everything: the connection is gone.
    pub fn end(&mut self, node: &mut Node) {
        let contexts: Vec<u32> = self.contexts.iter().map(|(handle, _)| handle).collect();
        for context in contexts {
            if self.contexts.remove(context).is_ok() {
                node.quota.give(Resource::Other, 1);
            }
        }
        self.destroy_where(|_| true, node);
    }

    /// Destroys the objects of some contexts, users before what they use.
    fn destroy_where(&mut self, of: impl Fn(u32) -> bool, node: &mut Node) {
        let pds: Vec<u32> = self.pds.iter().filter(|(_, pd)| of(pd.context)).map(|(handle, _)| handle).collect();
        let in_pd = |pd: u32| pds.contains(&pd);
        let qps: Vec<u32> = self.qps.iter().filter(|(_, qp)| in_pd(qp.pd)).map(|(handle, _)| handle).collect();
        let mrs: Vec<u32> = self.mrs.iter().filter(|(_, mr)| in_pd(mr.pd)).map(|(handle, _)| handle).collect();
        let cqs: Vec<u32> = self.cqs.iter().filter(|(_, cq)| of(cq.context)).map(|(handle, _)| handle).collect();
        let regions: Vec<u32> = self.regions.iter().filter(|(_, r)| of(r.context)).map(|(handle, _)| handle).collect();
        let channels: Vec<u32> =
            self.channels.iter().filter(|(_, c)| of(c.context)).map(|(handle, _)| handle).collect();
        // Nothing of this can fail but for objects of another context that still use them; those keep them.
        for handle in qps {
            let _ = self.destroy_qp(handle, node);
        }
        for handle in mrs {
            let _ = self.dereg_mr(handle, node);
        }
        for handle in pds {
            let _ = self.dealloc_pd(handle, node);
        }
        for handle in cqs {
            let _ = self.destroy_cq(handle, node);
        }
        for handle in channels {
            let _ = self.destroy_channel(handle, node);
        }
        for handle in regions {
            let _ = self.free_region(handle, node);
        }
    }
}

fn give_region(bytes: u64, node: &mut Node) {
    node.quota.give(Resource::Region, 1);
    node.quota.give(Resource::RegionBytes, bytes);
}

/// Maps the runs side by side and hands the region to the worker: its key and its name for neighbours.
fn register(request: &RegMr, pd: PdId, runs: Vec<SharedRun>, node: &mut Node) -> Result<(u32, u32), Errno> {
    let total: u64 = runs.iter().map(|run| run.bytes).sum();
    let mapped: Vec<_> = runs
        .iter()
        .map(|run| Run { file: &run.file, offset: run.offset as usize, bytes: run.bytes as usize })
        .collect();
    let lease = node.neighbours.budget.take_own(amount(runs.iter().map(|run| run.bytes)))?;
    let mapping = Arc::new(Mapping::of_runs(&mapped, ProtFlags::READ | ProtFlags::WRITE, total <= POPULATE)?);
    let share = node.next_share();
    let (first, length, iova) = (request.first_offset as usize, request.length, request.iova);
    let region = MemoryRegion::new(mapping, first, length, iova, pd, request.access, share).ok_or(Errno::INVAL)?;
    let key = node.worker.call(move |plane| plane.regions.insert(region, random)).ok_or(Errno::NOMEM)?;
    node.shares.insert(key, Backing { share, runs, lease });
    Ok((key, share))
}

/// 32 bits that nobody can guess.
///
/// # Panics
/// If the kernel has no random numbers, which ends with early boot.
pub fn random() -> u32 {
    let mut bytes = [0; 4];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty()).expect("getrandom works after boot");
    u32::from_ne_bytes(bytes)
}
