//! The file for the next small registration, which the proxy gave out with the answer to the last one.
//!
//! With it the application's pages are moved while the proxy registers them, so that neither waits for the other.

// UNSAFETY: what is kept is a static guarded by a lock that lies elsewhere.
#![allow(unsafe_code)]

use crate::connection::{Asking, Fds, Pending};
use crate::descriptor::{Fd, Inherited, Known};
use crate::sys::Errno;
use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicBool, Ordering};
use ringfence_protocol::control::{FreshReply, NO_HANDLE, Op, RegFresh};
use ringfence_protocol::verbs::Access;
use zerocopy::IntoBytes;

/// So many registrations in a row that it was not fit for, and it is given back for one that is.
const MOST_MISSES: u8 = 4;

/// What it is fit for.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Kind {
    bytes: u64,
    writable: bool,
}

impl Kind {
    fn of(request: &RegFresh) -> Self {
        Self { bytes: request.bytes, writable: request.access.contains(Access::LOCAL_WRITE) }
    }
}

#[derive(Clone, Copy)]
struct Ahead {
    kind: Kind,
    region: u32,
    file: Known,
    misses: u8,
}

struct Global(UnsafeCell<Option<Ahead>>);

// SAFETY: only touched with the process's control lock held.
unsafe impl Sync for Global {}

static STATE: Global = Global(UnsafeCell::new(None));

/// Whether there is one, for whoever does not hold the lock.
static THERE: AtomicBool = AtomicBool::new(false);

/// Whether there probably is one.
pub fn is_there() -> bool {
    THERE.load(Ordering::Relaxed)
}

/// What a forked child has of it.
static INHERITED: Inherited = Inherited::none();

/// Begins a registration of fresh pages. With the file that was kept, if it is fit for that: its region and its descriptor, and
/// the answer is still to come. Else the answer has come, with a file.
pub fn begin(asking: Asking, request: &RegFresh) -> Result<Begun, Errno> {
    // SAFETY: who asks holds the control lock.
    let state = unsafe { &mut *STATE.0.get() };
    let mut unfit = None;
    if let Some(ahead) = state {
        let fits = ahead.kind == Kind::of(request);
        match ahead.file.number() {
            Ok(number) if fits => {
                let Ahead { region, file, .. } = *ahead;
                *state = None;
                THERE.store(false, Ordering::Relaxed);
                let request = RegFresh { file: region, ..*request };
                let sent = asking.send(Op::REG_FRESH, &[request.as_bytes(), &[]], None);
                let pending = sent.inspect_err(|_| file.close())?;
                return Ok(Begun::Ahead { region, file: number, pending });
            }
            Ok(_) if ahead.misses < MOST_MISSES => ahead.misses += 1,
            // Somebody closed it, or it lies there for nothing.
            _ => {
                ahead.file.close();
                unfit = state.take().map(|ahead| ahead.region);
                THERE.store(false, Ordering::Relaxed);
            }
        }
    }
    let request = RegFresh { file: NO_HANDLE, ..*request };
    let sent = asking.send(Op::REG_FRESH, &[request.as_bytes(), &[]], None)?;
    let (reply, file, lost) = sent.finish(1, |reply: FreshReply, [file, next]: Fds| {
        let lost = keep(&request, &reply, next);
        (reply, file, lost)
    })?;
    let file = file.ok_or(libc::EPROTO)?;
    let unfit = unfit.or(lost);
    Ok(Begun::New { reply, file, unfit })
}

/// What came of [`begin`].
pub enum Begun {
    /// The pages can be moved into this file, which is the caller's.
    Ahead { region: u32, file: i32, pending: Pending },
    /// `unfit`: a region for the caller to free.
    New { reply: FreshReply, file: Fd, unfit: Option<u32> },
}

/// The answer to what was begun with a file that was kept, and a region for the caller to free.
pub fn finish(pending: Pending, request: &RegFresh) -> Result<(FreshReply, Option<u32>), Errno> {
    pending.finish(0, |reply: FreshReply, [next, _]: Fds| {
        let lost = keep(request, &reply, next);
        (reply, lost)
    })
}

/// Keeps what came with an answer. The region of what did not, for want of room for its descriptor: it must be freed, or no other will
/// come. The control lock is held.
fn keep(request: &RegFresh, reply: &FreshReply, next: Option<Fd>) -> Option<u32> {
    if reply.ahead == NO_HANDLE {
        return None;
    }
    let Some(next) = next else { return Some(reply.ahead) };
    let file = next.hidden().into_known();
    INHERITED.set(file);
    // SAFETY: the control lock is held.
    unsafe { *STATE.0.get() = Some(Ahead { kind: Kind::of(request), region: reply.ahead, file, misses: 0 }) };
    THERE.store(true, Ordering::Relaxed);
    None
}

/// The connection is gone, and what came by it. The control lock is held.
pub fn forget() {
    // SAFETY: by the caller's promise.
    if let Some(ahead) = unsafe { (*STATE.0.get()).take() } {
        THERE.store(false, Ordering::Relaxed);
        ahead.file.close();
    }
}

/// In a forked child: closes the parent's.
pub fn close() {
    INHERITED.close();
}
