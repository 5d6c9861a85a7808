//! The control thread: connections of the container's processes, links to neighbours, and the end of the container.
//!
//! It may take milliseconds over a registration; the worker goes on meanwhile.

pub mod adopted;
mod connection;
pub mod driver;
pub mod grants;
pub mod handles;
pub mod kept;
pub mod lent;
pub mod links;
pub mod node;
#[cfg(feature = "obedient")]
pub mod obedient;
mod peers;
pub mod quota;
pub mod session;
mod shown;
mod soft;
pub mod spares;

use crate::datagram;
use crate::device::control::Control;
use crate::device::soft::Soft;
use crate::pacing::Nanos;
use crate::plane::Notice;
use crate::sysfs::Shown;
use crate::worker::{lower, now};
use connection::{Connection, Served};
use driver::Driver;
use node::Node;
use ringfence_protocol::control::AsyncEvent;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, OwnedFd};
use rustix::io::Errno;
use rustix::net::{Shutdown, SocketFlags, accept_with, shutdown};
use zerocopy::IntoBytes;

/// Application processes of one container.
const MAX_CONNECTIONS: usize = 1024;

/// Descriptors of one party that wait to be closed before nothing more is taken in from it.
pub const MAX_CLOSING: usize = 1024;

/// How often the next request is looked for before the thread sleeps: requests come in rows, and to be woken takes longer than
/// most of them.
const LOOKS: u32 = 100;

/// How long nobody is let in after an attempt that failed, which it would again at once: for want of descriptors, say.
const PAUSE: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

/// The control thread's state.
#[derive(Debug)]
pub struct Server<D: Driver = Soft> {
    node: Node<D>,
    listener: OwnedFd,
    fabric: OwnedFd,
    init: OwnedFd,
    signals: OwnedFd,
    connections: Vec<Connection>,
    /// Connections that ended with answers that were not taken yet. They hold descriptors, so they count as connections.
    leaving: Vec<OwnedFd>,
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

impl<D: Driver> Server<D> {
    /// A server on `listener` (the container's processes) and `fabric` (neighbours), until `init` or `signals` is readable.
    #[must_use]
    pub fn new(node: Node<D>, listener: OwnedFd, fabric: OwnedFd, init: OwnedFd, signals: OwnedFd) -> Self {
        Self { node, listener, fabric, init, signals, connections: Vec::new(), leaving: Vec::new(), next_id: 1 }
    }

