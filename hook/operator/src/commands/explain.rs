//! `ringfence explain`

use crate::explanation::{Explanation, Facts, Mount, Registered, Unused, Value, Verdict};
use crate::output::{self, plain};
use anyhow::{Context, Result};
use ringfence_hook::config::Config;
use ringfence_hook::identity::Namespace;
use ringfence_hook::state::{Annotations, Bundle, State};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Shows what would happen to a container, and why; touches nothing
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  ringfence explain --annotation ringfence.dev/enable=true --annotation ringfence.dev/bandwidth=40Gbit
  ringfence explain --namespace team-a --container train --annotation enable.ringfence.dev/container.train=true
  ringfence explain --bundle /run/containerd/io.containerd.runtime.v2.task/k8s.io/ID
  ringfence explain --policy gold

The exit status is the hook's as far as annotations and configuration decide: 0 if they let the container start, with RDMA or without; see ringfence-hook(8). Whether the card, its port and its proxy are there, ringfence doctor says.")]
pub struct Args {
    /// A bundle, whose config.json is looked at
    #[arg(long, value_name = "DIR")]
    bundle: Option<PathBuf>,
    /// An annotation; goes before that of the bundle
    #[arg(long = "annotation", value_name = "KEY=VALUE", value_parser = annotation)]
    annotations: Vec<(String, String)>,
    /// The Kubernetes namespace of the pod
    #[arg(long, value_name = "NAME")]
    namespace: Option<String>,
    /// The container's name in its pod
    #[arg(long, value_name = "NAME")]
    container: Option<String>,
    /// The profile that the engine gives the container, by a CDI device or an argument of ringfence-runtime
    #[arg(long, value_name = "NAME")]
    policy: Option<String>,
    /// The configuration, instead of the one in force
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// As JSON
    #[arg(long)]
    json: bool,
}

fn annotation(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("an annotation is KEY=VALUE")?;
    Ok((key.to_owned(), value.to_owned()))
}

impl Args {
    pub fn run(self) -> Result<ExitCode> {
        let load = || match &self.config {
            Some(path) => Config::load_from(path),
            None => Config::load(),
        };
        let (mut annotations, registered) = match &self.bundle {
            Some(bundle) => read(bundle, &load().unwrap_or_default().hook.path)?,
            None => (Annotations::new(), None),
        };
        // As containerd writes it; CRI-O's keys mean the same.
        let name = self.container.iter().map(|name| ("io.kubernetes.cri.container-name".to_owned(), name.clone()));
        annotations.extend(self.annotations.iter().cloned().chain(name));
        let namespace = match (&self.namespace, &self.bundle) {
            (Some(namespace), _) => Namespace::Known(namespace.clone()),
            (None, Some(bundle)) => Namespace::of(&annotations, &std::fs::canonicalize(bundle)?),
            (None, None) => Namespace::None,
        };
        let of_bundle = match &registered {
            Some(Registered::Yes { policy }) => policy.clone(),
            _ => None,
        };
        let facts = Facts { annotations, namespace, policy: self.policy.clone().or(of_bundle) };
        let explanation = Explanation::of(&facts, load);
        match self.json {
            true => output::json(&explanation)?,
            false => output::print(&show(&explanation, registered.as_ref()))?,
        }
        Ok(ExitCode::from(explanation.exit_code()))
    }
}

/// The annotations of a bundle, and whether its config.json names the hook.
fn read(bundle: &Path, hook: &Path) -> Result<(Annotations, Option<Registered>)> {
    let directory = std::fs::canonicalize(bundle).with_context(|| bundle.display().to_string())?;
    let state = serde_json::json!({"id": "explained", "bundle": directory});
    let state = State::parse(&serde_json::to_vec(&state)?)?;
    let annotations = Bundle::load(&state, &directory)?;
    let annotations = annotations.annotations().map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
    let path = directory.join("config.json");
    let config = serde_json::from_slice(&std::fs::read(&path).with_context(|| path.display().to_string())?)?;
    Ok((annotations, Some(Registered::of(&config, hook))))
}

fn show(explanation: &Explanation, registered: Option<&Registered>) -> String {
    let mut text = String::new();
    for (what, name) in [("container", &explanation.container), ("namespace", &explanation.namespace)] {
        if let Some(name) = name {
            text += &format!("{what}: {}\n", plain(name));
        }
    }
    match &explanation.verdict {
        Verdict::LeftAlone { reason } => text += &format!("left alone: {}\n", plain(reason)),
        Verdict::Refused { code, message } => text += &format!("refused: E{code} {}\n", plain(message)),
        Verdict::Joined { enabled_by, device, settings, mounts } => {
            text += &format!("gets RDMA: device {device}, enabled by {}\n", plain(enabled_by));
            text += &format!("\n{}\n{}", values(settings), seen(mounts));
        }
    }
    if !explanation.unused.is_empty() {
        text += &format!("\n{}", unused(&explanation.unused));
    }
    if matches!((&explanation.verdict, registered), (Verdict::Joined { .. }, Some(Registered::No))) {
        text += "\nwarning: the bundle's config.json does not name ringfence-hook; unless it is started by ringfence-runtime, \
                 which adds it, the container gets no RDMA\n";
    }
    text
}

fn values(settings: &[Value]) -> String {
    let mut rows = vec![["KEY", "VALUE", "FROM", "ALLOWED"].map(str::to_owned)];
    rows.extend(settings.iter().map(|Value { key, value, from, bound }| {
        [(*key).to_owned(), plain(value), plain(from), bound.as_deref().map_or("any".into(), plain)]
    }));
    output::table(&rows)
}

fn seen(mounts: &[Mount]) -> String {
    let mut rows = vec![["IN THE CONTAINER", "", "FROM"].map(str::to_owned)];
    rows.extend(mounts.iter().map(|Mount { destination, source, read_only }| {
        let mode = if *read_only { "read-only" } else { "" };
        [destination.display().to_string(), mode.to_owned(), source.clone()]
    }));
    output::table(&rows)
}

fn unused(unused: &[Unused]) -> String {
    let mut rows = vec![["UNUSED ANNOTATION", "WHY"].map(str::to_owned)];
    rows.extend(
        unused.iter().map(|Unused { annotation, value, why }| [plain(&format!("{annotation}={value}")), plain(why)]),
    );
    output::table(&rows)
}
