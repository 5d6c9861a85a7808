//! The control thread: connections of the container's processes, links to neighbours, and the end of the container.
//!
//! It may take milliseconds over a registration; the worker goes on meanwhile.

pub mod device;
pub mod handles;
pub mod links;
pub mod node;
#[cfg(feature = "obedient")]
pub mod obedient;
pub mod quota;
pub mod session;

use crate::datagram;
use crate::pacing::Nanos;
use crate::plane::Notice;
use crate::worker::{now, silence};
use node::Node;
use ringfence_protocol::control::{AsyncEvent, MAGIC, MAX_DATAGRAM, ReplyHeader, RequestHeader};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, OwnedFd};
use rustix::io::Errno;
use rustix::net::{Shutdown, SocketFlags, accept_with, shutdown};
use session::{PeerFault, Session};
use zerocopy::{FromBytes, IntoBytes};

/// Application processes of one container.
const MAX_CONNECTIONS: usize = 1024;

/// Descriptors of one party that wait to be closed before nothing more is taken in from it.
pub const MAX_CLOSING: usize = 1024;

#[derive(Debug)]
struct Connection {
    id: u64,
    socket: OwnedFd,
    session: Session,
}

/// How long nobody is let in after an attempt that failed, which it would again at once: for want of descriptors, say.
const PAUSE: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

/// The control thread's state.
#[derive(Debug)]
pub struct Server {
    node: Node,
    listener: OwnedFd,
    fabric: OwnedFd,
    init: OwnedFd,
    signals: OwnedFd,
    connections: Vec<Connection>,
    next_id: u64,
}

/// Why [`Server::run`] came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The container's init is gone.
    Container,
    /// Somebody told the proxy to end.
    Signal,
    /// The warden is gone, without which no memory can be shared and nobody clears up.
    Warden,
}

impl Server {
    /// A server on `listener` (the container's processes) and `fabric` (neighbours), until `init` or `signals` is readable.
    #[must_use]
    pub fn new(node: Node, listener: OwnedFd, fabric: OwnedFd, init: OwnedFd, signals: OwnedFd) -> Self {
        Self { node, listener, fabric, init, signals, connections: Vec::new(), next_id: 1 }
    }

    /// Serves until the container ends.
    pub fn run(&mut self) -> Result<End, Errno> {
        let mut accepting = true;
        loop {
            let closers = &self.node.closers;
            let (full, others_full) = (closers.container.is_full(), closers.neighbours.is_full());
            let wanted = |wanted: bool| if wanted { PollFlags::IN } else { PollFlags::empty() };
            let mut fds: Vec<PollFd<'_>> = [
                (self.init.as_fd(), PollFlags::IN),
                (self.signals.as_fd(), PollFlags::IN),
                (self.node.warden.as_fd(), PollFlags::IN),
                (self.node.worker.notices_fd().as_fd(), PollFlags::IN),
                (self.fabric.as_fd(), wanted(accepting && !others_full && self.node.neighbours.has_room())),
                (self.listener.as_fd(), wanted(accepting && !full)),
            ]
            .into_iter()
            .map(|(fd, events)| PollFd::from_borrowed_fd(fd, events))
            .collect();
            const FIXED: usize = 6;
            // What polls without being asked, as a hang-up does, must not be asked at all while nothing is taken in.
            let connections = if full { 0 } else { self.connections.len() };
            let neighbours = if others_full { 0 } else { self.node.neighbours.list.len() };
            fds.extend(
                self.connections[..connections]
                    .iter()
                    .map(|c| PollFd::from_borrowed_fd(c.socket.as_fd(), PollFlags::IN)),
            );
            fds.extend(
                self.node.neighbours.list[..neighbours]
                    .iter()
                    .map(|n| PollFd::from_borrowed_fd(n.as_fd(), PollFlags::IN)),
            );
            let pause = (!accepting || full || others_full).then_some(PAUSE);
            let due = self.node.neighbours.wake_at().map(until);
            match poll(&mut fds, pause.into_iter().chain(due).min_by_key(|t| (t.tv_sec, t.tv_nsec)).as_ref()) {
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(error) => return Err(error),
            }
            let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
            if ready[0] {
                return Ok(End::Container);
            }
            if ready[1] {
                return Ok(End::Signal);
            }
            // It says nothing unasked.
            if ready[2] {
                return Ok(End::Warden);
            }
            // From the back, so that those that end do not move those that are still to come.
            for index in (0..neighbours).rev() {
                if ready[FIXED + connections + index] {
                    self.node.serve_neighbour(index);
                }
            }
            for index in (0..connections).rev() {
                if ready[FIXED + index] {
                    self.serve_connection(index);
                }
            }
            if ready[3] {
                self.hear_worker();
            }
            if self.node.neighbours.wake_at().is_some() {
                self.node.tend_neighbours();
            }
            accepting = true;
            if ready[4] {
                accepting &= self.accept_neighbour();
            }
            if ready[5] {
                accepting &= self.accept_connection();
            }
        }
    }

    /// False if the next attempt would fail too.
    fn accept_connection(&mut self) -> bool {
        let socket = match accept_with(&self.listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            Ok(socket) => socket,
            Err(error) => return may_accept_after(error),
        };
        if self.connections.len() < MAX_CONNECTIONS {
            let id = self.next_id;
            self.next_id += 1;
            self.connections.push(Connection { id, socket, session: Session::new(id) });
        } else {
            self.node.closers.container.close(socket);
        }
        true
    }

    /// False if the next attempt would fail too.
    fn accept_neighbour(&mut self) -> bool {
        match accept_with(&self.fabric, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            Ok(socket) => {
                self.node.admit_neighbour(socket);
                true
            }
            Err(error) => may_accept_after(error),
        }
    }

    fn serve_connection(&mut self, index: usize) {
        // One request a look, so that all processes have their turn.
        let served = serve(&mut self.connections[index], &mut self.node);
        if served != Served::On {
            let mut connection = self.connections.swap_remove(index);
            connection.session.end(&mut self.node);
            // Its process hears of the end now, also if the socket waits to be closed.
            let _ = shutdown(&connection.socket, Shutdown::Both);
            self.node.closers.container.close(connection.socket);
        }
    }

    fn hear_worker(&mut self) {
        silence(self.node.worker.notices_fd());
        while let Ok(notice) = self.node.worker.notices.try_recv() {
            match notice {
                Notice::Event { owner, event, cookie } => {
                    let connection = self.connections.iter_mut().find(|connection| connection.id == owner.connection);
                    if let Some(events) = connection.and_then(|connection| connection.session.events(owner.context)) {
                        let event = AsyncEvent { event, port: 1, cookie };
                        // A container that does not read its events loses the newest, as with a full event queue.
                        let _ = datagram::send(events, event.as_bytes(), &[]);
                    }
                }
                Notice::Share { link, key } => self.node.share(link, key),
                Notice::Fault { link, fault } => self.node.link_failed(link, fault),
            }
        }
    }
}

