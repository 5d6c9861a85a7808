//! The other proxies of the fabric: making links, and sharing memory over them.
//!
//! A link is a socket for rare messages ([`Message`]) and rings in shared memory for everything else
//! ([`crate::plane::link`]). Who first needs a link makes its memory and sends it along with the first message, so that
//! nobody ever waits for a neighbour: two proxies that waited for each other would never come to an end.
//!
//! Memory is shared one region at a time, when a work request first needs it, and read-only.

use super::ports::Port;
use crate::control::lent::Lent;
use crate::datagram::{self, MAX_FDS};
use crate::plane::link::{BYTES, End, Link, Share};
use crate::shared::{Mapping, Run, SealedFile};
use crate::worker::{Worker, bell};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mm::ProtFlags;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// A message between two proxies, as JSON.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Message {
    /// First, from the one who connects: its LID. Descriptors: the rings, the receiver's bell, the sender's bell.
    Hello { lid: u16 },
    /// A region, with one descriptor for each run of pages.
    Share { share: u32, runs: Vec<(u64, u64)> },
    /// The region was mapped.
    Shared { share: u32 },
    /// The region is gone.
    Unshare { share: u32 },
}

const MAX_MESSAGE: usize = 16 << 10;

/// Runs of pages that one neighbour may share: several neighbours must not use up what the kernel lets a process map.
const MAX_RUNS: usize = 1 << 13;

/// A region's pages, as its owner keeps them.
#[derive(Clone, Debug)]
pub struct SharedRun {
    /// The file.
    pub file: Arc<Lent>,
    /// Byte offset.
    pub offset: u64,
    /// Bytes.
    pub bytes: u64,
}

/// A neighbour.
#[derive(Debug)]
pub struct Neighbour {
    socket: OwnedFd,
    /// Its LID; zero until it has said hello.
    lid: u16,
    /// The link's place in the plane; none until it has said hello.
    link: Option<usize>,
}

