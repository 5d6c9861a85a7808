//! `ringfence info`

use crate::cards::{self, Shown};
use crate::commands::version::{COMMIT, VERSION};
use crate::engines::process;
use crate::output::{self, plain};
use anyhow::Result;
use ringfence_hook::config::{self, Config, DEFAULT_PATH};
use ringfence_hook::containers;
use ringfence_hook::units::show_rate;
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

/// Engines and runtimes, by their programs.
const ENGINES: [&str; 8] = ["podman", "docker", "dockerd", "containerd", "nerdctl", "crio", "runc", "crun"];

/// How long an engine may take to say its version.
const PATIENCE: Duration = Duration::from_secs(5);

/// Shows this node: configuration, devices, policies, engines
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  ringfence info
  ringfence info --json | jq .engines

See ringfence doctor for what is missing, and ringfence list for containers.")]
pub struct Args {
    /// As JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Info {
    version: &'static str,
    commit: &'static str,
    /// The files, each merged over those before; without one all defaults hold.
    configuration: Vec<PathBuf>,
    run_dir: PathBuf,
    devices: Vec<String>,
    /// RDMA cards among them.
    cards: Vec<Shown>,
    policies: Vec<String>,
    containers: usize,
    cgroups: &'static str,
    kernel: String,
    /// The first line of each one's --version.
    engines: BTreeMap<&'static str, String>,
}

impl Args {
    pub fn run(self) -> Result<ExitCode> {
        let info = Info::gather()?;
        match self.json {
            true => output::json(&info)?,
            false => output::print(&info.show())?,
        }
        Ok(ExitCode::SUCCESS)
    }
}

impl Info {
    fn gather() -> Result<Self> {
        let config = Config::load()?;
        let devices = config.devices.iter().map(|device| {
            let link = device.link.map(|link| format!(", {}", show_rate(link))).unwrap_or_default();
            let nodes: String = device.nodes.iter().map(|node| format!(", {}", node.display())).collect();
            let kind = format!("{:?}", device.kind).to_lowercase();
            format!("{} ({kind}{link}{nodes})", device.name)
        });
        Ok(Self {
            version: VERSION,
            commit: COMMIT,
            configuration: config::paths()?,
            devices: devices.collect(),
            cards: cards::all(&config),
            policies: config.policy.names().map(str::to_owned).collect(),
            containers: containers(&config)?.len(),
            run_dir: config.run_dir,
            cgroups: cgroups(),
            kernel: std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned(),
            engines: ENGINES.iter().filter_map(|name| Some((*name, engine(name)?))).collect(),
        })
    }

    fn show(&self) -> String {
        let files: Vec<_> = self.configuration.iter().map(|path| path.display().to_string()).collect();
        let files =
            if files.is_empty() { format!("{DEFAULT_PATH} is missing: all defaults") } else { files.join(", ") };
        let mut rows = vec![
            ["version".into(), format!("{} ({})", self.version, self.commit)],
            ["configuration".into(), files],
            ["run-dir".into(), self.run_dir.display().to_string()],
            ["devices".into(), self.devices.join("; ")],
            ["policies".into(), self.policies.join(", ")],
            ["containers".into(), self.containers.to_string()],
            ["cgroups".into(), self.cgroups.into()],
            ["kernel".into(), self.kernel.clone()],
        ];
        let at = rows.iter().position(|[name, _]| name == "policies").unwrap_or(rows.len());
        rows.splice(at..at, self.cards.iter().map(Shown::row));
        rows.extend(self.engines.iter().map(|(name, version)| [(*name).into(), plain(version)]));
        output::table(&rows)
    }
}

/// Which cgroup hierarchies the node has, see `cgroups(7)`.
fn cgroups() -> &'static str {
    // Each cgroup of version 2 has it, and none of version 1.
    let is_v2 = |path: &str| Path::new(path).join("cgroup.controllers").exists();
    match (is_v2("/sys/fs/cgroup"), is_v2("/sys/fs/cgroup/unified")) {
        (true, _) => "version 2",
        (false, true) => "hybrid: controllers in version 1",
        (false, false) if Path::new("/sys/fs/cgroup").exists() => "version 1",
        (false, false) => "none",
    }
}

/// What `name` says of its version; `None` if it is not there.
fn engine(name: &str) -> Option<String> {
    let text = process::output(Command::new(name).arg("--version"), PATIENCE).ok()?;
    Some(text.lines().next().unwrap_or_default().trim().to_owned())
}
