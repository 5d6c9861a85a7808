//! Posting work requests: from the program's list into the queue pair's rings.

// UNSAFETY: entry points of a C interface.
#![allow(unsafe_code)]

use crate::abi::{ibv_qp, ibv_recv_wr, ibv_send_wr, ibv_sge};
use crate::qp::{Limits, Qp};
use crate::sys::{self, Errno};
use crate::work_queue::{Posting, WorkQueue};
use core::ffi::c_int;
use core::ptr;
use core::slice;
use ringfence_protocol::ring::Words;
use ringfence_protocol::verbs::{Opcode, QpState, SendFlags};
use ringfence_protocol::work::{
    self, BASE_INLINE, EXTENSION_INLINE, MAX_EXTENSIONS, MAX_INLINE, MAX_SGE, ReceiveBase, SGES_PER_EXTENSION,
    SendBase, SendFields, Sge,
};

const HEAD_WORDS: usize = BASE_INLINE as usize / 8;
const EXTENSION_WORDS: usize = EXTENSION_INLINE as usize / 8;
/// Room for the longest inline data, a whole number of extensions.
const INLINE_WORDS: usize = HEAD_WORDS + MAX_EXTENSIONS as usize * EXTENSION_WORDS;

/// `ibv_post_send(3)`.
pub unsafe extern "C" fn post_send(qp: *mut ibv_qp, first: *mut ibv_send_wr, bad: *mut *mut ibv_send_wr) -> c_int {
    // SAFETY: the caller created the queue pair.
    let queue_pair = unsafe { Qp::from_raw(qp) };
    let mut result = Ok(());
    let mut next = first;
    if !queue_pair.connection.generation.is_current() {
        result = Err(libc::EIO);
    } else if queue_pair.state() < QpState::RTS {
        result = Err(libc::EINVAL);
    } else {
        let mut posting = queue_pair.send.posting.0.lock();
        // SAFETY: null, or a request of the program's list.
        while let Some(request) = unsafe { next.as_ref() } {
            // SAFETY: the request's list and data are readable, as the caller promises.
            result = unsafe { push_send(&queue_pair.send, &mut posting, &queue_pair.limits, request) };
            if result.is_err() {
                break;
            }
            next = request.next;
        }
        drop(posting);
        // What stands before a bad request has been posted.
        if next != first
            && queue_pair.header.send_bell.must_ring()
            && let Err(errno) = ring(queue_pair)
        {
            // Nobody will ever look at them.
            (result, next) = (Err(errno), first);
        }
    }
    result.map_or_else(
        |errno| {
            // SAFETY: the caller gave a place for the bad request.
            unsafe { refuse(bad, next, errno) }
        },
        |()| 0,
    )
}

/// `ibv_post_recv(3)`.
pub unsafe extern "C" fn post_recv(qp: *mut ibv_qp, first: *mut ibv_recv_wr, bad: *mut *mut ibv_recv_wr) -> c_int {
    // SAFETY: the caller created the queue pair.
    let queue_pair = unsafe { Qp::from_raw(qp) };
    let mut result = Ok(());
    let mut next = first;
    if !queue_pair.connection.generation.is_current() {
        result = Err(libc::EIO);
    } else if queue_pair.state() < QpState::INIT {
        result = Err(libc::EINVAL);
    } else {
        let mut posting = queue_pair.receive.posting.0.lock();
        // SAFETY: null, or a request of the program's list.
        while let Some(request) = unsafe { next.as_ref() } {
            // SAFETY: the request's list is readable, as the caller promises.
            result = unsafe { push_receive(&queue_pair.receive, &mut posting, &queue_pair.limits, request) };
            if result.is_err() {
                break;
            }
            next = request.next;
        }
        drop(posting);
        // Only when a sender waits for this, or the request is to be flushed.
        if next != first
            && queue_pair.header.receive_bell.must_ring()
            && let Err(errno) = ring(queue_pair)
        {
            // Nobody will ever look at them.
            (result, next) = (Err(errno), first);
        }
    }
    result.map_or_else(
        |errno| {
            // SAFETY: the caller gave a place for the bad request.
            unsafe { refuse(bad, next, errno) }
        },
        |()| 0,
    )
}

