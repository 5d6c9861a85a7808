//! The bytes of OBEY, for the proxy's test build and for the tests that command it, which include this file.

use ringfence_protocol::control::Op;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// [`Head`], `calls` times [`Call`], `bytes` bytes → [`Reply`], `calls` results, the bytes as the calls left them.
pub const OBEY: Op = Op(u32::from_le_bytes(*b"OBEY"));

/// Bytes of the buffer that calls may point into. A request can bring this many and no more.
pub const BUFFER: usize = 2048;

/// The most calls of one request.
pub const MAX_CALLS: usize = 16;

/// [`Head::give`]: no descriptor comes with the reply.
pub const NOTHING: i32 = -1;
/// [`Head::give`]: the result of the last call does.
pub const LAST: i32 = -2;

/// A call with this number copies within the proxy's memory: where to, where from, how many bytes.
pub const COPY: u64 = u64::MAX;

/// Before the calls.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Head {
    /// How many calls follow.
    pub calls: u32,
    /// How many bytes follow them: the beginning of the buffer.
    pub bytes: u32,
    /// Number of a descriptor that is sent along with the reply, [`LAST`] or [`NOTHING`].
    pub give: i32,
    /// Zero.
    pub reserved: u32,
}

/// A system call: its number and arguments, which may be addresses in the buffer.
pub type Call = [u64; 7];

/// Before the results, each of which is what the kernel answered: negative for an error.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Reply {
    /// Where the buffer is in the proxy's memory: the same for as long as it lives.
    pub base: u64,
    /// Whether a descriptor comes with this reply.
    pub given: u32,
    /// Zero.
    pub reserved: u32,
}
