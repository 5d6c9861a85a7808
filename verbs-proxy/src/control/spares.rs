//! The next memory file, made and mapped while nobody waits for it.
//!
//! A program that registers one small buffer waits for the proxy's answer more than for anything else, and most of that is making a
//! file and mapping it. After each such registration the file for another one like it is made, when the answer is under way.

use crate::shared::{Mapping, Run, RunFile, SealedFile};
use ringfence_protocol::control::RegFresh;
use ringfence_protocol::verbs::Access;
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::mm::ProtFlags;

/// Up to so many bytes.
const MOST: u64 = 64 << 10;

/// `realloc` of the C library enlarges the application's mapping of a region's file, as far as there are addresses.
const GROWTH: u64 = 1 << 47;

/// What a spare file is fit for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Kind {
    bytes: u64,
    writable: bool,
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

/// At most one spare file: a descriptor or two, a mapping, and no pages.
#[derive(Debug, Default)]
pub struct Spares {
    next: Option<(Kind, Fresh, Mapping)>,
    wanted: Option<Kind>,
}

impl Spares {
    /// The spare file and its mapping, if it is fit for this. One like it is made by [`Self::prepare`].
    pub fn take(&mut self, request: &RegFresh) -> Option<(Fresh, Mapping)> {
        let kind = Kind { bytes: request.bytes, writable: request.access.contains(Access::LOCAL_WRITE) };
        self.wanted = Some(kind).filter(|kind| (1..=MOST).contains(&kind.bytes));
        // Of another kind: it goes, so that there is one at most.
        let (_, fresh, mapping) = self.next.take().filter(|(spare, ..)| *spare == kind)?;
        Some((fresh, mapping))
    }

    /// Makes what was wanted last. Where that fails, so will what asks for it, or not.
    pub fn prepare(&mut self) {
        if let Some(kind) = self.wanted.take() {
            self.next = Self::make(kind).ok();
        }
    }

    fn make(kind: Kind) -> Result<(Kind, Fresh, Mapping), Errno> {
        let fresh = Fresh::create(kind.bytes as usize)?;
        let run = Run { file: RunFile::Sealed(&fresh.file), offset: 0, bytes: kind.bytes as usize };
        let protection = if kind.writable { ProtFlags::READ | ProtFlags::WRITE } else { ProtFlags::READ };
        let mapping = Mapping::of_runs(&[run], protection, false)?;
        Ok((kind, fresh, mapping))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spare_is_what_was_asked_for_last_and_is_given_once() {
        let mut spares = Spares::default();
        let small = RegFresh { bytes: 4096, access: Access::LOCAL_WRITE, ..RegFresh::default() };
        let to_read = RegFresh { access: Access(0), ..small };
        let large = RegFresh { bytes: MOST + 4096, ..small };
        assert!(spares.take(&small).is_none());
        spares.prepare();
        let (fresh, mapping) = spares.take(&small).unwrap();
        assert_eq!((fresh.file.bytes(), mapping.bytes()), (4096, 4096));
        assert!(spares.take(&small).is_none(), "it was given");
        spares.prepare();
        assert!(spares.take(&to_read).is_none(), "it is mapped for writing");
        spares.prepare();
        assert!(spares.take(&to_read).is_some());
        assert!(spares.take(&large).is_none());
        spares.prepare();
        assert!(spares.next.is_none(), "there are none of that size");
    }
}
