//! The other proxies of the fabric: making links, and sharing memory over them.
//!
//! A link is a socket for rare messages ([`Message`]) and rings in shared memory for everything else
//! ([`crate::device::soft::link`]). Who first needs a link makes its memory and sends it along with the first message, so that
//! nobody ever waits for a neighbour: two proxies that waited for each other would never come to an end.
//!
//! Nothing is accepted from a port that no queue pair of ours is connected to. So of two proxies that connect a queue pair
//! each to the other's, the first is turned away; the second makes the link, and the first accepts it. If both do so at the
//! same time they have two links, of which they use one.
//!
//! Memory is shared one region at a time, when a work request first needs it, and read-only.

mod grants;
mod hearing;
mod hello;
mod shares;

use super::budget::{Account, Budget};
use super::ports::Port;
use crate::closer::Closer;
use crate::datagram;
use crate::device::soft::Worker;
use crate::device::soft::grants::Grant;
use crate::device::soft::grants::using::GrantFault;
use crate::device::soft::link::LinkFault;
use crate::device::soft::links::LinkId;
use crate::pacing::Nanos;
use crate::plane::bell::Foreign;
use crate::steps::{self, Step};
use crate::worker::now;
use hearing::Hearing;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;
use rustix::net::{Shutdown, shutdown, sockopt};
use rustix::process::Pid;
use serde::{Deserialize, Serialize};
use shares::Given;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

/// A message between two proxies, as JSON.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Message {
    /// First, from the one who connects: its LID. Descriptors: the rings, and the end of its bell that is for the receiver.
    Hello { lid: u16 },
    /// The link is taken. Descriptor: the end of the bell of the one who took it.
    Welcome {},
    /// Memory, with one descriptor for each run of pages.
    Share {
        share: u32,
        runs: Vec<(u64, u64)>,
        #[serde(default)]
        writable: bool,
    },
    /// The region was mapped.
    Shared { share: u32 },
    /// It was not; whoever needs it may ask again.
    Refused { share: u32 },
    /// The region is gone.
    Unshare { share: u32 },
    /// The sender's page of grants, as a descriptor; whether it can copy by grants of the receiver's.
    Page { copies: bool },
    /// The receiver may do this by itself.
    Grant(Grant),
}

const MAX_MESSAGE: usize = 16 << 10;

/// Links with one proxy: the one that we made and the one that it made.
const MAX_LINKS: usize = 2;

/// Those that have connected and said nothing.
const MAX_SILENT: usize = 32;

pub use grants::Granting;
pub use shares::{Backing, Owed, SharedRun, amount};

/// A socket to a neighbour.
#[derive(Debug)]
struct Socket(Foreign);

impl Drop for Socket {
    fn drop(&mut self) {
        // The neighbour hears of the end now, however long its descriptors take to close.
        let _ = shutdown(&self.0, Shutdown::Both);
    }
}

/// How far a link has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Somebody connected, and must say hello by this time.
    Silent(Nanos),
    /// We said hello to this port.
    Greeting(u16, LinkId),
    /// A link with this port.
    Linked(u16, LinkId),
}

/// What a link is made from.
#[derive(Clone, Copy, Debug)]
pub struct Means<'a> {
    /// Our own port.
    pub port: &'a Port,
    /// The data plane's thread.
    pub worker: &'a Worker,
    /// Where descriptors of neighbours are closed.
    pub closer: &'a Closer,
}

/// A neighbour.
#[derive(Debug)]
pub struct Neighbour {
    socket: Socket,
    /// The process that connected, or listened, at the other end.
    process: Pid,
    stage: Stage,
    /// Its part of our mappings.
    account: Account,
    given: Given,
    hearing: Hearing,
    /// What of our memory it reaches without us, and we of its.
    pub granting: Granting,
}

impl AsFd for Neighbour {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.0.as_fd()
    }
}

