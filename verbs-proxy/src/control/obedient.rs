//! A test build's obedience: the container says which system calls the proxy makes, and reads and writes its memory.
//!
//! That is what a proxy amounts to whose memory safety is gone. `integration/tests/takeover.rs` uses it to show what
//! such a proxy reaches outside its container's fence. No release build can have it.

// UNSAFETY: makes whatever system calls and copies it is told to. Nothing here is sound, and that is its purpose.
#![allow(unsafe_code)]

pub mod steps;
pub mod wire;

use crate::datagram;
use ringfence_protocol::control::{MAGIC, ReplyHeader, RequestHeader};
use rustix::fd::{AsFd, BorrowedFd};
use std::sync::OnceLock;
use wire::{BUFFER, COPY, Call, Head, LAST, MAX_CALLS, OBEY, Reply};
use zerocopy::{FromBytes, IntoBytes};

#[cfg(not(debug_assertions))]
compile_error!("a proxy that obeys its container must not be built for release");

/// What a program with this module contains and no other does: by it the tests tell them apart.
pub const MARK: &str = "ringfence-proxy: THIS TEST BUILD OBEYS ITS CONTAINER";

/// Does what a datagram says, if it is OBEY; `None` if it is something else. False ends the connection.
pub(super) fn serve(socket: impl AsFd, datagram: &[u8]) -> Option<bool> {
    let (header, body) = RequestHeader::read_from_prefix(datagram).ok()?;
    if header.magic != MAGIC || header.op != OBEY {
        return None;
    }
    let Some((head, calls, bytes)) = parse(body) else { return Some(false) };
    // SAFETY: the buffer is that long, never freed, and only this thread's; `parse` has checked the length.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), buffer() as *mut u8, bytes.len()) };
    let results: Vec<i64> = calls.iter().map(make).collect();
    let mut after = vec![0u8; bytes.len()];
    // SAFETY: as above.
    unsafe { std::ptr::copy_nonoverlapping(buffer() as *const u8, after.as_mut_ptr(), after.len()) };
    let given = if head.give == LAST { results.last().map_or(-1, |last| *last as i32) } else { head.give };
    // SAFETY: asks whether the number is that of an open descriptor.
    let is_open = given >= 0 && unsafe { libc::fcntl(given, libc::F_GETFD) } >= 0;
    let reply = Reply { base: buffer() as u64, given: is_open.into(), reserved: 0 };
    let answer = ReplyHeader { magic: MAGIC, sequence: header.sequence, errno: 0, reserved: 0 };
    let bytes = [answer.as_bytes(), reply.as_bytes(), results.as_bytes(), &after].concat();
    // SAFETY: it is open, as was asked above; nobody closes it before it is sent.
    let fds = if is_open { vec![unsafe { BorrowedFd::borrow_raw(given) }] } else { Vec::new() };
    Some(datagram::send(socket, &bytes, &fds).is_ok())
}

fn parse(body: &[u8]) -> Option<(Head, Vec<Call>, &[u8])> {
    let (head, rest) = Head::read_from_prefix(body).ok()?;
    let count = head.calls as usize;
    let (calls, bytes) = rest.split_at_checked(count.checked_mul(size_of::<Call>())?)?;
    if count > MAX_CALLS || bytes.len() != head.bytes as usize || bytes.len() > BUFFER {
        return None;
    }
    let calls = calls.chunks_exact(size_of::<Call>()).filter_map(|call| Call::read_from_bytes(call).ok()).collect();
    Some((head, calls, bytes))
}

/// The address of the buffer that calls point into, of whole pages and zero at first.
fn buffer() -> usize {
    static AT: OnceLock<usize> = OnceLock::new();
    *AT.get_or_init(|| Box::leak(Box::new([0u64; BUFFER / 8])).as_mut_ptr() as usize)
}

fn make(call: &Call) -> i64 {
    let [number, a, b, c, d, e, f] = *call;
    if number == COPY {
        // SAFETY: none. A wrong address ends the proxy, which is its container's loss.
        unsafe { std::ptr::copy(b as *const u8, a as *mut u8, c as usize) };
        return c as i64;
    }
    // SAFETY: asks for a number.
    let before = unsafe { libc::syscall(libc::SYS_gettid) };
    // SAFETY: none, as the module says.
    let result = unsafe { libc::syscall(number as i64, a, b, c, d, e, f) };
    let error = std::io::Error::last_os_error().raw_os_error().unwrap_or(0);
    // SAFETY: asks for a number.
    if unsafe { libc::syscall(libc::SYS_gettid) } != before {
        // The child of a fork or clone: it has shown that it can be made.
        // SAFETY: ends this process, or this thread if it is one.
        unsafe { libc::syscall(libc::SYS_exit, 0) };
    }
    if result == -1 { -i64::from(error) } else { result }
}
