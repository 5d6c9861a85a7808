//! The rdma controller's limits of a cgroup that is about to go.
//!
//! Linux 6.12 keeps what `rdma.max` set in a list that it frees together with the cgroup; when the device goes, later, it takes
//! entries off that list and crashes (seen in `free_cg_rpool_locked`, called by `rdmacg_unregister_device`).
//! Limits that are lifted first leave nothing in it.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;

/// Where systemd mounts version 2. Its scopes are the only cgroups of proxies that nobody but the proxy can see go.
const UNIFIED: &str = "/sys/fs/cgroup";

/// Lifts the limits for RDMA objects of the cgroup `directory`, if it has any.
///
/// # Errors
/// If they cannot be read or written. A directory without the controller is no error, nor one that does not exist, nor a device
/// that goes meanwhile.
pub fn lift_limits(directory: &Path) -> io::Result<()> {
    let lift = || {
        let mut file = File::options().read(true).write(true).open(directory.join("rdma.max"))?;
        let mut limits = String::new();
        file.read_to_string(&mut limits)?;
        limits.lines().filter_map(lifted).try_for_each(|line| file.write_all(line.as_bytes()))
    };
    match lift() {
        // Somebody else removed the cgroup, or the device.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV)) => Ok(()),
        result => result,
    }
}

/// Lifts those of the calling process's cgroup, for where systemd removes it the moment the process has ended.
///
/// # Errors
/// As [`lift_limits`].
pub fn lift_own_limits() -> io::Result<()> {
    let cgroups = std::fs::read_to_string("/proc/self/cgroup")?;
    let unified = cgroups.lines().find_map(|line| line.strip_prefix("0::/"));
    unified.map_or(Ok(()), |path| lift_limits(&Path::new(UNIFIED).join(path)))
}

/// What lifts the limits of a line such as `mlx5_0 hca_handle=2 hca_object=max`.
fn lifted(line: &str) -> Option<String> {
    let (device, limits) = line.split_once(' ')?;
    let is_limited = limits.split_whitespace().any(|limit| !limit.ends_with("=max"));
    is_limited.then(|| format!("{device} hca_handle=max hca_object=max"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_lifted_where_there_are_any() {
        assert_eq!(lifted("rxe0 hca_handle=3 hca_object=max").unwrap(), "rxe0 hca_handle=max hca_object=max");
        assert_eq!(lifted("rxe0 hca_handle=max hca_object=1").unwrap(), "rxe0 hca_handle=max hca_object=max");
        assert_eq!(lifted("rxe0 hca_handle=max hca_object=max "), None);
        assert_eq!(lifted(""), None);
    }

    #[test]
    fn a_cgroup_without_the_controller_has_none() {
        let directory = tempfile::tempdir().unwrap();
        lift_limits(directory.path()).unwrap();
        lift_limits(&directory.path().join("gone")).unwrap();
        std::fs::write(directory.path().join("rdma.max"), "rxe0 hca_handle=max hca_object=max\n").unwrap();
        lift_limits(directory.path()).unwrap();
        std::fs::write(
            directory.path().join("rdma.max"),
            "a hca_handle=1 hca_object=max\nb hca_handle=max hca_object=max\n",
        )
        .unwrap();
        lift_limits(directory.path()).unwrap();
        let written = std::fs::read_to_string(directory.path().join("rdma.max")).unwrap();
        assert!(written.ends_with("\na hca_handle=max hca_object=max"), "{written}");
    }
}
