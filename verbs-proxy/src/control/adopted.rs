//! Memory files that the container made: what its processes share among each other, registered.
//!
//! A file has one descriptor here, however many processes register it, and counts like a file of the proxy's own. Its pages are
//! the container's, who made them; the proxy makes none ([`crate::shared::Holes`]), so nothing has to be emptied when it has no
//! use for the file any more. The descriptor is closed where that may take its time.

use super::lent::Lent;
use super::quota::{Quota, Resource, Taken};
use crate::closer::Closer;
use crate::shared::{ForeignFile, Identity, PAGE, SealedFile};
use crate::warden::Emptier;
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use std::collections::HashMap;
use std::ops::Deref;
use std::sync::{Arc, Weak};

/// A file of the container's own, until the last region that uses it is gone.
#[derive(Debug)]
pub struct Adopted {
    /// Always there but while it is dropped.
    file: Option<ForeignFile>,
    closer: Closer,
    _taken: Taken,
}

impl Deref for Adopted {
    type Target = ForeignFile;

    fn deref(&self) -> &ForeignFile {
        self.file.as_ref().expect("only Drop takes the file")
    }
}

impl Drop for Adopted {
    fn drop(&mut self) {
        if let Some(file) = self.file.take() {
            self.closer.close(file.into_fd());
        }
    }
}

/// What regions are made of.
#[derive(Debug)]
pub enum RegionFile {
    /// The proxy's file, which the container holds, too.
    Lent(Lent),
    /// The container's file.
    Adopted(Adopted),
}

impl RegionFile {
    /// The file, if it is the proxy's: only that may be shown to neighbours.
    #[must_use]
    pub fn own(&self) -> Option<&SealedFile> {
        match self {
            Self::Lent(file) => Some(file),
            Self::Adopted(_) => None,
        }
    }

    /// As [`Lent::is_granted`]; nothing else is ever granted.
    pub fn is_granted(&self, closer: &Closer, emptier: Emptier) {
        if let Self::Lent(file) = self {
            file.is_granted(closer, emptier);
        }
    }

    /// Bytes of its pages.
    #[must_use]
    pub fn page(&self) -> usize {
        match self {
            Self::Lent(_) => PAGE,
            Self::Adopted(file) => file.page(),
        }
    }
}

/// Files that are adopted already.
#[derive(Debug, Default)]
pub struct AdoptedFiles {
    known: HashMap<Identity, Weak<RegionFile>>,
    /// Entries at which those that are gone are looked for.
    limit: usize,
}

impl AdoptedFiles {
    /// Takes a file in, unless it is already. What the descriptor is of no use for is closed in any case.
    ///
    /// # Errors
    /// As [`ForeignFile::inspect`] and the quota.
    pub fn adopt(&mut self, fd: OwnedFd, quota: &Quota, closer: &Closer) -> Result<Arc<RegionFile>, Errno> {
        let file = ForeignFile::adopt(fd).map_err(|(fd, error)| {
            closer.close(fd);
            error
        })?;
        let identity = file.identity();
        let known = self.known.get(&identity).and_then(Weak::upgrade);
        if let Some(known) = known {
            closer.close(file.into_fd());
            return Ok(known);
        }
        let taken = quota.take(Resource::Region, 1).and_then(|taken| quota.keep(&file).map(|_| taken));
        let taken = match taken {
            Ok(taken) => taken,
            Err(error) => {
                closer.close(file.into_fd());
                return Err(error);
            }
        };
        if self.known.len() >= self.limit {
            self.known.retain(|_, file| file.strong_count() > 0);
            self.limit = 2 * self.known.len() + 16;
        }
        let file = Arc::new(RegionFile::Adopted(Adopted { file: Some(file), closer: closer.clone(), _taken: taken }));
        self.known.insert(identity, Arc::downgrade(&file));
        Ok(file)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::launch::Limits;
    use crate::stats::Counters;
    use rustix::fs::{MemfdFlags, memfd_create};
    use rustix::io::dup;
    use std::time::Duration;

    fn limits(max_mr: u32) -> Limits {
        Limits { max_mr, ..Limits::default() }
    }

    fn settle(closer: &Closer) {
        let _ = closer.settle(Duration::from_secs(60));
        assert_eq!(closer.waiting(), 0);
    }

    #[test]
    fn one_file_has_one_descriptor_however_often_it_is_adopted() {
        let (quota, closer) =
            (Quota::new(&limits(1), Counters::private().unwrap().holdings), Closer::start("a", 1).unwrap());
        let mut files = AdoptedFiles::default();
        let memory = memfd_create("test", MemfdFlags::CLOEXEC).unwrap();
        let kept: Vec<_> = (0..100).map(|_| files.adopt(dup(&memory).unwrap(), &quota, &closer).unwrap()).collect();
        assert!(kept.iter().all(|file| Arc::ptr_eq(file, &kept[0])));
        settle(&closer);
        let mut others = Vec::new();
        let error = loop {
            match files.adopt(memfd_create("other", MemfdFlags::CLOEXEC).unwrap(), &quota, &closer) {
                Ok(file) => others.push(file),
                Err(error) => break error,
            }
        };
        assert_eq!((error, others.len()), (Errno::NOMEM, 5));
        drop((kept, others));
        for _ in 0..1000 {
            files.adopt(memfd_create("once", MemfdFlags::CLOEXEC).unwrap(), &quota, &closer).unwrap();
        }
        assert!(files.known.len() <= 2 * 16, "{} files are remembered", files.known.len());
        settle(&closer);
    }

    #[test]
    fn what_is_refused_is_closed_elsewhere() {
        let (quota, closer) =
            (Quota::new(&limits(1), Counters::private().unwrap().holdings), Closer::start("a", 1).unwrap());
        let (read, write) = rustix::pipe::pipe().unwrap();
        let refused = AdoptedFiles::default().adopt(write, &quota, &closer).unwrap_err();
        assert_eq!(refused, Errno::INVAL);
        // The end of the file says that the other end is closed.
        assert_eq!(rustix::io::read(&read, &mut [0; 1]), Ok(0));
    }
}
