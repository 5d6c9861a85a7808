//! Completion channels, completion queues and queue pairs.

use super::{Answer, Session};
use crate::control::driver::Driver;
use crate::control::lent::Lent;
use crate::control::node::Node;
use crate::control::quota::{Resource, Taken};
use crate::device::control::Control;
use crate::plane::CqEntry;
use crate::plane::channel::{self as plane, event_sockets};
use crate::plane::cq::{Cq, CqIndex};
use crate::plane::qp::{Caps, NewQp, Owner};
use crate::shared::Mapping;
use ringfence_protocol::control::{CqReply, CreateCq, CreateQp, Handle, ModifyQp, NO_HANDLE, QpReply, ResizeCq};
use ringfence_protocol::layout::CqHeader;
use ringfence_protocol::verbs::{QpAttrMask, QpType};
use ringfence_protocol::{layout, ring, work};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use std::sync::Arc;

/// Rings of one completion queue that the container has not read to their ends yet.
const MAX_UNREAD_RINGS: usize = 8;

#[derive(Debug)]
pub(super) struct Channel {
    events: Arc<plane::Channel>,
    pub(super) context: u32,
    users: u32,
    _taken: Taken,
}

#[derive(Debug)]
pub(super) struct CqObject {
    index: CqIndex,
    pub(super) context: u32,
    channel: Option<u32>,
    users: u32,
    /// The last is in use; the container may still read in those before it.
    rings: Vec<CqRing>,
    _taken: Taken,
}

#[derive(Debug)]
struct CqRing {
    _memory: Lent,
    mapping: Arc<Mapping>,
    slots: u32,
}

impl CqRing {
    fn create<D: Driver>(cqe: u32, node: &Node<D>) -> Result<(Self, OwnedFd), Errno> {
        if cqe == 0 || cqe > node.device.max_cqe() {
            return Err(Errno::INVAL);
        }
        let slots = ring::slots_for(cqe, 1).ok_or(Errno::INVAL)?;
        let (memory, theirs) = queue_memory("ringfence-cq", layout::cq_bytes(slots), node)?;
        let mapping = Arc::new(Mapping::of(&memory)?);
        Ok((Self { _memory: memory, mapping, slots }, theirs))
    }

    /// The container says that it has read in it: a claim. If it is none, completions are lost to the one who lied.
    fn is_read(&self) -> bool {
        self.mapping.header::<CqHeader>(0).consumed() != 0
    }
}

/// A file for rings, and a descriptor for the container.
fn queue_memory<D: Driver>(name: &str, bytes: usize, node: &Node<D>) -> Result<(Lent, OwnedFd), Errno> {
    let taken = vec![node.take(Resource::QueueBytes, bytes as u64)?];
    let (memory, theirs) = Lent::create(name, bytes, taken, &node.closers.container, None, 0)?;
    Ok((node.quota.keep(memory)?, theirs))
}

#[derive(Debug)]
pub(super) struct QpObject {
    queue: u32,
    pub(super) pd: u32,
    send_cq: u32,
    recv_cq: u32,
    _memory: Lent,
    _taken: Taken,
}

impl Session {
    pub(super) fn create_channel<D: Driver>(&mut self, context: u32, node: &mut Node<D>) -> Result<Answer, Errno> {
        self.contexts.get(context)?;
        let taken = node.take(Resource::Other, 1)?;
        let (ours, theirs) = event_sockets()?;
        let events = Arc::new(plane::Channel::new(node.quota.keep(ours)?));
        let handle = self.channels.insert(Channel { events, context, users: 0, _taken: taken });
        Ok(Answer::of(Handle { handle, reserved: 0 }).with(theirs))
    }

    pub(super) fn destroy_channel(&mut self, handle: u32) -> Result<Answer, Errno> {
        if self.channels.get(handle)?.users > 0 {
            return Err(Errno::BUSY);
        }
        self.channels.remove(handle)?;
        Ok(Answer::default())
    }

    pub(super) fn create_cq<D: Driver>(&mut self, request: &CreateCq, node: &mut Node<D>) -> Result<Answer, Errno> {
        self.contexts.get(request.context)?;
        if request.vector != 0 {
            return Err(Errno::INVAL);
        }
        let channel = match request.channel {
            NO_HANDLE => None,
            handle => Some(Arc::clone(&self.channels.get(handle)?.events)),
        };
        let taken = node.take(Resource::Cq, 1)?;
        let (ring, theirs) = CqRing::create(request.cqe, node)?;
        let (mapping, slots) = (Arc::clone(&ring.mapping), ring.slots);
        let owner = Owner { connection: self.id, context: request.context };
        let cq = Cq::new(mapping, slots, channel, request.cookie);
        let index = node.worker.call(move |plane| {
            let entry = Some(Box::new(CqEntry { cq, owner }));
            CqIndex(match plane.cqs.iter().position(Option::is_none) {
                Some(index) => {
                    plane.cqs[index] = entry;
                    index
                }
                None => {
                    plane.cqs.push(entry);
                    plane.cqs.len() - 1
                }
            })
        });
        let channel = (request.channel != NO_HANDLE).then_some(request.channel);
        if let Some(channel) = channel {
            self.channels.get(channel)?.users += 1;
        }
        let rings = vec![ring];
        let handle =
            self.cqs.insert(CqObject { index, context: request.context, channel, users: 0, rings, _taken: taken });
        Ok(Answer::of(CqReply { handle, cqe: slots, slots, switch: 0 }).with(theirs))
    }

