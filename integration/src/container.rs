//! Containers under runc, with our hook.

use crate::command::{Ended, Running, command, run};
use crate::config::Config;
use crate::netns::{self, Netns};
use crate::perftest::Peer;
use crate::rootfs::{Image, Rootfs};
use crate::spec::{Bind, Hook, Parts};
use crate::{artifacts, sandbox};
use anyhow::{Context, Result};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

static NEXT: AtomicU32 = AtomicU32::new(0);

/// How long a runtime's command may take.
const RUNTIME_LIMIT: Duration = Duration::from_secs(60);

/// A container to be started.
#[derive(Clone, Debug)]
pub struct Builder {
    args: Vec<String>,
    netns: Option<PathBuf>,
    address: Option<String>,
    annotations: Vec<(String, String)>,
    mounts: Vec<Bind>,
    config: Option<PathBuf>,
    start_stage: &'static str,
    readonly: bool,
    user_namespace: bool,
    processors: Option<Value>,
}

/// A started container: its init sleeps, programs are run in it by [`Container::exec`]. Deleted when dropped.
#[derive(Debug)]
pub struct Container {
    bundle: Bundle,
    init: i32,
    address: Option<String>,
}

/// A bundle that a runtime can start.
#[derive(Debug)]
pub struct Bundle {
    id: String,
    dir: PathBuf,
    rootfs: Rootfs,
}

impl Default for Builder {
    fn default() -> Self {
        Self {
            args: ["sleep", "infinity"].map(str::to_owned).to_vec(),
            netns: None,
            address: None,
            annotations: Vec::new(),
            mounts: Vec::new(),
            config: None,
            start_stage: "createRuntime",
            readonly: false,
            user_namespace: false,
            processors: None,
        }
    }
}

impl Builder {
    /// A container with RDMA under `config`, in `netns`.
    #[must_use]
    pub fn with_rdma(config: &Config, netns: &Netns) -> Self {
        Self::default().hooked(config).in_netns(netns).annotation("enable", "true")
    }

    /// Calls the hook with this configuration.
    #[must_use]
    pub fn hooked(mut self, config: &Config) -> Self {
        self.config = Some(config.path());
        self
    }

    /// Joins a network namespace.
    #[must_use]
    pub fn in_netns(mut self, netns: &Netns) -> Self {
        self.netns = Some(netns.path());
        self.address = Some(netns.address.clone());
        self
    }

    /// The annotation `ringfence.dev/<key>`.
    #[must_use]
    pub fn annotation(mut self, key: &str, value: &str) -> Self {
        self.annotations.push((format!("ringfence.dev/{key}"), value.to_owned()));
        self
    }

    /// The program instead of a long sleep.
    #[must_use]
    pub fn args(mut self, args: &[&str]) -> Self {
        self.args = args.iter().map(|arg| (*arg).to_owned()).collect();
        self
    }

    /// Shows a host's file or directory in the container, read-only.
    #[must_use]
    pub fn mount(mut self, source: &Path, destination: &str) -> Self {
        let (source, destination) = (source.to_owned(), destination.to_owned());
        self.mounts.push(Bind { source, destination, writable: false });
        self
    }

    /// Shows a host's directory in the container, for reading and writing.
    #[must_use]
    pub fn share(mut self, source: &Path, destination: &str) -> Self {
        let (source, destination) = (source.to_owned(), destination.to_owned());
        self.mounts.push(Bind { source, destination, writable: true });
        self
    }

    /// Calls the hook at the older stage, `prestart`, instead of `createRuntime`.
    #[must_use]
    pub fn at_prestart(mut self) -> Self {
        self.start_stage = "prestart";
        self
    }

    /// With a read-only root file system.
    #[must_use]
    pub fn readonly(mut self) -> Self {
        self.readonly = true;
        self
    }

    /// With a user namespace of its own.
    #[must_use]
    pub fn in_user_namespace(mut self) -> Self {
        self.user_namespace = true;
        self
    }

    /// With so much of one processor, and on the CPU `cpu` only.
    #[must_use]
    pub fn processors(mut self, share: f64, cpu: &str) -> Self {
        self.processors = Some(json!({"quota": (share * 100_000.0) as u64, "period": 100_000, "cpus": cpu}));
        self
    }

