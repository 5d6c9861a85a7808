//! The connection to the proxy: one per process, made on first use.
//!
//! The program may close its descriptors, or a thread may be torn out of a call. So the descriptors are looked at before
//! each use ([`crate::descriptor`]), no signal handler runs between a request and its answer, and an answer that nobody
//! waits for any more is passed over.

// UNSAFETY: the connection's state is a static guarded by a lock that lies elsewhere.
#![allow(unsafe_code)]

use crate::descriptor::{Fd, Inherited, Known};
use crate::lock::SleepingGuard;
use crate::pages::signals::Blocked;
use crate::process::{self, Generation};
use crate::shared::Shared;
use crate::sys::{self, Errno};
use crate::{atfork, mr, pages, registry};
use core::cell::UnsafeCell;
use core::ffi::c_int;
use core::sync::atomic::{AtomicBool, Ordering};
use ringfence_protocol::VERSION;
use ringfence_protocol::control::{
    FreshReply, Handle, Hello, HelloReply, MAGIC, MAX_DATAGRAM, MAX_FDS, NO_HANDLE, Op, ReplyHeader, RequestHeader,
    SOCKET_PATH,
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
    wake: Known,
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
    socket: Known,
}

impl Connection {
    /// Wakes the worker, which sleeps. Fails if the connection is gone.
    pub fn wake(&self) -> Result<(), Errno> {
        let woken = self.wake.number().and_then(sys::ring);
        if woken.is_err() {
            self.generation.set_dead();
        }
        woken.map_err(|_| libc::EIO)
    }

