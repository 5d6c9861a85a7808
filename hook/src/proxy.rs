//! Starting the proxy.

use crate::cgroup;
use crate::config::{self, Config, Kind};
use crate::failure::{Code, During, Failure};
use crate::placement::Entrances;
use crate::process::{self, Process, timespec};
use crate::sys::{self, Forked};
use crate::trust::{self, Program};
use ringfence_launch::{FD_INIT, FD_LISTENER, FD_NETNS, FD_READY, FD_SYSFS};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{Mode, OFlags};
use rustix::process::{Resource, Rlimit, WaitOptions};
use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::{Duration, Instant};

/// The longest reason that a proxy may give.
const MAX_LINE: usize = 1024;
/// The proxy's whole environment. Nothing of the runtime's, let alone of the image's, reaches it.
const ENVIRONMENT: [&CStr; 1] = [c"PATH=/usr/sbin:/usr/bin:/sbin:/bin"];
/// What kernels allow unless `fs.nr_open` says otherwise. A proxy needs up to three for each object of its container.
const MAX_DESCRIPTORS: u64 = 1 << 20;
/// How long a proxy that is given up may take to clean up.
const PATIENCE: Duration = Duration::from_millis(200);

/// What the proxy gets besides its launch file.
pub struct Handles<'a> {
    /// Bound and listening.
    pub listener: BorrowedFd<'a>,
    /// pidfd of the container's init.
    pub init: BorrowedFd<'a>,
    /// The container's network namespace.
    pub network: BorrowedFd<'a>,
    /// The file system for what `/sys` is to show, if it is to show something.
    pub sysfs: Option<BorrowedFd<'a>>,
    /// Ways to where it is to be accounted.
    pub cgroups: &'a Entrances,
    /// How soon the kernel is to kill it for want of memory.
    pub oom_score_adj: i32,
}

/// A proxy that has been started and is our child.
pub struct Proxy {
    /// For the record.
    pub process: Process,
    pidfd: OwnedFd,
    pid: rustix::process::Pid,
    ready: File,
    program: String,
}

/// Starts the proxy. It is detached from all that is the runtime's: session, descriptors (runc waits until the last holder of
/// its pipes is gone), signals, working directory, OOM score.
///
/// It stays our child until we end, so that its exit status can be told; then it is adopted, as after a second fork.
pub fn start(
    config: &config::Proxy,
    device: &config::Device,
    launch: &Path,
    handles: &Handles<'_>,
) -> Result<Proxy, Failure> {
    let path = config.program(device.kind);
    let program = path.display().to_string();
    let what = || format!("cannot start proxy {program}");
    if device.kind == Kind::Ibverbs && !path.exists() {
        let name = &device.name;
        let message = format!(
            "device {name} is of kind ibverbs, whose proxy {program} is missing: install the package ringfence-ibverbs \
             (apt-get install ringfence-ibverbs)"
        );
        return Err(Failure::new(Code::ProxyDied, message));
    }
    let path = c_string(&path)?;
    let launch = c_string(launch)?;
    let (ready, theirs) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).during(Code::Internal, what)?;
    let forked = match &handles.cgroups.unified {
        // Where that is refused the proxy stays in the runtime's cgroup, as is found out when it is ready.
        Some(cgroup) => sys::fork_into(cgroup.as_fd()).or_else(|_| sys::fork()),
        None => sys::fork(),
    };
    match forked.during(Code::Internal, what)? {
        Forked::Child => {
            let code = match become_proxy(&path, &launch, handles, theirs.as_fd()) {
                Stopped::BeforeDescriptors => 126,
                Stopped::AtExecution(error) => {
                    let line = format!("cannot execute {program} (proxy.path): {error}\n");
                    sys::write_kept(FD_READY, line.as_bytes());
                    127
                }
            };
            sys::exit_child(code)
        }
        Forked::Parent(pid) => {
            drop(theirs);
            // A child that has ended already has a start time, too: it is not reaped before `died`.
            match Process::open_child(pid) {
                Ok((process, pidfd)) => Ok(Proxy { process, pidfd, pid, ready: ready.into(), program }),
                Err(error) => {
                    let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
                    Err(Failure::new(Code::Internal, format!("{}: pid {pid:?}: {error}", what())))
                }
            }
        }
    }
}

/// The proxy of `container`, by what it runs, for when there is no record. Processes of other users or in other mount
/// namespaces, such as containers', may have any command line.
pub fn running(config: &Config, container: &str) -> Option<Process> {
    let user = format!("Uid:\t{}\t", rustix::process::geteuid().as_raw());
    let is_ours = |pid: i32| {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        status.lines().any(|line| line.starts_with(&user))
    };
    let namespace = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/mnt")).ok();
    let own = namespace("self")?;
    std::fs::read_dir("/proc").ok()?.find_map(|entry| {
        let pid: i32 = entry.ok()?.file_name().to_str()?.parse().ok()?;
        let (process, _pidfd) = Process::open(pid).ok()?;
        let is_proxy = trust::program(config, container, pid) == Program::Proxy && is_ours(pid);
        (is_proxy && namespace(&pid.to_string())? == own && process.is_alive()).then_some(process)
    })
}

fn c_string(path: &Path) -> Result<CString, Failure> {
    CString::new(path.as_os_str().as_bytes())
        .map_err(|_| Failure::new(Code::Internal, format!("path {} contains a zero byte", path.display())))
}

/// How far a child came that is not a proxy.
enum Stopped {
    BeforeDescriptors,
    AtExecution(io::Error),
}