#[cold]
fn ring(queue_pair: &Qp) -> Result<(), Errno> {
    if queue_pair.connection.doorbells.ring(queue_pair.queue) { queue_pair.connection.wake() } else { Ok(()) }
}

/// # Safety
/// `bad` is null or writable.
#[cold]
unsafe fn refuse<T>(bad: *mut *mut T, request: *mut T, errno: Errno) -> c_int {
    if !bad.is_null() {
        // SAFETY: by the caller's promise.
        unsafe { *bad = request };
    }
    sys::zero_or_errno(Err(errno))
}

/// The elements of a request, if they are not too many.
///
/// # Safety
/// The list has that many elements.
#[inline(always)]
unsafe fn elements<'a>(list: *const ibv_sge, count: c_int, most: u32) -> Result<&'a [ibv_sge], Errno> {
    match u32::try_from(count) {
        Ok(0) => Ok(&[]),
        // SAFETY: by the caller's promise; programs give no null list with a count.
        Ok(count) if count <= most => Ok(unsafe { slice::from_raw_parts(list, count as usize) }),
        _ => Err(libc::EINVAL),
    }
}

fn element(sge: &ibv_sge) -> Sge {
    Sge { addr: sge.addr, length: sge.length, lkey: sge.lkey }
}

/// # Safety
/// The request's elements are readable, and for inline requests the data that they name.
#[inline(always)]
unsafe fn push_send(
    queue: &WorkQueue,
    posting: &mut Posting,
    limits: &Limits,
    request: &ibv_send_wr,
) -> Result<(), Errno> {
    let opcode = Opcode(u8::try_from(request.opcode).unwrap_or(u8::MAX));
    // The invalidating opcodes, windows and segmentation belong to capabilities that the device does not announce.
    if opcode > Opcode::FETCH_AND_ADD {
        return Err(libc::EINVAL);
    }
    // SAFETY: by the caller's promise.
    let sges = unsafe { elements(request.sg_list, request.num_sge, limits.max_send_sge) }?;
    let mut fields = SendFields {
        wr_id: request.wr_id,
        opcode,
        flags: SendFlags(request.send_flags as u8 & 0xf),
        imm: request.imm_data,
        ..SendFields::default()
    };
    if opcode >= Opcode::CMP_AND_SWP {
        // SAFETY: the opcode says which member of the union is set; all are plain numbers.
        let atomic = unsafe { request.wr.atomic };
        fields.remote_addr = atomic.remote_addr;
        fields.rkey = atomic.rkey;
        fields.compare_add = atomic.compare_add;
        fields.swap = atomic.swap;
    } else if opcode != Opcode::SEND && opcode != Opcode::SEND_WITH_IMM {
        // SAFETY: as above.
        let rdma = unsafe { request.wr.rdma };
        fields.remote_addr = rdma.remote_addr;
        fields.rkey = rdma.rkey;
    }
    if fields.flags.contains(SendFlags::INLINE) {
        if opcode >= Opcode::RDMA_READ {
            return Err(libc::EINVAL);
        }
        // SAFETY: by the caller's promise.
        return unsafe { push_inline(queue, posting, limits, &mut fields, sges) };
    }
    match sges {
        [only] if only.length != 0 => {
            if !queue.has_room(posting, 1) {
                return Err(libc::ENOMEM);
            }
            fields.sges = 1;
            fields.sge = element(only);
            posting.push(&SendBase::pack(&fields).0);
            Ok(())
        }
        _ => {
            let (list, count) = without_empty(sges);
            fields.sges = count as u8;
            fields.sge = list[0];
            push_list(queue, posting, &SendBase::pack(&fields).0, &list[..count])
        }
    }
}

