//! What a test needs from the machine, and how it says so where it is missing.

use std::path::Path;
use std::process::{Command, Stdio};

/// Why the end-to-end tests cannot run here, if they cannot.
#[must_use]
pub fn obstacle(programs: &[&str]) -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("needs root (namespaces, mounts, runc)".into());
    }
    let missing: Vec<_> = programs.iter().copied().filter(|program| !is_installed(program)).collect();
    if !missing.is_empty() {
        return Some(format!("{} not installed: run integration/test.sh", missing.join(", ")));
    }
    None
}

/// Whether `program` is found in `PATH`.
#[must_use]
pub fn is_installed(program: &str) -> bool {
    std::env::var_os("PATH").is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(program).is_file()))
}

/// Debian's name for the release that runs here, such as `bookworm`.
#[must_use]
pub fn debian_suite() -> Option<String> {
    let text = std::fs::read_to_string("/etc/os-release").ok()?;
    let value = text.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="))?;
    Some(value.trim_matches('"').to_owned())
}

/// Whether overlay file systems can be mounted: tried by the kernel's own list, after asking for the module.
#[must_use]
pub fn has_overlayfs() -> bool {
    let listed =
        || std::fs::read_to_string("/proc/filesystems").is_ok_and(|text| text.lines().any(|l| l.ends_with("overlay")));
    if !listed() && Path::new("/sbin/modprobe").exists() {
        Command::new("/sbin/modprobe").arg("overlay").stderr(Stdio::null()).status().ok();
    }
    listed()
}
