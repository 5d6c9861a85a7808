//! The connection to the proxy: one per process, made on first use.

// UNSAFETY: the connection's state is a static guarded by a lock that lies elsewhere.
#![allow(unsafe_code)]

use crate::process::{self, Generation};
use crate::shared::Shared;
use crate::sys::{self, Errno, Fd};
use crate::{device, mr, pages, registry};
use core::cell::UnsafeCell;
use ringfence_protocol::VERSION;
use ringfence_protocol::control::{
    Handle, Hello, HelloReply, MAGIC, MAX_DATAGRAM, MAX_FDS, Op, ReplyHeader, RequestHeader, SOCKET_PATH,
};
use ringfence_protocol::doorbell::Doorbells;
use ringfence_protocol::keys::{KeyWord, Keys};
use ringfence_protocol::layout::{KEYS_OFFSET, bells_bytes};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// More key words than any proxy has.
const MOST_PLACES: u32 = 1 << 24;

/// Names another socket than [`SOCKET_PATH`].
const SOCKET_VARIABLE: &core::ffi::CStr = c"RINGFENCE_SOCKET";

/// What every object of a connection needs to know of it.
#[derive(Clone, Copy, Debug)]
pub struct Connection {
    /// Whether it still is this process's connection.
    pub generation: Generation,
    /// How to tell the worker of work.
    pub doorbells: &'static Doorbells,
    /// How to wake it.
    pub wake: i32,
    /// Which keys its memory regions answer to.
    pub words: &'static [KeyWord],
    /// The order of keys.
    pub keys: Keys,
    /// Bytes of deregistered regions that may be kept, and how many regions.
    pub keep: (u64, u32),
    /// Whether spinning for somebody else's progress is hopeless.
    pub yield_at_once: bool,
    /// How many devices there are.
    pub devices: u32,
    socket: i32,
}

#[derive(Debug)]
struct State {
    connection: Option<Connection>,
    sequence: u32,
}

struct Global(UnsafeCell<State>);

// SAFETY: only touched with the process's control lock held.
unsafe impl Sync for Global {}

static STATE: Global = Global(UnsafeCell::new(State { connection: None, sequence: 0 }));

/// Descriptors that came with a reply.
pub type Fds = [Option<Fd>; MAX_FDS];

/// The process's connection, made anew if there is none, it was the parent's, or the proxy behind it has gone.
///
/// Fails with the errno of `connect(2)` where there is no proxy.
pub fn connect() -> Result<Connection, Errno> {
    let process = process::process()?;
    let _held = process.control.lock();
    // SAFETY: the control lock is held.
    let state = unsafe { &mut *STATE.0.get() };
    if let Some(old) = state.connection {
        if old.generation.is_current() && !old.generation.is_dead() && !sys::hung_up(old.socket) {
            return Ok(old);
        }
        // The parent's, or of a proxy that has gone: let go of what is left of it, so that the proxy sees the parent's
        // end when it comes.
        pages::forget();
        sys::close(old.socket);
        sys::close(old.wake);
        registry::forget();
        mr::kept::forget();
        device::forget();
        state.connection = None;
    }
    let path = sys::environment(SOCKET_VARIABLE).filter(|path| !path.is_empty());
    let socket = sys::connect(path.unwrap_or(SOCKET_PATH.as_bytes()))?;
    let hello = Hello { version: VERSION, reserved: 0 };
    let mut fds = Fds::default();
    let reply: HelloReply = exchange(&socket, 0, Op::HELLO, hello.as_bytes(), &[], &mut fds).map_err(i32::abs)?;
    let [Some(memory), Some(wake)] = fds else {
        return Err(libc::EMFILE);
    };
    if reply.version != VERSION {
        return Err(libc::EPROTO);
    }
    if !reply.places.is_power_of_two() || reply.places > MOST_PLACES {
        return Err(libc::EPROTO);
    }
    let doorbells = Shared::map(&memory, bells_bytes(reply.places))?;
    let connection = Connection {
        generation: process.begin(),
        // SAFETY: doorbells are made of atomics; the mapping is never ended, because queue pairs of this generation may
        // ring as long as the process runs.
        doorbells: unsafe { doorbells.head() },
        wake: wake.into_raw(),
        // SAFETY: as above.
        words: unsafe { doorbells.words(KEYS_OFFSET, reply.places) },
        keys: Keys::new(reply.places, reply.secret),
        keep: (reply.keep_bytes, reply.keep_regions),
        yield_at_once: reply.processors == 1,
        devices: reply.devices,
        socket: socket.into_raw(),
    };
    core::mem::forget(doorbells);
    state.connection = Some(connection);
    state.sequence = 0;
    Ok(connection)
}

