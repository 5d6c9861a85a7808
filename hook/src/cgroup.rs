//! cgroups: where a proxy is accounted, and which device nodes a container may open.

use crate::state::Rdma;
use crate::systemd;
use ringfence_proxy::rdma_cgroup::lift_limits;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

/// A process's cgroup in one hierarchy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Membership {
    /// Empty for version 2.
    pub controllers: Vec<String>,
    /// Its directory on this host.
    pub directory: PathBuf,
    /// Whether it is the root of what can be seen of the hierarchy, beside which there is nothing.
    pub is_root: bool,
}

impl Membership {
    /// Whether `controller` is bound to this hierarchy of version 1.
    pub fn controls(&self, controller: &str) -> bool {
        self.controllers.iter().any(|bound| bound == controller)
    }

    /// Whether the process `pid` is really there: what `/proc/PID/cgroup` says is relative to the reader's cgroup namespace,
    /// and the hierarchy may be mounted from another.
    pub fn holds(&self, pid: i32) -> bool {
        let procs = std::fs::read_to_string(self.directory.join("cgroup.procs")).unwrap_or_default();
        procs.lines().any(|line| line.parse() == Ok(pid))
    }
}

/// Where the process `pid` is, in all hierarchies that are mounted.
pub fn of(pid: i32) -> io::Result<Vec<Membership>> {
    let cgroup = std::fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    Ok(memberships(&cgroup, &std::fs::read_to_string("/proc/self/mountinfo")?))
}

/// Removes a cgroup whose last process has just ended; the kernel needs a moment for that.
pub fn remove(directory: &Path) -> io::Result<()> {
    lift_limits(directory)?;
    let deadline = Instant::now() + Duration::from_secs(2);
    loop {
        match std::fs::remove_dir(directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(5));
            }
            result => return result,
        }
    }
}

/// Lets the proxy `pid` of `container` have the processor to itself while it ends: with what little of it its container may have, that
/// could take longer than anybody waits. Other cgroups than its own stay as they are, and so does what cannot be changed.
pub fn lift_processor_limit(pid: i32, container: &str) {
    let names = [format!("ringfence-{container}"), systemd::unit(container)];
    let is_its = |membership: &Membership| {
        membership.directory.file_name().is_some_and(|name| names.iter().any(|its| name.to_str() == Some(its)))
    };
    for Membership { directory, .. } in of(pid).unwrap_or_default().into_iter().filter(is_its) {
        for (file, unlimited) in [("cpu.cfs_quota_us", "-1"), ("cpu.max", "max")] {
            if let Ok(mut file) = File::options().write(true).open(directory.join(file)) {
                let _ = file.write_all(unlimited.as_bytes());
            }
        }
    }
}

/// Lets the container of `pid` open the character device `major:minor`; `false` where no controller of version 1 decides
/// about that.
pub fn allow_device(pid: i32, major: u32, minor: u32) -> io::Result<bool> {
    let memberships = of(pid)?;
    let Some(devices) = memberships.iter().find(|m| m.controls("devices")) else { return Ok(false) };
    std::fs::write(devices.directory.join("devices.allow"), format!("c {major}:{minor} rwm"))?;
    Ok(true)
}

/// Holds the container of `pid` to `limits` of the rdma controller for the card `card`; `false` where that controller does not reach
/// the container's cgroup.
pub fn limit_rdma(pid: i32, card: &str, limits: Rdma) -> io::Result<bool> {
    let memberships = of(pid)?;
    let own = memberships.iter().find(|membership| membership.controls("rdma"));
    let own = own.or_else(|| memberships.iter().find(|membership| membership.controllers.is_empty()));
    let Some(own) = own.filter(|own| own.holds(pid) && !own.is_root) else { return Ok(false) };
    // crun has the container in a cgroup below its scope, which the controller may not reach.
    let scope = own.directory.parent().filter(|parent| parent.extension().is_some_and(|kind| kind == "scope"));
    let directories = [Some(own.directory.as_path()), scope].into_iter().flatten();
    for file in directories.map(|directory| directory.join("rdma.max")) {
        if file.exists() {
            std::fs::write(file, limits.line(card))?;
            return Ok(true);
        }
    }
    Ok(false)
}