/// # Safety
/// The request's elements are readable.
#[inline(always)]
unsafe fn push_receive(
    queue: &WorkQueue,
    posting: &mut Posting,
    limits: &Limits,
    request: &ibv_recv_wr,
) -> Result<(), Errno> {
    // SAFETY: by the caller's promise.
    let sges = unsafe { elements(request.sg_list, request.num_sge, limits.max_recv_sge) }?;
    match sges {
        [only] if only.length != 0 => {
            if !queue.has_room(posting, 1) {
                return Err(libc::ENOMEM);
            }
            posting.push(&ReceiveBase::pack(request.wr_id, 1, element(only)).0);
            Ok(())
        }
        _ => {
            let (list, count) = without_empty(sges);
            push_list(queue, posting, &ReceiveBase::pack(request.wr_id, count as u8, list[0]).0, &list[..count])
        }
    }
}

/// Elements of length zero name no memory; what they say besides does not count.
fn without_empty(sges: &[ibv_sge]) -> ([Sge; MAX_SGE as usize], usize) {
    let mut list = [Sge::default(); MAX_SGE as usize];
    let mut count = 0;
    for (to, from) in list.iter_mut().zip(sges.iter().filter(|sge| sge.length != 0)) {
        *to = element(from);
        count += 1;
    }
    (list, count)
}

/// A request whose base holds the first element of the list.
fn push_list(queue: &WorkQueue, posting: &mut Posting, base: &Words, list: &[Sge]) -> Result<(), Errno> {
    let count = work::extensions_for_sges(list.len() as u32);
    if !queue.has_room(posting, 1 + count) {
        return Err(libc::ENOMEM);
    }
    let mut extensions = [[0; 8]; MAX_EXTENSIONS as usize];
    let rest = list.get(1..).unwrap_or_default();
    for (to, from) in extensions.iter_mut().zip(rest.chunks(SGES_PER_EXTENSION as usize)) {
        *to = work::pack_sges(from);
    }
    posting.push_extended(base, &extensions[..count as usize]);
    Ok(())
}

/// # Safety
/// The data that the elements name is readable.
#[inline]
unsafe fn push_inline(
    queue: &WorkQueue,
    posting: &mut Posting,
    limits: &Limits,
    fields: &mut SendFields,
    sges: &[ibv_sge],
) -> Result<(), Errno> {
    let bytes: u64 = sges.iter().map(|sge| u64::from(sge.length)).sum();
    if bytes > u64::from(limits.max_inline.min(MAX_INLINE)) {
        return Err(libc::EINVAL);
    }
    let bytes = bytes as u32;
    fields.inline_bytes = bytes as u16;
    let count = work::extensions_for_inline(bytes);
    if !queue.has_room(posting, 1 + count) {
        return Err(libc::ENOMEM);
    }
    if count == 0 {
        let mut head = [0; HEAD_WORDS];
        // SAFETY: the data is readable, and not longer than the head.
        unsafe { gather(&mut head, sges) };
        posting.push(&SendBase::pack_inline(fields, &head).0);
        return Ok(());
    }
    let mut data = [0; INLINE_WORDS];
    // SAFETY: the data is readable, and not longer than the longest.
    unsafe { gather(&mut data, sges) };
    let (head, rest) = data.split_at(HEAD_WORDS);
    let mut extensions = [[0; 8]; MAX_EXTENSIONS as usize];
    for (to, from) in extensions.iter_mut().zip(rest.chunks_exact(EXTENSION_WORDS)).take(count as usize) {
        let mut words = [0; EXTENSION_WORDS];
        words.copy_from_slice(from);
        *to = work::pack_inline(&words);
    }
    let mut first = [0; HEAD_WORDS];
    first.copy_from_slice(head);
    posting.push_extended(&SendBase::pack_inline(fields, &first).0, &extensions[..count as usize]);
    Ok(())
}

/// Copies the data that the elements name, one behind the other.
///
/// # Safety
/// The data is readable and not longer than `to`.
#[inline(always)]
unsafe fn gather<const N: usize>(to: &mut [u64; N], sges: &[ibv_sge]) {
    let mut at = to.as_mut_ptr().cast::<u8>();
    for sge in sges {
        // SAFETY: by the caller's promise.
        unsafe {
            ptr::copy_nonoverlapping(ptr::with_exposed_provenance::<u8>(sge.addr as usize), at, sge.length as usize);
            at = at.add(sge.length as usize);
        }
    }
}
