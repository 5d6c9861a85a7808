//! What a proxy has to say: lines in memory that it shares with its warden, which logs them.
//!
//! No descriptor leads from the proxy to the log, or to the warden: one that was taken over has nothing to fill, to block or to
//! send along. It can write lines, which are no more than text to the warden, and no more of them than that cares to log.

// UNSAFETY: declares what may be overlaid on shared memory.
#![allow(unsafe_code)]

use crate::shared::{Header, Held, Mapping, PAGE, SealedFile};
use crate::stats::Holdings;
use rustix::io::Errno;
use rustix::thread::futex;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Lines that wait to be heard.
const LINES: usize = 16;
/// Words of a line.
const WORDS: usize = 64;
/// Its bytes.
const LONGEST: usize = WORDS * 8;

/// The page between the two.
#[repr(C)]
#[derive(Debug)]
struct Shared {
    /// Lines that were said; the warden sleeps on it.
    said: AtomicU32,
    /// Not zero while the proxy serves, and should not end.
    serves: AtomicU32,
    lines: [[AtomicU64; WORDS]; LINES],
}
// SAFETY: atomics only.
unsafe impl Header for Shared {}

/// The proxy's end.
#[derive(Debug)]
pub struct Voice {
    shared: Held<Shared>,
    said: Mutex<u32>,
    holdings: Arc<Holdings>,
}

/// The warden's end. It believes nothing.
#[derive(Debug)]
pub struct Ear {
    shared: Arc<Held<Shared>>,
    heard: u32,
}

/// Who waits for something to be said, while others may listen.
#[derive(Debug)]
pub struct Sleeper(Arc<Held<Shared>>);

/// What [`Ear::hear`] hears.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Heard {
    /// A line.
    pub line: Option<String>,
    /// Lines before it that were said too fast.
    pub missed: u32,
}

/// Both ends. The warden is a process that is forked afterwards.
///
/// # Errors
/// What the kernel says.
pub fn pair(holdings: Arc<Holdings>) -> Result<(Voice, Ear), Errno> {
    let bytes = size_of::<Shared>().next_multiple_of(PAGE);
    let mapping = Arc::new(Mapping::of(&SealedFile::create("ringfence-voice", bytes)?)?);
    let voice = Voice { shared: mapping.header(0), said: Mutex::new(0), holdings };
    Ok((voice, Ear { shared: Arc::new(mapping.header(0)), heard: 0 }))
}

impl Voice {
    /// Says a line, or the beginning of a long one. Waits for nobody: who says more than is heard is not understood.
    pub fn say(&self, line: &str) {
        self.holdings.said();
        // Nothing that holds the lock can panic.
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        let place = &self.shared.lines[*said as usize % LINES];
        let mut bytes = [0; LONGEST];
        let length = (0..=line.len().min(LONGEST)).rev().find(|at| line.is_char_boundary(*at)).unwrap_or(0);
        bytes[..length].copy_from_slice(&line.as_bytes()[..length]);
        let (words, _) = bytes.as_chunks();
        // SYNC POINT voice: that the place is in use shows in `said`, which `Ear::hear` looks at again after it has read.
        fence(Ordering::Release);
        for (word, bytes) in place.iter().zip(words) {
            word.store(u64::from_le_bytes(*bytes), Ordering::Relaxed);
        }
        *said = said.wrapping_add(1);
        self.shared.said.store(*said, Ordering::Release);
        // If nobody sleeps, nobody is woken.
        let _ = futex::wake(&self.shared.said, futex::Flags::empty(), 1);
    }

    /// Says whether the proxy serves. One that ends while it does was killed.
    pub fn serve(&self, serves: bool) {
        self.shared.serves.store(serves.into(), Ordering::Release);
    }

    /// Has panics of all threads say what they are. They end the process afterwards.
    pub fn report_panics(self: &Arc<Self>) {
        let voice = Arc::clone(self);
        std::panic::set_hook(Box::new(move |panic| voice.say(&format!("a bug: {panic}"))));
    }
}

impl Sleeper {
    /// Waits until something was said beyond `heard`, or for so long.
    pub fn wait(&self, heard: u32, patience: Option<Duration>) {
        let timeout = patience.and_then(|patience| patience.try_into().ok());
        // Interrupted, or said meanwhile: whoever waited looks.
        let _ = futex::wait(&self.0.said, futex::Flags::empty(), heard, timeout.as_ref());
    }
}

impl Ear {
    /// For waiting.
    #[must_use]
    pub fn sleeper(&self) -> Sleeper {
        Sleeper(Arc::clone(&self.shared))
    }