/// What is told of a device node that a container cannot be allowed to open, because the hook sees none of its cgroups.
pub fn unseen(node: &str) -> String {
    format!(
        "no {node}: the container's cgroup cannot be seen from the hook; use --runtime ringfence, or --device {node}"
    )
}

/// Joins `/proc/PID/cgroup` with the hierarchies that are mounted.
pub(crate) fn memberships(cgroup: &str, mountinfo: &str) -> Vec<Membership> {
    let mounts: Vec<_> = mountinfo.lines().filter_map(mount).collect();
    cgroup
        .lines()
        .filter_map(|line| {
            let mut fields = line.splitn(3, ':').skip(1);
            let controllers: Vec<&str> = fields.next()?.split(',').filter(|c| !c.is_empty()).collect();
            let path = Path::new(fields.next()?);
            let (root, mount_point, _) =
                mounts.iter().find(|(root, _, of)| path.starts_with(root) && *of == controllers.as_slice())?;
            let inner = path.strip_prefix(root).ok()?;
            // A process outside of our cgroup namespace is seen above its root.
            if inner.components().any(|component| component == Component::ParentDir) {
                return None;
            }
            Some(Membership {
                controllers: controllers.into_iter().map(str::to_owned).collect(),
                directory: Path::new(mount_point).join(inner),
                is_root: inner.as_os_str().is_empty(),
            })
        })
        .collect()
}

/// Root, mount point and controllers of a cgroup mount; none for version 2.
fn mount(line: &str) -> Option<(&str, &str, Vec<&str>)> {
    const FLAGS: [&str; 8] =
        ["rw", "ro", "xattr", "clone_children", "noprefix", "release_agent", "nsdelegate", "memory_recursiveprot"];
    let (before, after) = line.split_once(" - ")?;
    let mut before = before.split(' ').skip(3);
    let (root, mount_point) = (before.next()?, before.next()?);
    let mut after = after.split(' ');
    match after.next()? {
        "cgroup2" => Some((root, mount_point, Vec::new())),
        "cgroup" => {
            let options = after.nth(1)?.split(',');
            let flag = |option: &str| FLAGS.contains(&option.split('=').next().unwrap_or(""));
            Some((root, mount_point, options.filter(|option| !flag(option)).collect()))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const V1: &str = "\
30 24 0:26 / /sys/fs/cgroup ro,nosuid shared:9 - tmpfs tmpfs ro,mode=755
31 30 0:27 / /sys/fs/cgroup/unified rw,nosuid shared:10 - cgroup2 cgroup2 rw,nsdelegate
32 30 0:28 / /sys/fs/cgroup/systemd rw,nosuid shared:11 - cgroup cgroup rw,xattr,name=systemd
33 30 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:15 - cgroup cgroup rw,cpu,cpuacct
34 30 0:30 /outer /sys/fs/cgroup/memory rw shared:16 - cgroup cgroup rw,memory
36 30 0:32 / /sys/fs/cgroup/pids rw,nosuid shared:18 - cgroup cgroup rw,pids";

    fn directories(cgroup: &str, mountinfo: &str) -> Vec<(PathBuf, bool)> {
        memberships(cgroup, mountinfo).into_iter().map(|m| (m.directory, m.is_root)).collect()
    }

    #[test]
    fn hierarchies_are_found_where_they_are_mounted() {
        let cgroup = "5:pids:/\n4:devices:/c1\n3:memory:/outer/c1\n2:cpu,cpuacct:/c1\n1:name=systemd:/x\n0::/c1\n";
        let expected = [("pids", true), ("memory/c1", false), ("cpu,cpuacct/c1", false), ("systemd/x", false)];
        let expected = expected.into_iter().chain([("unified/c1", false)]);
        let expected: Vec<_> =
            expected.map(|(path, is_root)| (Path::new("/sys/fs/cgroup").join(path), is_root)).collect();
        assert_eq!(directories(cgroup, V1), expected);
    }

    #[test]
    fn what_lies_outside_of_our_namespace_is_not_there() {
        let own = "30 24 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate";
        assert_eq!(directories("0::/../other\n", own), []);
        assert_eq!(directories("0::/c1\n", own), [("/sys/fs/cgroup/c1".into(), false)]);
        let outer = "30 24 0:26 /.. /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate";
        assert_eq!(directories("0::/../other\n", outer), [("/sys/fs/cgroup/other".into(), false)]);
    }
}
