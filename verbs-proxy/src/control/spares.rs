//! The next memory file, made and mapped while nobody waits for it.
//!
//! A program that registers one small buffer waits for the proxy's answer more than for anything else, and most of that is making a
//! file and mapping it. After each such registration the file for another one like it is made, when the answer is under way. The one
//! before that goes out with the answer, so that the program can fill it while its registration is under way
//! ([`ringfence_protocol::control::FreshReply::ahead`]).

use crate::shared::{Mapping, PAGE, Run, RunFile, SealedFile};
use ringfence_protocol::control::RegFresh;
use ringfence_protocol::verbs::Access;
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::mm::ProtFlags;

/// Up to so many bytes.
const MOST: u64 = 64 << 10;

/// `realloc` of the C library enlarges the application's mapping of a region's file, as far as there are addresses.
const GROWTH: u64 = 1 << 47;

/// What a file is fit for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kind {
    bytes: u64,
    writable: bool,
}

impl Kind {
    /// What this asks for; `None` for what no files are made in advance for.
    #[must_use]
    pub fn of(request: &RegFresh) -> Option<Self> {
        let fit = (1..=MOST).contains(&request.bytes) && request.bytes.is_multiple_of(PAGE as u64);
        fit.then(|| Self { bytes: request.bytes, writable: request.access.contains(Access::LOCAL_WRITE) })
    }
}

/// A file for a region, which nobody has seen.
#[derive(Debug)]
pub struct Fresh {
    /// The file.
    pub file: SealedFile,
    /// A descriptor of it for the container.
    pub theirs: OwnedFd,
}

impl Fresh {
    /// A new one of zeros.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn create(bytes: usize) -> Result<Self, Errno> {
        let file = SealedFile::create_longer("ringfence-mr", bytes, GROWTH)?;
        let theirs = rustix::io::fcntl_dupfd_cloexec(&file, 0)?;
        Ok(Self { file, theirs })
    }
}

/// At most one file: two descriptors, a mapping, and no pages.
#[derive(Debug, Default)]
pub struct Spares {
    next: Option<(Kind, Spare)>,
    wanted: Option<Kind>,
}

/// A file that is made and mapped.
#[derive(Debug)]
pub struct Spare {
    /// The file.
    pub fresh: Fresh,
    /// All of it, mapped.
    pub mapping: Mapping,
}

impl Spare {
    fn make(kind: Kind) -> Result<Self, Errno> {
        let fresh = Fresh::create(kind.bytes as usize)?;
        let run = Run { file: RunFile::Sealed(&fresh.file), offset: 0, bytes: kind.bytes as usize };
        let protection = if kind.writable { ProtFlags::READ | ProtFlags::WRITE } else { ProtFlags::READ };
        let mapping = Mapping::of_runs(&[run], protection, false)?;
        Ok(Self { fresh, mapping })
    }
}

impl Spares {
    /// One of this kind: the one that lies ready, or a new one. Another is made by [`Self::prepare`].
    ///
    /// # Errors
    /// What the kernel says.
    pub fn take(&mut self, kind: Kind) -> Result<Spare, Errno> {
        self.wanted = Some(kind);
        // Of another kind: it goes, so that there is one at most.
        match self.next.take().filter(|(ready, _)| *ready == kind) {
            Some((_, spare)) => Ok(spare),
            None => Spare::make(kind),
        }
    }

    /// Makes what was wanted last. Where that fails, so will what asks for it, or not.
    pub fn prepare(&mut self) {
        if let Some(kind) = self.wanted.take() {
            self.next = Spare::make(kind).ok().map(|spare| (kind, spare));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_ready_is_what_was_asked_for_last() {
        let small = RegFresh { bytes: 4096, access: Access::LOCAL_WRITE, ..RegFresh::default() };
        let kind = |request: RegFresh| Kind::of(&request);
        let (writable, readable) = (kind(small).unwrap(), kind(RegFresh { access: Access(0), ..small }).unwrap());
        for bytes in [0, 4095, MOST + 4096] {
            assert_eq!(kind(RegFresh { bytes, ..small }), None);
        }
        let mut spares = Spares::default();
        let Spare { fresh, mapping } = spares.take(writable).unwrap();
        assert_eq!((fresh.file.bytes(), mapping.bytes()), (4096, 4096));
        assert!(spares.next.is_none());
        spares.prepare();
        assert!(spares.next.as_ref().is_some_and(|(ready, _)| *ready == writable));
        spares.take(readable).unwrap();
        assert!(spares.next.is_none(), "there is one at most");
        spares.prepare();
        assert!(spares.next.as_ref().is_some_and(|(ready, _)| *ready == readable));
        spares.prepare();
        assert!(spares.next.is_some(), "it is made once");
    }
}
