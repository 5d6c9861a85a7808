//! Other processes, and the proxy's own identity.

use super::{Attack, attempt};
use crate::takeover::table::{Attempt, Seen};
use nix::libc::{
    self, AT_EMPTY_PATH, F_SETFL, F_SETOWN, O_ASYNC, O_NONBLOCK, O_RDWR, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL,
    PR_SET_DUMPABLE, PR_SET_KEEPCAPS, PR_SET_PDEATHSIG, PR_SET_PTRACER, PR_SET_SECCOMP, RLIMIT_NOFILE, SCHED_FIFO,
    SIGCHLD, SIGTERM,
};

const PTRACE_SEIZE: i64 = 0x4206;
/// `asm-generic/fcntl.h`.
const F_SETSIG: i32 = 10;

/// Running something else, or somewhere else.
pub(in crate::takeover) fn programs() -> Vec<Attempt> {
    let vfork = Attempt {
        // Where it is let in, the child spoils its parent's stack.
        control: false,
        ..attempt!("vfork", SYS_vfork, |_a| [])
    };
    vec![
        attempt!("execve", SYS_execve, |a| [a.hands.text("/no/such/program"), 0, 0]),
        attempt!("execveat", SYS_execveat, |a| [-1i32, a.hands.text(""), 0, 0, AT_EMPTY_PATH]),
        attempt!("fork", SYS_fork, |_a| []),
        attempt!("clone", SYS_clone, |_a| [SIGCHLD, 0, 0, 0, 0]),
        attempt!("clone3", SYS_clone3, |a| [a.hands.words(&[0, 0, 0, 0, SIGCHLD as u64, 0, 0, 0]), 64]),
        vfork,
        attempt!("setns", SYS_setns, |_a| [-1i32, 0]),
        attempt!("fchdir", SYS_fchdir, |_a| [-1i32]),
    ]
}

/// What the proxy could do to its own standing.
pub(in crate::takeover) fn privileges() -> Vec<Attempt> {
    vec![
        attempt!("setuid", SYS_setuid, |_a| [0]),
        attempt!("setgid", SYS_setgid, |_a| [0]),
        attempt!("setresuid", SYS_setresuid, |_a| [0, 0, 0]),
        attempt!("setresgid", SYS_setresgid, |_a| [0, 0, 0]),
        attempt!("setgroups", SYS_setgroups, |a| [1, a.hands.room(4)]),
        attempt!("setfsuid", SYS_setfsuid, |_a| [0]),
        attempt!("capset", SYS_capset, |a| [a.hands.words(&[0x2008_0522]), a.hands.room(24)]),
        attempt!("prctl, ambient capabilities", SYS_prctl, |_a| [PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0]),
        attempt!("prctl, keeping capabilities", SYS_prctl, |_a| [PR_SET_KEEPCAPS, 1, 0, 0, 0]),
        attempt!("prctl, dumpable", SYS_prctl, |_a| [PR_SET_DUMPABLE, 1, 0, 0, 0]),
        attempt!("prctl, a signal at the parent's death", SYS_prctl, |_a| [PR_SET_PDEATHSIG, SIGTERM, 0, 0, 0]),
        attempt!("prctl, a tracer", SYS_prctl, |_a| [PR_SET_PTRACER, u64::MAX, 0, 0, 0]),
        attempt!("prctl, seccomp", SYS_prctl, |_a| [PR_SET_SECCOMP, 7, 0, 0, 0]),
        attempt!("seccomp", SYS_seccomp, |_a| [77, 0, 0]),
        attempt!("personality", SYS_personality, |_a| [0xffff_ffffu32]),
        attempt!("sched_setscheduler, real time", SYS_sched_setscheduler, |a| [0, SCHED_FIFO, a.hands.words(&[1])]),
        attempt!("setpriority, of its own", SYS_setpriority, |_a| [0, 0, -20i64]),
        attempt!("setrlimit", SYS_setrlimit, |a| [RLIMIT_NOFILE, a.hands.words(&[64, 64])]),
        attempt!("mlockall", SYS_mlockall, |_a| [4]),
        attempt!("setpgid", SYS_setpgid, |_a| [0, 0]),
        attempt!("arch_prctl", SYS_arch_prctl, |a| [0x1003, a.hands.room(8)]),
    ]
}

