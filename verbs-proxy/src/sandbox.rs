//! What the proxy asks of the kernel, and what it gives up, before it listens to a container.

// UNSAFETY: one system call that neither rustix nor nix offers.
#![allow(unsafe_code)]

use rustix::process::{Resource, getrlimit, setrlimit};

/// Descriptors cost a container up to three each; the soft limit that the engine happened to have must not decide.
pub fn raise_file_limit() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    // With the old limit the proxy works as well, only for fewer objects.
    let _ = setrlimit(Resource::Nofile, limit);
}

/// Gives up every capability of the calling thread and of those that it starts, and the way to gain new ones.
///
/// What is left is what a process with the administrator's user id may do to files: the proxy reads its launch file,
/// makes sockets in the run directory, and needs nothing else.
pub fn drop_privileges() -> Result<(), caps::errors::CapsError> {
    // It can only fail for a flag that the kernel does not know, which is older than all that this runs on.
    let _ = rustix::thread::set_no_new_privs(true);
    for set in [caps::CapSet::Ambient, caps::CapSet::Effective, caps::CapSet::Permitted, caps::CapSet::Inheritable] {
        caps::clear(None, set)?;
    }
    Ok(())
}

/// Asks for short time slices for the calling thread: 100 µs, the least there is.
///
/// Applications spin on memory, where no yield can be had from them. A thread with a short slice that wakes up takes the
/// processor from one that has been running, instead of waiting for the end of its slice, which is milliseconds away
/// (EEVDF; `sched_setattr(2)`, `sched_runtime` of SCHED_OTHER, kernel 6.12). Older kernels ignore it.
pub fn prefer_short_slices() {
    /// `struct sched_attr` (`linux/sched/types.h`), first version.
    #[repr(C)]
    struct Attributes {
        size: u32,
        policy: u32,
        flags: u64,
        nice: i32,
        priority: u32,
        runtime: u64,
        deadline: u64,
        period: u64,
    }
    let attributes = Attributes {
        size: size_of::<Attributes>() as u32,
        policy: libc::SCHED_OTHER as u32,
        flags: 0,
        nice: 0,
        priority: 0,
        runtime: 100_000,
        deadline: 0,
        period: 0,
    };
    // SAFETY: the structure is as long as it says and lives across the call; it concerns the calling thread only.
    unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
}
