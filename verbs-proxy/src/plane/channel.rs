//! Completion channels: sockets that carry the cookies of queues with news.
//!
//! A channel is a pair of sockets of which the proxy alone holds its own end, so that no lock that sending takes can be held
//! by a reader, as that of a pipe can by one that reads into memory whose page fault nobody answers.

use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::net::sockopt::set_socket_send_buffer_size;
use rustix::net::{AddressFamily, SendFlags, Shutdown, SocketFlags, SocketType, send, shutdown, socketpair};

/// Room for some forty events. The kernel doubles it, and charges what is in it to the proxy.
const EVENT_BUFFER: usize = 16 << 10;

/// A socket on which the proxy only sends, and the other end, on which the container only receives.
pub fn event_sockets() -> Result<(OwnedFd, OwnedFd), Errno> {
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    // What the container sent would be ours to close.
    shutdown(&ours, Shutdown::Read)?;
    set_socket_send_buffer_size(&ours, EVENT_BUFFER)?;
    Ok((ours, theirs))
}

/// The proxy's end of a completion channel.
#[derive(Debug)]
pub struct Channel {
    socket: OwnedFd,
}

impl Channel {
    /// Over a socket from [`event_sockets`].
    #[must_use]
    pub fn new(socket: OwnedFd) -> Self {
        Self { socket }
    }

    /// Sends an event. False if there is no room for it at present.
    #[must_use]
    pub fn send(&self, cookie: u64) -> bool {
        let sent = send(&self.socket, &cookie.to_ne_bytes(), SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
        // A container that closed its end wants no events.
        !matches!(sent, Err(Errno::AGAIN | Errno::NOBUFS | Errno::NOMEM | Errno::INTR))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{RecvFlags, recv};

    #[test]
    fn the_other_end_only_receives_and_hears_of_the_end() {
        let (ours, theirs) = event_sockets().unwrap();
        assert_eq!(send(&theirs, &[0; 8], SendFlags::NOSIGNAL), Err(Errno::PIPE));
        let channel = Channel::new(ours);
        let sent = (0..10_000).take_while(|cookie| channel.send(*cookie)).count();
        assert!((20..1000).contains(&sent), "{sent} events fit");
        drop(channel);
        let mut cookie = [0; 8];
        for number in 0..sent {
            assert_eq!(rustix::io::read(&theirs, &mut cookie), Ok(8));
            assert_eq!(u64::from_ne_bytes(cookie), number as u64);
        }
        assert_eq!(rustix::io::read(&theirs, &mut cookie), Ok(0));
        assert_eq!(recv(&theirs, &mut cookie, RecvFlags::DONTWAIT).map(|(bytes, _)| bytes), Ok(0));
    }

    #[test]
    fn an_end_that_is_gone_is_no_full_one() {
        let (ours, theirs) = event_sockets().unwrap();
        drop(theirs);
        assert!(Channel::new(ours).send(1));
    }
}
