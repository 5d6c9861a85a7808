//! Files, directories and mounts of the host.

use super::attempt;
use crate::takeover::table::Attempt;
use nix::libc::{
    AT_EMPTY_PATH, AT_FDCWD, CLONE_NEWNS, CLONE_NEWUSER, MS_BIND, O_CREAT, O_DIRECTORY, O_PATH, O_RDONLY, O_RDWR,
    O_WRONLY,
};

/// Mounting, unmounting, and what leads there.
pub(in crate::takeover) fn mounts() -> Vec<Attempt> {
    vec![
        attempt!("mount", SYS_mount, |a| [a.hands.text("none"), a.beside("directory"), a.hands.text("tmpfs"), 0, 0], also NOENT),
        attempt!("mount, binding the root", SYS_mount, |a| [a.hands.text("/"), a.beside("directory"), 0, MS_BIND, 0], also NOENT),
        attempt!("umount2", SYS_umount2, |a| [a.beside("directory"), 0], also NOENT),
        attempt!("pivot_root", SYS_pivot_root, |a| [a.hands.text("."), a.hands.text(".")]),
        attempt!("fsopen", SYS_fsopen, |a| [a.hands.text("tmpfs"), 0]),
        attempt!("fsmount", SYS_fsmount, |_a| [-1i32, 0, 0]),
        attempt!("open_tree", SYS_open_tree, |a| [AT_FDCWD, a.hands.text("/"), 0]),
        attempt!("move_mount", SYS_move_mount, |a| [AT_FDCWD, a.hands.text("/"), AT_FDCWD, a.beside("directory"), 0], also NOENT),
        attempt!("mount_setattr", SYS_mount_setattr, |a| [AT_FDCWD, a.hands.text("/"), 0, a.hands.room(32), 32]),
        attempt!("unshare, mounts", SYS_unshare, |_a| [CLONE_NEWNS]),
        attempt!("unshare, users", SYS_unshare, |_a| [CLONE_NEWUSER]),
    ]
}

/// Every call that takes a path. An empty root answers ENOENT to those that are let in.
pub(in crate::takeover) fn files() -> Vec<Attempt> {
    let mut attempts = vec![
        attempt!("open /", SYS_open, |a| [a.hands.text("/"), O_RDONLY | O_DIRECTORY, 0]),
        attempt!("openat /, O_PATH", SYS_openat, |a| [AT_FDCWD, a.hands.text("/"), O_PATH, 0]),
        attempt!("open, reading", SYS_open, |a| [a.canary(), O_RDONLY, 0], also NOENT),
        attempt!("open, writing", SYS_open, |a| [a.canary(), O_WRONLY, 0], also NOENT),
        attempt!("openat, writing", SYS_openat, |a| [AT_FDCWD, a.canary(), O_RDWR, 0], also NOENT),
        attempt!("openat, the working directory's parent", SYS_openat, |a| [AT_FDCWD, a.hands.text(".."), O_PATH, 0]),
        attempt!("openat2", SYS_openat2, |a| [AT_FDCWD, a.canary(), a.hands.words(&[O_RDWR as u64, 0, 0]), 24], also NOENT),
        attempt!("openat, making", SYS_openat, |a| [AT_FDCWD, a.beside("made"), O_CREAT | O_WRONLY, 0o600], also NOENT),
        attempt!("creat", SYS_creat, |a| [a.beside("created"), 0o600], also NOENT),
        attempt!("open /proc/self/mem", SYS_open, |a| [a.hands.text("/proc/self/mem"), O_RDWR, 0], also NOENT),
        attempt!("open /dev/kmsg", SYS_open, |a| [a.hands.text("/dev/kmsg"), O_RDWR, 0], also NOENT),
        attempt!("name_to_handle_at", SYS_name_to_handle_at, |a| [
            AT_FDCWD, a.canary(), a.hands.words(&[128, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]), a.hands.room(8), 0,
        ], also NOENT),
        attempt!("open_by_handle_at", SYS_open_by_handle_at, |a| [
            AT_FDCWD,
            a.hands.words(&[8 | 1 << 32, 1, 0]),
            O_RDWR
        ]),
        attempt!("stat", SYS_stat, |a| [a.canary(), a.hands.room(144)], also NOENT),
        attempt!("lstat", SYS_lstat, |a| [a.canary(), a.hands.room(144)], also NOENT),
        attempt!("newfstatat", SYS_newfstatat, |a| [AT_FDCWD, a.canary(), a.hands.room(144), 0], also NOENT),
        attempt!("statx", SYS_statx, |a| [AT_FDCWD, a.canary(), 0, 0x7ff, a.hands.room(256)], also NOENT),
        attempt!("statfs", SYS_statfs, |a| [a.canary(), a.hands.room(120)], also NOENT),
        attempt!("access", SYS_access, |a| [a.canary(), 0], also NOENT),
        attempt!("readlink", SYS_readlink, |a| [a.hands.text("/proc/self/exe"), a.hands.room(64), 64], also NOENT),
        attempt!("getcwd", SYS_getcwd, |a| [a.hands.room(256), 256]),
        attempt!("chdir", SYS_chdir, |a| [a.hands.text("/proc")], also NOENT),
        attempt!("chroot", SYS_chroot, |a| [a.hands.text("/proc")], also NOENT),
        attempt!("truncate", SYS_truncate, |a| [a.canary(), 100], also NOENT),
        attempt!("chmod", SYS_chmod, |a| [a.canary(), 0o666], also NOENT),
        attempt!("fchmodat", SYS_fchmodat, |a| [AT_FDCWD, a.canary(), 0o666], also NOENT),
        attempt!("chown", SYS_chown, |a| [a.canary(), 1, 1], also NOENT),
        attempt!("utimensat", SYS_utimensat, |a| [AT_FDCWD, a.canary(), 0, 0], also NOENT),
        attempt!("setxattr", SYS_setxattr, |a| [a.canary(), a.hands.text("trusted.x"), a.hands.text("y"), 1, 0], also NOENT),
        attempt!("getxattr", SYS_getxattr, |a| [a.canary(), a.hands.text("user.x"), a.hands.room(8), 8], also NOENT),
        attempt!("mkdir", SYS_mkdir, |a| [a.beside("made-directory"), 0o700], also NOENT),
        attempt!("mknod", SYS_mknod, |a| [a.beside("made-node"), 0o010_600, 0], also NOENT),
        attempt!("symlink", SYS_symlink, |a| [a.hands.text("x"), a.beside("made-link")], also NOENT),
        attempt!("link", SYS_link, |a| [a.canary(), a.beside("made-name")], also NOENT),
        attempt!("inotify_init1", SYS_inotify_init1, |_a| [0]),
        attempt!("fanotify_init", SYS_fanotify_init, |_a| [0, 0]),
        attempt!("swapon", SYS_swapon, |a| [a.canary(), 0], also NOENT),
        attempt!("execveat, the canary", SYS_execveat, |a| [AT_FDCWD, a.beside("program"), 0, 0, AT_EMPTY_PATH]),
    ];
    // Last: what they leave is not there for the others.
    attempts.extend([
        attempt!("rename", SYS_rename, |a| [a.canary(), a.beside("moved")], also NOENT),
        attempt!("rmdir", SYS_rmdir, |a| [a.beside("directory")], also NOENT),
        attempt!("unlink", SYS_unlink, |a| [a.canary()], also NOENT),
        attempt!("unlinkat", SYS_unlinkat, |a| [AT_FDCWD, a.canary(), 0], also NOENT),
    ]);
    attempts
}
