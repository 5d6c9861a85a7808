//! What is believed of the files that hooks left under the run-dir, and of the processes that they name.
//!
//! Hooks run as root and end processes, remove directories and files because a record says so. So a record speaks only for
//! the container whose name it bears, only if nobody but us can have written it, and only of what a hook makes.

use crate::annotations::is_device_name;
use crate::cgroup;
use crate::config::{CARD_PROXY, Config};
use crate::process::{self, Process};
use crate::record::{MountPoint, Record, Records};
use crate::session;
use crate::systemd;
use rustix::fs::{FileType, Mode, OFlags};
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

/// The largest file that is read; hooks write a few KiB.
const MAX_BYTES: u64 = 1 << 20;
/// More than a proxy's command line can be: its words, and a path.
const MAX_COMMAND_LINE: usize = 8192;
/// The magic numbers of cgroup hierarchies, versions 1 and 2 (`statfs(2)`).
const CGROUPS: [i64; 2] = [0x0027_e0eb, 0x6367_7270];

/// Why something is not believed.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum Doubt {
    #[error("it is a symbolic link")]
    Symlink,
    #[error("it is not a {0}")]
    Type(&'static str),
    #[error("it belongs to uid {uid} and has mode {mode:o}; hooks leave what only their own user can write")]
    Writable { uid: u32, mode: u32 },
    #[error("it exceeds {MAX_BYTES} bytes")]
    TooLong,
    #[error("it is of container {0:?}")]
    Container(String),
    #[error("it names the cgroup {0:?}, which is none of its container's proxy")]
    Cgroup(PathBuf),
    #[error("it names the root file system {0:?}")]
    Root(PathBuf),
    #[error("it names the mount point {0:?}, which hooks do not make")]
    MountPoint(String),
    #[error("it names the unit {0:?}, which is none of its container's proxy")]
    Unit(String),
    #[error("it names the card {0:?}, which is no device's name")]
    Card(String),
    #[error("it names process {pid} as its proxy, which is another program: {program}")]
    Proxy { pid: i32, program: String },
}

impl From<Doubt> for io::Error {
    fn from(doubt: Doubt) -> Self {
        io::Error::new(io::ErrorKind::InvalidData, doubt)
    }
}

/// Whether `error` is a [`Doubt`].
pub fn is_doubt(error: &io::Error) -> bool {
    error.get_ref().is_some_and(|error| error.is::<Doubt>())
}

/// Opens the file `name` in `directory` and reads it, if only we can have written it. Waits for nobody.
pub fn read(directory: impl AsFd, name: impl AsRef<Path>) -> io::Result<Vec<u8>> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = match rustix::fs::openat(directory, name.as_ref(), flags, Mode::empty()) {
        Err(rustix::io::Errno::LOOP) => return Err(Doubt::Symlink.into()),
        result => result?,
    };
    ours(&file, FileType::RegularFile)?;
    let mut bytes = Vec::new();
    File::from(file).take(MAX_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_BYTES { Err(Doubt::TooLong.into()) } else { Ok(bytes) }
}

/// Whether `fd` is of that type, and nobody but our own user can write it.
pub fn ours(fd: &OwnedFd, expected: FileType) -> io::Result<()> {
    let found = rustix::fs::fstat(fd)?;
    if FileType::from_raw_mode(found.st_mode) != expected {
        return Err(Doubt::Type(if expected == FileType::Directory { "directory" } else { "regular file" }).into());
    }
    if found.st_uid != rustix::process::geteuid().as_raw() || found.st_mode & 0o022 != 0 {
        return Err(Doubt::Writable { uid: found.st_uid, mode: found.st_mode & 0o7777 }.into());
    }
    Ok(())
}

/// Whether `record` is of `container`, and names nothing but what hooks make for it.
pub fn check(record: &Record, container: &str) -> Result<(), Doubt> {
    if record.container != container {
        return Err(Doubt::Container(record.container.clone()));
    }
    if let Some(cgroup) = record.cgroups.iter().find(|path| !is_cgroup_of(path, container)) {
        return Err(Doubt::Cgroup(cgroup.clone()));
    }
    // Bundles name it with detours of their own.
    if !record.root.is_absolute() {
        return Err(Doubt::Root(record.root.clone()));
    }
    if let Some(point) = record.mount_points.iter().find(|point| !is_made_by_hooks(point)) {
        return Err(Doubt::MountPoint(point.path.clone()));
    }
    if let Some(lent) = record.lent.as_ref().filter(|lent| !is_device_name(&lent.name)) {
        return Err(Doubt::Card(lent.name.clone()));
    }
    match &record.unit {
        Some(unit) if *unit != systemd::unit(container) => Err(Doubt::Unit(unit.clone())),
        _ => Ok(()),
    }
}