/// What the child does. Settings that cannot be made are left: each is allowed to a full root only, and none is a matter of
/// safety.
fn become_proxy(path: &CStr, launch: &CStr, handles: &Handles<'_>, ready: BorrowedFd<'_>) -> Stopped {
    const { assert!(FD_LISTENER == 3 && FD_INIT == 4 && FD_READY == 5 && FD_NETNS == 6 && FD_SYSFS == 7) };
    let _ = rustix::process::setsid();
    let _ = rustix::process::chdir("/");
    rustix::process::umask(Mode::from_raw_mode(0o077));
    sys::reset_signals();
    let _ = rustix::process::set_parent_process_death_signal(None);
    for mut tasks in &handles.cgroups.tasks {
        let _ = tasks.write_all(b"0");
    }
    let _ = std::fs::write("/proc/self/oom_score_adj", handles.oom_score_adj.to_string());
    raise_limits();
    let Ok(null) = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()) else {
        return Stopped::BeforeDescriptors;
    };
    // `keep_only` closes it.
    let null = std::mem::ManuallyDrop::new(null);
    let stdio =
        [rustix::stdio::dup2_stdin(&*null), rustix::stdio::dup2_stdout(&*null), rustix::stdio::dup2_stderr(&*null)];
    let mut kept = vec![handles.listener, handles.init, ready, handles.network];
    kept.extend(handles.sysfs);
    if stdio.iter().any(Result::is_err) || sys::keep_only(&kept).is_err() {
        return Stopped::BeforeDescriptors;
    }
    Stopped::AtExecution(sys::execute(path, &[c"ringfence-proxy", c"--launch", launch], &ENVIRONMENT))
}

/// The limits of the engine's own service are not meant for a proxy: as high as may be, and no core files, which would hold
/// the memory that containers registered.
fn raise_limits() {
    let unlimited = Rlimit { current: None, maximum: None };
    let _ = rustix::process::setrlimit(Resource::Memlock, unlimited);
    // It counts all processes of the user that the proxy becomes, and a container's root can start some under any id.
    let _ = rustix::process::setrlimit(Resource::Nproc, unlimited);
    let most = Some(MAX_DESCRIPTORS);
    let _ = rustix::process::setrlimit(Resource::Nofile, Rlimit { current: most, maximum: most });
    for resource in [
        Resource::As,
        Resource::Cpu,
        Resource::Data,
        Resource::Fsize,
        Resource::Memlock,
        Resource::Nofile,
        Resource::Nproc,
    ] {
        let maximum = rustix::process::getrlimit(resource).maximum;
        let _ = rustix::process::setrlimit(resource, Rlimit { current: maximum, maximum });
    }
    let _ = rustix::process::setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) });
}

impl Proxy {
    /// Waits until the proxy says that it is ready. `init` is the container's.
    pub fn wait_ready(&mut self, timeout: Duration, init: BorrowedFd<'_>) -> Result<(), Failure> {
        let program = self.program.clone();
        let deadline = Instant::now() + timeout;
        let mut line = Vec::new();
        loop {
            let remaining = deadline.saturating_duration_since(Instant::now());
            let mut fds = [PollFd::new(&self.ready, PollFlags::IN), PollFd::new(&init, PollFlags::IN)];
            let ready = match poll(&mut fds, Some(&timespec(remaining))) {
                Err(rustix::io::Errno::INTR) => continue,
                result => result.during(Code::Internal, || format!("waiting for proxy {program}"))?,
            };
            if ready == 0 {
                let message =
                    format!("proxy {program} was not ready within {} ms (proxy.ready-timeout-ms)", timeout.as_millis());
                return Err(Failure::new(Code::NotReady, message));
            }
            if fds[0].revents().is_empty() {
                return Err(Failure::new(Code::State, "the container's init ended while its proxy was starting"));
            }
            let mut buffer = [0; 256];
            let read = match self.ready.read(&mut buffer) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                result => result.during(Code::Internal, || format!("waiting for proxy {program}"))?,
            };
            line.extend_from_slice(&buffer[..read]);
            match line.iter().position(|b| *b == b'\n') {
                Some(end) if &line[..end] == b"ready" => return Ok(()),
                Some(end) => line.truncate(end),
                None if read > 0 && line.len() < MAX_LINE => continue,
                None => {}
            }
            let message = match line.is_empty() {
                true => format!("proxy {program} ended before it was ready: {}", self.status()),
                false => format!("proxy {program} did not start: {}", String::from_utf8_lossy(&line)),
            };
            return Err(Failure::new(Code::ProxyDied, message));
        }
    }

    /// Why the proxy will not start, if it is about to say so: the cause to tell when something else that needs it has failed. That a
    /// proxy ends with its container's init is none.
    pub fn refusal(&mut self, init: BorrowedFd<'_>) -> Option<Failure> {
        let refusal = self.wait_ready(PATIENCE, init).err();
        refusal.filter(|failure| failure.code == Code::ProxyDied && !process::has_ended(init))
    }

    /// How the proxy ended.
    fn status(&self) -> String {
        if !process::wait(self.pidfd.as_fd(), PATIENCE) {
            return "it closed its descriptor without a word".into();
        }
        match rustix::process::waitpid(Some(self.pid), WaitOptions::NOHANG) {
            Ok(Some((_, status))) => match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => format!("exit status {code}"),
                (_, Some(signal)) => format!("signal {signal}"),
                _ => "unknown exit status".into(),
            },
            _ => "unknown exit status".into(),
        }
    }

    /// Ends the proxy of `container`.
    pub fn abandon(self, container: &str) {
        cgroup::lift_processor_limit(self.pid.as_raw_nonzero().get(), container);
        process::end(self.pidfd.as_fd(), PATIENCE);
        let _ = rustix::process::waitpid(Some(self.pid), WaitOptions::NOHANG);
    }
}
