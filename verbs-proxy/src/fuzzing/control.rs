//! Control messages of two of the container's processes.

use super::node::{Scene, scene};
use arbitrary::{Arbitrary, Unstructured};
use ringfence_protocol::control::*;
use rustix::fd::OwnedFd;
use rustix::fs::{MemfdFlags, SealFlags};
use zerocopy::FromBytes;

/// What is sent next: by whom, what, and what comes along.
#[derive(Debug, Arbitrary)]
struct Asked {
    second: bool,
    op: u8,
    fd: Option<Descriptor>,
}

/// A descriptor that the container sends.
#[derive(Clone, Copy, Debug, Arbitrary)]
enum Descriptor {
    Memory,
    Short,
    Sealed,
    Socket,
}

/// A word of this upper half names a handle that an answer gave: the lower half says which. So the fuzzer need not guess them.
const KNOWN: u32 = 0xfeed;

const OPS: [(Op, usize); 28] = [
    (Op::HELLO, size_of::<Hello>()),
    (Op::DEVICE, size_of::<Index>()),
    (Op::OPEN, size_of::<Index>()),
    (Op::CLOSE, size_of::<Handle>()),
    (Op::QUERY_PORT, size_of::<PortQuery>()),
    (Op::QUERY_GID, size_of::<PortQuery>()),
    (Op::FIND_GID, size_of::<CardIndex>()),
    (Op::ALLOC_PD, size_of::<Handle>()),
    (Op::DEALLOC_PD, size_of::<Handle>()),
    (Op::ALLOC_REGION, size_of::<AllocRegion>()),
    (Op::FREE_REGION, size_of::<Handle>()),
    (Op::REG_MR, size_of::<RegMr>()),
    (Op::DEREG_MR, size_of::<Handle>()),
    (Op::ADOPT_REGION, size_of::<Handle>()),
    (Op::REG_FRESH, size_of::<RegFresh>()),
    (Op::REG_DMABUF, size_of::<RegDmabuf>()),
    (Op::CREATE_COMP_CHANNEL, size_of::<Handle>()),
    (Op::DESTROY_COMP_CHANNEL, size_of::<Handle>()),
    (Op::CREATE_CQ, size_of::<CreateCq>()),
    (Op::DESTROY_CQ, size_of::<Handle>()),
    (Op::RESIZE_CQ, size_of::<ResizeCq>()),
    (Op::CREATE_QP, size_of::<CreateQp>()),
    (Op::MODIFY_QP, size_of::<ModifyQp>()),
    (Op::QUERY_QP, size_of::<Handle>()),
    (Op::DESTROY_QP, size_of::<Handle>()),
    (Op(99), 8),
    (Op::QUERY_PKEY, size_of::<PortQuery>()),
    (Op::FIND_PKEY, size_of::<CardIndex>()),
];

/// One input.
pub fn run(data: &[u8]) {
    let mut input = Unstructured::new(data);
    let mut scene = scene();
    let mut sessions = vec![scene.session(), scene.session()];
    let mut known = Vec::new();
    for _ in 0..64 {
        if input.is_empty() {
            break;
        }
        let Ok(asked) = input.arbitrary::<Asked>() else { break };
        let (op, bytes) = OPS[usize::from(asked.op) % OPS.len()];
        // Seldom of another length than it should be.
        let bytes = if asked.op >= 240 { usize::from(asked.op - 240) * 16 } else { bytes };
        let segments = if op == Op::REG_MR { usize::from(asked.op >> 5) * size_of::<Segment>() } else { 0 };
        let Ok(body) = input.bytes((bytes + segments).min(input.len())) else { break };
        let mut body = body.to_vec();
        body.resize(bytes + segments, 0);
        name_handles(&mut body, &known);
        let fd = if op.takes_descriptor() { asked.fd.map(make) } else { None };
        let session = &mut sessions[usize::from(asked.second)];
        match scene.ask(session, op, &body, fd) {
            Ok(Ok(answer)) => remember(op, &answer, &mut known),
            Ok(Err(_)) => {}
            Err(_) => {
                // It ends, and another process connects.
                let mut broken = std::mem::replace(session, scene.session());
                broken.end(&mut scene.node);
            }
        }
    }
    scene.end(sessions);
}

fn name_handles(body: &mut [u8], known: &[u32]) {
    for word in body.as_chunks_mut::<4>().0 {
        let value = u32::from_ne_bytes(*word);
        if value >> 16 == KNOWN
            && let Some(handle) = known.get(value as usize & 0xff)
        {
            *word = handle.to_ne_bytes();
        }
    }
}

