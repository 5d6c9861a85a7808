//! A neighbour that obeys the test: it has a port, and says to the victim's proxy whatever it is told to.

use super::client::Key;
use anyhow::{Context, Result, bail, ensure};
use ringfence_integration::direct::DirectProxy;
use ringfence_protocol::verbs::{Access, Opcode};
use ringfence_proxy::closer::Closer;
use ringfence_proxy::datagram;
use ringfence_proxy::device::soft::grants::BYTES as GRANTS_BYTES;
use ringfence_proxy::device::soft::link::{BYTES, End, Ends, Link as Rings};
use ringfence_proxy::device::soft::qp::WireSequence;
use ringfence_proxy::device::soft::wire::{INLINE, Kind, Request, Response};
use ringfence_proxy::fabric::ports::{MAX_PORTS, Taken};
use ringfence_proxy::plane::bell::{Bell, Foreign, Ringer};
use ringfence_proxy::shared::{Mapping, PAGE, SealedFile};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept, connect, socket_with};
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

const SOON: Duration = Duration::from_secs(10);
/// The queue pair number that the victim's queue pairs are connected to.
const NUMBER: u32 = 5;

/// Where a descriptor is sent to the victim.
#[derive(Clone, Copy, Debug)]
pub enum Place {
    /// As the memory of a link's rings, with a hello.
    Rings,
    /// As a bell, with a hello.
    Bell,
    /// As a bell, with a welcome.
    Welcome,
    /// As the pages of a region.
    Share,
    /// As the pages of a region, to be written.
    Writable,
    /// As a page of grants.
    Page,
}

impl Place {
    pub const ALL: [Self; 6] = [Self::Rings, Self::Bell, Self::Welcome, Self::Share, Self::Writable, Self::Page];

    pub fn name(self) -> &'static str {
        match self {
            Self::Rings => "as_the_rings_of_a_hello",
            Self::Bell => "as_the_bell_of_a_hello",
            Self::Welcome => "as_the_bell_of_a_welcome",
            Self::Share => "as_a_share",
            Self::Writable => "as_a_writable_share",
            Self::Page => "as_a_page_of_grants",
        }
    }
}

pub struct Neighbour {
    taken: Taken,
    victim: PathBuf,
    victim_lid: u16,
    closer: Closer,
}

/// A link, or an attempt at one.
pub struct Link {
    socket: OwnedFd,
    rings: Option<Rings>,
    welcome: Option<bool>,
    /// The end of the victim's bell that it gave.
    bell: Option<Ringer>,
    closer: Closer,
    to: u32,
    sequence: WireSequence,
}

/// What came from the victim.
type Message = (serde_json::Value, Vec<OwnedFd>);

impl Neighbour {
    pub fn new(victim: &DirectProxy) -> Result<Self> {
        let run_dir =
            victim.dir().parent().and_then(|dir| dir.parent()).context("a container's directory is deeper")?;
        // The victim is the first of its node.
        let victim_lid = 1;
        let taken = Taken::take(run_dir, "soft0", 0x0200_0000_0000_0009, MAX_PORTS).context("cannot take a port")?;
        ensure!(taken.port.lid() != victim_lid, "the victim's port is not the first");
        let victim = taken.port.socket_of(victim_lid);
        Ok(Self { taken, victim, victim_lid, closer: Closer::start("hostile", 1024)? })
    }

    pub fn lid(&self) -> u16 {
        self.taken.port.lid()
    }

    /// Connects, and says nothing.
    pub fn dial(&self) -> Result<OwnedFd> {
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        let end = Instant::now() + SOON;
        loop {
            match connect(&socket, &SocketAddrUnix::new(&self.victim)?) {
                Err(Errno::AGAIN) if Instant::now() < end => std::thread::sleep(Duration::from_millis(1)),
                result => return Ok(result.map(|()| socket)?),
            }
        }
    }

    /// Says hello as an honest proxy would.
    pub fn hello(&mut self) -> Result<Link> {
        self.hello_with(None, None)
    }

