//! How the workers at the two ends of a link wake each other, and a container its worker, without waiting for each other.
//!
//! Nobody waits on a descriptor that somebody else made or holds. A counter (eventfd) or pipe that two processes hold can be
//! filled, or its O_NONBLOCK taken away, between a look and a write. So each end makes a pair of datagram sockets, keeps the
//! end that it listens on to itself, and gives the other end away; ringing is a datagram of one byte. A proxy gives all
//! processes of its container the same end:
//!
//! - Sending to a Unix socket with MSG_DONTWAIT takes spinlocks only, whatever the pair's maker does meanwhile.
//! - Receiving holds a mutex while it copies, for as long as a hostile page takes to appear; nobody but us can receive on the
//!   end that we listen on, and we never receive on an end that was given to us.
//! - Datagram sockets, because of a pair of any other type the holder of one end can make the other readable for good, by
//!   shutdown or close, and then it never sleeps again.

use crate::closer::Closer;
use crate::datagram;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, send, socketpair, sockopt};

/// A descriptor that others made, or send to: closed where nobody waits for it.
#[derive(Debug)]
pub struct Foreign {
    fd: Option<OwnedFd>,
    closer: Closer,
}

impl Foreign {
    /// Takes a descriptor over.
    #[must_use]
    pub fn new(fd: OwnedFd, closer: &Closer) -> Self {
        Self { fd: Some(fd), closer: closer.clone() }
    }

    /// Gives it up to who knows that its close does not wait.
    #[must_use]
    pub fn into_inner(mut self) -> Option<OwnedFd> {
        self.fd.take()
    }
}

impl AsFd for Foreign {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_ref().expect("only taken by `into_inner` and `drop`").as_fd()
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        if let Some(fd) = self.fd.take() {
            self.closer.close(fd);
        }
    }
}

/// The end that we listen on.
#[derive(Debug)]
pub struct Bell(Foreign);

/// Who rings sent descriptors along, which no proxy and no preload library does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Baggage;

/// Datagrams taken at a time: who keeps ringing keeps us awake, but not from our other work.
const MOST: usize = 64;

impl Bell {
    /// A bell, and the end of it that is to be given away.
    pub fn new(closer: &Closer) -> Result<(Self, OwnedFd), Errno> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::DGRAM, flags, None)?;
        datagram::refuse_descriptors(&ours);
        Ok((Self(Foreign::new(ours, closer)), theirs))
    }

    /// Takes the rings. Never waits.
    pub fn silence(&self) -> Result<(), Baggage> {
        let mut byte = [0];
        for _ in 0..MOST {
            match datagram::receive(&self.0, &mut byte) {
                // What the kernel had no room for is closed already.
                Ok(received) if received.fds.is_empty() => {}
                Ok(received) => {
                    self.0.closer.close_all(received.fds);
                    return Err(Baggage);
                }
                Err(Errno::AGAIN) => return Ok(()),
                // The other end was disconnected from ours, which is said once.
                Err(_) => {}
            }
        }
        Ok(())
    }
}

impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The end of a neighbour's bell that it gave us.
#[derive(Debug)]
pub struct Ringer(Foreign);

impl Ringer {
    /// Takes an end over, if it is one. These options are read without a lock, and nothing else touches it before.
    pub fn adopt(fd: Foreign) -> Result<Self, Errno> {
        let datagrams = sockopt::socket_type(&fd)? == SocketType::DGRAM;
        if datagrams && sockopt::socket_domain(&fd)? == AddressFamily::UNIX {
            Ok(Self(fd))
        } else {
            Err(Errno::PROTOTYPE)
        }
    }

    /// Rings. A full bell rings already; what else may fail is the neighbour's own doing.
    pub fn ring(&self) {
        let _ = send(&self.0, &[1], SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, Shutdown, sendmsg, shutdown};
    use std::mem::MaybeUninit;

    fn closer() -> Closer {
        Closer::start("test", 16).unwrap()
    }

    fn rung(bell: &Bell) -> bool {
        let mut fds = [PollFd::new(bell, PollFlags::IN)];
        poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap() == 1
    }

    #[test]
    fn a_bell_is_rung_and_silenced() {
        let closer = closer();
        let (bell, end) = Bell::new(&closer).unwrap();
        let ringer = Ringer::adopt(Foreign::new(end, &closer)).unwrap();
        assert!(!rung(&bell));
        ringer.ring();
        assert!(rung(&bell));
        assert_eq!(bell.silence(), Ok(()));
        assert!(!rung(&bell));
    }

    #[test]
    fn a_full_bell_holds_up_nobody() {
        let closer = closer();
        let (bell, end) = Bell::new(&closer).unwrap();
        // Flags are shared with the maker, who may take O_NONBLOCK away.
        rustix::fs::fcntl_setfl(&end, rustix::fs::OFlags::empty()).unwrap();
        let ringer = Ringer::adopt(Foreign::new(end, &closer)).unwrap();
        for _ in 0..10_000 {
            ringer.ring();
        }
        while rung(&bell) {
            bell.silence().unwrap();
        }
    }

    /// Whatever its holder does to the end that we gave away, ours can be waited on afterwards.
    #[test]
    fn the_other_end_cannot_ring_for_ever() {
        type Abuse = fn(&OwnedFd);
        let abuses: [(&str, Abuse); 3] = [
            ("shutdown", |end| shutdown(end, Shutdown::Both).unwrap()),
            ("disconnect", |end| rustix::net::connect_unspec(end).unwrap()),
            ("nothing but close", |_| {}),
        ];
        for (name, abuse) in abuses {
            let (bell, end) = Bell::new(&closer()).unwrap();
            abuse(&end);
            let _ = bell.silence();
            assert!(!rung(&bell), "after {name}");
            drop(end);
            let _ = bell.silence();
            assert!(!rung(&bell), "after {name} and close");
        }
    }

    #[test]
    fn descriptors_on_a_bell_do_not_get_through() {
        let (bell, end) = Bell::new(&closer()).unwrap();
        let (_read, write) = rustix::pipe::pipe().unwrap();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds = [write.as_fd()];
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        // From Linux 6.16 on the sender fails.
        let sent = sendmsg(&end, &[rustix::io::IoSlice::new(&[1])], &mut control, SendFlags::empty());
        assert_eq!(bell.silence().is_ok(), sent.is_err());
    }

    #[test]
    fn only_ends_of_bells_are_adopted() {
        let closer = closer();
        let pair = |kind| socketpair(AddressFamily::UNIX, kind, SocketFlags::empty(), None).unwrap().0;
        let udp = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let others: [OwnedFd; 5] = [
            pair(SocketType::STREAM),
            pair(SocketType::SEQPACKET),
            udp.into(),
            rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap(),
            std::fs::File::open("/dev/zero").unwrap().into(),
        ];
        for fd in others {
            assert!(Ringer::adopt(Foreign::new(fd, &closer)).is_err());
        }
        assert!(Ringer::adopt(Foreign::new(pair(SocketType::DGRAM), &closer)).is_ok());
    }
}
