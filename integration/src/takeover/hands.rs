//! Who makes the system calls of an attack: a proxy that obeys, or this process, for comparison.

// UNSAFETY: makes any system call, in this process, with whatever arguments an attempt has.
#![allow(unsafe_code)]

use super::wire::{BUFFER, COPY, Call, Head, LAST, NOTHING, OBEY, Reply};
use crate::raw::Raw;
use anyhow::{Context, Result, bail, ensure};
use nix::libc;
use ringfence_protocol::control::ReplyHeader;
use rustix::io::Errno;
use rustix::net::SendFlags;
use std::os::fd::{FromRawFd, OwnedFd};
use std::path::Path;
use zerocopy::{FromBytes, IntoBytes};

/// What a system call answered.
pub type Answer = Result<u64, Errno>;

/// Makes system calls, with a buffer for what they point to.
#[derive(Debug)]
pub struct Hands {
    whose: Whose,
    /// Where the buffer is in the memory of who makes the calls.
    base: u64,
    buffer: Vec<u8>,
}

#[derive(Debug)]
enum Whose {
    Proxy(Raw),
    Own(Box<[u64]>),
}

impl Hands {
    /// Those of the proxy that listens at `socket`; an error if it does not obey.
    pub fn of_proxy(socket: &Path) -> Result<Self> {
        let mut hands = Self { whose: Whose::Proxy(Raw::connect(socket)?), base: 0, buffer: Vec::new() };
        hands.base = hands.exchange(&[], NOTHING)?.0.base;
        Ok(hands)
    }

    /// Those of this process.
    #[must_use]
    pub fn own() -> Self {
        let mut memory = vec![0u64; BUFFER / 8].into_boxed_slice();
        let base = memory.as_mut_ptr() as u64;
        Self { whose: Whose::Own(memory), base, buffer: Vec::new() }
    }

    /// Forgets what is in the buffer.
    pub fn clear(&mut self) {
        self.buffer.clear();
    }

    /// Puts bytes into the buffer: their address.
    ///
    /// # Panics
    /// If there is no room: an attempt needs less.
    pub fn put(&mut self, bytes: &[u8]) -> u64 {
        let at = self.buffer.len().next_multiple_of(8);
        assert!(at + bytes.len() <= BUFFER, "an attempt needs more than {BUFFER} bytes");
        self.buffer.resize(at, 0);
        self.buffer.extend(bytes);
        self.base + at as u64
    }

    /// Puts words.
    pub fn words(&mut self, words: &[u64]) -> u64 {
        self.put(words.as_bytes())
    }

    /// Puts zeros.
    pub fn room(&mut self, bytes: usize) -> u64 {
        self.put(&vec![0; bytes])
    }

    /// Puts text, zero-terminated.
    pub fn text(&mut self, text: &str) -> u64 {
        self.put(&[text.as_bytes(), &[0]].concat())
    }

    /// What the buffer holds now.
    #[must_use]
    pub fn get(&self, address: u64, bytes: usize) -> &[u8] {
        let at = (address - self.base) as usize;
        &self.buffer[at..at + bytes]
    }

    /// A number in the buffer.
    #[must_use]
    pub fn number(&self, address: u64) -> i32 {
        i32::from_ne_bytes(self.get(address, 4).try_into().expect("four bytes"))
    }

    /// Makes one system call.
    pub fn call(&mut self, number: i64, arguments: &[u64]) -> Result<Answer> {
        Ok(self.calls(&[call(number, arguments)])?[0])
    }

    /// Makes several, without anything of the proxy's own in between.
    pub fn calls(&mut self, calls: &[Call]) -> Result<Vec<Answer>> {
        Ok(self.exchange(calls, NOTHING)?.1)
    }

    /// A descriptor of theirs, for this process.
    pub fn fetch(&mut self, number: i32) -> Result<Option<OwnedFd>> {
        Ok(self.exchange(&[], number)?.2)
    }

    /// What one call answers, as a descriptor for this process.
    pub fn fetch_result(&mut self, number: i64, arguments: &[u64]) -> Result<Result<OwnedFd, Errno>> {
        let (_, answers, fd) = self.exchange(&[call(number, arguments)], LAST)?;
        Ok(match answers[0] {
            Ok(_) => Ok(fd.context("a call succeeded, but its result is no descriptor")?),
            Err(errno) => Err(errno),
        })
    }

