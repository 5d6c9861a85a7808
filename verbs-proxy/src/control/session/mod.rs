//! One connection of an application process: its objects, and the control verbs on them.

mod memory;
mod queues;

use super::driver::Driver;
use super::handles::Handles;
use super::kept::Allowance;
use super::node::Node;
use super::quota::{Resource, Taken};
use super::spares::Spares;
use crate::device::control::Control;
use crate::memory::PdId;
use crate::plane::channel::event_sockets;
use memory::{Mr, Region};
use queues::{Channel, CqObject, QpObject};
use ringfence_protocol::VERSION;
use ringfence_protocol::control::*;
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use std::sync::Arc;
use zerocopy::{FromBytes, IntoBytes};

#[derive(Debug)]
struct Context {
    events: OwnedFd,
    _taken: Taken,
}

#[derive(Debug)]
struct Pd {
    id: PdId,
    context: u32,
    users: u32,
    _taken: Taken,
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

    fn with(mut self, fd: impl Into<Arc<OwnedFd>>) -> Self {
        self.fds.push(fd.into());
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
    /// Longer than any request, or descriptors where none are expected, or none where one is.
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
    /// What the process may keep of what it has deregistered.
    allowance: Option<Allowance>,
    contexts: Handles<Context>,
    pds: Handles<Pd>,
    /// They belong to the connection, not to the context that they were made in: the process has them in place of its own
    /// pages, and must not lose those with the context.
    regions: Handles<Region>,
    /// Of them, the one that was given out for a registration to come.
    ahead: Option<u32>,
    mrs: Handles<Mr>,
    channels: Handles<Channel>,
    cqs: Handles<CqObject>,
    qps: Handles<QpObject>,
}

fn parse<T: FromBytes + zerocopy::KnownLayout + zerocopy::Immutable>(op: Op, body: &[u8]) -> Result<T, PeerFault> {
    T::read_from_bytes(body).map_err(|_| PeerFault::Size { op: op.0, bytes: body.len() })
}

/// Whether this is of the only device, and its only port.
fn of_card(asked: &CardIndex) -> Result<(), Errno> {
    match (asked.device, asked.port) {
        (0, 1) => Ok(()),
        (0, _) => Err(Errno::INVAL),
        _ => Err(Errno::NODEV),
    }
}

impl Session {
    /// A connection without objects.
    #[must_use]
    pub fn new(id: u64) -> Self {
        Self {
            id,
            greeted: false,
            allowance: None,
            contexts: Handles::default(),
            pds: Handles::default(),
            regions: Handles::default(),
            ahead: None,
            mrs: Handles::default(),
            channels: Handles::default(),
            cqs: Handles::default(),
            qps: Handles::default(),
        }
    }