/// How long it is until then.
fn until(at: Nanos) -> Timespec {
    let left = at.saturating_sub(now());
    Timespec { tv_sec: (left / 1_000_000_000) as i64, tv_nsec: (left % 1_000_000_000) as _ }
}

/// Whether an attempt to accept that failed this way says nothing about the next.
fn may_accept_after(error: Errno) -> bool {
    matches!(error, Errno::AGAIN | Errno::INTR | Errno::CONNABORTED)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Served {
    On,
    /// The process closed its connection or broke the protocol.
    End,
}

fn serve(connection: &mut Connection, node: &mut Node) -> Served {
    let mut buffer = [0; MAX_DATAGRAM];
    let received = match datagram::receive(&connection.socket, &mut buffer) {
        Ok(received) => received,
        Err(Errno::AGAIN | Errno::INTR) => return Served::On,
        Err(_) => return Served::End,
    };
    if received.bytes == 0 && received.fds.is_empty() {
        return Served::End;
    }
    #[cfg(feature = "obedient")]
    if let Some(goes_on) = obedient::serve(&connection.socket, &buffer[..received.bytes]) {
        return if goes_on { Served::On } else { Served::End };
    }
    let bare = received.fds.is_empty();
    node.closers.container.close_all(received.fds);
    // A container can end its connections as often as it likes: its faults are not worth a line of log each.
    let answered = if received.truncated || !bare {
        Err(PeerFault::Surplus)
    } else {
        answer(connection, &buffer[..received.bytes], node)
    };
    if answered.is_ok() { Served::On } else { Served::End }
}

fn answer(connection: &mut Connection, datagram: &[u8], node: &mut Node) -> Result<(), PeerFault> {
    let (header, body) =
        RequestHeader::read_from_prefix(datagram).map_err(|_| PeerFault::Size { op: 0, bytes: datagram.len() })?;
    if header.magic != MAGIC {
        return Err(PeerFault::Magic);
    }
    let answer = connection.session.serve(header.op, body, node)?;
    let reply = |errno: u32| ReplyHeader { magic: MAGIC, sequence: header.sequence, errno, reserved: 0 };
    let sent = match &answer {
        Ok(answer) => {
            let bytes = [reply(0).as_bytes(), &answer.body].concat();
            let fds: Vec<_> = answer.fds.iter().map(|fd| fd.as_fd()).collect();
            datagram::send(&connection.socket, &bytes, &fds)
        }
        Err(error) => datagram::send(&connection.socket, reply(error.raw_os_error() as u32).as_bytes(), &[]),
    };
    sent.map_err(|_| PeerFault::Deaf)
}
