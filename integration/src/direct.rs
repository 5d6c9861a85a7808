//! A proxy without a container, started as the hook would start it: for tests of what it does, not of how it got there.

use crate::command::Running;
use crate::netns::Netns;
use crate::perftest::Peer;
use crate::{artifacts, sandbox};
use anyhow::{Context, Result, ensure};
use command_fds::{CommandFdExt, FdMapping};
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};
use ringfence_proxy::launch::addresses::Gids;
use ringfence_proxy::launch::marks::Marks;
use ringfence_proxy::launch::pkeys::Pkey;
use ringfence_proxy::launch::{
    BitRate, Device, DeviceKind, FD_INIT, FD_LISTENER, FD_NETNS, FD_READY, FD_SYSFS, FIRST_PORT, Launch, Limits, Uids,
    Worker,
};
use ringfence_proxy::sysfs::{CLASSES, DEVICES, VERBS};
use std::ffi::OsString;
use std::fs::File;
use std::io::Read;
use std::num::NonZeroU8;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

static NEXT: AtomicU32 = AtomicU32::new(0);

/// The variable of the environment that gives the test build its file.
pub const STEPS: &str = "RINGFENCE_STEPS";
/// Bytes of [`DirectProxy::steps`].
const PAGE: u64 = 4096;

/// As by default.
const UIDS: Uids = Uids { first: 2_000_000_000, count: 1023 };

/// A node: proxies of the same node reach each other.
#[derive(Debug)]
pub struct Node {
    dir: PathBuf,
    device: Device,
    /// What is loaded in place of the distribution's libibverbs, for a card that is not there.
    provider: Option<PathBuf>,
    /// Words before the proxy's program, which run it with less than this process has.
    before: Vec<String>,
    /// Containers' network namespace; this process's own by default.
    netns: PathBuf,
    /// Whether proxies write what programs read of the device beside verbs.
    shows: bool,
    /// Whether proxies stop where they are told to.
    obeys: bool,
}

/// A running proxy and the process that stands for its container's init. Both end when this is dropped.
#[derive(Debug)]
pub struct DirectProxy {
    proxy: Child,
    init: Child,
    dir: PathBuf,
    steps: PathBuf,
}

impl Node {
    /// A node with a software device, its modelled link at `link` bits per second.
    pub fn new(link: Option<u64>) -> Result<Self> {
        Self::with(
            Device {
                name: "soft0".into(),
                kind: DeviceKind::Soft,
                link: link.map(|bits| BitRate::new(bits).expect("no link carries nothing")),
                port: FIRST_PORT,
                gids: Gids::default(),
                pkeys: None,
                marks: Marks::default(),
            },
            None,
        )
    }

    /// A node with a card, which is the kernel's, or that of a library that is loaded in place of libibverbs.
    pub fn with_card(name: &str, provider: Option<&Path>) -> Result<Self> {
        let device = Device {
            name: name.into(),
            kind: DeviceKind::Ibverbs,
            link: None,
            port: FIRST_PORT,
            gids: Gids::default(),
            pkeys: None,
            marks: Marks::default(),
        };
        Self::with(device, provider.map(Path::to_owned))
    }

    fn with(device: Device, provider: Option<PathBuf>) -> Result<Self> {
        let dir = sandbox::work_dir().join(format!("direct-{}", NEXT.fetch_add(1, Ordering::Relaxed)));
        for path in [dir.clone(), dir.join("containers"), dir.join("fabric")] {
            std::fs::create_dir(&path).with_context(|| format!("cannot create {}", path.display()))?;
        }
        Ok(Self {
            dir,
            device,
            provider,
            before: Vec::new(),
            netns: "/proc/self/ns/net".into(),
            shows: false,
            obeys: false,
        })
    }

    /// The same, whose proxies are run by a program that runs another.
    #[must_use]
    pub fn run_by(mut self, before: &[&str]) -> Self {
        self.before = before.iter().map(|word| (*word).to_owned()).collect();
        self
    }

    /// Containers have the device with this name, from now on.
    pub fn rename_device(&mut self, name: &str) {
        self.device.name = name.into();
    }

    /// Containers have this port of the card, from now on.
    pub fn use_port(&mut self, port: NonZeroU8) {
        self.device.port = port;
    }

    /// Grants containers these GIDs of the card, from now on.
    pub fn grant_gids(&mut self, gids: Gids) {
        self.device.gids = gids;
    }

    /// Containers are in these partitions of the card's, from now on.
    pub fn grant_pkeys(&mut self, pkeys: Option<Vec<Pkey>>) {
        self.device.pkeys = pkeys;
    }

    /// Packets are marked with these, from now on.
    pub fn mark(&mut self, marks: Marks) {
        self.device.marks = marks;
    }

    /// Containers have this network namespace, from now on.
    pub fn in_netns(&mut self, netns: &Netns) {
        self.netns = netns.path();
    }

    /// What programs read of the device beside verbs is in [`DirectProxy::sys`], from now on.
    pub fn show(&mut self) {
        self.shows = true;
    }

    /// Proxies with the software device are of the test build that obeys [`DirectProxy::steps`], from now on.
    pub fn obey(&mut self) {
        self.obeys = true;
    }

