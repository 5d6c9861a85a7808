//! One connection of an application process: requests in, answers out, and no faster in than out.
//!
//! Answers that are not taken hold descriptors in flight, of which the kernel allows a user only so many. So nothing is read
//! from a connection while its last answers lie unread: at most two, and at most two descriptors with each.

use super::driver::Driver;
use super::node::Node;
use super::session::{PeerFault, Session};
use crate::datagram;
use ringfence_protocol::control::{MAGIC, MAX_DATAGRAM, ReplyHeader, RequestHeader};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;
use rustix::net::sockopt::set_socket_send_buffer_size;
use zerocopy::{FromBytes, IntoBytes};

/// A process that has connected.
#[derive(Debug)]
pub(super) struct Connection {
    id: u64,
    socket: OwnedFd,
    session: Session,
    /// There is no room for an answer, so no request is read.
    stalled: bool,
}

/// What came of a look at a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Served {
    On,
    /// The process closed its connection or broke the protocol.
    End,
}

impl Connection {
    pub(super) fn new(id: u64, socket: OwnedFd) -> Self {
        // The least that there is: two answers fit, and the socket is writable again when one of them was taken. It is a
        // constant that no socket refuses.
        let _ = set_socket_send_buffer_size(&socket, 1);
        Self { id, socket, session: Session::new(id), stalled: false }
    }

    pub(super) fn id(&self) -> u64 {
        self.id
    }

    /// Where asynchronous events of a context go.
    pub(super) fn events(&mut self, context: u32) -> Option<&OwnedFd> {
        self.session.events(context)
    }

    /// The same of all contexts.
    pub(super) fn all_events(&self) -> impl Iterator<Item = &OwnedFd> {
        self.session.all_events()
    }

    /// What must happen before it is to be served.
    pub(super) fn awaits(&self) -> PollFlags {
        if self.stalled { PollFlags::OUT } else { PollFlags::IN }
    }

    /// Serves one request, if there is room for its answer.
    pub(super) fn serve<D: Driver>(&mut self, node: &mut Node<D>) -> Served {
        // A hang-up counts as room: then there is nobody to answer.
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        self.stalled = poll(&mut [PollFd::new(&self.socket, PollFlags::OUT)], Some(&now)) == Ok(0);
        if self.stalled {
            return Served::On;
        }
        let mut buffer = [0; MAX_DATAGRAM];
        let received = match datagram::receive(&self.socket, &mut buffer) {
            Ok(received) => received,
            Err(Errno::AGAIN | Errno::INTR) => return Served::On,
            Err(_) => return Served::End,
        };
        if received.bytes == 0 && received.fds.is_empty() {
            return Served::End;
        }
        #[cfg(feature = "obedient")]
        if let Some(goes_on) = super::obedient::serve(&self.socket, &buffer[..received.bytes]) {
            return if goes_on { Served::On } else { Served::End };
        }
        let mut fds = received.fds;
        // A container can end its connections as often as it likes: its faults are not worth a line of log each.
        let answered = if received.truncated || fds.len() > 1 {
            Err(PeerFault::Surplus)
        } else {
            let mut fd = fds.pop();
            let answered = self.answer(&buffer[..received.bytes], &mut fd, node);
            // Of no use to this request.
            fds.extend(fd);
            answered
        };
        node.closers.container.close_all(fds);
        if answered.is_ok() { Served::On } else { Served::End }
    }

    fn answer<D: Driver>(
        &mut self,
        datagram: &[u8],
        fd: &mut Option<OwnedFd>,
        node: &mut Node<D>,
    ) -> Result<(), PeerFault> {
        let (header, body) =
            RequestHeader::read_from_prefix(datagram).map_err(|_| PeerFault::Size { op: 0, bytes: datagram.len() })?;
        if header.magic != MAGIC {
            return Err(PeerFault::Magic);
        }
        if fd.is_some() != header.op.takes_descriptor() {
            return Err(PeerFault::Surplus);
        }
        let answer = self.session.serve(header.op, body, fd, node)?;
        let reply = |errno: u32| ReplyHeader { magic: MAGIC, sequence: header.sequence, errno, reserved: 0 };
        let sent = match &answer {
            Ok(answer) => {
                let bytes = [reply(0).as_bytes(), &answer.body].concat();
                let fds: Vec<_> = answer.fds.iter().map(|fd| fd.as_fd()).collect();
                datagram::send(&self.socket, &bytes, &fds)
            }
            Err(error) => datagram::send(&self.socket, reply(error.raw_os_error() as u32).as_bytes(), &[]),
        };
        sent.map_err(|_| PeerFault::Deaf)?;
        node.spares.prepare();
        Ok(())
    }

    /// Destroys its objects. What is left is the socket.
    pub(super) fn end<D: Driver>(mut self, node: &mut Node<D>) -> OwnedFd {
        self.session.end(node);
        self.socket
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