/// The record of `container`, with all that can be said against it.
pub fn load(config: &Config, records: &Records, container: &str) -> io::Result<Option<Record>> {
    let Some(record) = records.load(container)? else { return Ok(None) };
    match record.proxy.map(|proxy| what_is(config, container, proxy)) {
        Some(Program::Other(program)) => {
            Err(Doubt::Proxy { pid: record.proxy.map_or(0, |proxy| proxy.pid), program }.into())
        }
        _ => Ok(Some(record)),
    }
}

/// A path without detours.
fn is_plain(path: &Path, absolute: bool) -> bool {
    let mut components = path.components();
    if absolute && components.next() != Some(Component::RootDir) {
        return false;
    }
    let is_normal = components.all(|component| matches!(component, Component::Normal(_)));
    // `components` drops some dots and slashes, which would make another path of the same text.
    is_normal && !path.as_os_str().is_empty() && path.components().collect::<PathBuf>().as_os_str() == path.as_os_str()
}

/// Below a hierarchy that is mounted, by the name that the hook gives. The kernel removes cgroups' parents meanwhile, and
/// kubelet a pod's.
fn is_cgroup_of(path: &Path, container: &str) -> bool {
    is_named_for(path, container) && is_below(path, &CGROUPS)
}

/// Without detours, by the name that the hook gives.
fn is_named_for(path: &Path, container: &str) -> bool {
    is_plain(path, true) && path.file_name() == Some(OsStr::new(&format!("ringfence-{container}")))
}

/// Whether what there is of the path's directories ends in a file system of one of these kinds.
fn is_below(path: &Path, kinds: &[rustix::fs::FsWord]) -> bool {
    let found = path.ancestors().skip(1).find_map(|ancestor| rustix::fs::statfs(ancestor).ok());
    found.is_some_and(|found| kinds.contains(&found.f_type))
}

/// See [`crate::inject`].
fn is_made_by_hooks(point: &MountPoint) -> bool {
    let path = point.path.as_str();
    match (path, path.split_once('/')) {
        ("etc" | "dev", _) => point.directory,
        ("etc/ld.so.ringfence", _) => point.directory,
        ("etc/ld.so.preload" | "etc/ld-musl-x86_64.path", _) => !point.directory,
        (_, Some(("dev", _))) => is_plain(Path::new(path), false),
        _ => false,
    }
}

/// What a process is.
#[derive(Debug, PartialEq, Eq)]
pub enum Program {
    /// The proxy of the container.
    Proxy,
    /// None: it has ended, or is about to.
    Ended,
    /// A hook's child, which is about to become a proxy.
    Starting,
    /// Another, which is shown.
    Other(String),
}

/// What `process` is for `container`.
pub fn what_is(config: &Config, container: &str, process: Process) -> Program {
    let Some(pidfd) = process.reopen() else { return Program::Ended };
    let program = program(config, container, process.pid);
    // Only if it still lives was it the one that was looked at.
    if process::has_ended(pidfd.as_fd()) { Program::Ended } else { program }
}

/// Ends the proxy `process` of `container`, and nothing else. Of one that is starting it waits for what becomes of it.
pub fn end(config: &Config, container: &str, process: Process, patience: Duration) -> Program {
    let Some(pidfd) = process.reopen() else { return Program::Ended };
    let deadline = Instant::now() + patience;
    let mut program = program(config, container, process.pid);
    while program == Program::Starting && Instant::now() < deadline {
        if process::wait(pidfd.as_fd(), Duration::from_millis(1)) {
            return Program::Ended;
        }
        program = self::program(config, container, process.pid);
    }
    match program {
        Program::Proxy => {
            cgroup::lift_processor_limit(process.pid, container);
            process::end(pidfd.as_fd(), patience);
        }
        // Its memory is gone; its cgroups are its own until the rest is.
        Program::Ended => {
            cgroup::lift_processor_limit(process.pid, container);
            process::wait(pidfd.as_fd(), patience);
        }
        Program::Starting | Program::Other(_) => {}
    }
    program
}