/// The victim's proxy.
pub(in crate::takeover) fn others() -> Vec<Attempt> {
    vec![
        attempt!("process_vm_readv", SYS_process_vm_readv, |a| [
            a.target.victim,
            local(a, 8),
            1,
            a.hands.words(&[a.target.address, 8]),
            1,
            0,
        ]),
        attempt!("process_vm_writev", SYS_process_vm_writev, |a| [
            a.target.victim,
            local(a, 0),
            1,
            a.hands.words(&[a.target.address, 0]),
            1,
            0,
        ]),
        attempt!("ptrace", SYS_ptrace, |a| [PTRACE_SEIZE, a.target.victim, 0, 0]),
        attempt!("its mem file", SYS_openat, |a| [libc::AT_FDCWD, a.proc("mem"), O_RDWR, 0], also NOENT),
        attempt!("its maps", SYS_openat, |a| [libc::AT_FDCWD, a.proc("maps"), 0, 0], also NOENT),
        attempt!("its root", SYS_openat, |a| [libc::AT_FDCWD, a.proc("root/"), 0, 0], also NOENT),
        attempt!("pidfd_open", SYS_pidfd_open, |a| [a.target.victim, 0]),
        attempt!("pidfd_getfd", SYS_pidfd_getfd, |_a| [-1i32, 0, 0]),
        attempt!("process_madvise", SYS_process_madvise, |a| [-1i32, a.hands.room(16), 1, 4, 0]),
        attempt!("process_mrelease", SYS_process_mrelease, |_a| [-1i32, 0]),
        attempt!("kcmp", SYS_kcmp, |a| [a.target.victim, a.target.victim, 1, 0, 0]),
        attempt!("move_pages", SYS_move_pages, |a| [a.target.victim, 0, 0, 0, 0, 0]),
        attempt!("migrate_pages", SYS_migrate_pages, |a| [a.target.victim, 0, 0, 0]),
        attempt!("get_robust_list", SYS_get_robust_list, |a| [a.target.victim, a.hands.room(8), a.hands.room(8)]),
        attempt!("sched_setaffinity", SYS_sched_setaffinity, |a| [a.target.victim, 8, a.hands.words(&[u64::MAX])]),
        attempt!("sched_getaffinity", SYS_sched_getaffinity, |a| [a.target.victim, 128, a.hands.room(128)]),
        attempt!("sched_setattr", SYS_sched_setattr, |a| [a.target.victim, a.hands.words(&[48, 0, 0, 0, 0, 0]), 0,]),
        attempt!("setpriority", SYS_setpriority, |a| [0, a.target.victim, 0]),
        attempt!("ioprio_set", SYS_ioprio_set, |a| [1, a.target.victim, 0]),
        attempt!("prlimit64", SYS_prlimit64, |a| [a.target.victim, RLIMIT_NOFILE, 0, a.hands.room(16)]),
        attempt!("perf_event_open", SYS_perf_event_open, |a| [a.hands.room(128), a.target.victim, -1i32, -1i32, 0]),
        attempt!("getpgid", SYS_getpgid, |a| [a.target.victim]),
    ]
}

/// With signal 0, which only asks whether it may.
pub(in crate::takeover) fn signals() -> Vec<Attempt> {
    vec![
        attempt!("kill the victim's proxy", SYS_kill, |a| [a.target.victim, 0]),
        attempt!("kill init", SYS_kill, |_a| [1, 0]),
        attempt!("kill everybody", SYS_kill, |_a| [-1i32, 0]),
        attempt!("tkill", SYS_tkill, |a| [a.target.victim, 0], also INVAL),
        attempt!("tgkill", SYS_tgkill, |a| [a.target.victim, a.target.victim, 0]),
        attempt!("rt_sigqueueinfo", SYS_rt_sigqueueinfo, |a| [
            a.target.victim,
            0,
            a.hands.words(&[0, 0xffff_ffff, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])
        ]),
        attempt!("pidfd_send_signal", SYS_pidfd_send_signal, |_a| [-1i32, 0, 0, 0]),
        attempt!("timer_create", SYS_timer_create, |_a| [99, 0, 0]),
    ]
}

/// A socket that tells the victim of its readiness, by a signal that would end it. The test sees whether it lives on.
pub(in crate::takeover) fn late_signals() -> Vec<Attempt> {
    vec![Attempt {
        name: "fcntl, F_SETOWN and F_SETSIG",
        run: |a| {
            let pair = a.hands.room(8);
            let made =
                a.hands.call(libc::SYS_socketpair, &[libc::AF_UNIX as u64, libc::SOCK_SEQPACKET as u64, 0, pair])?;
            if let Err(errno) = made {
                return Ok(Seen::Refused(errno));
            }
            let (one, other) = (a.hands.number(pair) as u64, a.hands.number(pair + 4) as u64);
            let byte = a.hands.put(b"x");
            let victim = a.target.victim as u64;
            for arguments in [
                [one, F_SETOWN as u64, victim],
                [one, F_SETSIG as u64, SIGTERM as u64],
                [one, F_SETFL as u64, (O_ASYNC | O_NONBLOCK) as u64],
            ] {
                // Refused or not: what counts is whether the signal comes.
                let _ = a.hands.call(libc::SYS_fcntl, &arguments)?;
            }
            let _ = a.hands.call(libc::SYS_write, &[other, byte, 1])?;
            Ok(Seen::Nothing("the test sees whether the victim lives on".to_owned()))
        },
        control: false,
    }]
}

/// An iovec of `bytes` bytes of the buffer.
fn local(attack: &mut Attack, bytes: u64) -> u64 {
    let room = attack.hands.room(8);
    attack.hands.words(&[room, bytes])
}