impl AsFd for Neighbour {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// What is wrong with a neighbour.
#[derive(Debug, thiserror::Error)]
pub enum NeighbourFault {
    /// It closed the socket.
    #[error("it is gone")]
    Gone,
    /// A system call failed.
    #[error("{0}")]
    System(#[from] Errno),
    /// It sent something that makes no sense.
    #[error("it sent a malformed message: {0}")]
    Malformed(&'static str),
}

fn send(socket: &OwnedFd, message: &Message, fds: &[BorrowedFd<'_>]) -> Result<(), Errno> {
    let bytes = serde_json::to_vec(message).map_err(|_| Errno::INVAL)?;
    if bytes.len() > MAX_MESSAGE {
        return Err(Errno::MSGSIZE);
    }
    datagram::send(socket, &bytes, fds)
}

impl Neighbour {
    /// Makes a link to the proxy of another port.
    pub fn connect(port: &Port, lid: u16, worker: &Worker) -> Result<Self, Errno> {
        let socket = socket_with(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            None,
        )?;
        connect(&socket, &SocketAddrUnix::new(port.socket_of(lid))?)?;
        let file = SealedFile::create("ringfence-link", BYTES)?;
        let mapping = Arc::new(Mapping::of(&file)?);
        let (theirs, ours) = (bell()?, Arc::new(bell()?));
        let hello = Message::Hello { lid: port.lid() };
        send(&socket, &hello, &[file.as_fd(), theirs.as_fd(), ours.as_fd()])?;
        let link = Link::new(port.lid(), lid, End::Initiator, mapping, theirs, ours);
        let index = worker.call(move |plane| plane.add_link(link));
        Ok(Self { socket, lid, link: Some(index) })
    }

    /// Somebody connected, and has said nothing yet.
    #[must_use]
    pub fn accepted(socket: OwnedFd) -> Self {
        Self { socket, lid: 0, link: None }
    }

    /// Its LID; zero if it has not said hello.
    #[must_use]
    pub fn lid(&self) -> u16 {
        self.lid
    }

    /// The link's place in the plane.
    #[must_use]
    pub fn link(&self) -> Option<usize> {
        self.link
    }

    /// Takes one message.
    pub fn serve(&mut self, port: &Port, worker: &Worker) -> Result<(), NeighbourFault> {
        let mut buffer = vec![0; MAX_MESSAGE];
        let received = match datagram::receive(&self.socket, &mut buffer) {
            Ok(received) => received,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        if received.bytes == 0 {
            return Err(NeighbourFault::Gone);
        }
        if received.truncated {
            return Err(NeighbourFault::Malformed("too long"));
        }
        let message = serde_json::from_slice(&buffer[..received.bytes])
            .map_err(|_| NeighbourFault::Malformed("no message of this version"))?;
        match (message, self.link) {
            (Message::Hello { lid }, None) => self.greet(lid, received.fds, port, worker),
            (Message::Share { share, runs }, Some(link)) => {
                self.map(link, share, &runs, received.fds, worker)?;
                send(&self.socket, &Message::Shared { share }, &[])?;
                Ok(())
            }
            (Message::Shared { share }, Some(link)) => {
                worker.call(move |plane| {
                    if let Some(Some(entry)) = plane.links.get_mut(link)
                        // Only what was asked for and not taken back since.
                        && let Some(confirmed) = entry.shared.get_mut(&share)
                    {
                        *confirmed = true;
                        plane.share_arrived(link);
                    }
                });
                Ok(())
            }
            (Message::Unshare { share }, Some(link)) => {
                let mapping = worker.call(move |plane| {
                    plane.links.get_mut(link).and_then(|link| link.as_mut()).and_then(|link| link.shares.remove(&share))
                });
                drop(mapping);
                Ok(())
            }
            (Message::Hello { .. }, Some(_)) => Err(NeighbourFault::Malformed("a second hello")),
            (_, None) => Err(NeighbourFault::Malformed("no hello")),
        }
    }

    fn greet(&mut self, lid: u16, fds: Vec<OwnedFd>, port: &Port, worker: &Worker) -> Result<(), NeighbourFault> {
        let [file, ours, theirs]: [OwnedFd; 3] =
            fds.try_into().map_err(|_| NeighbourFault::Malformed("a hello without its descriptors"))?;
        // A proxy that was taken over must not pass for another container's.
        let peer = rustix::net::sockopt::socket_peercred(&self.socket)?;
        if !port.belongs_to(lid, peer.pid) {
            return Err(NeighbourFault::Malformed("a hello in another port's name"));
        }
        let file = SealedFile::adopt(file)?;
        if file.bytes() != BYTES {
            return Err(NeighbourFault::Malformed("a hello with another size"));
        }
        let mapping = Arc::new(Mapping::of(&file)?);
        let link = Link::new(port.lid(), lid, End::Acceptor, mapping, theirs, Arc::new(ours));
        let index = worker.call(move |plane| {
            let index = plane.add_link(link);
            plane.adopt_link(index, lid);
            index
        });
        (self.lid, self.link) = (lid, Some(index));
        Ok(())
    }

    fn map(
        &self,
        link: usize,
        share: u32,
        runs: &[(u64, u64)],
        fds: Vec<OwnedFd>,
        worker: &Worker,
    ) -> Result<(), NeighbourFault> {
        if fds.len() != runs.len() || runs.is_empty() {
            return Err(NeighbourFault::Malformed("runs without descriptors"));
        }
        let files = fds.into_iter().map(SealedFile::adopt).collect::<Result<Vec<_>, _>>()?;
        let runs: Vec<_> = files
            .iter()
            .zip(runs)
            .map(|(file, (offset, bytes))| Run { file, offset: *offset as usize, bytes: *bytes as usize })
            .collect();
        let count = runs.len();
        let mapping = Arc::new(Mapping::of_runs(&runs, ProtFlags::READ, false)?);
        let accepted = worker.call(move |plane| {
            let Some(Some(entry)) = plane.links.get_mut(link) else { return true };
            if entry.shares.values().map(|share| share.runs).sum::<usize>() + count > MAX_RUNS {
                return false;
            }
            entry.shares.insert(share, Share { mapping, runs: count });
            plane.share_arrived(link);
            true
        });
        if accepted { Ok(()) } else { Err(NeighbourFault::Malformed("too many shared regions")) }
    }

    /// Shares one of our regions with it.
    pub fn share(&self, share: u32, runs: &[SharedRun]) -> Result<(), Errno> {
        if runs.len() > MAX_FDS {
            return Err(Errno::TOOBIG);
        }
        let read_only = runs.iter().map(|run| reopen_read_only(&run.file)).collect::<Result<Vec<_>, _>>()?;
        let message = Message::Share { share, runs: runs.iter().map(|run| (run.offset, run.bytes)).collect() };
        send(&self.socket, &message, &read_only.iter().map(AsFd::as_fd).collect::<Vec<_>>())
    }

    /// Takes a region back.
    pub fn unshare(&self, share: u32) {
        // If the neighbour does not read, it loses the link at the next message that matters.
        let _ = send(&self.socket, &Message::Unshare { share }, &[]);
    }
}

/// A descriptor through which the file cannot be written.
fn reopen_read_only(file: &SealedFile) -> Result<OwnedFd, Errno> {
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file.as_fd()));
    rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
}