/// Asks the proxy for something that brings no descriptors.
pub fn call<Q, R>(generation: Generation, op: Op, request: &Q) -> Result<R, Errno>
where
    Q: IntoBytes + Immutable,
    R: FromBytes + IntoBytes + Immutable,
{
    call_with(generation, op, request.as_bytes(), &[], &mut [])
}

/// Asks the proxy; `tail` follows the request's body, `fds` are the descriptors that must come back.
pub fn call_with<R: FromBytes + IntoBytes + Immutable>(
    generation: Generation,
    op: Op,
    request: &[u8],
    tail: &[u8],
    fds: &mut [Option<Fd>],
) -> Result<R, Errno> {
    // Before the lock: in a forked child the lock of the parent's page may not be ours.
    if !generation.is_current() {
        return Err(libc::EIO);
    }
    let _held = generation.process().control.lock();
    // SAFETY: the control lock is held.
    let state = unsafe { &mut *STATE.0.get() };
    let Some(connection) = state.connection.filter(|connection| connection.generation == generation) else {
        return Err(libc::EIO);
    };
    if generation.is_dead() {
        return Err(libc::EIO);
    }
    state.sequence = state.sequence.wrapping_add(1);
    let socket = Fd::new(connection.socket);
    let mut received = Fds::default();
    let mut result = exchange(&socket, state.sequence, op, request, tail, &mut received);
    if result.is_ok() && received.iter().flatten().count() < fds.len() {
        result = Err(undo(&socket, state, op, &result));
    }
    let _ = socket.into_raw();
    let reply = result.inspect_err(|errno| {
        // Refusals leave the connection in step; anything else does not.
        if *errno < 0 {
            generation.set_dead();
        }
    });
    let reply = reply.map_err(|errno| if errno < 0 { libc::EIO } else { errno })?;
    fds.iter_mut().zip(&mut received).for_each(|(wanted, got)| *wanted = got.take());
    Ok(reply)
}

/// The process had no room for a reply's descriptors: destroys what the proxy made, so that the call fails alone. Returns
/// its errno, as [`exchange`] does.
fn undo<R: IntoBytes + Immutable>(socket: &Fd, state: &mut State, op: Op, reply: &Result<R, Errno>) -> Errno {
    let undo: &[Op] = match op {
        Op::OPEN => &[Op::CLOSE],
        Op::ALLOC_REGION => &[Op::FREE_REGION],
        Op::REG_FRESH => &[Op::FREE_REGION, Op::DEREG_MR],
        Op::CREATE_COMP_CHANNEL => &[Op::DESTROY_COMP_CHANNEL],
        Op::CREATE_CQ => &[Op::DESTROY_CQ],
        Op::CREATE_QP => &[Op::DESTROY_QP],
        // Nothing brings a resized queue's old memory back.
        _ => return -libc::EMFILE,
    };
    // Each of these replies begins with what it made.
    let mut rest = reply.as_ref().map_or(&[][..], IntoBytes::as_bytes);
    for undo in undo {
        let Ok((made, more)) = u32::read_from_prefix(rest) else {
            return -libc::EPROTO;
        };
        rest = more;
        state.sequence = state.sequence.wrapping_add(1);
        let request = Handle { handle: made, reserved: 0 };
        let undone = exchange::<()>(socket, state.sequence, *undo, request.as_bytes(), &[], &mut Fds::default());
        if let Err(errno) = undone {
            return -errno.abs();
        }
    }
    libc::EMFILE
}

/// Whether the proxy has gone; remembers it.
pub fn is_gone(connection: &Connection) -> bool {
    if !connection.generation.is_dead() && sys::hung_up(connection.socket) {
        connection.generation.set_dead();
    }
    connection.generation.is_dead()
}

/// One request and its reply. A refusal is the proxy's positive errno; a broken connection a negative one.
fn exchange<R: FromBytes>(
    socket: &Fd,
    sequence: u32,
    op: Op,
    request: &[u8],
    tail: &[u8],
    fds: &mut Fds,
) -> Result<R, Errno> {
    let header = RequestHeader { magic: MAGIC, op, sequence, reserved: 0 };
    sys::sendmsg(socket.raw(), &[header.as_bytes(), request, tail]).map_err(|errno| -errno)?;
    let mut datagram = [0; MAX_DATAGRAM];
    let length = sys::recvmsg(socket.raw(), &mut datagram, fds).map_err(|errno| -errno)?;
    let Ok((header, body)) = ReplyHeader::read_from_prefix(&datagram[..length]) else {
        return Err(-libc::ECONNRESET);
    };
    if header.magic != MAGIC || header.sequence != sequence || header.errno > i32::MAX as u32 {
        return Err(-libc::EPROTO);
    }
    if header.errno != 0 {
        return Err(header.errno as Errno);
    }
    R::read_from_bytes(body).map_err(|_| -libc::EPROTO)
}
