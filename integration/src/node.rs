//! Whole small nodes: a Debian release with its engines installed and ours beside them, in namespaces and a control group
//! of its own. What an engine does here it does on a server: paths, daemons, shared mounts, delegated control groups.

pub mod applications;
mod image;
mod install;
mod leftovers;

pub use image::{ARCHIVE, IMAGE};
pub use leftovers::Leftovers;

use crate::command::{Ended, Running, command, wait_until};
use crate::{artifacts, sandbox};
use anyhow::{Context, Result};
use nix::mount::{MsFlags, mount};
use ringfence_trials::surroundings;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

static NEXT: AtomicU32 = AtomicU32::new(0);

/// How long a command on a node may take.
pub const LIMIT: Duration = Duration::from_secs(60);

/// A Debian release.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Suite {
    /// Debian 12: runc 1.1.5, crun 1.8, podman 4.3, containerd 1.6, docker 20.10.
    Bookworm,
    /// Debian 13: runc 1.1.15, crun 1.21, podman 5.4, containerd 1.7, docker 26.1.
    Trixie,
    /// What comes next: runc 1.3, crun 1.28, podman 5.8, containerd 2.1, docker 28.5 in November 2026. It moves.
    Sid,
}

impl Suite {
    /// All that are tested.
    pub const ALL: [Self; 3] = [Self::Bookworm, Self::Trixie, Self::Sid];

    /// Debian's name for it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Bookworm => "bookworm",
            Self::Trixie => "trixie",
            Self::Sid => "sid",
        }
    }
}

/// The version of control groups that a node has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cgroups {
    /// The hierarchies of the first version, without the second beside them, as the machine has them.
    V1,
    /// Only the second version, with the controllers that the machine's first version leaves to it (often none).
    V2,
}

impl Cgroups {
    /// The version that the machine has its controllers in.
    fn of_machine() -> Self {
        if surroundings::is_version_2() { Self::V2 } else { Self::V1 }
    }
}

/// A running node. All its processes, mounts and files are gone when it is dropped; its control groups go with the sandbox.
#[derive(Debug)]
pub struct Node {
    suite: Suite,
    dir: PathBuf,
    cgroup: String,
    /// Whether this process is in its control groups.
    entered: bool,
    init: i32,
    /// Its end is the end of the node's first process, and so of all.
    _unshare: Running,
}

impl Node {
    /// Starts a node of the machine's version of control groups with Ringfence and the image [`IMAGE`]'s archive on it.
    pub fn start(suite: Suite) -> Result<Self> {
        Self::start_with(suite, Cgroups::of_machine())
    }

