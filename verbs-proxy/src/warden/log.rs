//! Where a proxy's words go: the journal, or else syslog, or else a file in the run-dir; a bounded number of them.

use crate::stats::Holdings;
use crate::voice::Ear;
use rustix::fd::{AsRawFd, OwnedFd, RawFd};
use rustix::fs::{Mode, OFlags, fstat, open};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType, sendto, socket_with};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

const JOURNAL: &str = "/run/systemd/journal/socket";
const SYSLOG: &str = "/dev/log";
/// The file's name in the run-dir.
const FILE: &str = "proxies.jsonl";
/// A file that is larger begins anew.
const MAX_BYTES: i64 = 256 << 10;
/// What `journalctl -t` takes.
const IDENTIFIER: &str = "ringfence-proxy";
/// `LOG_WARNING`.
const WARNING: u8 = 4;
/// `LOG_DAEMON`.
const DAEMON: u8 = 3 << 3;
/// With these flags lines are sent.
pub(super) const FLAGS: SendFlags = SendFlags::DONTWAIT.union(SendFlags::NOSIGNAL);

/// Lines that are logged at once.
const BURST: u32 = 20;
/// Between lines from then on.
const EVERY: Duration = Duration::from_secs(3);
/// Between two looks at what the proxy says: it can say as much as it likes.
const PAUSE: Duration = Duration::from_millis(100);

/// How many lines may be logged: [`BURST`], and one more every so often. The rest is counted.
#[derive(Debug)]
struct Rate {
    left: u32,
    earned: Instant,
    suppressed: u32,
}

impl Rate {
    fn new(now: Instant) -> Self {
        Self { left: BURST, earned: now, suppressed: 0 }
    }

    /// Whether a line may be logged, and how many were not since the last one that was.
    fn take(&mut self, now: Instant) -> Option<u32> {
        let earned =
            (now.saturating_duration_since(self.earned).as_nanos() / EVERY.as_nanos()).min(BURST.into()) as u32;
        if self.left + earned >= BURST {
            (self.left, self.earned) = (BURST, now);
        } else {
            self.left += earned;
            self.earned += EVERY * earned;
        }
        if self.left == 0 {
            return None;
        }
        self.left -= 1;
        Some(std::mem::take(&mut self.suppressed))
    }
}

/// The log of one proxy.
#[derive(Debug)]
pub struct Log {
    container: String,
    journal: PathBuf,
    syslog: PathBuf,
    file: PathBuf,
    holdings: Arc<Holdings>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    ear: Ear,
    rate: Rate,
    /// `None` where there can be no socket.
    socket: Option<OwnedFd>,
}

impl Log {
    /// The log of the proxy of `container`.
    #[must_use]
    pub fn new(container: &str, run_dir: &Path, holdings: Arc<Holdings>, ear: Ear) -> Self {
        let state = State { ear, rate: Rate::new(Instant::now()), socket: None };
        Self {
            container: plain(container),
            journal: JOURNAL.into(),
            syslog: SYSLOG.into(),
            file: run_dir.join(FILE),
            holdings,
            state: Mutex::new(state),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Whoever holds it waits for nobody, and no panic leaves it half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes its socket, and says which descriptor it is: nothing else is sent to by path.
    pub(super) fn open(&self) -> Option<RawFd> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None).ok();
        let mut state = self.state();
        state.socket = socket;
        state.socket.as_ref().map(AsRawFd::as_raw_fd)
    }

    /// Logs what the proxy says, as long as the process lives.
    pub(super) fn run(&self) -> ! {
        let sleeper = self.state().ear.sleeper();
        loop {
            self.hear();
            let (heard, suppressed) = {
                let state = self.state();
                (state.ear.heard(), state.rate.suppressed)
            };
            sleeper.wait(heard, (suppressed > 0).then_some(EVERY));
            // It can say as much as it likes, and costs no more than this.
            std::thread::sleep(PAUSE);
        }
    }

    /// Logs what has been said by now.
    pub(super) fn hear(&self) {
        let mut state = self.state();
        // More than this it says while we listen.
        for _ in 0..2 * BURST {
            let Some(heard) = state.ear.hear() else { break };
            self.lose(&mut state, heard.missed);
            if let Some(line) = heard.line {
                self.write(&mut state, &line);
            }
        }
        if state.rate.suppressed > 0
            && let Some(suppressed) = state.rate.take(Instant::now())
            && !self.put(&state, &format!("{suppressed} lines were not logged"))
        {
            state.rate.suppressed = suppressed;
        }
    }

