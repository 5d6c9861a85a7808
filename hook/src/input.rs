//! Standard input, which runtimes are to close when the state is written.

use crate::process::timespec;
use rustix::event::{PollFd, PollFlags, poll};
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

/// How long the whole state may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// Reads a descriptor, and does not wait for ever.
pub struct Input {
    fd: OwnedFd,
    deadline: Instant,
}

impl Input {
    /// Standard input.
    ///
    /// # Errors
    /// If it is closed.
    pub fn stdin() -> io::Result<Self> {
        Ok(Self { fd: io::stdin().as_fd().try_clone_to_owned()?, deadline: Instant::now() + PATIENCE })
    }
}

impl Read for Input {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let remaining = self.deadline.saturating_duration_since(Instant::now());
        match poll(&mut [PollFd::new(&self.fd, PollFlags::IN)], Some(&timespec(remaining)))? {
            0 => Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!(
                    "it was not closed within {} s, as the OCI runtime must do after the state",
                    PATIENCE.as_secs()
                ),
            )),
            _ => Ok(rustix::io::read(&self.fd, buffer)?),
        }
    }
}