    /// Writes the bundle.
    pub fn bundle(&self, image: &Image) -> Result<Bundle> {
        let id = format!("{}-c{}", sandbox::name(), NEXT.fetch_add(1, Ordering::Relaxed));
        let dir = sandbox::work_dir().join(&id);
        std::fs::create_dir(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        let bundle = Bundle { id, dir, rootfs: image.instance()? };
        if self.user_namespace {
            // Its root may make nothing in a root file system that is the host's root's.
            for bind in &self.mounts {
                let point = bundle.rootfs.dir().join(bind.destination.trim_start_matches('/'));
                if bind.source.is_dir() { std::fs::create_dir_all(point) } else { std::fs::write(point, "") }?;
            }
        }
        let program = artifacts::hook()?;
        let parts = Parts {
            rootfs: bundle.rootfs.dir(),
            args: &self.args,
            netns: self.netns.as_deref(),
            annotations: &self.annotations,
            mounts: &self.mounts,
            hook: self.config.as_deref().map(|config| Hook {
                program: &program,
                config,
                start_stage: self.start_stage,
            }),
            readonly: self.readonly,
            user_namespace: self.user_namespace,
            cgroups_path: format!("/{}/{}", sandbox::name(), bundle.id),
            processors: self.processors.as_ref(),
        };
        std::fs::write(bundle.dir.join("config.json"), serde_json::to_vec_pretty(&parts.config_json())?)?;
        Ok(bundle)
    }

    /// Starts the container in the background.
    pub fn start(&self, image: &Image) -> Result<Container> {
        let bundle = self.bundle(image)?;
        let pid_file = bundle.dir.join("pid");
        let mut command = bundle.runc(&["run", "--detach", "--pid-file"]);
        command.arg(&pid_file).arg("--bundle").arg(&bundle.dir).arg(&bundle.id);
        run(command)?;
        let init = std::fs::read_to_string(&pid_file)?.trim().parse().context("runc wrote no pid")?;
        Ok(Container { bundle, init, address: self.address.clone() })
    }
}

impl Bundle {
    /// The container's id.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The bundle's directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Its root file system.
    #[must_use]
    pub fn rootfs(&self) -> &Rootfs {
        &self.rootfs
    }

    /// `runc run` in the foreground, to the container's end.
    pub fn run(&self) -> Result<Ended> {
        let mut command = self.runc(&["run", "--bundle"]);
        command.arg(&self.dir).arg(&self.id);
        Running::start(command)?.wait(RUNTIME_LIMIT)
    }

    fn runc(&self, words: &[&str]) -> Command {
        let mut command = Command::new("runc");
        command.arg("--root").arg(sandbox::work_dir().join("runc")).args(words);
        command
    }

    fn delete(&self) {
        run({
            let mut command = self.runc(&["delete", "--force"]);
            command.arg(&self.id);
            command
        })
        .ok();
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        self.delete();
        std::fs::remove_dir_all(&self.dir).ok();
    }
}

impl Container {
    /// The container's id.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.bundle.id
    }

    /// Pid of the container's init.
    #[must_use]
    pub fn init(&self) -> i32 {
        self.init
    }

    /// Its root file system.
    #[must_use]
    pub fn rootfs(&self) -> &Rootfs {
        &self.bundle.rootfs
    }

    /// Runs a program in the container to its end and returns its output, if it ended well.
    pub fn exec(&self, words: &[&str]) -> Result<String> {
        self.spawn(words)?.wait(RUNTIME_LIMIT)?.success()
    }

    /// Starts a program in the container with something to read on its standard input.
    pub fn spawn_reading(&self, words: &[&str], input: Stdio) -> Result<Running> {
        let mut command = self.bundle.runc(&["exec"]);
        command.arg(self.id()).args(words);
        Running::start_reading(command, input)
    }

    /// Kills the container's init with SIGKILL, without telling the runtime.
    pub fn kill_init(&self) -> Result<()> {
        run(command(&["kill", "-KILL", &self.init.to_string()])).map(drop)
    }

    /// Kills and deletes the container, which calls poststop; an error if the runtime fails.
    pub fn delete(&self) -> Result<()> {
        let mut command = self.bundle.runc(&["delete", "--force"]);
        command.arg(self.id());
        run(command).map(drop)
    }
}

impl Peer for Container {
    fn spawn(&self, words: &[&str]) -> Result<Running> {
        self.spawn_reading(words, Stdio::null())
    }

    fn listens(&self, port: u16) -> bool {
        netns::listens(self.init, port)
    }

    fn address(&self) -> &str {
        self.address.as_deref().unwrap_or("127.0.0.1")
    }
}