fn remember(op: Op, answer: &[u8], known: &mut Vec<u32>) {
    let handle = match op {
        Op::OPEN => OpenReply::read_from_bytes(answer).map(|reply| reply.context).ok(),
        Op::REG_FRESH => FreshReply::read_from_bytes(answer).ok().map(|reply| {
            known.extend([reply.region, reply.ahead]);
            reply.handle
        }),
        Op::ALLOC_PD | Op::ALLOC_REGION | Op::ADOPT_REGION | Op::CREATE_COMP_CHANNEL => {
            Handle::read_from_bytes(answer).map(|reply| reply.handle).ok()
        }
        Op::REG_MR | Op::REG_DMABUF => MrReply::read_from_bytes(answer).map(|reply| reply.handle).ok(),
        Op::CREATE_CQ => CqReply::read_from_bytes(answer).map(|reply| reply.handle).ok(),
        Op::CREATE_QP => QpReply::read_from_bytes(answer).map(|reply| reply.handle).ok(),
        _ => return,
    };
    known.push(handle.unwrap_or_else(|| panic!("{op:?} is answered by {} bytes", answer.len())));
}

fn make(kind: Descriptor) -> OwnedFd {
    let memory = |bytes| {
        let fd = rustix::fs::memfd_create("fuzzed", MemfdFlags::ALLOW_SEALING | MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fd, bytes).unwrap();
        fd
    };
    match kind {
        Descriptor::Memory => memory(16 << 12),
        Descriptor::Short => memory(100),
        Descriptor::Sealed => {
            let fd = memory(16 << 12);
            rustix::fs::fcntl_add_seals(&fd, SealFlags::WRITE | SealFlags::SHRINK).unwrap();
            fd
        }
        Descriptor::Socket => std::os::unix::net::UnixDatagram::unbound().unwrap().into(),
    }
}

/// For who connects queue pairs: what a session needs for one, and the queue pair itself.
pub(super) fn connected_qp(scene: &mut Scene) -> crate::control::session::Session {
    use ringfence_protocol::verbs::{Access, QpAttrMask as Mask, QpState, QpType};
    use zerocopy::IntoBytes;
    let mut session = scene.session();
    let lid = scene.other.lid;
    let mut ask = |op, body: &[u8]| scene.ask(&mut session, op, body, None).unwrap().unwrap();
    let open = OpenReply::read_from_bytes(&ask(Op::OPEN, Index { index: 0, reserved: 0 }.as_bytes())).unwrap();
    let context = Handle { handle: open.context, reserved: 0 };
    let pd = Handle::read_from_bytes(&ask(Op::ALLOC_PD, context.as_bytes())).unwrap().handle;
    let create = CreateCq { context: open.context, cqe: 16, channel: NO_HANDLE, ..CreateCq::default() };
    let cq = CqReply::read_from_bytes(&ask(Op::CREATE_CQ, create.as_bytes())).unwrap().handle;
    let create = CreateQp { pd, send_cq: cq, recv_cq: cq, qp_type: QpType::RC, ..CreateQp::default() };
    let handle = QpReply::read_from_bytes(&ask(Op::CREATE_QP, create.as_bytes())).unwrap().handle;
    let access = Access::LOCAL_WRITE | Access::REMOTE_WRITE | Access::REMOTE_READ;
    let mut init = QpAttr { state: QpState::INIT, port: 1, access, ..QpAttr::default() };
    init.mask = (Mask::STATE | Mask::PKEY_INDEX | Mask::PORT | Mask::ACCESS_FLAGS).0;
    let mut rtr = QpAttr {
        state: QpState::RTR,
        path_mtu: 5,
        dest_qp_num: u32::from(lid) << 14 | 5,
        max_dest_rd_atomic: 4,
        min_rnr_timer: 1,
        ..QpAttr::default()
    };
    (rtr.av.dlid, rtr.av.port) = (lid, 1);
    rtr.mask = (Mask::STATE | Mask::AV | Mask::PATH_MTU | Mask::DEST_QPN | Mask::RQ_PSN).0
        | (Mask::MAX_DEST_RD_ATOMIC | Mask::MIN_RNR_TIMER).0;
    for attr in [init, rtr] {
        ask(Op::MODIFY_QP, ModifyQp { handle, attr, ..ModifyQp::default() }.as_bytes());
    }
    session
}
