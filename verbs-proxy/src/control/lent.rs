//! Memory files that the container holds too.
//!
//! It may keep its descriptor as long as it likes, and with it the pages. So a file is emptied when the proxy has no use for
//! it any more, and only then its bytes are given back to the quota. Emptying takes the file's lock, which a process of the
//! container can hold for as long as it likes (a write into the file, from memory whose page fault nobody answers). That is
//! why it happens on the closer's thread, and why nothing here takes that lock otherwise: no `lseek` for data, say.
//!
//! A neighbour that was granted writing can hold that lock, too. Its files are emptied on a closer, and by a thread of the warden's,
//! that have nothing else to do, so that what it keeps is no more than what it was granted.

use super::quota::Taken;
use crate::closer::Closer;
use crate::shared::SealedFile;
use crate::warden::Emptier;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;
use std::ops::Deref;
use std::sync::OnceLock;

/// A file that the container holds too, with what it takes of the quota.
#[derive(Debug)]
pub struct Lent {
    /// Always there but while it is dropped.
    contents: Option<Contents>,
    closer: Closer,
    /// Where it ends if neighbours can write to it.
    granted: OnceLock<(Closer, Emptier)>,
}

#[derive(Debug)]
struct Contents {
    file: SealedFile,
    emptier: Option<Emptier>,
    // After the file is emptied, which is when fields are dropped.
    taken: OnceLock<Vec<Taken>>,
}

impl Drop for Contents {
    fn drop(&mut self) {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        // It can only fail for a file that is immutable, since neighbours read it: seals against writing were ruled out.
        if fallocate(&self.file, flags, 0, self.file.length()).is_err()
            && let Some(emptier) = &self.emptier
        {
            emptier.empty(&self.file);
        }
    }
}

impl Lent {
    /// A new file of zeros that takes `taken` until it is emptied, and a descriptor for the container. `emptier`: for a file
    /// that neighbours may read. `spare`: where the container may enlarge a mapping of the file beyond `bytes`, it finds
    /// pages, its own and charged to it alone, instead of a SIGBUS.
    pub fn create(
        name: &str,
        bytes: usize,
        taken: Vec<Taken>,
        closer: &Closer,
        emptier: Option<Emptier>,
        spare: u64,
    ) -> Result<(Self, OwnedFd), Errno> {
        let file = SealedFile::create_longer(name, bytes, spare)?;
        let theirs = rustix::io::fcntl_dupfd_cloexec(&file, 0)?;
        let lent = Self::of(file, closer, emptier);
        lent.charge(taken);
        Ok((lent, theirs))
    }

    /// A file that is there already, and that the container is about to be given.
    pub fn of(file: SealedFile, closer: &Closer, emptier: Option<Emptier>) -> Self {
        let contents = Contents { file, emptier, taken: OnceLock::new() };
        Self { contents: Some(contents), closer: closer.clone(), granted: OnceLock::new() }
    }

    /// What it takes of the quota until it is emptied; once.
    pub fn charge(&self, taken: Vec<Taken>) {
        if let Some(contents) = &self.contents {
            let _ = contents.taken.set(taken);
        }
    }

    /// A neighbour is about to be able to write to it, and to hold its lock for as long as it likes. The file is immutable.
    pub fn is_granted(&self, closer: &Closer, emptier: Emptier) {
        let _ = self.granted.set((closer.clone(), emptier));
    }
}

impl Deref for Lent {
    type Target = SealedFile;

    fn deref(&self) -> &SealedFile {
        &self.contents.as_ref().expect("only Drop takes the contents").file
    }
}

impl AsFd for Lent {
    fn as_fd(&self) -> BorrowedFd<'_> {
        (**self).as_fd()
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let Some(mut contents) = self.contents.take() {
            match self.granted.take() {
                Some((closer, emptier)) => {
                    contents.emptier = Some(emptier);
                    closer.finish(contents);
                }
                None => self.closer.finish(contents),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::quota::{Quota, Resource};
    use crate::launch::{Bytes, Limits};
    use crate::stats::Counters;
    use std::time::Duration;

    #[test]
    fn a_file_that_somebody_keeps_is_empty_before_its_bytes_are_given_back() {
        let quota = Quota::new(
            &Limits { max_mr_bytes: Bytes(1 << 20), ..Limits::default() },
            Counters::private().unwrap().holdings,
        );
        let closer = Closer::start("a", 1).unwrap();
        let taken = vec![quota.take(Resource::MrBytes, 1 << 20).unwrap()];
        let (file, kept) = Lent::create("test", 1 << 20, taken, &closer, None, 1 << 30).unwrap();
        rustix::io::pwrite(&kept, &[1; 1 << 20], 0).unwrap();
        rustix::io::pwrite(&kept, &[1; 1 << 20], 1 << 29).unwrap();
        assert_eq!(quota.take(Resource::MrBytes, 1).unwrap_err(), Errno::NOMEM);
        drop(file);
        let _ = closer.settle(Duration::from_secs(60));
        let _all = quota.take(Resource::MrBytes, 1 << 20).unwrap();
        assert_eq!(rustix::fs::fstat(&kept).unwrap().st_blocks, 0);
    }
}