    /// Serves until the container ends.
    pub fn run(&mut self) -> Result<End, Errno> {
        let mut accepting = true;
        let mut looks = 0;
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
            let leaving = if full { 0 } else { self.leaving.len() };
            let neighbours = if others_full { Vec::new() } else { self.node.neighbours.heard(now()) };
            fds.extend(self.connections[..connections].iter().map(|c| PollFd::from_borrowed_fd(c.as_fd(), c.awaits())));
            fds.extend(
                self.leaving[..leaving]
                    .iter()
                    .map(|socket| PollFd::from_borrowed_fd(socket.as_fd(), PollFlags::empty())),
            );
            fds.extend(
                neighbours
                    .iter()
                    .map(|index| &self.node.neighbours.list[*index])
                    .map(|n| PollFd::from_borrowed_fd(n.as_fd(), PollFlags::IN)),
            );
            let quiet_until = self.node.shown.as_ref().map(Shown::quiet_until).filter(|until| *until > now());
            let watched = self.node.shown.as_ref().filter(|_| quiet_until.is_none());
            fds.extend(watched.map(|shown| PollFd::from_borrowed_fd(shown.as_fd(), PollFlags::IN)));
            let has_shown = watched.is_some();
            let shown_at = fds.len() - usize::from(has_shown);
            fds.extend(self.node.device.waker().map(|waker| PollFd::from_borrowed_fd(waker, PollFlags::IN)));
            let waker_at = shown_at + usize::from(has_shown);
            let pause = (!accepting || full || others_full).then_some(PAUSE);
            let due = self.node.neighbours.wake_at().map(until);
            let look = (looks > 0).then_some(Timespec { tv_sec: 0, tv_nsec: 0 });
            let tend = self.node.device.wake_at();
            let gids = self.node.gids_due;
            let timeouts = [pause, due, look, quiet_until.map(until), tend.map(until), gids.map(until)];
            match poll(&mut fds, timeouts.into_iter().flatten().min_by_key(|t| (t.tv_sec, t.tv_nsec)).as_ref()) {
                Ok(0) if looks > 0 => {
                    looks -= 1;
                    rustix::thread::sched_yield();
                    continue;
                }
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
            if ready[2] && self.node.warden.has_ended() {
                return Ok(End::Warden);
            }
            // From the back, so that those that end do not move those that are still to come.
            for (place, index) in neighbours.iter().enumerate().rev() {
                if ready[FIXED + connections + leaving + place] {
                    D::serve_neighbour(&mut self.node, *index);
                }
            }
            for index in (0..leaving).rev() {
                if ready[FIXED + connections + index] {
                    self.node.closers.container.close(self.leaving.swap_remove(index));
                }
            }
            for index in (0..connections).rev() {
                if ready[FIXED + index] {
                    self.serve_connection(index);
                    looks = LOOKS;
                }
            }
            if has_shown && ready[shown_at] {
                self.node.hear_addresses();
            }
            if ready.get(waker_at) == Some(&true) || tend.is_some_and(|at| at <= now()) {
                D::hear_device(&mut self.node);
            }
            self.node.tend_gids();
            self.announce();
            if ready[3] {
                self.hear_worker();
            }
            if self.node.neighbours.wake_at().is_some() {
                D::tend_neighbours(&mut self.node);
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
        let closer = &self.node.closers.container;
        closer.close_all(self.leaving.extract_if(.., |socket| !datagram::has_unread(&*socket)));
        let crowded = self.connections.len() + self.leaving.len() >= MAX_CONNECTIONS;
        if crowded || !self.node.quota.may_keep_connection(&socket) {
            closer.close(socket);
            return true;
        }
        self.connections.push(Connection::new(self.next_id, socket));
        self.next_id += 1;
        true
    }

    /// False if the next attempt would fail too.
    fn accept_neighbour(&mut self) -> bool {
        match accept_with(&self.fabric, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            Ok(socket) => {
                D::let_neighbour_in(&mut self.node, socket);
                self.announce();
                true
            }
            Err(error) => may_accept_after(error),
        }
    }

    fn serve_connection(&mut self, index: usize) {
        // One request a look, so that all processes have their turn.
        if self.connections[index].serve(&mut self.node) == Served::On {
            return;
        }
        let socket = self.connections.swap_remove(index).end(&mut self.node);
        // Its process hears of the end now, also if the socket waits to be closed.
        if datagram::has_unread(&socket) {
            let _ = shutdown(&socket, Shutdown::Write);
            self.leaving.push(socket);
        } else {
            let _ = shutdown(&socket, Shutdown::Both);
            self.node.closers.container.close(socket);
        }
    }

    /// Tells every context what the device has to say to all.
    fn announce(&mut self) {
        for event in std::mem::take(&mut self.node.announced) {
            let event = AsyncEvent { event, port: 1, cookie: 0 };
            for events in self.connections.iter().flat_map(Connection::all_events) {
                // As below.
                let _ = datagram::send(events, event.as_bytes(), &[]);
            }
        }
    }

    fn hear_worker(&mut self) {
        lower(self.node.worker.notices_fd());
        while let Ok(notice) = self.node.worker.notices.try_recv() {
            match notice {
                Notice::Event { owner, event, cookie } => {
                    let connection = self.connections.iter_mut().find(|connection| connection.id() == owner.connection);
                    if let Some(events) = connection.and_then(|connection| connection.events(owner.context)) {
                        let event = AsyncEvent { event, port: 1, cookie };
                        // A container that does not read its events loses the newest, as with a full event queue.
                        let _ = datagram::send(events, event.as_bytes(), &[]);
                    }
                }
                Notice::Device(notice) => D::hear(&mut self.node, notice),
            }
        }
        self.announce();
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