    /// Its run-time directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Starts a proxy and waits until it is ready.
    pub fn proxy(&self, limits: Limits) -> Result<DirectProxy> {
        let container = format!("direct{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let dir = self.dir.join("containers").join(&container);
        std::fs::create_dir_all(dir.join("mount"))?;
        let listener = listen_at(&dir.join("mount/verbs.sock"))?;
        let init = Command::new("sleep").arg("infinity").stdin(Stdio::null()).spawn().context("cannot start sleep")?;
        let launch = Launch {
            container: container.clone(),
            init_pid: init.id().cast_signed(),
            run_dir: self.dir.clone(),
            container_dir: dir.clone(),
            uids: Some(UIDS),
            device: self.device.clone(),
            limits,
            worker: Worker::default(),
            sysfs: self.shows,
        };
        let file = dir.join("launch.json");
        std::fs::write(&file, serde_json::to_vec(&launch)?)?;
        let pid = rustix::process::Pid::from_child(&init);
        let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())?;
        let (mut ready, ready_writer) = std::io::pipe()?;
        let tree = if self.shows { Some(empty_tree(&dir.join("sys"))?) } else { None };
        let mapping = |parent_fd: OwnedFd, child_fd| FdMapping { parent_fd, child_fd };
        let program = match self.device.kind {
            DeviceKind::Soft if self.obeys => artifacts::obedient_proxy()?,
            DeviceKind::Soft => artifacts::proxy()?,
            DeviceKind::Ibverbs => artifacts::ibverbs_proxy()?,
        };
        let words: Vec<OsString> = self.before.iter().map(OsString::from).chain([program.into()]).collect();
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]);
        if let Some(provider) = &self.provider {
            command.env("LD_LIBRARY_PATH", provider.parent().context("a library lies in a directory")?);
        }
        let steps = self.dir.join(format!("{container}.steps"));
        if self.obeys {
            File::create(&steps)?.set_len(PAGE)?;
            command.env(STEPS, &steps);
        }
        let mut handles = vec![
            mapping(listener, FD_LISTENER),
            mapping(pidfd, FD_INIT),
            mapping(ready_writer.into(), FD_READY),
            mapping(File::open(&self.netns)?.into(), FD_NETNS),
        ];
        handles.extend(tree.map(|tree| mapping(tree, FD_SYSFS)));
        command.arg("--launch").arg(&file).stdin(Stdio::null()).fd_mappings(handles)?;
        let proxy = command.spawn().context("cannot start the proxy")?;
        // The command still holds our copy of the pipe's writing end; without it the read ends with the proxy's.
        drop(command);
        let started = DirectProxy { proxy, init, dir, steps };
        let mut line = String::new();
        ready.read_to_string(&mut line)?;
        ensure!(line.trim_end() == "ready", "the proxy is not ready: {line:?}");
        Ok(started)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.dir).ok();
    }
}

impl DirectProxy {
    /// The socket for its clients.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.dir.join("mount/verbs.sock")
    }

    /// What its container's programs would read in `/sys`, if its node shows it.
    #[must_use]
    pub fn sys(&self) -> PathBuf {
        self.dir.join("sys")
    }

    /// The file by which the test build is told where to stop (`verbs-proxy/src/control/obedient/steps.rs`).
    #[must_use]
    pub fn steps(&self) -> &Path {
        &self.steps
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.proxy.id().cast_signed()
    }

    /// User and system time that it has used, in clock ticks of 10 ms.
    pub fn processor_ticks(&self) -> Result<u64> {
        let path = PathBuf::from(format!("/proc/{}/stat", self.pid()));
        let stat = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let fields: Vec<&str> = stat.rsplit(") ").next().unwrap_or_default().split(' ').collect();
        let number = |index: usize| -> Result<u64> { Ok(fields.get(index).context("a short line")?.parse()?) };
        Ok(number(11)? + number(12)?)
    }

    /// Whether it has ended.
    pub fn has_ended(&mut self) -> bool {
        !matches!(self.proxy.try_wait(), Ok(None))
    }

    /// Its directory, which its warden removes when it has ended.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Ends the process that stands for the container's init.
    pub fn end_init(&mut self) -> Result<()> {
        self.init.kill()?;
        self.init.wait()?;
        Ok(())
    }

    /// A verbs program that uses this proxy instead of the distribution's library.
    pub fn command(&self, program: &Path) -> Result<Command> {
        let mut command = Command::new(program);
        command.env("RINGFENCE_SOCKET", self.socket()).env("LD_PRELOAD", artifacts::library()?);
        Ok(command)
    }
}

/// Its programs are processes of a container without one.
impl Peer for DirectProxy {
    fn spawn(&self, words: &[&str]) -> Result<Running> {
        let mut command = self.command(Path::new(words[0]))?;
        command.args(&words[1..]);
        Running::start(command)
    }

    fn listens(&self, port: u16) -> bool {
        let listening = format!(":{port:04X} 00000000:0000 0A");
        std::fs::read_to_string("/proc/net/tcp").is_ok_and(|table| table.contains(&listening))
    }

    fn address(&self) -> &str {
        "127.0.0.1"
    }
}

impl Drop for DirectProxy {
    fn drop(&mut self) {
        for child in [&mut self.proxy, &mut self.init] {
            child.kill().ok();
            child.wait().ok();
        }
    }
}

/// What the hook hands a proxy to show the device in; the hook's is a file system of its own.
fn empty_tree(root: &Path) -> Result<OwnedFd> {
    for class in [DEVICES, VERBS] {
        std::fs::create_dir_all(root.join(CLASSES).join(class))?;
    }
    Ok(File::open(root)?.into())
}

fn listen_at(path: &Path) -> Result<OwnedFd> {
    let fd = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
    bind(std::os::fd::AsRawFd::as_raw_fd(&fd), &UnixAddr::new(path)?)
        .with_context(|| format!("cannot bind {}", path.display()))?;
    listen(&fd, Backlog::new(64)?)?;
    Ok(fd)
}