    /// Says hello with other descriptors than an honest proxy's.
    pub fn hello_with(&mut self, rings: Option<OwnedFd>, bell: Option<OwnedFd>) -> Result<Link> {
        let socket = self.dial()?;
        let file = SealedFile::create("hostile", BYTES)?;
        let (own, theirs) = Bell::new(&self.closer)?;
        let mapping = Arc::new(Mapping::of(&file)?);
        let hello = format!(r#"{{"hello":{{"lid":{}}}}}"#, self.lid());
        let fds = [rings.as_ref().map_or(file.as_fd(), AsFd::as_fd), bell.as_ref().map_or(theirs.as_fd(), AsFd::as_fd)];
        // It may have been ended already.
        let _ = datagram::send(&socket, hello.as_bytes(), &fds);
        let rings = Rings::new(Ends { own: self.lid(), port: self.victim_lid }, End::Initiator, mapping, None, own);
        let to = u32::from(self.victim_lid) << 14 | 3;
        Ok(Link {
            socket,
            rings: Some(rings),
            welcome: None,
            bell: None,
            closer: self.closer.clone(),
            to,
            sequence: WireSequence(0),
        })
    }

    /// Awaits the victim's hello and welcomes it with this descriptor as the bell.
    pub fn welcome(&self, bell: OwnedFd) -> Result<()> {
        ensure!(readable(&self.taken.listener, SOON), "the victim makes no link");
        let socket = accept(&self.taken.listener)?;
        let (hello, fds) = next(&socket, SOON)?.context("no hello")?;
        ensure!(hello.get("hello").is_some() && fds.len() == 2, "{hello} with {} descriptors", fds.len());
        datagram::send(&socket, br#"{"welcome":{}}"#, &[bell.as_fd()])?;
        Ok(())
    }
}

impl Link {
    /// Whether the victim has taken the link, as opposed to ended it.
    pub fn is_welcome(&mut self) -> bool {
        if self.welcome.is_none() {
            let welcome = next(&self.socket, SOON).ok().flatten();
            let (message, fds) = welcome.unwrap_or_default();
            self.welcome = Some(message.get("welcome").is_some());
            let bell = fds.into_iter().next().map(|fd| Foreign::new(fd, &self.closer));
            self.bell = bell.and_then(|fd| Ringer::adopt(fd).ok());
        }
        self.welcome == Some(true)
    }

    /// Whether the victim ends the link in time.
    pub fn has_ended(&self, within: Duration) -> bool {
        let end = Instant::now() + within;
        loop {
            // What it says before is not asked for.
            match next(&self.socket, end.saturating_duration_since(Instant::now())) {
                Ok(Some(_)) => {}
                ended => return matches!(ended, Ok(None)),
            }
        }
    }

    pub fn say(&self, message: &str) -> Result<()> {
        Ok(datagram::send(&self.socket, message.as_bytes(), &[])?)
    }

    /// As [`Self::say`]; false if there is no room for it now.
    pub fn says(&self, message: &str) -> Result<bool> {
        match datagram::send(&self.socket, message.as_bytes(), &[]) {
            Ok(()) => Ok(true),
            Err(Errno::AGAIN) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Offers a region of `runs` pages, each a mapping of its own; an error if the link has ended.
    pub fn offer(&self, share: u32, runs: usize) -> Result<()> {
        let file = SealedFile::create("share", runs * PAGE)?;
        let list: Vec<String> = (0..runs).rev().map(|run| format!("[{},{PAGE}]", run * PAGE)).collect();
        let message = format!(r#"{{"share":{{"share":{share},"runs":[{}]}}}}"#, list.join(","));
        let end = Instant::now() + SOON;
        loop {
            match datagram::send(&self.socket, message.as_bytes(), &vec![file.as_fd(); runs]) {
                Err(Errno::AGAIN) if Instant::now() < end => std::thread::sleep(Duration::from_micros(100)),
                result => return Ok(result?),
            }
        }
    }

    /// Offers a page of whatever this is.
    pub fn offer_fd(&self, share: u32, writable: bool, fd: OwnedFd) -> Result<()> {
        self.say_with(
            &format!(r#"{{"share":{{"share":{share},"runs":[[0,{PAGE}]],"writable":{writable}}}}}"#),
            fd.as_fd(),
        )
    }

    /// Sends this as a page of grants.
    pub fn page(&self, fd: impl AsFd) -> Result<()> {
        self.say_with(r#"{"page":{"copies":true}}"#, fd.as_fd())
    }

    fn say_with(&self, message: &str, fd: BorrowedFd<'_>) -> Result<()> {
        Ok(datagram::send(&self.socket, message.as_bytes(), &[fd])?)
    }

    /// Shares a region of `runs` pages. False if the victim refuses.
    pub fn share(&mut self, share: u32, runs: usize) -> Result<bool> {
        self.offer(share, runs)?;
        let (answer, _) = next(&self.socket, SOON)?.context("the victim has ended the link")?;
        match (answer["shared"]["share"].as_u64(), answer["refused"]["share"].as_u64()) {
            (Some(name), _) if name == u64::from(share) => Ok(true),
            (_, Some(name)) if name == u64::from(share) => Ok(false),
            _ => bail!("the answer to share {share} is {answer}"),
        }
    }

    /// Grants the victim's queue pair `from`, which is connected to 5, reading a page of what it was shown, as a key of its own.
    pub fn grant_reading(&self, slot: u32, from: u32, share: u32) -> Result<()> {
        let (to, access, key) = (5, Access::REMOTE_READ.0, slot + 1);
        self.say(&format!(
            r#"{{"grant":{{"slot":{slot},"generation":1,"to":{to},"from":{from},"key":{key},"access":{access},"iova":0,"length":{PAGE},"share":{share},"offset":0}}}}"#
        ))
    }

    pub fn unshare(&self, share: u32) -> Result<()> {
        self.say(&format!(r#"{{"unshare":{{"share":{share}}}}}"#))
    }

    /// The name of a region that the victim offers, if there is one now.
    pub fn offered(&self) -> Result<Option<u32>> {
        if !readable(&self.socket, Duration::ZERO) {
            return Ok(None);
        }
        let (message, _) = next(&self.socket, SOON)?.context("the victim has ended the link")?;
        Ok(message["share"]["share"].as_u64().map(u32::try_from).transpose()?)
    }

    /// Sends the victim a request and awaits its answer, asleep as far as the victim can see, so that it rings.
    pub fn ask(&mut self, from: u32) -> Result<()> {
        let rings = self.rings.as_mut().context("a link without rings")?;
        self.sequence = self.sequence.next();
        let request = Request { to: self.to, from, sequence: self.sequence, ..Request::default() };
        ensure!(rings.request(&request, &[])?, "there is no room for a request");
        self.bell.as_ref().context("the victim gave no bell")?.ring();
        let end = Instant::now() + SOON;
        while rings.prepare_sleep() {
            ensure!(Instant::now() < end, "the victim's worker does not answer");
            // What the victim rings may be of any kind, and is not waited for.
            std::thread::sleep(Duration::from_micros(100));
        }
        rings.advance(1);
        rings.outstanding = 0;
        Ok(())
    }
}

/// Memory that the victim lets this end write to.
pub struct Granted {
    /// The victim's name for it.
    pub share: u32,
    /// Its file.
    pub file: File,
    /// The victim's words about what may be done there.
    pub grant: serde_json::Value,
}

/// What came of requests that succeeded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reached {
    /// This end was shown all of the region.
    pub shown: bool,
    /// It was granted it.
    pub granted: bool,
}

/// A WRITE to, or READ from, the first 8 bytes of a region, by the victim's queue pair `to`.
pub fn request(opcode: Opcode, to: u32, key: Key) -> Request {
    Request {
        to,
        from: NUMBER,
        opcode,
        pieces: if opcode == Opcode::RDMA_READ { 0 } else { INLINE },
        bytes: 8,
        total: 8,
        remote_addr: key.iova,
        rkey: key.rkey,
        compare_add: u64::from_ne_bytes(*b"honestly"),
        ..Request::default()
    }
}

impl Link {
    /// WRITEs 8 bytes to the victim's queue pair `to`, four times, as the one that it is connected to.
    fn write(&mut self, to: u32, key: Key) -> Result<()> {
        let write = request(Opcode::RDMA_WRITE, to, key);
        for _ in 0..4 {
            let rings = self.rings.as_mut().context("a link without rings")?;
            let request = Request { sequence: self.sequence, ..write };
            ensure!(rings.request(&request, &[])?, "there is no room for a request");
            self.sequence = self.sequence.next();
            self.bell.as_ref().context("the victim gave no bell")?.ring();
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Whether it comes to be granted something that this key names, besides what it was before.
    pub fn is_granted_more(&mut self, to: u32, key: Key) -> Result<bool> {
        self.write(to, key)?;
        while readable(&self.socket, Duration::from_millis(500)) {
            let (message, _) = next(&self.socket, SOON)?.context("the victim has ended the link")?;
            if message["share"]["writable"] == true || message.get("grant").is_some() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Repeats a request, each after the last has succeeded, until what it names is granted or the time has passed. Whatever the victim
    /// shows is confirmed, and not touched. `bytes`: the region's.
    pub fn repeat(&mut self, mut request: Request, bytes: u64, within: Duration) -> Result<Reached> {
        let mut reached = Reached::default();
        let end = Instant::now() + within;
        while !reached.granted && Instant::now() < end {
            request.sequence = self.sequence;
            let rings = self.rings.as_mut().context("a link without rings")?;
            ensure!(rings.request(&request, &[])?, "there is no room for a request");
            self.bell.as_ref().context("the victim gave no bell")?.ring();
            let answer = self.answer()?;
            match answer.kind {
                Kind::ACK | Kind::DATA => self.sequence = self.sequence.next(),
                // What the data of READs go through is not shared yet.
                Kind::LATER if !reached.shown => {}
                _ => bail!("the answer is {answer:?}"),
            }
            // Long enough for some more messages, and short beside the pause after what was not granted.
            while readable(&self.socket, Duration::from_millis(5)) {
                let (message, _) = next(&self.socket, SOON)?.context("the victim has ended the link")?;
                if let Some(share) = message["share"]["share"].as_u64() {
                    self.say(&format!(r#"{{"shared":{{"share":{share}}}}}"#))?;
                    reached.shown |= message["share"]["runs"] == serde_json::json!([[0, bytes]]);
                }
                reached.granted |= message["grant"]["key"] == request.rkey;
            }
        }
        Ok(reached)
    }

    /// The victim's next answer.
    fn answer(&mut self) -> Result<Response> {
        let rings = self.rings.as_mut().context("a link without rings")?;
        let end = Instant::now() + SOON;
        loop {
            if let Some(words) = rings.peek() {
                rings.advance(1);
                rings.publish();
                rings.outstanding = 0;
                return Ok(Response::unpack(&words));
            }
            ensure!(Instant::now() < end, "the victim's worker does not answer");
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    /// WRITEs until it need not ask any more. The link is new, and nothing has gone to the queue pair before.
    pub fn be_granted(&mut self, to: u32, key: Key) -> Result<Granted> {
        self.page(SealedFile::create("grants", GRANTS_BYTES)?)?;
        self.write(to, key)?;
        let mut shown = None;
        loop {
            let (message, fds) = next(&self.socket, SOON)?.context("the victim has ended the link")?;
            if message["share"]["writable"] == true {
                let share = u32::try_from(message["share"]["share"].as_u64().context("a share without a name")?)?;
                self.say(&format!(r#"{{"shared":{{"share":{share}}}}}"#))?;
                shown = fds.into_iter().next().map(|fd| (share, File::from(fd)));
            } else if let Some(grant) = message.get("grant") {
                let (share, file) = shown.context("a grant of memory that was not shown")?;
                return Ok(Granted { share, file, grant: grant.clone() });
            }
        }
    }
}

fn readable(fd: &OwnedFd, within: Duration) -> bool {
    let mut fds = [PollFd::new(fd, PollFlags::IN)];
    Timespec::try_from(within).is_ok_and(|limit| poll(&mut fds, Some(&limit)) == Ok(1))
}

/// Whether the other end closes this connection in time.
pub fn has_ended(socket: &OwnedFd, within: Duration) -> bool {
    readable(socket, within) && matches!(next(socket, Duration::ZERO), Ok(None))
}

/// The next message; `None` if the other end has closed.
fn next(socket: &OwnedFd, within: Duration) -> Result<Option<Message>> {
    ensure!(readable(socket, within), "the victim says nothing within {within:?}");
    let mut buffer = vec![0; 16 << 10];
    match datagram::receive(socket, &mut buffer) {
        Ok(received) if received.bytes > 0 => {
            Ok(Some((serde_json::from_slice(&buffer[..received.bytes])?, received.fds)))
        }
        Ok(_) | Err(Errno::CONNRESET) => Ok(None),
        Err(error) => Err(error.into()),
    }
}
