//! The control groups of a process of ours that systemd has moved.

use rustix::process::Pid;
use std::path::{Path, PathBuf};

const MOUNTS: &str = "/sys/fs/cgroup";

/// Moves this process into the control groups of `leader` where it is in others: systemd moves the processes that it is told
/// of, one by one. What cannot be done is left, and nothing is if the leader `has_ended`: another process may have its pid.
pub fn follow(leader: Pid, has_ended: impl Fn() -> bool) {
    let (Ok(theirs), Ok(ours)) = (read(&leader.as_raw_nonzero().to_string()), read("self")) else { return };
    if has_ended() {
        return;
    }
    for line in theirs.lines().filter(|line| !ours.lines().any(|own| own == *line)) {
        if let Some(directory) = directory_of(line) {
            let _ = std::fs::write(directory.join("cgroup.procs"), "0");
        }
    }
}

fn read(process: &str) -> std::io::Result<String> {
    std::fs::read_to_string(format!("/proc/{process}/cgroup"))
}

/// The directory of a line of `/proc/PID/cgroup`, where systemd mounts the hierarchies.
fn directory_of(line: &str) -> Option<PathBuf> {
    let mut fields = line.splitn(3, ':').skip(1);
    let (controllers, path) = (fields.next()?, fields.next()?.strip_prefix('/')?);
    let mounts = Path::new(MOUNTS);
    let hierarchy = match controllers.strip_prefix("name=").unwrap_or(controllers) {
        "" if mounts.join("cgroup.controllers").exists() => mounts.to_owned(),
        "" => mounts.join("unified"),
        name => mounts.join(name),
    };
    Some(hierarchy.join(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hierarchies_are_where_systemd_mounts_them() {
        let directory = |line| directory_of(line).map(|path| path.display().to_string());
        assert_eq!(directory("4:cpu,cpuacct:/a.slice/b").as_deref(), Some("/sys/fs/cgroup/cpu,cpuacct/a.slice/b"));
        assert_eq!(directory("1:name=systemd:/x").as_deref(), Some("/sys/fs/cgroup/systemd/x"));
        assert!(directory("0::/x").is_some_and(|path| path.ends_with("x")));
        assert_eq!(directory("nonsense"), None);
    }
}