    pub(super) fn destroy_cq<D: Driver>(&mut self, handle: u32, node: &mut Node<D>) -> Result<Answer, Errno> {
        if self.cqs.get(handle)?.users > 0 {
            return Err(Errno::BUSY);
        }
        let cq = self.cqs.remove(handle)?;
        if let Some(channel) = cq.channel
            && let Ok(channel) = self.channels.get(channel)
        {
            channel.users -= 1;
        }
        let index = cq.index;
        drop(node.worker.call(move |plane| plane.remove_cq(index)));
        Ok(Answer::default())
    }

    pub(super) fn resize_cq<D: Driver>(&mut self, request: &ResizeCq, node: &mut Node<D>) -> Result<Answer, Errno> {
        let cq = self.cqs.get(request.handle)?;
        // Whoever has read in the last ring has done with those before it.
        let last = cq.rings.len().saturating_sub(1);
        if cq.rings.last().is_some_and(CqRing::is_read) {
            cq.rings.drain(..last);
        } else if last >= MAX_UNREAD_RINGS {
            return Err(Errno::NOMEM);
        }
        let index = cq.index;
        let (ring, theirs) = CqRing::create(request.cqe, node)?;
        let (mapping, slots) = (Arc::clone(&ring.mapping), ring.slots);
        let switch = node.worker.call(move |plane| {
            plane.cqs.get_mut(index.0).and_then(Option::as_mut).map(|entry| entry.cq.move_to(mapping, slots))
        });
        let switch = switch.ok_or(Errno::INVAL)?;
        self.cqs.get(request.handle)?.rings.push(ring);
        Ok(Answer::of(CqReply { handle: request.handle, cqe: slots, slots, switch }).with(theirs))
    }

    pub(super) fn create_qp<D: Driver>(&mut self, request: &CreateQp, node: &mut Node<D>) -> Result<Answer, Errno> {
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
        let taken = node.take(Resource::Qp, 1)?;
        let bytes = layout::qp_bytes(send_slots, receive_slots);
        let (memory, theirs) = queue_memory("ringfence-qp", bytes, node)?;
        let mapping = Arc::new(Mapping::of(&memory)?);
        let queue = node.queues.take().ok_or(Errno::NOMEM)?;
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
        let number = loop {
            let number = match node.device.create_qp(node.port.lid(), &new) {
                Ok(number) => number,
                Err(error) => {
                    node.queues.give(queue);
                    return Err(error);
                }
            };
            let mapping = Arc::clone(&mapping);
            let added = node.worker.call(move |plane| {
                let free = !plane.by_number.contains_key(&number);
                if free {
                    plane.add_qp(&NewQp { number, ..new }, mapping);
                }
                free
            });
            if added {
                break number;
            }
        };
        self.pds.get(request.pd)?.users += 1;
        self.cqs.get(request.send_cq)?.users += 1;
        self.cqs.get(request.recv_cq)?.users += 1;
        let (send_cq, recv_cq) = (request.send_cq, request.recv_cq);
        let object = QpObject { queue, pd: request.pd, send_cq, recv_cq, _memory: memory, _taken: taken };
        let handle = self.qps.insert(object);
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
        Ok(Answer::of(reply).with(theirs))
    }

    pub(super) fn modify_qp<D: Driver>(&mut self, request: &ModifyQp, node: &mut Node<D>) -> Result<Answer, Errno> {
        let queue = self.qps.get(request.handle)?.queue;
        let av = &request.attr.av;
        let has_av = request.attr.mask & QpAttrMask::AV.0 != 0;
        if has_av {
            node.check_peer(av)?;
        }
        if has_av && av.is_global != 0 {
            node.check_source(u32::from(av.sgid_index))?;
        }
        if request.attr.mask & QpAttrMask::PKEY_INDEX.0 != 0 {
            node.check_pkey(request.attr.pkey_index)?;
        }
        D::modify_qp(node, queue, request)?;
        Ok(Answer::default())
    }

    pub(super) fn query_qp<D: Driver>(&mut self, handle: u32, node: &mut Node<D>) -> Result<Answer, Errno> {
        let queue = self.qps.get(handle)?.queue;
        D::query_qp(node, queue).map(Answer::of)
    }

    pub(super) fn destroy_qp<D: Driver>(&mut self, handle: u32, node: &mut Node<D>) -> Result<Answer, Errno> {
        let qp = self.qps.remove(handle)?;
        if let Ok(pd) = self.pds.get(qp.pd) {
            pd.users -= 1;
        }
        for cq in [qp.send_cq, qp.recv_cq] {
            if let Ok(cq) = self.cqs.get(cq) {
                cq.users -= 1;
            }
        }
        D::remove_qp(node, qp.queue);
        node.queues.give(qp.queue);
        Ok(Answer::default())
    }
}