/// What the process `pid` runs. Who holds a pidfd of it knows afterwards whether it was the same one all the time.
pub fn program(config: &Config, container: &str, pid: i32) -> Program {
    // It has none any more when its memory is gone, a moment before it has ended.
    let found = match command_line(pid) {
        Ok(found) if !found.is_empty() => found,
        _ => return Program::Ended,
    };
    let launch = session::launch_path(&config.run_dir, container);
    let expected = [b"ringfence-proxy\0--launch\0", launch.as_os_str().as_bytes(), b"\0"].concat();
    let exe = std::fs::read_link(format!("/proc/{pid}/exe"));
    if found != expected {
        if exe.is_ok_and(|exe| is_program(&exe, &config.hook.path, "ringfence-hook")) {
            return Program::Starting;
        }
        let shown: String = String::from_utf8_lossy(&found).trim_end_matches('\0').replace('\0', " ");
        return Program::Other(shown.chars().take(80).collect());
    }
    match exe {
        Ok(exe) if !["ringfence-proxy", CARD_PROXY].iter().any(|usual| is_program(&exe, &config.proxy.path, usual)) => {
            Program::Other(exe.display().to_string())
        }
        _ => Program::Proxy,
    }
}

/// In one system call: the kernel looks for the process's memory anew in each, and of a process that ends between two there would
/// be half a command line.
fn command_line(pid: i32) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; MAX_COMMAND_LINE];
    let length = File::open(format!("/proc/{pid}/cmdline"))?.read(&mut bytes)?;
    bytes.truncate(length);
    Ok(bytes)
}

