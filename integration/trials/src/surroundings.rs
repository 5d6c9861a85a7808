//! A layout of control groups that runc and crun both support, whatever the machine has mounted.
//!
//! Machines differ: version 1, version 2, both ("hybrid"), with or without systemd. The layout is changed in a mount namespace
//! that goes with the program; the machine's own stays as it is. It becomes either of these, which systemd has, too:
//!
//! - version 2 at `/sys/fs/cgroup`, if it is there or nothing else that is of use;
//! - else the machine's hierarchies of version 1 with version 2 at `unified` beside them, which shows no controllers: crun
//!   refuses it with some, and makes directories that are no control groups without it.

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::statfs::{CGROUP_SUPER_MAGIC, CGROUP2_SUPER_MAGIC, FsType, TMPFS_MAGIC, statfs};
use std::io;
use std::os::unix::fs::symlink;
use std::path::Path;

/// Where everybody looks for control groups.
const ROOT: &str = "/sys/fs/cgroup";

/// Moves this process, which must not have other threads yet that make containers, to a mount namespace with a layout that is
/// supported. For an ordinary user, who makes no containers, it does nothing.
pub fn arrange() -> io::Result<()> {
    if !nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    let shared = is_shared()?;
    unshare(CloneFlags::CLONE_NEWNS).map_err(said("cannot make a mount namespace"))?;
    // What the machine mounts meanwhile is seen here, and not the other way round.
    propagate(MsFlags::MS_SLAVE)?;
    if is_version_2() {
        // It is well as it is.
    } else if is(&Path::new(ROOT).join("devices"), CGROUP_SUPER_MAGIC) {
        let stage = std::env::temp_dir().join(format!("ringfence-cgroup-{}", std::process::id()));
        std::fs::create_dir(&stage)?;
        let arranged = both_versions(&stage);
        std::fs::remove_dir(&stage)?;
        arranged?;
    } else {
        // Without that hierarchy no runtime makes a container under version 1.
        mount_new("cgroup2", Path::new(ROOT))?;
    }
    // As under systemd, containers then find shared mounts where the machine has them.
    if shared { propagate(MsFlags::MS_SHARED) } else { Ok(()) }
}

/// Makes the second layout in `stage`, and has it take the place of what is there.
fn both_versions(stage: &Path) -> io::Result<()> {
    mount_new("tmpfs", stage)?;
    for entry in std::fs::read_dir(ROOT)? {
        let entry = entry?;
        let (path, place) = (entry.path(), stage.join(entry.file_name()));
        if path.is_symlink() {
            // Such as from `cpu` to `cpu,cpuacct`.
            symlink(path.read_link()?, place)?;
        } else if is(&path, CGROUP_SUPER_MAGIC) {
            std::fs::create_dir(&place)?;
            bind(&path, &place)?;
        }
    }
    let unified = stage.join("unified");
    std::fs::create_dir(&unified)?;
    mount_new("cgroup2", &unified)?;
    bind(Path::new("/dev/null"), &unified.join("cgroup.controllers"))?;
    // With all below it. What were only covered would still be in the lists of mounts.
    while is(Path::new(ROOT), TMPFS_MAGIC) {
        umount2(ROOT, MntFlags::MNT_DETACH).map_err(said("cannot unmount /sys/fs/cgroup"))?;
    }
    mount(Some(stage), ROOT, None::<&str>, MsFlags::MS_MOVE, None::<&str>).map_err(said("cannot move control groups"))
}

fn mount_new(kind: &str, place: &Path) -> io::Result<()> {
    let options = (kind == "tmpfs").then_some("mode=755");
    mount(Some(kind), place, Some(kind), MsFlags::empty(), options)
        .map_err(said(&format!("cannot mount a {kind} on {}", place.display())))
}

fn bind(what: &Path, place: &Path) -> io::Result<()> {
    mount(Some(what), place, None::<&str>, MsFlags::MS_BIND, None::<&str>).map_err(said(&format!(
        "cannot bind {} to {}",
        what.display(),
        place.display()
    )))
}

/// Whether version 2 is all that there is at `/sys/fs/cgroup`.
#[must_use]
pub fn is_version_2() -> bool {
    is(Path::new(ROOT), CGROUP2_SUPER_MAGIC)
}

fn is(path: &Path, kind: FsType) -> bool {
    statfs(path).is_ok_and(|found| found.filesystem_type() == kind)
}

fn propagate(kind: MsFlags) -> io::Result<()> {
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | kind, none).map_err(said("cannot change how mounts propagate"))
}

/// Whether `/` is a shared mount: "36 35 98:0 /mnt1 / rw,noatime shared:1 - ext3 …".
fn is_shared() -> io::Result<bool> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    // The last one mounted there is the one that is seen.
    let root = mounts.lines().rfind(|line| line.split(' ').nth(4) == Some("/"));
    Ok(root
        .is_some_and(|line| line.split(' ').skip(6).take_while(|word| *word != "-").any(|w| w.starts_with("shared:"))))
}

fn said(what: &str) -> impl Fn(nix::errno::Errno) -> io::Error {
    move |error| io::Error::other(format!("{what}: {error}"))
}