    /// Logs a line of the warden's own.
    pub(super) fn note(&self, line: &str) {
        self.write(&mut self.state(), line);
    }

    /// Whether the proxy serves, or did when it ended.
    pub(super) fn proxy_serves(&self) -> bool {
        self.state().ear.serves()
    }

    fn write(&self, state: &mut State, line: &str) {
        let Some(suppressed) = state.rate.take(Instant::now()) else { return self.lose(state, 1) };
        let logged = match suppressed {
            0 => self.put(state, line),
            _ => self.put(state, &format!("{line} ({suppressed} others were not logged)")),
        };
        if !logged {
            self.lose(state, 1);
            state.rate.suppressed = state.rate.suppressed.saturating_add(suppressed);
        }
    }

    fn lose(&self, state: &mut State, lines: u32) {
        state.rate.suppressed = state.rate.suppressed.saturating_add(lines);
        self.holdings.unlogged(lines.into());
    }

    /// Whether somebody took the line.
    fn put(&self, state: &State, line: &str) -> bool {
        let line = plain(line);
        let sent = match &state.socket {
            Some(socket) => send(socket, &self.journal, &self.native(&line))
                .or_else(|error| unless_full(error, || send(socket, &self.syslog, &self.syslog_line(&line)))),
            None => Err(Errno::NOENT),
        };
        sent.or_else(|error| unless_full(error, || self.append(&line))).is_ok()
    }

    /// As in <https://systemd.io/JOURNAL_NATIVE_PROTOCOL/>; no value has a newline.
    fn native(&self, line: &str) -> String {
        let container = &self.container;
        format!("MESSAGE={line}\nPRIORITY={WARNING}\nSYSLOG_IDENTIFIER={IDENTIFIER}\nCONTAINER_ID={container}\n")
    }

    /// As syslog(3) of the C library writes it, without the time, which the receiver adds.
    fn syslog_line(&self, line: &str) -> String {
        let (priority, pid, container) = (DAEMON | WARNING, std::process::id(), &self.container);
        format!("<{priority}>{IDENTIFIER}[{pid}]: container {container}: {line}")
    }

    /// In one piece: readers and writers do not lock. Two that begin the file anew at once lose a line.
    fn append(&self, line: &str) -> Result<(), Errno> {
        let time = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let entry = serde_json::json!({"time": time, "container": self.container, "message": line});
        let flags =
            OFlags::WRONLY | OFlags::APPEND | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let open = |more| open(&self.file, flags | more, Mode::RUSR | Mode::WUSR);
        let mut file = open(OFlags::empty())?;
        if fstat(&file)?.st_size > MAX_BYTES {
            file = open(OFlags::TRUNC)?;
        }
        rustix::io::write(&file, format!("{entry}\n").as_bytes()).map(drop)
    }
}

/// Sends a datagram if that is possible at once.
fn send(socket: &OwnedFd, path: &Path, datagram: &str) -> Result<(), Errno> {
    sendto(socket, datagram.as_bytes(), FLAGS, &SocketAddrUnix::new(path)?).map(drop)
}

/// Another way, unless this one failed because a queue is full: then there is somebody, who is told too much.
fn unless_full(error: Errno, otherwise: impl FnOnce() -> Result<(), Errno>) -> Result<(), Errno> {
    if error == Errno::AGAIN || error == Errno::NOBUFS { Err(error) } else { otherwise() }
}

