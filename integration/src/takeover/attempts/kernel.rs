//! Parts of the kernel that a proxy has no business with. The arguments are such that they harm nobody where they are let in.

use super::attempt;
use crate::takeover::table::Attempt;
use nix::libc::{SO_ATTACH_FILTER, SOL_SOCKET};

const BPF_PROG_LOAD: u64 = 5;
const KEYCTL_GET_KEYRING_ID: u64 = 0;

/// All that is tried.
pub(in crate::takeover) fn all() -> Vec<Attempt> {
    vec![
        attempt!("bpf", SYS_bpf, |a| [BPF_PROG_LOAD, a.hands.room(64), 64]),
        attempt!("perf_event_open, of itself", SYS_perf_event_open, |a| [a.hands.room(128), 0, -1i32, -1i32, 0]),
        attempt!("userfaultfd", SYS_userfaultfd, |_a| [0]),
        attempt!("io_uring_setup", SYS_io_uring_setup, |a| [1, a.hands.room(120)]),
        attempt!("add_key", SYS_add_key, |a| [a.hands.text("user"), a.hands.text("x"), a.hands.text("y"), 1, -2i32]),
        attempt!("request_key", SYS_request_key, |a| [a.hands.text("user"), a.hands.text("x"), 0, 0]),
        attempt!("keyctl", SYS_keyctl, |_a| [KEYCTL_GET_KEYRING_ID, -2i32, 1]),
        attempt!("kexec_load", SYS_kexec_load, |_a| [0, 0, 0, 0xffffu64]),
        attempt!("init_module", SYS_init_module, |a| [a.hands.room(8), 8, a.hands.text("")]),
        attempt!("finit_module", SYS_finit_module, |a| [-1i32, a.hands.text(""), 0]),
        attempt!("delete_module", SYS_delete_module, |a| [a.hands.text("no-such-module"), 0]),
        attempt!("iopl", SYS_iopl, |_a| [3]),
        attempt!("ioperm", SYS_ioperm, |_a| [0x80, 1, 1]),
        attempt!("modify_ldt", SYS_modify_ldt, |a| [0, a.hands.room(16), 16]),
        attempt!("syslog", SYS_syslog, |_a| [10, 0, 0]),
        attempt!("reboot", SYS_reboot, |_a| [1, 2, 3, 0]),
        attempt!("clock_settime", SYS_clock_settime, |a| [0, a.hands.words(&[0, 2_000_000_000])]),
        attempt!("settimeofday", SYS_settimeofday, |_a| [0, 0]),
        attempt!("adjtimex", SYS_adjtimex, |a| [a.hands.room(256)]),
        attempt!("sethostname", SYS_sethostname, |a| [a.hands.text("x"), 100]),
        attempt!("swapoff", SYS_swapoff, |a| [a.hands.text("/no/such/file")]),
        attempt!("quotactl", SYS_quotactl, |a| [0x0080_0001, a.hands.text("/dev/no"), 0, 0]),
        attempt!("memfd_secret", SYS_memfd_secret, |_a| [0xffff]),
        attempt!("shmget", SYS_shmget, |_a| [0, 0, 0o1600]),
        attempt!("shmat", SYS_shmat, |_a| [-1i32, 0, 0]),
        attempt!("semget", SYS_semget, |_a| [0, 0, 0o1600]),
        attempt!("msgget", SYS_msgget, |_a| [0x5ec1_e701, 0]),
        attempt!("mq_open", SYS_mq_open, |a| [a.hands.text("no-such-queue"), 2, 0, 0]),
        attempt!("epoll_create1", SYS_epoll_create1, |_a| [0]),
        attempt!("splice", SYS_splice, |_a| [-1i32, 0, -1i32, 0, 1, 0]),
        attempt!("vmsplice", SYS_vmsplice, |_a| [-1i32, 0, 0, 0]),
        attempt!("sendfile", SYS_sendfile, |_a| [-1i32, -1i32, 0, 1]),
        attempt!("mbind", SYS_mbind, |_a| [0, 4096, 99, 0, 0, 0]),
        attempt!("remap_file_pages", SYS_remap_file_pages, |_a| [0, 0, 0, 0, 0]),
        attempt!("ustat", SYS_ustat, |a| [0, a.hands.room(32)]),
        attempt!("pkey_alloc", SYS_pkey_alloc, |_a| [0, 99]),
        attempt!("setsockopt, a program that filters", SYS_setsockopt, |_a| [
            -1i32,
            SOL_SOCKET,
            SO_ATTACH_FILTER,
            0,
            0
        ]),
        attempt!("landlock_create_ruleset", SYS_landlock_create_ruleset, |_a| [0, 0, 1]),
    ]
}
