//! A process tree that leaves nothing behind, however it ends.
//!
//! [`run`] starts the program anew inside a PID namespace and a mount namespace of its own. Whatever happens to it, an
//! interruption or `kill -9` included, the kernel ends every process of the PID namespace (containers and daemonised
//! proxies too), and with the last process go the mount namespace's mounts and, since their names are mounts, the
//! network namespaces. What lives outside (control groups, two directories) is removed by the outermost process.
//!
//! ```text
//! outer ── waits, cleans up ──► init (pid 1: mounts, reaps) ──► inside (does the work) ──► runc, proxies, tools
//! ```

use anyhow::{Context, Result};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use ringfence_trials::surroundings;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, ExitStatus};
use std::sync::{Arc, Mutex};
use std::time::Duration;

const STAGE: &str = "RINGFENCE_SANDBOX_STAGE";
const NAME: &str = "RINGFENCE_SANDBOX_NAME";
const NETNS_DIR: &str = "/run/netns";

/// Runs `inside` in a sandbox whose name starts with `label`, with the program's own arguments.
///
/// Call it first thing in `main`: the program is started twice more, and only the innermost reaches `inside`.
pub fn run(label: &str, inside: impl FnOnce() -> ExitCode) -> ExitCode {
    let result = match std::env::var(STAGE).as_deref() {
        Err(_) => outer(label),
        Ok("init") => init(),
        Ok(_) => return inside(),
    };
    result.unwrap_or_else(|error| {
        eprintln!("{label}: {error:#}");
        ExitCode::FAILURE
    })
}

/// The sandbox's name, unique on this machine.
#[must_use]
pub fn name() -> String {
    std::env::var(NAME).expect("only called inside sandbox::run")
}

/// Lets a program that is started from here make a sandbox of its own, within this one.
pub fn nest(command: &mut Command) {
    command.env_remove(STAGE).env_remove(NAME);
}

/// An empty directory that vanishes with the sandbox.
#[must_use]
pub fn work_dir() -> PathBuf {
    work_dir_of(&name())
}

/// Where something is built that is moved into the cache when whole.
#[must_use]
pub fn partial_dir() -> PathBuf {
    partial_dir_of(&name())
}

fn work_dir_of(name: &str) -> PathBuf {
    Path::new("/tmp").join(name)
}

fn partial_dir_of(name: &str) -> PathBuf {
    crate::artifacts::cache().join(format!("partial-{name}"))
}

/// What the signal handling thread knows: which process to end, and which signal asked for it.
#[derive(Default)]
struct Interruption {
    init: Option<Pid>,
    signal: Option<i32>,
}

impl Interruption {
    fn act(&self) {
        if let (Some(init), Some(_)) = (self.init, self.signal) {
            kill(init, Signal::SIGKILL).ok();
        }
    }
}

fn outer(label: &str) -> Result<ExitCode> {
    // Here rather than inside: what is made there in control groups is removed from here.
    surroundings::arrange()?;
    let name = format!("{label}-{}", std::process::id());
    let interruption = Arc::new(Mutex::new(Interruption::default()));
    let shared = Arc::clone(&interruption);
    let mut signals = signal_hook::iterator::Signals::new([SIGINT, SIGTERM, SIGHUP])?;
    std::thread::spawn(move || {
        for signal in signals.forever() {
            let mut interruption = shared.lock().expect("nothing panics while holding it");
            interruption.signal = Some(signal);
            interruption.act();
        }
    });

    std::fs::create_dir(work_dir_of(&name))
        .with_context(|| format!("cannot create {}", work_dir_of(&name).display()))?;
    let made_netns_dir = std::fs::create_dir(NETNS_DIR).is_ok();
    let status = start_init(&name, &interruption);
    clean_up(&name, made_netns_dir);

    if let Some(signal) = interruption.lock().expect("nothing panics while holding it").signal {
        return Ok(exit_code(128 + signal));
    }
    Ok(code_of(status?))
}

fn start_init(name: &str, interruption: &Mutex<Interruption>) -> Result<ExitStatus> {
    unshare(CloneFlags::CLONE_NEWPID).context("cannot make a PID namespace")?;
    let mut child = this_program(name, "init")?.spawn()?;
    {
        let mut interruption = interruption.lock().expect("nothing panics while holding it");
        interruption.init = Some(Pid::from_raw(child.id().cast_signed()));
        interruption.act();
    }
    Ok(child.wait()?)
}

fn this_program(name: &str, stage: &str) -> Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(std::env::args_os().skip(1)).env(STAGE, stage).env(NAME, name);
    Ok(command)
}

/// Pid 1 of the new namespace.
fn init() -> Result<ExitCode> {
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
    unshare(CloneFlags::CLONE_NEWNS).context("cannot make a mount namespace")?;
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).context("cannot make mounts private")?;
    mount(Some("proc"), "/proc", Some("proc"), MsFlags::empty(), none).context("cannot mount /proc")?;
    for dir in [work_dir().as_path(), Path::new(NETNS_DIR)] {
        mount(Some("tmpfs"), dir, Some("tmpfs"), MsFlags::empty(), Some("mode=0755"))
            .with_context(|| format!("cannot mount a tmpfs on {}", dir.display()))?;
    }
    let worker = this_program(&name(), "inside")?.spawn()?;
    let worker = Pid::from_raw(worker.id().cast_signed());
    loop {
        // Orphans, such as daemonised proxies, become children of this process and are reaped here.
        match waitpid(None, None)? {
            WaitStatus::Exited(pid, code) if pid == worker => return Ok(exit_code(code)),
            WaitStatus::Signaled(pid, signal, _) if pid == worker => return Ok(exit_code(128 + signal as i32)),
            _ => {}
        }
    }
}

fn clean_up(name: &str, made_netns_dir: bool) {
    let mountinfo = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    for hierarchy in mountinfo.lines().filter(|line| line.contains(" - cgroup")) {
        if let Some(mount_point) = hierarchy.split(' ').nth(4) {
            remove_cgroup(&Path::new(mount_point).join(name));
        }
    }
    std::fs::remove_dir(work_dir_of(name)).ok();
    if made_netns_dir {
        std::fs::remove_dir(NETNS_DIR).ok();
    }
    std::fs::remove_dir_all(partial_dir_of(name)).ok();
}

/// Removes a control group and those below it. Their processes are gone, but the kernel may need a moment to notice.
fn remove_cgroup(dir: &Path) {
    let Ok(entries) = std::fs::read_dir(dir) else { return };
    for entry in entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
        remove_cgroup(&entry.path());
    }
    for _ in 0..100 {
        match std::fs::remove_dir(dir) {
            Err(error) if error.kind() == std::io::ErrorKind::ResourceBusy => {
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(error) => return eprintln!("cannot remove control group {}: {error}", dir.display()),
            Ok(()) => return,
        }
    }
    eprintln!("control group {} stays: it is busy", dir.display());
}

fn code_of(status: ExitStatus) -> ExitCode {
    exit_code(status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0)))
}

fn exit_code(code: i32) -> ExitCode {
    ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX))
}
