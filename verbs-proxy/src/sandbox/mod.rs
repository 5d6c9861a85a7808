//! What the proxy asks of the kernel, and what it gives up, before it listens to a container.
//!
//! In this order: [`raise_file_limit`]; [`enter_root`] and [`become_user`], while there is one thread; [`give_up_files`];
//! threads; [`filter::confine_proxy`], for all of them.

// UNSAFETY: three system calls that no crate here offers.
#![allow(unsafe_code)]

pub mod filter;
mod root;

pub use root::{View, enter_root};

use anyhow::{Context, Result};
use landlock::{
    ABI, Access, AccessFs, AccessNet, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr, RulesetCreatedAttr, Scope,
};
use rustix::io::Errno;
use rustix::process::{DumpableBehavior, Gid, Resource, Uid, getrlimit, set_dumpable_behavior, setrlimit};
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};

/// Descriptors cost a container up to three each; the soft limit that the engine happened to have must not decide.
pub fn raise_file_limit() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    // With the old limit the proxy works as well, only for fewer objects.
    let _ = setrlimit(Resource::Nofile, limit);
}

/// Gives up root: becomes the user and the group `id`, if one is given, without capabilities and the way to gain new ones,
/// and not to be looked into by others of the same user. To be called while the process has one thread.
///
/// # Errors
/// If the kernel refuses, as for an id that the user namespace does not map.
pub fn become_user(id: Option<u32>) -> Result<()> {
    // It can only fail for a flag that the kernel does not know, which is older than all that this runs on.
    let _ = rustix::thread::set_no_new_privs(true);
    if let Some(id) = id {
        let (uid, gid) = (Uid::from_raw(id), Gid::from_raw(id));
        let what = || format!("cannot become user {id} of proxy.uids; give a range that this user namespace maps");
        set_thread_groups(&[]).with_context(what)?;
        set_thread_res_gid(gid, gid, gid).with_context(what)?;
        set_thread_res_uid(uid, uid, uid).with_context(what)?;
    }
    for set in [caps::CapSet::Ambient, caps::CapSet::Effective, caps::CapSet::Permitted, caps::CapSet::Inheritable] {
        caps::clear(None, set)?;
    }
    set_dumpable_behavior(DumpableBehavior::NotDumpable).context("cannot become undumpable")
}

/// Gives up, by Landlock, what the root has left of file systems, but for what `view` is for, TCP, and signals and abstract sockets of others. As
/// much of it as the kernel has: all of it from 6.12 on, nothing before 5.13. Holds for threads that are started afterwards.
///
/// # Errors
/// If the kernel has Landlock and refuses.
pub fn give_up_files(view: &View) -> Result<()> {
    // No right of a later ABI: those would take away what a proxy needs, the way to other proxies' sockets.
    let mut rules = Ruleset::default()
        .set_compatibility(landlock::CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(ABI::V5))?
        .handle_access(AccessNet::from_all(ABI::V5))?
        .scope(Scope::from_all(ABI::V6))?
        .create()?;
    if let View::Card { .. } = view {
        for (path, access) in [
            ("/sys", AccessFs::ReadFile | AccessFs::ReadDir),
            ("/dev", AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::ReadDir | AccessFs::IoctlDev),
        ] {
            rules = rules.add_rule(PathBeneath::new(PathFd::new(path)?, access))?;
        }
    }
    rules.restrict_self()?;
    Ok(())
}

/// Returns when every processor has taken an interrupt, or was idle, since the call (`membarrier(2)`).
///
/// # Errors
/// `EINVAL` where processors are kept from interrupts (`nohz_full`), `ENOSYS`.
pub fn pass_all_processors() -> Result<(), Errno> {
    // SAFETY: the command takes nothing and touches no memory of ours.
    let result = unsafe { libc::syscall(libc::SYS_membarrier, filter::MEMBARRIER_CMD_GLOBAL, 0, 0) };
    if result == 0 {
        Ok(())
    } else {
        Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::INVAL))
    }
}

/// The version of Landlock that the kernel has (`landlock_create_ruleset(2)`); zero for none.
#[must_use]
pub fn landlock_abi() -> u32 {
    const VERSION: libc::c_uint = 1;
    // SAFETY: with this flag the call takes neither a structure nor its size, and makes nothing.
    let abi = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<u8>(), 0usize, VERSION) };
    u32::try_from(abi).unwrap_or(0)
}

/// How long the time slices of a thread are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Slices {
    /// 100 µs, the least there is. A thread that wakes up with such takes the processor from one that has been running, instead of
    /// waiting for the end of its slice, which is milliseconds away: applications that spin on memory give no yield.
    Short,
    /// The system's. Of threads that yield to each other each pays for a yield with a slice: one with short slices would have
    /// the processor again twenty-eight times before it is the other's turn.
    Usual,
}

/// Asks for such time slices for the calling thread (EEVDF; `sched_setattr(2)`, `sched_runtime` of SCHED_OTHER, kernel 6.12). Older
/// kernels ignore it.
pub fn set_slices(slices: Slices) {
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
        runtime: if slices == Slices::Short { 100_000 } else { 0 },
        deadline: 0,
        period: 0,
    };
    // SAFETY: the structure is as long as it says and lives across the call; it concerns the calling thread only.
    unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
}