/// Whether `exe`, as `/proc` shows it, may be the program that is configured, or is the one that is `usual`: by its name only,
/// for that of a proxy which has changed its root, or has been replaced by an upgrade, has another path.
fn is_program(exe: &Path, configured: &Path, usual: &str) -> bool {
    let name = exe.file_name().unwrap_or_default().as_bytes();
    let name = name.strip_suffix(b" (deleted)").unwrap_or(name);
    let resolved = configured.canonicalize().unwrap_or_default();
    let names = [configured, &resolved].into_iter().filter_map(Path::file_name).map(OsStr::as_bytes);
    names.chain([usual.as_bytes()]).any(|expected| expected == name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Lent;
    use std::os::unix::fs::{PermissionsExt, symlink};

    fn record() -> Record {
        let point = |path: &str, directory| MountPoint { path: path.into(), directory };
        Record {
            container: "c1".into(),
            policy: "default".into(),
            init: Process { pid: 1, start: 1 },
            proxy: None,
            root: "/srv/rootfs".into(),
            mount_points: vec![
                point("etc", true),
                point("etc/ld.so.preload", false),
                point("etc/ld.so.ringfence", true),
                point("etc/ld-musl-x86_64.path", false),
                point("dev", true),
                point("dev/ringfence", true),
                point("dev/infiniband/uverbs0", false),
            ],
            cgroups: Vec::new(),
            unit: Some("ringfence-c1.scope".into()),
            device: String::new(),
            since: 0,
            warnings: Vec::new(),
            lent: None,
        }
    }

    #[test]
    fn a_record_speaks_of_its_own_container_only() {
        check(&record(), "c1").unwrap();
        assert_eq!(check(&record(), "c2").unwrap_err().to_string(), "it is of container \"c1\"");
        let wrong = |change: &dyn Fn(&mut Record)| {
            let mut record = record();
            change(&mut record);
            check(&record, "c1").unwrap_err().to_string()
        };
        for path in [
            "home",
            "etc/passwd",
            "etc/../home",
            "/etc",
            "/dev/x",
            "dev/../home",
            "dev//x",
            "dev/./x",
            "dev/x/",
            "dev/",
            "",
            ".",
        ] {
            let message = wrong(&|record| record.mount_points.push(MountPoint { path: path.into(), directory: true }));
            assert_eq!(message, format!("it names the mount point {path:?}, which hooks do not make"));
        }
        assert!(wrong(&|record| record.mount_points[1].directory = true).contains("etc/ld.so.preload"));
        for root in ["rootfs", "../rootfs", ""] {
            assert_eq!(wrong(&|record| record.root = root.into()), format!("it names the root file system {root:?}"));
        }
        for unit in ["ssh.service", "ringfence-c2.scope", "ringfence-c1.service"] {
            assert!(wrong(&|record| record.unit = Some(unit.into())).contains(unit));
        }
        let lent = Lent { name: "../x".into(), node_guid: String::new(), from: 1, to: 2 };
        assert!(wrong(&|record| record.lent = Some(lent.clone())).contains("names the card \"../x\""));
        for cgroup in ["/tmp/ringfence-c1", "/nonexistent/ringfence-c1", "ringfence-c1", "/", "/proc/ringfence-c1"] {
            assert!(wrong(&|record| record.cgroups = vec![cgroup.into()]).contains("names the cgroup"), "{cgroup}");
        }
    }

    #[test]
    fn cgroups_are_named_for_their_container() {
        for (path, expected) in [
            ("/c/ringfence-c1", true),
            ("/c/gone/ringfence-c1", true),
            ("/c/c1", false),
            ("/c/ringfence-c2", false),
            ("/c/x/../ringfence-c1", false),
            ("/c/ringfence-c1/x", false),
            ("c/ringfence-c1", false),
        ] {
            assert_eq!(is_named_for(Path::new(path), "c1"), expected, "{path}");
        }
    }

    /// Hierarchies of control groups are such a kind, which a machine may have none of.
    #[test]
    fn what_is_gone_of_a_path_does_not_matter() {
        let directory = tempfile::tempdir().unwrap();
        let kind = rustix::fs::statfs(directory.path()).unwrap().f_type;
        for path in ["ringfence-c1", "gone/ringfence-c1", "gone/gone/ringfence-c1"] {
            assert!(is_below(&directory.path().join(path), &[kind]), "{path}");
            assert!(!is_below(&directory.path().join(path), &[kind + 1]), "{path}");
        }
        // Itself it may be anything.
        assert!(!is_below(Path::new("/proc"), &[rustix::fs::statfs("/proc").unwrap().f_type]));
    }

    #[test]
    fn only_our_own_files_are_read() {
        let directory = tempfile::tempdir().unwrap();
        let fd = rustix::fs::open(directory.path(), OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).unwrap();
        let refused = |name: &str| {
            let error = read(&fd, name).unwrap_err();
            assert!(is_doubt(&error), "{error}");
            error.to_string()
        };
        let path = |name: &str| directory.path().join(name);
        std::fs::write(path("good"), "x").unwrap();
        assert_eq!(read(&fd, "good").unwrap(), b"x");
        assert!(!is_doubt(&read(&fd, "missing").unwrap_err()));
        symlink("good", path("link")).unwrap();
        assert_eq!(refused("link"), "it is a symbolic link");
        std::fs::create_dir(path("directory")).unwrap();
        assert_eq!(refused("directory"), "it is not a regular file");
        rustix::fs::mknodat(&fd, "pipe", FileType::Fifo, Mode::RWXU, 0).unwrap();
        assert_eq!(refused("pipe"), "it is not a regular file");
        for mode in [0o620, 0o602, 0o666] {
            std::fs::set_permissions(path("good"), std::fs::Permissions::from_mode(mode)).unwrap();
            assert!(refused("good").contains(&format!("mode {mode:o}")), "{mode:o}");
        }
        std::fs::write(path("long"), vec![b' '; MAX_BYTES as usize + 1]).unwrap();
        assert_eq!(refused("long"), "it exceeds 1048576 bytes");
    }

    #[test]
    fn another_program_is_no_proxy_and_is_not_ended() {
        let config = Config::default();
        let mut child = std::process::Command::new("/bin/sleep").arg("60").spawn().unwrap();
        let (process, _) = Process::open(child.id() as i32).unwrap();
        // A moment before it is executed it has our own command line.
        let deadline = Instant::now() + Duration::from_secs(10);
        let expected = Program::Other("/bin/sleep 60".into());
        while what_is(&config, "c1", process) != expected {
            assert!(Instant::now() < deadline, "{:?}", what_is(&config, "c1", process));
        }
        assert_eq!(end(&config, "c1", process, Duration::ZERO), expected);
        assert!(process.is_alive());
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(what_is(&config, "c1", process), Program::Ended);
    }

    #[test]
    fn a_hooks_child_that_is_no_proxy_yet_is_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let hook = directory.path().join("hook");
        std::fs::copy("/bin/sleep", &hook).unwrap();
        let mut config = Config::default();
        config.hook.path = hook.clone();
        let mut child = std::process::Command::new(&hook).arg("0.5").spawn().unwrap();
        let (process, _) = Process::open(child.id() as i32).unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        while what_is(&config, "c1", process) != Program::Starting {
            assert!(Instant::now() < deadline, "{:?}", what_is(&config, "c1", process));
        }
        assert_eq!(end(&config, "c1", process, Duration::ZERO), Program::Starting);
        assert_eq!(end(&config, "c1", process, Duration::from_secs(10)), Program::Ended);
        assert!(child.wait().unwrap().success(), "it was ended");
    }

    #[test]
    fn a_program_is_known_by_its_name() {
        let configured = Path::new("/opt/rf/proxy");
        for (exe, expected) in [
            ("/opt/rf/proxy", true),
            ("/proxy", true),
            ("/opt/rf/proxy (deleted)", true),
            ("/usr/libexec/ringfence/ringfence-proxy", true),
            ("/bin/sleep", false),
            ("/opt/rf/proxy2", false),
            ("/", false),
        ] {
            assert_eq!(is_program(Path::new(exe), configured, "ringfence-proxy"), expected, "{exe}");
        }
    }
}
