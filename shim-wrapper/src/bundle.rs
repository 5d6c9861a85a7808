//! The bundle's `config.json` on disk.

use ringfence_hook::state::MAX_BYTES;
use ringfence_hook::{Code, Failure};
use rustix::fs::{Gid, Mode, OFlags, Uid};
use rustix::process::getpid;
use std::fs::{File, Metadata, OpenOptions, Permissions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// What every annotation of ours has in its key, however the engine escapes the rest.
const MENTION: &[u8] = b"ringfence.dev";

/// A `config.json` as it was read.
pub struct ConfigFile {
    /// Where it really is, so that a symbolic link to it stays one.
    path: PathBuf,
    metadata: Metadata,
    bytes: Vec<u8>,
    /// Why it is not looked into, if it is not.
    defect: Option<Defect>,
    mentions_us: bool,
}

/// What keeps us from looking into a `config.json`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Defect {
    /// What a pipe holds could not be read again by the real runtime, and a device may never end.
    #[error("is no regular file; the bundle must hold one")]
    NotRegular,
    #[error("exceeds {MAX_BYTES} bytes; make it shorter")]
    TooLong,
    #[error("is not UTF-8")]
    NotText,
}

impl ConfigFile {
    /// Reads `path`; `None` if there is nothing, which the runtime will say.
    pub fn read(path: &Path) -> Result<Option<Self>, Failure> {
        match Self::try_read(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Failure::new(Code::State, format!("{}: {error}", path.display()))),
            Ok(file) => Ok(Some(file)),
        }
    }

    fn try_read(path: &Path) -> io::Result<Self> {
        let path = path.canonicalize()?;
        // Nobody need write to a pipe for this one to be opened.
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let file = File::from(rustix::fs::open(&path, flags, Mode::empty())?);
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            let defect = Some(Defect::NotRegular);
            return Ok(Self { path, metadata, bytes: Vec::new(), defect, mentions_us: false });
        }
        let mut bytes = Vec::with_capacity(metadata.len().min(MAX_BYTES) as usize + 1);
        (&file).take(MAX_BYTES + 1).read_to_end(&mut bytes)?;
        let is_too_long = bytes.len() as u64 > MAX_BYTES;
        let mentions_us = mentions_us(&bytes, if is_too_long { Some(&file) } else { None })?;
        Ok(Self { path, metadata, bytes, defect: is_too_long.then_some(Defect::TooLong), mentions_us })
    }

    /// All of it.
    pub fn text(&self) -> Result<&str, Defect> {
        match self.defect {
            Some(defect) => Err(defect),
            None => std::str::from_utf8(&self.bytes).map_err(|_| Defect::NotText),
        }
    }

    /// Whether something of ours is in it, also if it cannot be understood.
    pub fn mentions_us(&self) -> bool {
        self.mentions_us
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The bundle.
    pub fn directory(&self) -> PathBuf {
        let directory = self.path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        directory.canonicalize().unwrap_or_else(|_| directory.to_owned())
    }

    /// Replaces it as a whole, with the same owner and mode. It is not synced: a bundle does not outlive the host's crash.
    pub fn replace(&self, text: &str) -> Result<(), Failure> {
        let failed = |error: io::Error| {
            let path = self.path.display();
            let hint = match error.kind() {
                ErrorKind::ReadOnlyFilesystem | ErrorKind::PermissionDenied => "; the bundle must be writable",
                ErrorKind::StorageFull | ErrorKind::QuotaExceeded => "; make room in its file system",
                _ => "",
            };
            Failure::new(Code::State, format!("cannot add the hook to {path}: {error}{hint}"))
        };
        let name = format!(".config.json.ringfence-{}", getpid().as_raw_nonzero());
        let temporary = self.path.with_file_name(name);
        let result = self.write(&temporary, text).and_then(|()| std::fs::rename(&temporary, &self.path));
        result.map_err(|error| {
            // The failure itself is what to tell.
            let _ = std::fs::remove_file(&temporary);
            failed(error)
        })
    }

    fn write(&self, temporary: &Path, text: &str) -> io::Result<()> {
        let create = || OpenOptions::new().write(true).create_new(true).mode(0o600).open(temporary);
        let mut file = match create() {
            // Of a process with our number, which was killed.
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                std::fs::remove_file(temporary)?;
                create()?
            }
            result => result?,
        };
        file.write_all(text.as_bytes())?;
        let made = file.metadata()?;
        if (made.uid(), made.gid()) != (self.metadata.uid(), self.metadata.gid()) {
            let owner = (Uid::from_raw(self.metadata.uid()), Gid::from_raw(self.metadata.gid()));
            rustix::fs::fchown(&file, Some(owner.0), Some(owner.1))?;
        }
        file.set_permissions(Permissions::from_mode(self.metadata.mode() & 0o7777))
    }
}

/// Searches `bytes`, and what follows them in `rest`, up to the first zero byte: there every runtime stops, and a sparse file
/// has terabytes of them at no cost.
fn mentions_us(bytes: &[u8], rest: Option<&File>) -> io::Result<bool> {
    let contains = |bytes: &[u8]| bytes.windows(MENTION.len()).any(|window| window == MENTION);
    if contains(bytes) {
        return Ok(true);
    }
    let Some(rest) = rest.filter(|_| !bytes.contains(&0)) else { return Ok(false) };
    // A mention may begin in one piece and end in the next.
    let mut piece = bytes[bytes.len() - MENTION.len()..].to_vec();
    loop {
        let kept = piece.len();
        if rest.take(MAX_BYTES).read_to_end(&mut piece)? == 0 {
            return Ok(false);
        }
        if contains(&piece) || piece.contains(&0) {
            return Ok(contains(&piece));
        }
        piece.drain(..piece.len() - kept);
    }
}
