//! What the hook and the proxy need of the kernel.

use super::Report;
use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

/// The first with `mount_setattr`, by which the library is mounted read-only.
const OLDEST: (u32, u32) = (5, 12);

/// Checks version and system calls.
pub fn check(report: &mut Report) {
    let name = rustix::system::uname();
    let release = name.release().to_string_lossy().into_owned();
    match version(&release) {
        Some(version) if version < OLDEST => {
            let (major, minor) = OLDEST;
            report.fail("kernel", format!("Linux {release} is older than {major}.{minor}"), "upgrade the kernel");
        }
        _ => report.ok("kernel", format!("Linux {release}")),
    }
    let missing: Vec<_> = probes().into_iter().filter(|(_, result)| *result == Err(Errno::NOSYS)).collect();
    match &missing[..] {
        [] => report.ok("kernel", "openat2, open_tree, move_mount, pidfd_open and memfd_create are there"),
        _ => {
            let names: Vec<_> = missing.iter().map(|(name, _)| *name).collect();
            report.fail("kernel", format!("no {}", names.join(", ")), "upgrade the kernel, or lift the seccomp filter");
        }
    }
    match ringfence_proxy::sandbox::landlock_abi() {
        0 => report.warn(
            "kernel",
            "no Landlock: an empty root and system call filters alone confine proxies",
            "boot with landlock in the kernel's lsm= list; it is there from Linux 5.13 on",
        ),
        abi => report.ok("kernel", format!("Landlock, ABI {abi}")),
    }
    if !rustix::process::geteuid().is_root() {
        report.warn("kernel", "not root: what only root can see is not checked", "sudo ringfence doctor");
    }
}

/// Calls that fail for another reason than that they do not exist, or do nothing.
fn probes() -> [(&'static str, Result<(), Errno>); 5] {
    let root = rustix::fs::CWD;
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let tree = rustix::mount::OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let here = rustix::mount::MoveMountFlags::empty();
    [
        ("openat2", rustix::fs::openat2(root, "/", flags, Mode::empty(), ResolveFlags::empty()).map(drop)),
        ("open_tree", rustix::mount::open_tree(root, "/", tree).map(drop)),
        ("move_mount", rustix::mount::move_mount(root, "/nonexistent", root, "/nonexistent", here)),
        (
            "pidfd_open",
            rustix::process::pidfd_open(rustix::process::getpid(), rustix::process::PidfdFlags::empty()).map(drop),
        ),
        ("memfd_create", rustix::fs::memfd_create("ringfence", rustix::fs::MemfdFlags::CLOEXEC).map(drop)),
    ]
}

fn version(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_as_numbers() {
        assert_eq!(version("6.18.0-rc1-amd64"), Some((6, 18)));
        assert_eq!(version("5.4-custom"), Some((5, 4)));
        assert!(version("5.4.0").unwrap() < OLDEST && version("5.15.0").unwrap() > OLDEST);
    }
}