    /// Copies within their memory.
    pub fn copy(&mut self, to: u64, from: u64, bytes: u64) -> Result<()> {
        self.call(COPY as i64, &[to, from, bytes]).map(drop)
    }

    fn exchange(&mut self, calls: &[Call], give: i32) -> Result<(Reply, Vec<Answer>, Option<OwnedFd>)> {
        let (reply, results, given) = match &mut self.whose {
            Whose::Proxy(raw) => ask(raw, calls, give, &mut self.buffer)?,
            Whose::Own(memory) => by_ourselves(memory, calls, give, &mut self.buffer)?,
        };
        let answers = results.into_iter().map(|result| match result {
            -4095..=-1 => Err(Errno::from_raw_os_error(-result as i32)),
            result => Ok(result as u64),
        });
        Ok((reply, answers.collect(), given))
    }
}

/// A system call as it is sent.
#[must_use]
pub fn call(number: i64, arguments: &[u64]) -> Call {
    let mut call = [0; 7];
    call[0] = number as u64;
    call[1..=arguments.len()].copy_from_slice(arguments);
    call
}

type Outcome = (Reply, Vec<i64>, Option<OwnedFd>);

fn ask(raw: &Raw, calls: &[Call], give: i32, buffer: &mut [u8]) -> Result<Outcome> {
    let head = Head { calls: calls.len() as u32, bytes: buffer.len() as u32, give, reserved: 0 };
    let body = [head.as_bytes(), calls.as_bytes(), buffer].concat();
    raw.send(&Raw::request(OBEY, 1, &body), &[], SendFlags::empty()).context("the proxy takes no more requests")?;
    let received = raw.receive().with_context(|| format!("no answer to the calls {:?}", numbers(calls)))?;
    let Some((bytes, mut given)) = received else { bail!("the proxy closed the connection at {:?}", numbers(calls)) };
    let (_, rest) = ReplyHeader::read_from_prefix(&bytes).map_err(|_| anyhow::anyhow!("a short reply"))?;
    let (reply, rest) = Reply::read_from_prefix(rest).map_err(|_| anyhow::anyhow!("a short reply"))?;
    ensure!(rest.len() == calls.len() * 8 + buffer.len(), "a reply of {} bytes", rest.len());
    let (results, after) = rest.split_at(calls.len() * 8);
    buffer.copy_from_slice(after);
    let results = results.chunks_exact(8).map(|bytes| i64::from_ne_bytes(bytes.try_into().expect("eight"))).collect();
    Ok((reply, results, given.pop()))
}

fn numbers(calls: &[Call]) -> Vec<i64> {
    calls.iter().map(|call| call[0] as i64).collect()
}

fn by_ourselves(memory: &mut [u64], calls: &[Call], give: i32, buffer: &mut [u8]) -> Result<Outcome> {
    let bytes = memory.as_mut_bytes();
    bytes[..buffer.len()].copy_from_slice(buffer);
    let mut results = Vec::new();
    for call in calls {
        let [number, a, b, c, d, e, f] = *call;
        if number == COPY {
            // SAFETY: attempts copy between the buffer and what they have mapped.
            unsafe { std::ptr::copy(b as *const u8, a as *mut u8, c as usize) };
            results.push(c as i64);
            continue;
        }
        // SAFETY: asks for a number.
        let before = unsafe { libc::getpid() };
        // SAFETY: the attempts' pointers are addresses in `memory`, which lives on, or in their own mappings.
        let result = unsafe { libc::syscall(number as i64, a, b, c, d, e, f) };
        let error = std::io::Error::last_os_error().raw_os_error().unwrap_or(0);
        // SAFETY: asks for a number, and ends a child that an attempt made.
        unsafe {
            if libc::getpid() != before {
                libc::_exit(0);
            }
        }
        results.push(if result == -1 { -i64::from(error) } else { result });
    }
    buffer.copy_from_slice(&memory.as_bytes()[..buffer.len()]);
    let reply = Reply { base: memory.as_ptr() as u64, given: 0, reserved: 0 };
    let number = if give == LAST { results.last().map_or(-1, |last| *last as i32) } else { give };
    // SAFETY: duplicates a descriptor if the number is that of one.
    let copy = if number >= 0 { unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 3) } } else { -1 };
    // SAFETY: just made by `fcntl`, and nobody else's.
    let given = (copy >= 0).then(|| unsafe { OwnedFd::from_raw_fd(copy) });
    Ok((reply, results, given))
}