/// `text` on one line.
fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stats::Counters;
    use crate::voice::{self, Voice};
    use std::os::unix::net::UnixDatagram;

    fn log(directory: &Path) -> (Voice, Log) {
        let holdings = Counters::private().unwrap().holdings;
        let (voice, ear) = voice::pair(Arc::clone(&holdings)).unwrap();
        (voice, Log::new("c1\nPRIORITY=0", directory, holdings, ear))
    }

    #[test]
    fn a_burst_is_logged_and_the_rest_counted() {
        let start = Instant::now();
        let mut rate = Rate::new(start);
        let taken = |rate: &mut Rate, after: Duration| rate.take(start + after).is_some();
        assert_eq!((0..100).filter(|_| taken(&mut rate, Duration::ZERO)).count(), BURST as usize);
        assert!(!taken(&mut rate, EVERY - Duration::from_nanos(1)));
        assert!(taken(&mut rate, EVERY) && !taken(&mut rate, EVERY));
        assert_eq!((0..100).filter(|_| taken(&mut rate, 1000 * EVERY)).count(), BURST as usize);
        assert!(!taken(&mut rate, Duration::ZERO), "a clock that went back");
    }

    #[test]
    fn a_line_cannot_add_fields() {
        let directory = tempfile::tempdir().unwrap();
        let (_voice, log) = log(directory.path());
        let native = log.native(&plain("a\nb\u{0}"));
        assert_eq!(
            native,
            "MESSAGE=a\u{fffd}b\u{fffd}\nPRIORITY=4\nSYSLOG_IDENTIFIER=ringfence-proxy\nCONTAINER_ID=c1\u{fffd}PRIORITY=0\n"
        );
        assert!(log.syslog_line("x").starts_with("<28>ringfence-proxy["));
    }

    #[test]
    fn without_a_log_lines_go_to_a_file_that_stays_small() {
        let directory = tempfile::tempdir().unwrap();
        let (_voice, log) = log(directory.path());
        let path = directory.path().join(FILE);
        (0..4000).for_each(|_| log.append(&"x".repeat(500)).unwrap());
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.len() as i64 <= MAX_BYTES + 1000, "{}", text.len());
        let entry: serde_json::Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
        assert_eq!(entry["message"], "x".repeat(500));
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("elsewhere", &path).unwrap();
        assert_eq!(log.append("x").unwrap_err(), Errno::LOOP);
    }

    /// A log whose ways are in `directory`, and the proxy's end.
    fn opened(directory: &Path) -> (Voice, Log) {
        let (voice, mut log) = log(directory);
        (log.journal, log.syslog) = (directory.join("journal"), directory.join("syslog"));
        log.open().unwrap();
        (voice, log)
    }

    fn received(socket: &UnixDatagram) -> Option<String> {
        let mut buffer = [0; 1024];
        let length = socket.recv(&mut buffer).ok()?;
        Some(String::from_utf8_lossy(&buffer[..length]).into_owned())
    }

    fn listen(path: &Path) -> UnixDatagram {
        let socket = UnixDatagram::bind(path).unwrap();
        socket.set_nonblocking(true).unwrap();
        socket
    }

    #[test]
    fn the_first_that_listens_gets_a_line() {
        let directory = tempfile::tempdir().unwrap();
        let (voice, log) = opened(directory.path());
        let file = || std::fs::read_to_string(directory.path().join(FILE)).unwrap_or_default();
        voice.say("to the file");
        log.hear();
        assert!(file().contains("\"message\":\"to the file\""), "{}", file());
        let syslog = listen(&directory.path().join("syslog"));
        voice.say("to syslog");
        log.hear();
        assert!(received(&syslog).unwrap().ends_with(": to syslog"));
        let journal = listen(&directory.path().join("journal"));
        voice.say("to the journal");
        log.hear();
        assert!(received(&journal).unwrap().starts_with("MESSAGE=to the journal\n"));
        assert_eq!((received(&syslog), file().lines().count()), (None, 1));
        // One that went away is nobody.
        drop((journal, syslog));
        log.note("to the file again");
        assert_eq!(file().lines().count(), 2);
    }

    #[test]
    fn a_flood_is_a_burst_and_its_number() {
        let directory = tempfile::tempdir().unwrap();
        let (voice, log) = opened(directory.path());
        let journal = listen(&directory.path().join("journal"));
        let mut lines = Vec::new();
        for _ in 0..100 {
            (0..10).for_each(|_| voice.say("again"));
            log.hear();
            lines.extend(std::iter::from_fn(|| received(&journal)));
        }
        assert!(lines.len() >= BURST as usize && lines.len() < 2 * BURST as usize, "{}", lines.len());
        let suppressed = log.state().rate.suppressed;
        assert!(suppressed > 900, "{suppressed}");
        log.state().rate.earned -= EVERY;
        log.hear();
        assert!(received(&journal).unwrap().starts_with(&format!("MESSAGE={suppressed} lines were not logged\n")));
        log.hear();
        assert_eq!(received(&journal), None);
    }

    #[test]
    fn a_log_that_nobody_reads_is_not_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let (_voice, log) = opened(directory.path());
        let reader = listen(&log.journal);
        let state = log.state();
        let full = (0..100_000).find_map(|_| send(state.socket.as_ref().unwrap(), &log.journal, "x").err());
        assert_eq!(full, Some(Errno::AGAIN));
        assert!(!log.put(&state, "one more"));
        assert!(!directory.path().join(FILE).exists(), "a flood must not go on to the next log");
        drop(reader);
        assert!(log.put(&state, "and another"));
        assert!(directory.path().join(FILE).exists());
    }
}
