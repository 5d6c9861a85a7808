//! cgroups: where a proxy is accounted, and which device nodes a container may open.

use crate::failure::{Code, During, Failure};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Controllers that matter for a proxy. Not cpuset, whose version 1 needs to be told its CPUs before anything runs in it.
const CONTROLLERS: [&str; 3] = ["memory", "pids", "cpu"];

/// A process's cgroup in one hierarchy.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Membership {
    /// Empty for version 2.
    controllers: Vec<String>,
    /// Its directory on this host.
    directory: PathBuf,
    /// Whether it is the hierarchy's root, beside which there is nothing.
    is_root: bool,
}

/// Where a proxy beside the container of `pid` is to be accounted. Empty, for the runtime's own cgroups, where the container's
/// parent belongs to systemd, which allows no cgroups in its slices but its own, or where the container has none of its own.
pub fn siblings(pid: i32, container: &str) -> io::Result<Vec<PathBuf>> {
    let (cgroup, mountinfo) = read(pid)?;
    Ok(siblings_among(&memberships(&cgroup, &mountinfo), container))
}

fn siblings_among(memberships: &[Membership], container: &str) -> Vec<PathBuf> {
    let controls = |m: &Membership| m.controllers.iter().any(|c| CONTROLLERS.contains(&c.as_str()));
    let version_1 = memberships.iter().any(controls);
    memberships
        .iter()
        // In a hybrid the controllers are elsewhere, and version 2 only tracks processes for systemd.
        .filter(|m| !m.is_root && if version_1 { controls(m) } else { m.controllers.is_empty() })
        .filter_map(|m| m.directory.parent())
        .filter(|parent| parent.extension().is_none_or(|extension| extension != "slice"))
        .map(|parent| parent.join(format!("ringfence-{container}")))
        .collect()
}

/// Makes `directory` and opens the file that takes a process into it; `None` where that is not allowed.
pub fn make(directory: &Path) -> Option<std::fs::File> {
    match std::fs::create_dir(directory) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return None,
        _ => {}
    }
    std::fs::OpenOptions::new().write(true).open(directory.join("cgroup.procs")).ok()
}

/// Removes a cgroup whose last process has just ended; the kernel needs a moment for that.
pub fn remove(directory: &Path) -> io::Result<()> {
    let deadline = Instant::now() + Duration::from_millis(500);
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

/// Lets the container of `pid` open the character device `major:minor`.
pub fn allow_device(pid: i32, major: u32, minor: u32) -> Result<(), Failure> {
    let (cgroup, mountinfo) = read(pid).during(Code::Injection, || format!("cgroups of pid {pid}"))?;
    let memberships = memberships(&cgroup, &mountinfo);
    let Some(devices) = memberships.iter().find(|m| m.controllers.iter().any(|c| c == "devices")) else {
        return Err(Failure::new(
            Code::Injection,
            "mode=passthrough needs the devices controller of cgroup version 1, which this host does not have; \
             with version 2 name the device nodes in the container's linux.devices and linux.resources.devices",
        ));
    };
    let path = devices.directory.join("devices.allow");
    std::fs::write(&path, format!("c {major}:{minor} rwm")).during(Code::Injection, || path.display().to_string())
}

fn read(pid: i32) -> io::Result<(String, String)> {
    Ok((std::fs::read_to_string(format!("/proc/{pid}/cgroup"))?, std::fs::read_to_string("/proc/self/mountinfo")?))
}

/// Joins `/proc/PID/cgroup` with the hierarchies that are mounted.
fn memberships(cgroup: &str, mountinfo: &str) -> Vec<Membership> {
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
35 30 0:31 / /sys/fs/cgroup/devices rw,nosuid shared:17 - cgroup cgroup rw,devices
36 30 0:32 / /sys/fs/cgroup/pids rw,nosuid shared:18 - cgroup cgroup rw,pids";

    #[test]
    fn siblings_stand_beside_the_container() {
        let cgroup = "5:pids:/\n4:devices:/pod/c1\n3:memory:/outer/pod/c1\n2:cpu,cpuacct:/pod/c1\n1:name=systemd:/x\n0::/pod/c1\n";
        assert_eq!(
            siblings_among(&memberships(cgroup, V1), "c1"),
            [
                PathBuf::from("/sys/fs/cgroup/memory/pod/ringfence-c1"),
                PathBuf::from("/sys/fs/cgroup/cpu,cpuacct/pod/ringfence-c1")
            ]
        );
    }

    #[test]
    fn version_2_is_one_hierarchy() {
        let mountinfo = "30 24 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate";
        let siblings = |path: &str| siblings_among(&memberships(&format!("0::{path}\n"), mountinfo), "c1");
        assert_eq!(siblings("/pod/c1"), [PathBuf::from("/sys/fs/cgroup/pod/ringfence-c1")]);
        assert_eq!(siblings("/system.slice/runc-c1.scope"), Vec::<PathBuf>::new());
        assert_eq!(siblings("/"), Vec::<PathBuf>::new());
    }
}