    /// Starts a node.
    pub fn start_with(suite: Suite, cgroups: Cgroups) -> Result<Self> {
        let lower = image::root(suite)?;
        let archive = image::archive(suite)?;
        let name = format!("n{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let dir = sandbox::work_dir().join(&name);
        let [upper, work, root] = ["upper", "work", "root"].map(|name| dir.join(name));
        for path in [&upper, &work, &root] {
            std::fs::create_dir_all(path).with_context(|| format!("cannot create {}", path.display()))?;
        }
        let layers = format!("lowerdir={},upperdir={},workdir={}", lower.display(), upper.display(), work.display());
        mount(Some("overlay"), &root, Some("overlay"), MsFlags::empty(), Some(layers.as_str()))
            .with_context(|| format!("cannot mount an overlay of {}", lower.display()))?;

        let cgroup = format!("/{}/{name}", sandbox::name());
        let mut unshare = Command::new("unshare");
        unshare.args(["--kill-child", "--fork", "--mount", "--pid", "--net", "--uts", "--ipc"]);
        unshare.arg(script("init.sh")).arg(&root).arg(&cgroup).arg(if cgroups == Cgroups::V1 { "v1" } else { "v2" });
        let mut unshare = Running::start(unshare)?;
        let mut init = None;
        wait_until("the node to be ready", Duration::from_secs(60), || {
            init = init.or_else(|| child_of(unshare.pid()));
            let ready = init.is_some_and(|init| Path::new(&format!("/proc/{init}/root/run/node-is-ready")).exists());
            ready || unshare.has_ended()
        })
        .with_context(|| unshare.output())?;
        let init = init.filter(|_| !unshare.has_ended());
        let init = init.with_context(|| format!("the node ended at once: {}", unshare.output()))?;
        let node = Self { suite, dir, cgroup, entered: false, init, _unshare: unshare };
        std::fs::copy(&archive, node.path(image::ARCHIVE)).context("cannot copy the image's archive")?;
        install::engines(&node)?;
        install::ringfence(&node)?;
        Ok(node)
    }

    /// Why nodes of `suite` cannot be started here, if they cannot: no network, or Debian's archive is not what it was.
    #[must_use]
    pub fn obstacle(suite: Suite) -> Option<String> {
        image::root(suite).and_then(|_| image::archive(suite)).err().map(|error| format!("{error:#}"))
    }

    /// Its release.
    #[must_use]
    pub fn suite(&self) -> Suite {
        self.suite
    }

    /// A file of the node as this process sees it. For a path without symbolic links that lead out of it.
    #[must_use]
    pub fn path(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{path}", self.init))
    }

    /// Writes a file, and its directories.
    pub fn write(&self, path: &str, text: impl AsRef<[u8]>) -> Result<()> {
        let target = self.path(path);
        std::fs::create_dir_all(target.parent().context("a file has a parent")?)?;
        std::fs::write(&target, text).with_context(|| format!("cannot write {path} of the node"))
    }

    /// Moves this process into the control groups of the node until it ends.
    ///
    /// Otherwise every program that is started here moves itself. That waits for all processors, and spares the wait to
    /// whoever moves a process within the next milliseconds, which spoils any measurement of what the program does.
    pub fn enter_cgroups(&mut self) -> Result<()> {
        let mounts = std::fs::read_to_string("/proc/mounts")?;
        for mount in mounts.lines() {
            let mut fields = mount.split(' ').skip(1);
            let (Some(point), Some("cgroup" | "cgroup2")) = (fields.next(), fields.next()) else { continue };
            let procs = format!("{point}{}/init/cgroup.procs", self.cgroup);
            std::fs::write(&procs, "0").with_context(|| format!("cannot write {procs}"))?;
        }
        self.entered = true;
        Ok(())
    }

    /// A program to be run on the node. It is killed together with the [`Running`] that is made of it; what it starts is not.
    #[must_use]
    pub fn command(&self, words: &[&str]) -> Command {
        let mut enter = Command::new(script("enter.sh"));
        enter.arg(self.init.to_string()).arg(if self.entered { "" } else { &self.cgroup }).args(words);
        enter
    }

    /// Starts a program.
    pub fn spawn(&self, words: &[&str]) -> Result<Running> {
        Running::start(self.command(words))
    }

    /// Runs a program to its end, however it ends.
    pub fn attempt(&self, words: &[&str]) -> Result<Ended> {
        self.spawn(words)?.wait(LIMIT)
    }

    /// Runs a program; what it said, if it ended well.
    pub fn run(&self, words: &[&str]) -> Result<String> {
        self.attempt(words)?.success()
    }

    /// Whether a TCP port is listened to.
    #[must_use]
    pub fn listens(&self, port: u16) -> bool {
        crate::netns::listens(self.init, port)
    }

    /// The node's processes but its first and the threads of the kernel: pid on the node, and command line.
    pub fn processes(&self) -> Result<Vec<(i32, Vec<String>)>> {
        let mut found = Vec::new();
        for entry in std::fs::read_dir(self.path("/proc"))?.flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            // A process may end while it is looked at.
            let Ok(line) = std::fs::read(entry.path().join("cmdline")) else { continue };
            let words = line.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned());
            if pid != 1 {
                found.push((pid, words.collect()));
            }
        }
        Ok(found)
    }

    /// Pids of those whose program's name is `name`, proxies without their wardens.
    pub fn pids(&self, name: &str) -> Result<Vec<i32>> {
        let is_named = |words: &Vec<String>| {
            words.first().and_then(|program| Path::new(program).file_name()).is_some_and(|found| found == name)
        };
        let is_warden = |pid: &i32| crate::command::is_warden(&self.path(&format!("/proc/{pid}")));
        let named = self.processes()?.into_iter().filter(|(_, words)| is_named(words)).map(|(pid, _)| pid);
        Ok(named.filter(|pid| !is_warden(pid)).collect())
    }

    /// How many verbs proxies run.
    pub fn proxies(&self) -> Result<usize> {
        Ok(self.pids("ringfence-proxy")?.len())
    }

    /// Fails unless there are soon `number` proxies.
    pub fn proxies_are(&self, number: usize) -> Result<()> {
        let mut now = Vec::new();
        wait_until(&format!("{number} proxies"), Duration::from_secs(20), || {
            now = self.pids("ringfence-proxy").unwrap_or_default();
            now.len() == number
        })
        .with_context(|| format!("there are {now:?}; processes: {:?}", self.processes()))
    }

    /// Sends a signal, such as `KILL`, to a process of the node.
    pub fn kill(&self, signal: &str, pid: i32) -> Result<()> {
        self.run(&["sh", "-c", &format!("kill -{signal} {pid}")]).map(drop)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        nix::mount::umount2(&self.dir.join("root"), nix::mount::MntFlags::MNT_DETACH).ok();
        std::fs::remove_dir_all(&self.dir).ok();
    }
}

fn script(name: &str) -> PathBuf {
    artifacts::repository().join("integration/src/node").join(name)
}

/// The one child of a process: `unshare --fork` has no more.
fn child_of(parent: i32) -> Option<i32> {
    let is_child = |pid: &i32| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // "pid (name) state ppid …", and the name may contain anything.
        let fields = stat.rsplit_once(") ").map(|(_, fields)| fields.to_owned()).unwrap_or_default();
        fields.split(' ').nth(1).and_then(|field| field.parse().ok()) == Some(parent)
    };
    let entries = std::fs::read_dir("/proc").ok()?.flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).find(is_child)
}

/// Runs a script of this directory on the machine.
fn run_script(name: &str, arguments: &[&str]) -> Result<()> {
    let script = script(name);
    let words = [&[script.to_str().context("the repository's path is not UTF-8")?], arguments].concat();
    Running::start(command(&words))?.wait(Duration::from_secs(600))?.success().map(drop)
}
