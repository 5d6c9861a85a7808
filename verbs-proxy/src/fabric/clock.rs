//! The modelled link: one word that all proxies of a device advance.

// UNSAFETY: declares that the clock may be overlaid on shared memory.
#![allow(unsafe_code)]

use crate::pacing::Nanos;
use crate::shared::{Header, Held, Mapping, PAGE, SealedFile, allocate};
use ringfence_protocol::doorbell::Line;
use rustix::fs::{Mode, OFlags, ftruncate, open};
use rustix::io::Errno;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// What the proxies of one device share about their link.
#[repr(C)]
#[derive(Debug, Default)]
struct Shared {
    free_at: Line<AtomicU64>,
    latency_at: Line<AtomicU64>,
}
// SAFETY: atomics only.
unsafe impl Header for Shared {}

/// A claim further in the future than this comes from a proxy gone wrong and is not believed.
const MAX_BACKLOG: Nanos = 2_000_000_000;

/// How long a latency-class container counts as active after its last request.
const LATENCY_ABOUT: Nanos = 20_000_000;

/// The modelled link's clock.
#[derive(Debug)]
pub struct WireClock {
    shared: Held<Shared>,
}

impl WireClock {
    /// The clock in this file, which is made if it is not there.
    pub fn open(path: &Path) -> Result<Self, Errno> {
        let fd =
            open(path, OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW, Mode::RUSR | Mode::WUSR)?;
        ftruncate(&fd, PAGE as u64)?;
        allocate(&fd, 0, PAGE)?;
        // The file lies in a directory of the administrator's; only proxies reach it.
        let mapping = Arc::new(Mapping::of(&SealedFile::trusted(fd)?)?);
        Ok(Self { shared: mapping.header(0) })
    }

    /// A clock of one proxy's own.
    pub fn private() -> Result<Self, Errno> {
        let mapping = Arc::new(Mapping::of(&SealedFile::create("ringfence-clock", PAGE)?)?);
        Ok(Self { shared: mapping.header(0) })
    }

    /// Takes the link: `finish` says until when, given until when it is taken.
    pub fn reserve(&self, finish: impl Fn(Nanos) -> Nanos, now: Nanos) -> Nanos {
        let believed = |free_at| believed(free_at, now);
        let free_at = &self.shared.free_at.0;
        match free_at.fetch_update(Ordering::AcqRel, Ordering::Acquire, |old| Some(finish(believed(old)))) {
            Ok(old) | Err(old) => finish(believed(old)),
        }
    }

    /// Until when the link is taken.
    #[must_use]
    pub fn free_at(&self, now: Nanos) -> Nanos {
        believed(self.shared.free_at.0.load(Ordering::Relaxed), now)
    }

    /// Notes that a latency-class container sends.
    pub fn note_latency(&self, now: Nanos) {
        self.shared.latency_at.0.store(now, Ordering::Relaxed);
    }

    /// Whether a latency-class container sent lately.
    #[must_use]
    pub fn latency_about(&self, now: Nanos) -> bool {
        now.saturating_sub(self.shared.latency_at.0.load(Ordering::Relaxed)) < LATENCY_ABOUT
            && self.shared.latency_at.0.load(Ordering::Relaxed) != 0
    }
}

fn believed(free_at: Nanos, now: Nanos) -> Nanos {
    if free_at > now.saturating_add(MAX_BACKLOG) { now } else { free_at }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reservations_follow_one_another() {
        let clock = WireClock::private().unwrap();
        assert_eq!(clock.reserve(|free_at| free_at.max(100) + 10, 100), 110);
        assert_eq!(clock.reserve(|free_at| free_at.max(100) + 10, 100), 120);
    }

    #[test]
    fn an_absurd_claim_is_not_believed() {
        let clock = WireClock::private().unwrap();
        clock.shared.free_at.0.store(u64::MAX / 2, Ordering::Relaxed);
        assert_eq!(clock.reserve(|free_at| free_at.max(100) + 10, 100), 110);
    }

    #[test]
    fn latency_is_about_for_a_while() {
        let clock = WireClock::private().unwrap();
        assert!(!clock.latency_about(5));
        clock.note_latency(5);
        assert!(clock.latency_about(6));
        assert!(!clock.latency_about(5 + LATENCY_ABOUT));
    }
}