    /// How far it has heard.
    #[must_use]
    pub fn heard(&self) -> u32 {
        self.heard
    }

    /// The next line, and how many were missed before it. Both are what the proxy says.
    pub fn hear(&mut self) -> Option<Heard> {
        let mut missed = 0;
        // A proxy that was taken over can say faster than this hears.
        for _ in 0..LINES {
            let said = self.shared.said.load(Ordering::Acquire);
            let pending = said.wrapping_sub(self.heard);
            if pending == 0 {
                break;
            }
            // The last place may be in use.
            let lost = pending.saturating_sub(LINES as u32 - 1);
            (missed, self.heard) = (lost.saturating_add(missed), self.heard.wrapping_add(lost));
            let place = &self.shared.lines[self.heard as usize % LINES];
            let bytes: Vec<u8> = place.iter().flat_map(|word| word.load(Ordering::Relaxed).to_le_bytes()).collect();
            // SYNC POINT voice: against `Voice::say`.
            fence(Ordering::Acquire);
            let whole = self.shared.said.load(Ordering::Relaxed).wrapping_sub(self.heard) < LINES as u32;
            self.heard = self.heard.wrapping_add(1);
            if whole {
                let length = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
                let line = Some(String::from_utf8_lossy(&bytes[..length]).into_owned());
                return Some(Heard { line, missed });
            }
            missed = missed.saturating_add(1);
        }
        (missed > 0).then_some(Heard { line: None, missed })
    }

    /// Whether the proxy serves, or did when it ended.
    #[must_use]
    pub fn serves(&self) -> bool {
        self.shared.serves.load(Ordering::Acquire) != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stats::Counters;

    fn ends() -> (Voice, Ear) {
        pair(Counters::private().unwrap().holdings).unwrap()
    }

    fn heard(ear: &mut Ear) -> Vec<(Option<String>, u32)> {
        std::iter::from_fn(|| ear.hear().map(|heard| (heard.line, heard.missed))).collect()
    }

    #[test]
    fn lines_are_heard_in_order_and_cut_where_a_character_ends() {
        let (voice, mut ear) = ends();
        voice.say("one");
        voice.say("");
        voice.say(&"ä".repeat(1000));
        let long = "ä".repeat(LONGEST / 2);
        let said = |line: &str| (Some(line.to_owned()), 0);
        assert_eq!(heard(&mut ear), [said("one"), said(""), said(&long)]);
        assert_eq!(heard(&mut ear), []);
        for serves in [true, false] {
            voice.serve(serves);
            assert_eq!(ear.serves(), serves);
        }
    }

    #[test]
    fn what_is_said_too_fast_is_counted() {
        let (voice, mut ear) = ends();
        (0..100).for_each(|number| voice.say(&number.to_string()));
        let heard = heard(&mut ear);
        assert_eq!(heard[0], (Some("85".into()), 85));
        assert_eq!(heard.len(), LINES - 1);
    }

    #[test]
    fn whatever_is_in_the_page_ends_soon_and_is_text() {
        let (voice, mut ear) = ends();
        for words in &voice.shared.lines {
            words.iter().for_each(|word| word.store(u64::MAX, Ordering::Relaxed));
        }
        for said in [u32::MAX, 1 << 31, 7, 0] {
            voice.shared.said.store(said, Ordering::Relaxed);
            let heard = heard(&mut ear);
            assert!(heard.len() <= LINES, "{said}: {}", heard.len());
            assert!(heard.iter().flat_map(|(line, _)| line).all(|line| line.starts_with('\u{fffd}')));
        }
    }

    #[test]
    fn a_panic_is_a_line_that_says_where() {
        let (voice, mut ear) = ends();
        let others = std::panic::take_hook();
        Arc::new(voice).report_panics();
        std::thread::spawn(|| panic!("on purpose")).join().unwrap_err();
        std::panic::set_hook(others);
        // Tests beside this one may panic on purpose, too.
        let lines: Vec<String> = heard(&mut ear).into_iter().filter_map(|(line, _)| line).collect();
        let found = lines.iter().any(|line| line.contains("on purpose") && line.contains("voice.rs"));
        assert!(found && lines.iter().all(|line| line.starts_with("a bug: ")), "{lines:?}");
    }

    #[test]
    fn who_waits_is_woken() {
        let (voice, mut ear) = ends();
        let listener = std::thread::spawn(move || {
            ear.sleeper().wait(ear.heard(), None);
            ear.hear()
        });
        // Whether it sleeps by now or not.
        voice.say("hello");
        assert_eq!(listener.join().unwrap(), Some(Heard { line: Some("hello".into()), missed: 0 }));
    }
}