/// What is wrong with a neighbour.
#[derive(Debug, thiserror::Error)]
pub enum NeighbourFault {
    /// It closed the socket.
    #[error("it is gone")]
    Gone,
    /// No queue pair of ours is connected to its port.
    #[error("nothing of ours is connected to it")]
    Stranger,
    /// What it wrote into the link's rings makes no sense.
    #[error(transparent)]
    Link(#[from] LinkFault),
    /// What it grants makes no sense.
    #[error(transparent)]
    Grant(#[from] GrantFault),
    /// It said nothing for too long.
    #[error("it did not say hello in time")]
    Late,
    /// A system call failed.
    #[error("{0}")]
    System(#[from] Errno),
    /// A region of ours could not be opened for it or sent to it, which is no fault of its own. Nothing has been said.
    #[error("a region cannot be shared with it: {0}")]
    Unshared(Errno),
    /// It does not read what it is sent.
    #[error("it does not read its messages")]
    Deaf,
    /// A descriptor is not what it must be.
    #[error("descriptor {index} of its {message} is of no use: {error}")]
    Descriptor {
        /// What it came with.
        message: &'static str,
        /// Which.
        index: usize,
        /// Why.
        error: Errno,
    },
    /// It sent something that makes no sense.
    #[error("it sent a malformed message: {0}")]
    Malformed(&'static str),
}

impl NeighbourFault {
    /// What a fault in sending memory is: want of room in the kernel is nobody's.
    fn of_memory(self) -> Self {
        match self {
            Self::System(error @ (Errno::TOOMANYREFS | Errno::NOMEM | Errno::NOBUFS)) => Self::Unshared(error),
            fault => fault,
        }
    }

    /// Whether it is part of how neighbours come and go, and no news.
    #[must_use]
    pub fn is_ordinary(&self) -> bool {
        matches!(self, Self::Gone | Self::Stranger | Self::System(Errno::CONNRESET | Errno::PIPE))
    }
}

impl Neighbour {
    /// Its LID, if it is known.
    #[must_use]
    pub fn lid(&self) -> Option<u16> {
        match self.stage {
            Stage::Silent(_) => None,
            Stage::Greeting(lid, _) | Stage::Linked(lid, _) => Some(lid),
        }
    }

    /// The process at the other end.
    #[must_use]
    pub fn process(&self) -> Pid {
        self.process
    }

    /// The link in the plane.
    #[must_use]
    pub fn link(&self) -> Option<LinkId> {
        match self.stage {
            Stage::Silent(_) => None,
            Stage::Greeting(_, link) | Stage::Linked(_, link) => Some(link),
        }
    }

    /// Whether it is listened to now. Until then it must not be polled.
    #[must_use]
    pub fn may_speak(&self, now: Nanos) -> bool {
        self.hearing.again_at() <= now
    }

    /// Whether it has closed the socket, whatever it has said before.
    #[must_use]
    pub fn has_hung_up(&self) -> bool {
        let mut fds = [PollFd::new(&self.socket.0, PollFlags::RDHUP)];
        poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok_and(|found| found > 0)
    }

    /// When it must have said hello.
    #[must_use]
    pub fn must_speak_by(&self) -> Option<Nanos> {
        if let Stage::Silent(until) = self.stage { Some(until) } else { None }
    }

    /// As [`Self::send`]. Descriptors may be too many on their way for the kernel, which counts those of all processes of a user.
    fn send_memory(&self, message: &Message, fds: &[BorrowedFd<'_>]) -> Result<(), NeighbourFault> {
        self.send(message, fds).map_err(NeighbourFault::of_memory)
    }

    fn send(&self, message: &Message, fds: &[BorrowedFd<'_>]) -> Result<(), NeighbourFault> {
        let bytes = serde_json::to_vec(message).map_err(|_| Errno::INVAL)?;
        if bytes.len() > MAX_MESSAGE {
            return Err(Errno::MSGSIZE.into());
        }
        datagram::send(&self.socket.0, &bytes, fds).map_err(|error| match error {
            Errno::AGAIN => NeighbourFault::Deaf,
            error => error.into(),
        })
    }

    /// Takes one message. False if there was none.
    pub fn serve(&mut self, means: Means<'_>) -> Result<bool, NeighbourFault> {
        let mut buffer = vec![0; MAX_MESSAGE];
        let received = match datagram::receive(&self.socket.0, &mut buffer) {
            Ok(received) => received,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(false),
            Err(error) => return Err(error.into()),
        };
        let fds: Vec<Foreign> = received.fds.into_iter().map(|fd| Foreign::new(fd, means.closer)).collect();
        if received.bytes == 0 {
            return Err(NeighbourFault::Gone);
        }
        if received.truncated {
            return Err(NeighbourFault::Malformed("too long"));
        }
        let message = serde_json::from_slice(&buffer[..received.bytes])
            .map_err(|_| NeighbourFault::Malformed("no message of this version"))?;
        let bare = fds.is_empty();
        self.hearing.charge(&message, now());
        match (message, self.stage) {
            (Message::Hello { lid }, Stage::Silent(_)) => self.accept(lid, fds, means)?,
            (Message::Welcome {}, Stage::Greeting(lid, link)) => self.open(lid, link, fds, means)?,
            (Message::Share { share, runs, writable }, Stage::Linked(lid, link)) => {
                self.take_share(lid, link, (share, writable), &runs, fds, means)?;
            }
            (Message::Page { copies }, Stage::Linked(_, link)) => self.take_page(link, copies, fds, means)?,
            (Message::Grant(grant), Stage::Linked(_, link)) if bare => self.take_grant(link, grant, means.worker)?,
            (Message::Shared { share }, Stage::Linked(_, link)) if bare => self.confirmed(link, share, means.worker)?,
            (Message::Refused { share }, Stage::Linked(_, link)) if bare => self.refused(link, share, means.worker)?,
            (Message::Unshare { share }, Stage::Linked(_, link)) if bare => {
                steps::at(Step::UnshareCome);
                drop(means.worker.call(move |plane| {
                    let link = plane.device.links.get_mut(link)?;
                    link.grants.using.forget_share(share);
                    link.shares.remove(&share)
                }));
                steps::at(Step::UnshareTaken);
            }
            (_, Stage::Silent(_)) => return Err(NeighbourFault::Malformed("no hello")),
            _ => return Err(NeighbourFault::Malformed("out of order, or with descriptors")),
        }
        Ok(true)
    }
}

/// All neighbours.
#[derive(Debug)]
pub struct Neighbours {
    /// In the order in which they are polled.
    pub list: Vec<Neighbour>,
    /// What all of them, and the container, take of the mappings.
    pub budget: Budget,
    /// Ports whose proxies had no room in their queues, and when to try again.
    pub due: Vec<(u16, Nanos)>,
    /// Whether the container cannot take pages away from what neighbours read, once that is known.
    pub keeps_pages: Option<bool>,
    /// Ports that turned us away lately, and until when they are spared: a container that connects queue pairs to them in a loop
    /// would keep their proxies busy with nothing else.
    spared: HashMap<u16, Nanos>,
    /// Processes whose links have ended before what they said was paid off, and when it is.
    owing: HashMap<Pid, Nanos>,
    /// Processes that broke the protocol. What they sent may take its time to be closed; more of it is not taken.
    outlaws: VecDeque<Pid>,
}

/// How long a port that turned us away is left alone. If a queue pair there is connected to one of ours meanwhile, its proxy
/// makes the link.
const SPARE: Nanos = 10_000_000;

/// More outlaws than that, and the oldest is forgotten.
const MAX_OUTLAWS: usize = 1024;

impl Neighbours {
    /// None yet.
    #[must_use]
    pub fn new(budget: Budget) -> Self {
        Self {
            list: Vec::new(),
            budget,
            due: Vec::new(),
            keeps_pages: None,
            spared: HashMap::new(),
            owing: HashMap::new(),
            outlaws: VecDeque::new(),
        }
    }

    /// Another try with this port is due at this time.
    pub fn try_again(&mut self, lid: u16, at: Nanos) {
        if !self.due.iter().any(|(port, _)| *port == lid) {
            self.due.push((lid, at));
        }
    }

    /// Until when this port is spared, if it is.
    pub fn spared_until(&mut self, lid: u16, now: Nanos) -> Option<Nanos> {
        self.spared.retain(|_, until| *until > now);
        self.spared.get(&lid).copied()
    }

    /// Whether another may be let in before one of those that have said nothing does, or goes.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.list.iter().filter(|neighbour| neighbour.must_speak_by().is_some()).count() < MAX_SILENT
    }

    /// Where those of the process at the other end of `socket` are, and whether it may have another.
    pub fn of_process(&self, process: Pid) -> impl DoubleEndedIterator<Item = usize> {
        let list = self.list.iter().enumerate();
        list.filter(move |(_, neighbour)| neighbour.process == process).map(|(position, _)| position)
    }

    /// Lets somebody in who has connected, unless there are as many of its process as may be.
    pub fn let_in(&mut self, socket: OwnedFd, closer: &Closer, now: Nanos) -> Result<(), Errno> {
        let socket = Socket(Foreign::new(socket, closer));
        let process = sockopt::socket_peercred(&socket.0)?.pid;
        if self.of_process(process).count() >= MAX_LINKS || self.outlaws.contains(&process) {
            return Err(Errno::USERS);
        }
        let hearing = Hearing::owing(self.owing.get(&process).copied().unwrap_or(0));
        self.list.push(Neighbour::silent(socket, process, self.budget.account(), hearing, now));
        Ok(())
    }

    /// Takes a neighbour out, because of this fault.
    pub fn remove(&mut self, position: usize, fault: &NeighbourFault) -> Neighbour {
        let neighbour = self.list.swap_remove(position);
        let now = now();
        self.owing.retain(|_, paid_at| *paid_at > now);
        let owing = self.owing.entry(neighbour.process).or_default();
        *owing = neighbour.hearing.paid_at().max(*owing);
        if let Stage::Greeting(lid, _) = neighbour.stage {
            self.spared.insert(lid, now + SPARE);
        }
        if matches!(
            fault,
            NeighbourFault::Malformed(_)
                | NeighbourFault::Descriptor { .. }
                | NeighbourFault::Link(_)
                | NeighbourFault::Grant(_)
        ) {
            self.outlaws.push_back(neighbour.process);
            if self.outlaws.len() > MAX_OUTLAWS {
                self.outlaws.pop_front();
            }
        }
        neighbour
    }

    /// Where those are that are listened to now.
    #[must_use]
    pub fn heard(&self, now: Nanos) -> Vec<usize> {
        (0..self.list.len()).filter(|position| self.list[*position].may_speak(now)).collect()
    }

    /// When something here is due.
    #[must_use]
    pub fn wake_at(&self) -> Option<Nanos> {
        let now = now();
        let silent = self.list.iter().filter_map(Neighbour::must_speak_by);
        let again = self.list.iter().map(|neighbour| neighbour.hearing.again_at()).filter(|at| *at > now);
        silent.chain(self.due.iter().map(|(_, at)| *at)).chain(again).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_has_no_room_for_is_no_fault_of_the_neighbours() {
        for error in [Errno::TOOMANYREFS, Errno::NOMEM, Errno::NOBUFS] {
            let fault = NeighbourFault::System(error).of_memory();
            assert!(matches!(fault, NeighbourFault::Unshared(_)), "{error}: the link would end");
        }
        for fault in [NeighbourFault::Deaf, NeighbourFault::System(Errno::PIPE)] {
            assert!(!matches!(fault.of_memory(), NeighbourFault::Unshared(_)));
        }
    }
}
