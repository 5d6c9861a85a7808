//! The beginning of a link.

use super::hearing::Hearing;
use super::shares::Given;
use super::{
    Account, Arc, Foreign, Granting, LinkId, Means, Message, Nanos, Neighbour, NeighbourFault, Pid, Socket, Stage,
};
use crate::device::soft::link::{BYTES, End, Ends, Link};
use crate::plane::bell::{Bell, Ringer};
use crate::shared::{Mapping, SealedFile};
use rustix::fd::AsFd;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with, sockopt};

/// How long somebody who has connected may take to say hello.
const HELLO_WITHIN: Nanos = 1_000_000_000;

impl Neighbour {
    /// Makes a link to the proxy of another port. Queue pairs use it when it is welcomed.
    pub fn connect(lid: u16, account: Account, means: Means<'_>) -> Result<Self, NeighbourFault> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        connect(&socket, &SocketAddrUnix::new(means.port.socket_of(lid))?)?;
        let socket = Socket(Foreign::new(socket, means.closer));
        let process = sockopt::socket_peercred(&socket.0)?.pid;
        let file = SealedFile::create("ringfence-link", BYTES)?;
        let mapping = Arc::new(Mapping::of(&file)?);
        let (bell, theirs) = Bell::new(means.closer)?;
        let own = means.port.lid();
        let link = Link::new(Ends { own, port: lid }, End::Initiator, mapping, None, bell);
        let link = means.worker.call(move |plane| plane.add_link(link));
        let neighbour = Self {
            socket,
            process,
            stage: Stage::Greeting(lid, link),
            account,
            given: Given::default(),
            hearing: Hearing::default(),
            granting: Granting::default(),
        };
        match neighbour.send(&Message::Hello { lid: own }, &[file.as_fd(), theirs.as_fd()]) {
            Ok(()) => Ok(neighbour),
            Err(fault) => {
                drop(means.worker.call(move |plane| plane.remove_link(link)));
                Err(fault)
            }
        }
    }

    /// Somebody connected, and has said nothing yet.
    pub(super) fn silent(socket: Socket, process: Pid, account: Account, hearing: Hearing, now: Nanos) -> Self {
        Self {
            socket,
            process,
            stage: Stage::Silent(now + HELLO_WITHIN),
            account,
            given: Given::default(),
            hearing,
            granting: Granting::default(),
        }
    }

    /// Takes a link that a neighbour made.
    pub(super) fn accept(&mut self, lid: u16, fds: Vec<Foreign>, means: Means<'_>) -> Result<(), NeighbourFault> {
        let [file, theirs]: [Foreign; 2] =
            fds.try_into().map_err(|_| NeighbourFault::Malformed("a hello without its descriptors"))?;
        // A proxy that was taken over must not pass for another container's.
        if !means.port.belongs_to(lid, self.process) {
            return Err(NeighbourFault::Malformed("a hello in another port's name"));
        }
        if !means.worker.call(move |plane| plane.is_connected_to(lid)) {
            return Err(NeighbourFault::Stranger);
        }
        let unfit = |index| move |error| NeighbourFault::Descriptor { message: "hello", index, error };
        let file = memory(file).map_err(unfit(0))?;
        if file.bytes() != BYTES {
            return Err(NeighbourFault::Malformed("a hello with another size"));
        }
        let ringer = Ringer::adopt(theirs).map_err(unfit(1))?;
        let mapping = Arc::new(Mapping::of(&file)?);
        let (bell, ours) = Bell::new(means.closer)?;
        // Before the link is used: what may follow it on the socket must not be there first.
        self.send(&Message::Welcome {}, &[ours.as_fd()])?;
        let ends = Ends { own: means.port.lid(), port: lid };
        let link = Link::new(ends, End::Acceptor, mapping, Some(ringer), bell);
        let link = means.worker.call(move |plane| plane.add_link(link));
        self.stage = Stage::Linked(lid, link);
        Ok(())
    }

    /// Our link was welcomed.
    pub(super) fn open(
        &mut self,
        lid: u16,
        link: LinkId,
        fds: Vec<Foreign>,
        means: Means<'_>,
    ) -> Result<(), NeighbourFault> {
        let [theirs]: [Foreign; 1] =
            fds.try_into().map_err(|_| NeighbourFault::Malformed("a welcome without its descriptor"))?;
        let ringer = Ringer::adopt(theirs).map_err(|error| NeighbourFault::Descriptor {
            message: "welcome",
            index: 0,
            error,
        })?;
        means.worker.call(move |plane| plane.open_link(link, ringer));
        self.stage = Stage::Linked(lid, link);
        Ok(())
    }
}

/// A memory file that a neighbour made.
pub(super) fn memory(fd: Foreign) -> Result<SealedFile, Errno> {
    SealedFile::inspect(&fd)?;
    // Ordinary memory, whose close does not wait.
    SealedFile::adopt(fd.into_inner().ok_or(Errno::BADF)?)
}
