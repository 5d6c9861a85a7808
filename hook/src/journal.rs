//! The system's log: journald, or else syslog.

use crate::failure::Failure;
use std::io;
use std::os::unix::net::UnixDatagram;
use std::path::Path;

const JOURNAL: &str = "/run/systemd/journal/socket";
const SYSLOG: &str = "/dev/log";
/// What `journalctl -t` takes.
const IDENTIFIER: &str = "ringfence-hook";
/// `LOG_ERR`.
const ERROR: u8 = 3;
/// `LOG_WARNING`.
const WARNING: u8 = 4;
/// `LOG_DAEMON`.
const DAEMON: u8 = 3 << 3;
/// The longest message that is sent, in characters. A datagram has room for some 200 KiB.
const MAX_MESSAGE: usize = 4096;

/// A line of the log.
struct Entry<'a> {
    priority: u8,
    container: Option<&'a str>,
    message: String,
}

/// Logs `failure` where that is possible at once.
pub fn log(failure: &Failure) {
    put(&Entry { priority: ERROR, container: failure.container.as_deref(), message: failure.to_string() });
}

/// Logs what `container` could not have, where that is possible at once.
pub fn warn(container: &str, message: &str) {
    let message = message.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    put(&Entry { priority: WARNING, container: Some(container), message });
}

fn put(entry: &Entry<'_>) {
    if send(JOURNAL.as_ref(), &native(entry)).is_err() {
        // There is nobody to tell.
        let _ = send(SYSLOG.as_ref(), &syslog(entry));
    }
}

fn send(socket: &Path, datagram: &[u8]) -> io::Result<()> {
    let ours = UnixDatagram::unbound()?;
    // A full queue is no reason to keep a container waiting.
    ours.set_nonblocking(true)?;
    ours.send_to(datagram, socket).map(drop)
}

/// As in <https://systemd.io/JOURNAL_NATIVE_PROTOCOL/>; no value has a newline.
fn native(entry: &Entry<'_>) -> Vec<u8> {
    let Entry { priority, container, .. } = entry;
    let mut text = format!("MESSAGE={}\nPRIORITY={priority}\nSYSLOG_IDENTIFIER={IDENTIFIER}\n", line(entry));
    if let Some(container) = container {
        text += &format!("CONTAINER_ID={container}\n");
    }
    text.into_bytes()
}

/// As syslog(3) of the C library writes it, without the time, which the receiver adds.
fn syslog(entry: &Entry<'_>) -> Vec<u8> {
    let container = entry.container.map(|container| format!("container {container}: ")).unwrap_or_default();
    let (priority, pid) = (DAEMON | entry.priority, std::process::id());
    format!("<{priority}>{IDENTIFIER}[{pid}]: {container}{}", line(entry)).into_bytes()
}

fn line(entry: &Entry<'_>) -> String {
    entry.message.chars().take(MAX_MESSAGE).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Code;

    fn entry(failure: &Failure) -> Entry<'_> {
        Entry { priority: ERROR, container: failure.container.as_deref(), message: failure.to_string() }
    }

    #[test]
    fn a_message_cannot_add_fields() {
        let failure = Failure::new(Code::Denied, "a\nPRIORITY=7\u{0}b").of("c1");
        assert_eq!(
            String::from_utf8(native(&entry(&failure))).unwrap(),
            "MESSAGE=E13 a PRIORITY=7 b\nPRIORITY=3\nSYSLOG_IDENTIFIER=ringfence-hook\nCONTAINER_ID=c1\n"
        );
        let expected = format!("<27>ringfence-hook[{}]: container c1: E13 a PRIORITY=7 b", std::process::id());
        assert_eq!(String::from_utf8(syslog(&entry(&failure))).unwrap(), expected);
        let nameless = Failure::new(Code::Usage, "");
        assert!(!String::from_utf8(native(&entry(&nameless))).unwrap().contains("CONTAINER_ID"));
        assert!(native(&entry(&Failure::new(Code::Usage, "ä".repeat(1 << 20)))).len() < 10_000);
    }

    #[test]
    fn a_log_that_nobody_reads_does_not_block() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        assert!(send(&path, b"x").is_err());
        let socket = UnixDatagram::bind(&path).unwrap();
        send(&path, b"hello").unwrap();
        let mut buffer = [0; 16];
        assert_eq!(socket.recv(&mut buffer).unwrap(), 5);
        let result = (0..100_000).try_for_each(|_| send(&path, b"x"));
        assert_eq!(result.unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }
}