    /// Whether somebody closed our socket, or the proxy has gone.
    fn is_cut(&self) -> bool {
        self.socket.number().map_or(true, sys::hung_up)
    }
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

/// What a forked child has of the connection.
static INHERITED: [Inherited; 2] = [Inherited::none(), Inherited::none()];

/// In a child of `fork(3)`: lets go of the parent's connection, so that the proxy sees the parent's end when it comes.
extern "C" fn forked() {
    pages::close_files();
    mr::ahead::close();
    INHERITED.iter().for_each(Inherited::close);
}

/// Descriptors that came with a reply.
pub type Fds = [Option<Fd>; MAX_FDS];

/// The process's connection, made anew if there is none, it was the parent's, the program closed it, or the proxy behind
/// it has gone.
///
/// Fails with the errno of `connect(2)` where there is no proxy.
pub fn connect() -> Result<Connection, Errno> {
    let process = process::process()?;
    let blocked = Blocked::new();
    let _held = process.control.lock();
    // SAFETY: the control lock is held.
    let state = unsafe { &mut *STATE.0.get() };
    if let Some(old) = state.connection {
        if old.generation.is_current() && !old.generation.is_dead() && !old.is_cut() {
            return Ok(old);
        }
        // Let go of what is left of it. Children of `fork(3)` have done so already, others of the parent's do it here.
        pages::forget();
        old.socket.close();
        old.wake.close();
        registry::forget();
        mr::kept::forget();
        mr::ahead::forget();
        state.connection = None;
    }
    static WATCHED: AtomicBool = AtomicBool::new(false);
    if !WATCHED.swap(true, Ordering::Relaxed) {
        atfork::register(None, None, forked);
    }
    let path = sys::environment(SOCKET_VARIABLE).filter(|path| !path.is_empty());
    let socket = sys::connect(path.unwrap_or(SOCKET_PATH.as_bytes()))?.hidden();
    let hello = Hello { version: VERSION, reserved: 0 };
    let mut fds = Fds::default();
    let reply: HelloReply =
        exchange(&blocked, socket.known(), 0, Op::HELLO, hello.as_bytes(), &[], &mut fds).map_err(i32::abs)?;
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
    let (socket, wake) = (socket.into_known(), wake.hidden().into_known());
    INHERITED.iter().zip([socket, wake]).for_each(|(inherited, known)| inherited.set(known));
    let connection = Connection {
        generation: process.begin(),
        // SAFETY: doorbells are made of atomics; the mapping is never ended, because queue pairs of this generation may
        // ring as long as the process runs.
        doorbells: unsafe { doorbells.head() },
        wake,
        // SAFETY: as above.
        words: unsafe { doorbells.words(KEYS_OFFSET, reply.places) },
        keys: Keys::new(reply.places, reply.secret),
        keep: (reply.keep_bytes, reply.keep_regions),
        yield_at_once: reply.processors == 1,
        devices: reply.devices,
        socket,
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
    call_passing(generation, op, &[request, tail], None, fds)
}

/// The same, with a descriptor for the proxy.
pub fn call_passing<R: FromBytes + IntoBytes + Immutable>(
    generation: Generation,
    op: Op,
    request: &[&[u8]; 2],
    pass: Option<c_int>,
    fds: &mut [Option<Fd>],
) -> Result<R, Errno> {
    let needed = fds.len();
    Asking::new(generation)?.send(op, request, pass)?.finish(needed, |reply, mut received| {
        fds.iter_mut().zip(&mut received).for_each(|(wanted, got)| *wanted = got.take());
        reply
    })
}

/// The connection for one request, which nobody else uses meanwhile.
pub struct Asking {
    // Before the signals.
    _held: SleepingGuard<'static>,
    blocked: Blocked,
    generation: Generation,
    socket: Known,
}

impl Asking {
    /// Waits for the others.
    pub fn new(generation: Generation) -> Result<Self, Errno> {
        // Before the lock: in a forked child the lock of the parent's page may not be ours.
        if !generation.is_current() {
            return Err(libc::EIO);
        }
        let blocked = Blocked::new();
        let held = generation.process().control.lock();
        // SAFETY: the control lock is held.
        let state = unsafe { &mut *STATE.0.get() };
        let connection = state.connection.filter(|connection| connection.generation == generation);
        match connection {
            Some(Connection { socket, .. }) if !generation.is_dead() => {
                Ok(Self { _held: held, blocked, generation, socket })
            }
            _ => Err(libc::EIO),
        }
    }

    /// Refusals leave the connection in step; anything else, a negative number, does not.
    fn outcome(&self, errno: Errno) -> Errno {
        if errno >= 0 {
            return errno;
        }
        self.generation.set_dead();
        libc::EIO
    }

    /// Sends the request. Its answer must be waited for.
    pub fn send(self, op: Op, request: &[&[u8]; 2], pass: Option<c_int>) -> Result<Pending, Errno> {
        // SAFETY: the control lock is held.
        let state = unsafe { &mut *STATE.0.get() };
        state.sequence = state.sequence.wrapping_add(1);
        let number = state.sequence;
        send(self.socket, number, op, request, pass).map_err(|errno| self.outcome(errno))?;
        Ok(Pending { asking: self, number, op })
    }
}

/// A request that is under way.
#[must_use]
pub struct Pending {
    asking: Asking,
    number: u32,
    op: Op,
}

impl Pending {
    /// Waits for the answer, with which so many descriptors must come at least; what `then` makes of it, while nobody asks anything
    /// else.
    pub fn finish<R, T>(self, needed: usize, then: impl FnOnce(R, Fds) -> T) -> Result<T, Errno>
    where
        R: FromBytes + IntoBytes + Immutable,
    {
        let Self { asking, number, op } = self;
        let mut received = Fds::default();
        let mut result = receive(&asking.blocked, asking.socket, number, &mut received);
        if result.is_ok() && received.iter().flatten().count() < needed {
            // SAFETY: the control lock is held.
            let state = unsafe { &mut *STATE.0.get() };
            result = Err(undo(&asking.blocked, asking.socket, state, op, &result));
        }
        result.map(|reply| then(reply, received)).map_err(|errno| asking.outcome(errno))
    }
}

/// The process had no room for a reply's descriptors: destroys what the proxy made, so that the call fails alone. Returns
/// its errno, as [`exchange`] does.
fn undo<R: IntoBytes + Immutable>(
    blocked: &Blocked,
    socket: Known,
    state: &mut State,
    op: Op,
    reply: &Result<R, Errno>,
) -> Errno {
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
    let reply = reply.as_ref().map_or(&[][..], IntoBytes::as_bytes);
    let ahead = FreshReply::read_from_bytes(reply).ok().filter(|reply| op == Op::REG_FRESH && reply.ahead != NO_HANDLE);
    let ahead = ahead.map(|reply| (Op::FREE_REGION, reply.ahead));
    let (made, _) = reply.as_chunks::<4>();
    if made.len() < undo.len() {
        return -libc::EPROTO;
    }
    let made = undo.iter().copied().zip(made.iter().map(|made| u32::from_ne_bytes(*made)));
    for (undo, handle) in made.chain(ahead) {
        state.sequence = state.sequence.wrapping_add(1);
        let request = Handle { handle, reserved: 0 };
        let number = state.sequence;
        let undone = exchange::<()>(blocked, socket, number, undo, request.as_bytes(), &[], &mut Fds::default());
        if let Err(errno) = undone {
            return -errno.abs();
        }
    }
    libc::EMFILE
}

/// Whether the connection is cut, or another has taken its place; remembers it.
pub fn is_gone(connection: &Connection) -> bool {
    if !connection.generation.is_current() {
        return true;
    }
    if !connection.generation.is_dead() && connection.is_cut() {
        connection.generation.set_dead();
    }
    connection.generation.is_dead()
}

/// One request and its reply. A refusal is the proxy's positive errno; a broken connection a negative one.
fn exchange<R: FromBytes>(
    blocked: &Blocked,
    socket: Known,
    sequence: u32,
    op: Op,
    request: &[u8],
    tail: &[u8],
    fds: &mut Fds,
) -> Result<R, Errno> {
    send(socket, sequence, op, &[request, tail], None)?;
    receive(blocked, socket, sequence, fds)
}

/// Errors as of [`exchange`].
fn send(socket: Known, sequence: u32, op: Op, request: &[&[u8]; 2], pass: Option<c_int>) -> Result<(), Errno> {
    let header = RequestHeader { magic: MAGIC, op, sequence, reserved: 0 };
    let parts = [header.as_bytes(), request[0], request[1]];
    sys::sendmsg(socket.number().map_err(broken)?, &parts, pass).map_err(|errno| match errno {
        // The kernel does not pass the descriptor on, and has sent nothing.
        libc::ETOOMANYREFS | libc::EPERM | libc::EINVAL | libc::EBADF if pass.is_some() => errno,
        errno => -errno,
    })
}

fn broken(errno: Errno) -> Errno {
    -errno
}

/// Waits for the answer to a request. Errors as of [`exchange`].
fn receive<R: FromBytes>(blocked: &Blocked, socket: Known, sequence: u32, fds: &mut Fds) -> Result<R, Errno> {
    sys::await_soon(socket.number().map_err(broken)?);
    let mut datagram = [0; MAX_DATAGRAM];
    loop {
        let number = socket.number().map_err(broken)?;
        let length = match sys::recvmsg(number, &mut datagram, fds) {
            // Nothing that answers takes so long: whoever wants to end the program now may.
            Err(libc::EAGAIN) => {
                blocked.let_defaults_through();
                sys::wait_for(number, libc::POLLIN);
                continue;
            }
            other => other.map_err(broken)?,
        };
        let Ok((header, body)) = ReplyHeader::read_from_prefix(&datagram[..length]) else {
            return Err(-libc::ECONNRESET);
        };
        // The answer to a request of which the thread was torn out before it came: nobody waits for it.
        if header.magic == MAGIC && is_before(header.sequence, sequence) {
            *fds = Fds::default();
            continue;
        }
        if header.magic != MAGIC || header.sequence != sequence || header.errno > i32::MAX as u32 {
            return Err(-libc::EPROTO);
        }
        if header.errno != 0 {
            return Err(header.errno as Errno);
        }
        return R::read_from_bytes(body).map_err(|_| -libc::EPROTO);
    }
}

/// Whether one sequence number was given out before another.
fn is_before(one: u32, other: u32) -> bool {
    (one.wrapping_sub(other) as i32) < 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};

    /// A socket of ours and one that stands for the proxy's.
    fn sockets() -> (Fd, OwnedFd) {
        let mut ends = [0; 2];
        let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC;
        // SAFETY: writes two descriptors, which nobody else has.
        unsafe {
            assert_eq!(libc::socketpair(libc::AF_UNIX, kind, 0, ends.as_mut_ptr()), 0);
            (Fd::adopt(ends[0]).unwrap(), OwnedFd::from_raw_fd(ends[1]))
        }
    }

    fn reply(proxy: &OwnedFd, sequence: u32, handle: u32) {
        use std::os::fd::AsRawFd;
        let header = ReplyHeader { magic: MAGIC, sequence, errno: 0, reserved: 0 };
        let body = Handle { handle, reserved: 0 };
        sys::sendmsg(proxy.as_raw_fd(), &[header.as_bytes(), body.as_bytes()], None).unwrap();
    }

    fn ask(socket: &Fd, sequence: u32) -> Result<Handle, Errno> {
        let request = Handle { handle: 0, reserved: 0 };
        exchange(&Blocked::new(), socket.known(), sequence, Op::ALLOC_PD, request.as_bytes(), &[], &mut Fds::default())
    }

    #[test]
    fn answers_to_abandoned_requests_are_passed_over() {
        let (socket, proxy) = sockets();
        for (sequence, handle) in [(u32::MAX - 1, 1), (u32::MAX, 2), (0, 3)] {
            reply(&proxy, sequence, handle);
        }
        assert_eq!(ask(&socket, 0).map(|reply| reply.handle), Ok(3));
        reply(&proxy, 2, 4);
        assert_eq!(ask(&socket, 1).map(|reply| reply.handle), Err(-libc::EPROTO), "an answer from the future");
    }

    #[test]
    fn nothing_is_said_to_whoever_has_our_number_now() {
        let ((socket, proxy), (other, theirs)) = (sockets(), sockets());
        let number = socket.number().unwrap();
        let other = other.into_raw();
        // SAFETY: replaces a descriptor of this test.
        unsafe { libc::dup2(other, number) };
        assert_eq!(ask(&socket, 1).map(|reply| reply.handle), Err(-libc::EBADF));
        drop(socket);
        let theirs = theirs.into_raw_fd();
        assert!(!sys::hung_up(theirs), "our end of theirs was closed");
        let mut byte = [0];
        // SAFETY: receives into one byte.
        let received = unsafe { libc::recv(theirs, byte.as_mut_ptr().cast(), 1, libc::MSG_DONTWAIT) };
        assert_eq!((received, sys::errno()), (-1, libc::EAGAIN), "something was sent to it");
        [number, other, theirs].into_iter().for_each(sys::close);
        drop(proxy);
    }
}
