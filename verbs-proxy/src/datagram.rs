//! Datagrams with file descriptors on SEQPACKET sockets.

// UNSAFETY: a socket option and an ioctl that rustix does not know.
#![allow(unsafe_code)]

use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::{Errno, IoSlice, IoSliceMut};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};
use rustix::thread::sched_yield;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;

/// The most descriptors that the kernel passes with one datagram (`SCM_MAX_FD`).
pub const MAX_FDS: usize = 253;

/// Has the kernel refuse descriptors that are sent to this socket, or to those that connect to it, at the sender.
///
/// Linux does since 6.16. Older kernels deliver them, so whoever receives must be ready for them in any case.
pub fn refuse_descriptors(socket: impl AsFd) {
    /// `SO_PASSRIGHTS` (`asm-generic/socket.h`).
    const SO_PASSRIGHTS: libc::c_int = 83;
    let off: libc::c_int = 0;
    // SAFETY: the value lives across the call and is as long as is said.
    unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            SO_PASSRIGHTS,
            (&raw const off).cast(),
            size_of_val(&off) as libc::socklen_t,
        )
    };
}

/// Whether something that was sent on a Unix socket has not been received yet.
pub fn has_unread(socket: impl AsFd) -> bool {
    let mut bytes: libc::c_int = 0;
    // SAFETY: `SIOCOUTQ`, which is `TIOCOUTQ`, writes one integer, which lives across the call.
    let asked = unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
    asked == 0 && bytes > 0
}

/// How often something is sent again for which the kernel has no memory: who waits for it would wait for ever, or be given up.
const TRIES: usize = 16;

/// Sends one datagram without waiting.
pub fn send(socket: impl AsFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(Errno::TOOBIG);
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    let parts = [IoSlice::new(bytes)];
    let mut sent = sendmsg(&socket, &parts, &mut control, flags);
    for _ in 0..TRIES {
        if matches!(sent, Err(Errno::NOBUFS | Errno::NOMEM)) {
            sched_yield();
            sent = sendmsg(&socket, &parts, &mut control, flags);
        }
    }
    let sent = sent?;
    if sent == bytes.len() { Ok(()) } else { Err(Errno::MSGSIZE) }
}

/// A received datagram.
#[derive(Debug)]
pub struct Received {
    /// Bytes in the buffer; zero when the other end has closed.
    pub bytes: usize,
    /// Descriptors beside it, close-on-exec.
    pub fds: Vec<OwnedFd>,
    /// It was longer than the buffer, or had more descriptors than there is room for.
    pub truncated: bool,
}

/// Takes one datagram without waiting.
///
/// The kernel closes descriptors that it finds no room for here and now, which may take as long as their maker likes: so
/// there is room for all that one datagram can bring. The same goes for those received: see [`crate::closer`].
pub fn receive(socket: impl AsFd, buffer: &mut [u8]) -> Result<Received, Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let message = recvmsg(socket, &mut [IoSliceMut::new(buffer)], &mut control, flags)?;
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    let lost = rustix::net::ReturnFlags::TRUNC | rustix::net::ReturnFlags::CTRUNC;
    Ok(Received { bytes: message.bytes, fds, truncated: message.flags.intersects(lost) })
}
