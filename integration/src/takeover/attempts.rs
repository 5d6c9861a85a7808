//! The attempts, by what they aim at.

pub(super) mod collusion;
pub(super) mod descriptors;
pub(super) mod files;
pub(super) mod kernel;
pub(super) mod memory;
pub(super) mod neighbours;
pub(super) mod processes;
pub(super) mod sockets;
pub(super) mod warden;

use super::exchange::Exchange;
use super::hands::{Answer, Hands};
use super::table::Seen;
use anyhow::{Context, Result};
use rustix::io::Errno;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

/// An attempt that is one system call, refused with EPERM or EACCES (or what stands behind `also`) where it is expected to be.
macro_rules! attempt {
    ($name:literal, $number:ident, |$attack:ident| [$($argument:expr),* $(,)?] $(, also $($errno:ident)+)?) => {
        crate::takeover::table::Attempt {
            name: $name,
            run: |$attack| {
                let arguments: Vec<u64> = vec![$(($argument) as u64),*];
                let answer = $attack.hands.call(nix::libc::$number, &arguments)?;
                Ok(crate::takeover::attempts::judge(answer, &[$($(rustix::io::Errno::$errno),+)?]))
            },
            control: true,
        }
    };
}
pub(crate) use attempt;

/// What an attacker knows of the node: more than it could find out.
#[derive(Clone, Debug)]
pub struct Target {
    /// A file that only the host's root (or the user, where the engine is his) can read or write.
    pub canary: PathBuf,
    /// A daemon's stream socket.
    pub daemon: PathBuf,
    /// A daemon's datagram socket.
    pub datagram: PathBuf,
    /// A daemon's abstract socket in the host's network namespace.
    pub abstract_name: String,
    /// The proxy of another container.
    pub victim: i32,
    /// A readable address in it.
    pub address: u64,
    /// Its port.
    pub victim_lid: u16,
    /// The node's directory of ports.
    pub fabric: PathBuf,
    /// Where the attacker's own proxy has mapped the table of identities.
    pub identities: u64,
    /// And the tables of all ports.
    pub pages: u64,
    /// And its own.
    pub own_page: u64,
}

impl Target {
    /// As words of a command line.
    #[must_use]
    pub fn words(&self) -> Vec<String> {
        let paths = [&self.canary, &self.daemon, &self.datagram, &self.fabric].map(|path| path.display().to_string());
        let numbers =
            [self.victim as u64, self.address, self.victim_lid.into(), self.identities, self.pages, self.own_page];
        let numbers = numbers.map(|number| number.to_string());
        paths.into_iter().chain(numbers).chain([self.abstract_name.clone()]).collect()
    }

    /// From words.
    pub fn of(words: &[String]) -> Result<Self> {
        let word = |index: usize| words.get(index).with_context(|| format!("{} words instead of 11", words.len()));
        Ok(Self {
            canary: word(0)?.into(),
            daemon: word(1)?.into(),
            datagram: word(2)?.into(),
            fabric: word(3)?.into(),
            victim: word(4)?.parse()?,
            address: word(5)?.parse()?,
            victim_lid: word(6)?.parse()?,
            identities: word(7)?.parse()?,
            pages: word(8)?.parse()?,
            own_page: word(9)?.parse()?,
            abstract_name: word(10)?.clone(),
        })
    }
}

/// The victim's proxy has shown no region's file with which this could be tried.
#[derive(Clone, Copy, Debug)]
pub struct NoShare;

impl std::fmt::Display for NoShare {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("no region's file was shown")
    }
}

impl std::error::Error for NoShare {}

/// An attacker under way.
#[derive(Debug)]
pub struct Attack {
    /// Who makes its system calls.
    pub hands: Hands,
    /// What it aims at.
    pub target: Target,
    /// How it meets its victim; none where it has none.
    pub exchange: Option<Exchange>,
    /// Its own port.
    pub lid: u16,
    /// The memory file that the victim's proxy shared: its number in the proxy, and our copy of the descriptor.
    pub(super) share: Option<(i32, OwnedFd)>,
}

impl Attack {
    /// An attacker that has done nothing yet.
    #[must_use]
    pub fn new(hands: Hands, target: Target, exchange: Option<Exchange>, lid: u16) -> Self {
        Self { hands, target, exchange, lid, share: None }
    }

    /// An accomplice's, which has no target of its own.
    #[must_use]
    pub fn accomplice(hands: Hands, exchange: Exchange, lid: u16) -> Self {
        let none = PathBuf::new;
        let target = Target {
            canary: none(),
            daemon: none(),
            datagram: none(),
            abstract_name: String::new(),
            victim: 0,
            address: 0,
            victim_lid: 0,
            fabric: none(),
            identities: 0,
            pages: 0,
            own_page: 0,
        };
        Self::new(hands, target, Some(exchange), lid)
    }

    fn share(&self) -> Result<&(i32, OwnedFd), NoShare> {
        self.share.as_ref().ok_or(NoShare)
    }

    fn canary(&mut self) -> u64 {
        self.hands.text(&self.target.canary.to_string_lossy())
    }

    /// A name beside the canary.
    fn beside(&mut self, name: &str) -> u64 {
        self.hands.text(&self.target.canary.with_file_name(name).to_string_lossy())
    }

    /// A file of the victim's in /proc.
    fn proc(&mut self, name: &str) -> u64 {
        self.hands.text(&format!("/proc/{}/{name}", self.target.victim))
    }
}

/// What an answer says: every error but a refusal means that the call itself was let in.
fn judge(answer: Answer, also: &[Errno]) -> Seen {
    match answer {
        Ok(value) => Seen::Reached(format!("{value:#x}")),
        Err(errno) if [Errno::PERM, Errno::ACCESS, Errno::NOSYS].contains(&errno) || also.contains(&errno) => {
            Seen::Refused(errno)
        }
        Err(errno) => Seen::Reached(format!("let in: {errno}")),
    }
}
