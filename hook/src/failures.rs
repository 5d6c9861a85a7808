//! The last failures of hooks, `<run-dir>/failures.jsonl`: most engines show no more of them than an exit code.

use crate::failure::Failure;
use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

const FILE: &str = "failures.jsonl";
/// A hidden name, on which the next file grows while all others wait for [`FILE`].
const NEXT: &str = ".failures.jsonl";
/// A file that is larger loses its older half.
const MAX_BYTES: u64 = 256 << 10;
/// The longest message that is kept, in characters.
const MAX_MESSAGE: usize = 2048;
/// How long to wait for other hooks that fail at the same time.
const PATIENCE: Duration = Duration::from_millis(200);

/// One failure.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Seconds since 1970.
    pub time: u64,
    /// The container's id; `None` if the hook could not even learn that.
    pub container: Option<String>,
    /// The hook's exit code, a [`Code`](crate::Code).
    pub code: u8,
    /// What was wrong, and what to do.
    pub message: String,
}

impl Entry {
    /// `failure`, now.
    pub(crate) fn now(failure: &Failure) -> Self {
        let time = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let message = failure.message.chars().take(MAX_MESSAGE).collect();
        Self { time, container: failure.container.clone(), code: failure.code as u8, message }
    }
}

/// The failures on record, the oldest first; none if there is no such file. Lines that are no entries are left out.
pub fn read(run_dir: &Path) -> io::Result<Vec<Entry>> {
    let text = match std::fs::read(run_dir.join(FILE)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        result => result?,
    };
    Ok(text.split(|b| *b == b'\n').filter_map(|line| serde_json::from_slice(line).ok()).collect())
}

/// Adds `entry` to the file in `run_dir`.
pub(crate) fn append(run_dir: &OwnedFd, entry: &Entry) -> io::Result<()> {
    let mut line = serde_json::to_vec(entry)?;
    line.push(b'\n');
    let mut file = open_locked(run_dir)?;
    let before = file.metadata()?.len();
    // In one piece: readers do not lock.
    file.write_all(&line).inspect_err(|_| {
        // A part of it, on a full file system, would spoil the next line, too.
        let _ = file.set_len(before);
    })?;
    if before + line.len() as u64 > MAX_BYTES { halve(run_dir, &mut file) } else { Ok(()) }
}

/// The file, locked, and surely still the one of that name: [`halve`] replaces it.
fn open_locked(run_dir: &OwnedFd) -> io::Result<File> {
    let flags = OFlags::RDWR | OFlags::APPEND | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let deadline = Instant::now() + PATIENCE;
    loop {
        let file = rustix::fs::openat(run_dir, FILE, flags, Mode::RUSR | Mode::WUSR)?;
        while let Err(error) = rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            if error != Errno::WOULDBLOCK || Instant::now() >= deadline {
                return Err(error.into());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        if rustix::fs::fstat(&file)?.st_nlink > 0 {
            return Ok(file.into());
        }
    }
}

/// Replaces the file by its newer half, whole lines.
fn halve(run_dir: &OwnedFd, file: &mut File) -> io::Result<()> {
    file.seek(SeekFrom::End(-(MAX_BYTES as i64 / 2)))?;
    let mut half = Vec::new();
    file.read_to_end(&mut half)?;
    let start = half.iter().position(|b| *b == b'\n').map_or(half.len(), |newline| newline + 1);
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let next = rustix::fs::openat(run_dir, NEXT, flags, Mode::RUSR | Mode::WUSR)?;
    File::from(next).write_all(&half[start..])?;
    Ok(rustix::fs::renameat(run_dir.as_fd(), NEXT, run_dir.as_fd(), FILE)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn open(directory: &tempfile::TempDir) -> OwnedFd {
        crate::session::open_run_dir(directory.path()).unwrap()
    }

    fn entry(time: u64, message: &str) -> Entry {
        Entry { time, container: Some("c1".into()), code: 13, message: message.into() }
    }

    #[test]
    fn what_is_appended_is_read() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(read(directory.path()).unwrap(), []);
        let entries = [entry(1, "a\nb \"ä\""), Entry { container: None, ..entry(2, "") }];
        for entry in &entries {
            append(&open(&directory), entry).unwrap();
        }
        assert_eq!(read(directory.path()).unwrap(), entries);
        let file = directory.path().join(FILE);
        assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        std::fs::OpenOptions::new().append(true).open(&file).unwrap().write_all(b"{\"torn\n").unwrap();
        append(&open(&directory), &entries[0]).unwrap();
        assert_eq!(read(directory.path()).unwrap().len(), 3);
    }

    #[test]
    fn a_link_is_not_followed() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("theirs"), "").unwrap();
        std::os::unix::fs::symlink("theirs", directory.path().join(FILE)).unwrap();
        assert!(append(&open(&directory), &entry(1, "")).is_err());
    }

    #[test]
    fn messages_are_cut() {
        let failure = Failure::new(crate::Code::Denied, "ä".repeat(100_000));
        assert_eq!(Entry::now(&failure).message, "ä".repeat(MAX_MESSAGE));
    }

    #[test]
    fn many_at_once_lose_only_the_oldest() {
        const WRITERS: u64 = 8;
        const EACH: u64 = 400;
        let directory = tempfile::tempdir().unwrap();
        let filler = "x".repeat(200);
        std::thread::scope(|scope| {
            for writer in 0..WRITERS {
                let (directory, filler) = (&directory, &filler);
                scope.spawn(move || {
                    for i in 0..EACH {
                        // On a busy machine the others' turns may take longer than a hook waits.
                        while let Err(error) = append(&open(directory), &entry(writer * EACH + i, filler)) {
                            assert_eq!(error.kind(), io::ErrorKind::WouldBlock, "{error}");
                        }
                        let size = std::fs::metadata(directory.path().join(FILE)).unwrap().len();
                        assert!(size <= MAX_BYTES + 1024, "{size}");
                    }
                });
            }
        });
        let found = read(directory.path()).unwrap();
        let lines = std::fs::read_to_string(directory.path().join(FILE)).unwrap().lines().count();
        assert_eq!(found.len(), lines, "a line is torn");
        let bytes_of_one = serde_json::to_vec(&entry(1000, &filler)).unwrap().len() + 1;
        assert!(found.len() >= MAX_BYTES as usize / 2 / bytes_of_one - 1, "{}", found.len());
        for writer in 0..WRITERS {
            // Of each writer the last ones, without a gap, if any.
            let of: Vec<_> = found.iter().map(|e| e.time).filter(|time| time / EACH == writer).collect();
            assert!(of.windows(2).all(|pair| pair[0] + 1 == pair[1]), "{of:?}");
            assert!(of.is_empty() || of.last() == Some(&(writer * EACH + EACH - 1)));
        }
    }
}
