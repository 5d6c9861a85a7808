//! What this proxy counts, on the page that [`ringfence_launch::counters`] describes.

// UNSAFETY: declares that the page may be overlaid on shared memory.
#![allow(unsafe_code)]

use crate::pacing::Nanos;
use crate::shared::{Header, Held, Mapping, SealedFile, allocate};
use ringfence_launch::counters::{self, Page, Work};
use ringfence_protocol::verbs::{Opcode, WcStatus};
use rustix::fs::{Mode, OFlags, ftruncate, open};
use rustix::io::Errno;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

type Shared = Page<AtomicU64>;
// SAFETY: atomics only.
unsafe impl Header for Shared {}

/// Adds to a word that only the calling thread writes: nothing is locked.
#[inline(always)]
fn add(word: &AtomicU64, amount: u64) {
    word.store(word.load(Ordering::Relaxed).wrapping_add(amount), Ordering::Relaxed);
}

#[inline(always)]
fn add_work(all: &[Work<AtomicU64>; 16], opcode: Opcode, operations: u64, bytes: u64) {
    // No opcode that is carried out is larger; the mask tells the compiler.
    let work = &all[usize::from(opcode.0 & 15)];
    add(&work.operations, operations);
    add(&work.bytes, bytes);
}

/// The page of one proxy, to be given to its writers.
#[derive(Debug)]
pub struct Counters {
    /// The worker's part.
    pub tally: Tally,
    /// Everybody else's.
    pub holdings: Arc<Holdings>,
}

impl Counters {
    /// Makes the file in a container's directory, which has none.
    ///
    /// The descriptor is closed when it is mapped: who takes the proxy over finds no way to the file's length.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn create(container_dir: &Path) -> Result<Self, Errno> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = open(container_dir.join(counters::FILE), flags, Mode::RUSR | Mode::WUSR)?;
        ftruncate(&fd, counters::BYTES as u64)?;
        allocate(&fd, 0, counters::BYTES)?;
        Self::over(&SealedFile::trusted(fd)?)
    }

    /// A page that nobody else sees.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn private() -> Result<Self, Errno> {
        Self::over(&SealedFile::create("ringfence-counters", counters::BYTES)?)
    }

    fn over(file: &SealedFile) -> Result<Self, Errno> {
        let mapping = Arc::new(Mapping::of(file)?);
        let page: Held<Shared> = mapping.header(0);
        page.version.store(counters::VERSION, Ordering::Relaxed);
        page.magic.store(counters::MAGIC, Ordering::Release);
        Ok(Self { tally: Tally { page }, holdings: Arc::new(Holdings { page: mapping.header(0) }) })
    }
}

/// What the worker counts. There is one, and one thread has it: its stores are plain.
#[derive(Debug)]
pub struct Tally {
    page: Held<Shared>,
}

impl Tally {
    /// What is counted by now.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn page(&self) -> Page {
        let words: [u64; counters::BYTES / 8] = std::array::from_fn(|at| {
            // SAFETY: the page is that many words, all of which are atomic.
            unsafe { AtomicU64::from_ptr((&raw const *self.page).cast::<u64>().cast_mut().add(at)) }
                .load(Ordering::Relaxed)
        });
        Page::read(zerocopy::IntoBytes::as_bytes(&words)).expect("it was made as one")
    }

    /// A piece of a request of the container's was carried out; `whole`: the last one.
    #[inline(always)]
    pub fn sent(&self, opcode: Opcode, bytes: u32, whole: bool) {
        add_work(&self.page.sent, opcode, whole.into(), bytes.into());
    }

    /// A piece of somebody's request was carried out as its responder.
    #[inline(always)]
    pub fn received(&self, opcode: Opcode, bytes: u32, whole: bool) {
        add_work(&self.page.received, opcode, whole.into(), bytes.into());
    }

    /// Requests of the container's went and were carried out at once, whole.
    #[inline(always)]
    pub fn sent_at_once(&self, opcode: Opcode, operations: u64, bytes: u64) {
        add_work(&self.page.sent, opcode, operations, bytes);
        add(&self.page.delays[0], operations);
    }

    /// Whole requests of somebody's were carried out.
    #[inline(always)]
    pub fn received_whole(&self, opcode: Opcode, operations: u64, bytes: u64) {
        add_work(&self.page.received, opcode, operations, bytes);
    }

    /// A request went, after it had been held back for so long.
    #[inline(always)]
    pub fn waited(&self, delay: Nanos) {
        add(&self.page.delays[Page::delay_place(delay)], 1);
    }

    /// A completion with an error.
    #[inline(always)]
    pub fn completed(&self, status: WcStatus) {
        if status != WcStatus::SUCCESS {
            add(&self.page.errors[usize::from(status.0 & 31)], 1);
        }
    }

    /// There was no room for a completion.
    #[cold]
    pub fn completion_lost(&self) {
        add(&self.page.completions_lost, 1);
    }

    /// Queue pairs waited for rates or share.
    pub fn throttled(&self, time: Nanos) {
        add(&self.page.throttled_ns, time);
    }

    /// The responder had no receive request.
    pub fn rnr_received(&self) {
        add(&self.page.rnr_received, 1);
    }

    /// There was no receive request for what came.
    pub fn rnr_sent(&self) {
        add(&self.page.rnr_sent, 1);
    }

    /// An answer did not come in time; its request is tried again.
    pub fn timed_out(&self) {
        add(&self.page.timeouts, 1);
    }

    /// A request came once more.
    pub fn repeated(&self) {
        add(&self.page.repeated, 1);
    }

    /// A READ was told to come later.
    pub fn read_deferred(&self) {
        add(&self.page.reads_deferred, 1);
    }

    /// There is one link more, so many now.
    pub fn link_made(&self, now: usize) {
        add(&self.page.links_made, 1);
        self.links(now);
    }

    /// The other end of a link broke the protocol.
    pub fn link_failed(&self) {
        add(&self.page.links_failed, 1);
    }

    /// There are so many links now.
    pub fn links(&self, now: usize) {
        self.page.links.store(now as u64, Ordering::Relaxed);
    }
}