    /// Serves one request. It takes `fd` if that belongs to it.
    pub fn serve<D: Driver>(
        &mut self,
        op: Op,
        body: &[u8],
        fd: &mut Option<OwnedFd>,
        node: &mut Node<D>,
    ) -> Result<Result<Answer, Errno>, PeerFault> {
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
            Op::FIND_GID => {
                let asked: CardIndex = parse(op, body)?;
                let found = of_card(&asked).and_then(|()| node.find_gid(asked.index));
                found.map(|index| Answer::of(Index { index, reserved: 0 }))
            }
            Op::QUERY_PKEY => {
                let query: PortQuery = parse(op, body)?;
                let key = self.port(&query).and_then(|()| node.pkey(query.index));
                key.map(|key| Answer::of(PartitionKey { pkey: key.into(), reserved: 0 }))
            }
            Op::FIND_PKEY => {
                let asked: CardIndex = parse(op, body)?;
                let found = of_card(&asked).and_then(|()| node.device.find_pkey(asked.index).ok_or(Errno::NODATA));
                found.map(|index| Answer::of(Index { index, reserved: 0 }))
            }
            Op::ALLOC_PD => self.alloc_pd(handle(body)?, node),
            Op::DEALLOC_PD => self.dealloc_pd(handle(body)?, node),
            Op::ALLOC_REGION => self.alloc_region(&parse(op, body)?, node),
            Op::ADOPT_REGION => {
                let context = handle(body)?;
                self.adopt_region(context, fd.take().ok_or(PeerFault::Surplus)?, node)
            }
            Op::FREE_REGION => self.free_region(handle(body)?),
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
            Op::REG_FRESH => self.reg_fresh(&parse(op, body)?, node),
            Op::REG_DMABUF => {
                let request = parse(op, body)?;
                self.reg_dmabuf(&request, fd.take().ok_or(PeerFault::Surplus)?, node)
            }
            Op::DEREG_MR => self.dereg_mr(handle(body)?, node),
            Op::CREATE_COMP_CHANNEL => self.create_channel(handle(body)?, node),
            Op::DESTROY_COMP_CHANNEL => self.destroy_channel(handle(body)?),
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

    fn hello<D: Driver>(&mut self, hello: &Hello, node: &Node<D>) -> Result<Answer, Errno> {
        if hello.version != VERSION {
            return Err(Errno::PROTO);
        }
        self.greeted = true;
        // A connection that finds no room keeps nothing.
        self.allowance = Allowance::of(&node.quota).ok().filter(|_| node.device.knows_key_words());
        let reply = HelloReply {
            version: VERSION,
            devices: 1,
            processors: node.processors,
            places: node.places,
            secret: u64::from(random()) << 32 | u64::from(random()),
            keep_bytes: self.allowance.as_ref().map_or(0, |allowance| allowance.bytes),
            keep_regions: self.allowance.as_ref().map_or(0, |allowance| allowance.regions),
            reserved: 0,
        };
        Ok(Answer::of(reply).with(Arc::clone(&node.doorbell_file)).with(Arc::clone(&node.bell)))
    }

    fn open<D: Driver>(&mut self, index: &Index, node: &mut Node<D>) -> Result<Answer, Errno> {
        if index.index != 0 {
            return Err(Errno::NODEV);
        }
        node.device.check()?;
        let taken = node.take(Resource::Other, 1)?;
        let (ours, theirs) = event_sockets()?;
        let context = self.contexts.insert(Context { events: node.quota.keep(ours)?, _taken: taken });
        let mut reply = OpenReply { context, ..node.device.attributes(&node.quota) };
        // Where it is known to be shown to nobody.
        if reply.shows_memory != 0 && node.keeps_pages() == Ok(false) {
            reply.shows_memory = 0;
        }
        Ok(Answer::of(reply).with(Arc::new(theirs)))
    }

    fn close<D: Driver>(&mut self, context: u32, node: &mut Node<D>) -> Result<Answer, Errno> {
        self.contexts.remove(context)?;
        self.destroy_where(|of| of == context, node);
        Ok(Answer::default())
    }

    fn port(&mut self, query: &PortQuery) -> Result<(), Errno> {
        self.contexts.get(query.context)?;
        if query.port == 1 { Ok(()) } else { Err(Errno::INVAL) }
    }

    fn alloc_pd<D: Driver>(&mut self, context: u32, node: &mut Node<D>) -> Result<Answer, Errno> {
        self.contexts.get(context)?;
        let taken = node.take(Resource::Other, 1)?;
        let id = node.next_pd();
        node.device.alloc_pd(id)?;
        let handle = self.pds.insert(Pd { id, context, users: 0, _taken: taken });
        Ok(Answer::of(Handle { handle, reserved: 0 }))
    }

    fn dealloc_pd<D: Driver>(&mut self, handle: u32, node: &mut Node<D>) -> Result<Answer, Errno> {
        if self.pds.get(handle)?.users > 0 {
            return Err(Errno::BUSY);
        }
        let pd = self.pds.remove(handle)?;
        node.device.dealloc_pd(pd.id);
        Ok(Answer::default())
    }

    /// Where asynchronous events of a context go.
    pub fn events(&mut self, context: u32) -> Option<&OwnedFd> {
        self.contexts.get(context).ok().map(|context| &context.events)
    }

    /// The same of all contexts.
    pub fn all_events(&self) -> impl Iterator<Item = &OwnedFd> {
        self.contexts.iter().map(|(_, context)| &context.events)
    }

    /// Destroys everything: the connection is gone.
    pub fn end<D: Driver>(&mut self, node: &mut Node<D>) {
        let contexts: Vec<u32> = self.contexts.iter().map(|(handle, _)| handle).collect();
        for context in contexts {
            let _ = self.contexts.remove(context);
        }
        self.destroy_where(|_| true, node);
        self.regions = Handles::default();
        node.spares = Spares::default();
    }

    /// Destroys the objects of some contexts, users before what they use.
    fn destroy_where<D: Driver>(&mut self, of: impl Fn(u32) -> bool, node: &mut Node<D>) {
        let pds: Vec<u32> = self.pds.iter().filter(|(_, pd)| of(pd.context)).map(|(handle, _)| handle).collect();
        let in_pd = |pd: u32| pds.contains(&pd);
        let qps: Vec<u32> = self.qps.iter().filter(|(_, qp)| in_pd(qp.pd)).map(|(handle, _)| handle).collect();
        let mrs: Vec<u32> = self.mrs.iter().filter(|(_, mr)| in_pd(mr.pd)).map(|(handle, _)| handle).collect();
        let cqs: Vec<u32> = self.cqs.iter().filter(|(_, cq)| of(cq.context)).map(|(handle, _)| handle).collect();
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
            let _ = self.destroy_channel(handle);
        }
    }
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