/// What the container holds, and what is said of it: for any thread, and for the warden.
#[derive(Debug)]
pub struct Holdings {
    page: Held<Shared>,
}

impl Holdings {
    /// What is held of the kind with this place, see [`counters::QUOTAS`].
    ///
    /// # Panics
    /// For a place that there is not: they are constants.
    #[must_use]
    pub fn used(&self, place: usize) -> &AtomicU64 {
        &self.page.quotas[place].used
    }

    /// Shows a limit.
    ///
    /// # Panics
    /// As [`Self::used`].
    pub fn show_limit(&self, place: usize, limit: u64) {
        self.page.quotas[place].limit.store(limit, Ordering::Relaxed);
    }

    /// The proxy had a line to say.
    pub fn said(&self) {
        self.page.lines.fetch_add(1, Ordering::Relaxed);
    }

    /// Lines were not logged.
    pub fn unlogged(&self, lines: u64) {
        self.page.lines_unlogged.fetch_add(lines, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    fn page(directory: &Path) -> Page {
        Page::read(&std::fs::read(directory.join(counters::FILE)).unwrap()).unwrap()
    }

    #[test]
    fn what_is_counted_is_in_the_file() {
        let directory = tempfile::tempdir().unwrap();
        let Counters { tally, holdings } = Counters::create(directory.path()).unwrap();
        assert_eq!(page(directory.path()).operations(), 0);
        tally.sent(Opcode::SEND, 100, false);
        tally.sent(Opcode::SEND, 50, true);
        tally.received(Opcode::RDMA_READ, 7, true);
        tally.received(Opcode::CMP_AND_SWP, 8, true);
        tally.received(Opcode::FETCH_AND_ADD, 8, true);
        tally.sent_at_once(Opcode::RDMA_WRITE, 32, 256);
        tally.received_whole(Opcode::RDMA_WRITE, 32, 256);
        tally.completed(WcStatus::SUCCESS);
        tally.completed(WcStatus::REM_ACCESS_ERR);
        tally.completed(WcStatus(255));
        tally.waited(1500);
        tally.link_made(3);
        tally.links(2);
        holdings.used(2).store(9, Ordering::Relaxed);
        let page = page(directory.path());
        assert_eq!(page.sent[2], Work { operations: 1, bytes: 150 });
        assert_eq!((page.sent[0], page.received[0]), (Work { operations: 32, bytes: 256 }, page.sent[0]));
        assert_eq!(page.bytes_out(), 150 + 256 + 7 + 8 + 8);
        assert_eq!((page.errors[10], page.errors[31], page.failed()), (1, 1, 2));
        assert_eq!((page.delays[0], page.delays[11]), (32, 1));
        assert_eq!((page.links, page.links_made, page.quotas[2].used), (2, 1, 9));
    }

    #[test]
    fn the_file_is_its_owners_and_nobody_elses_is_taken() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(counters::FILE);
        let _counters = Counters::create(directory.path()).unwrap();
        let found = std::fs::metadata(&path).unwrap();
        assert_eq!((found.len(), found.mode() & 0o7777), (counters::BYTES as u64, 0o600));
        assert_eq!(Counters::create(directory.path()).unwrap_err(), Errno::EXIST);
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("elsewhere", &path).unwrap();
        assert_eq!(Counters::create(directory.path()).unwrap_err(), Errno::EXIST);
    }
}
