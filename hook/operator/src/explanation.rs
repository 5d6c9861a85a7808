//! What would come of a container, and why: the hook's own decision, put into words.

use anyhow::Result;
use ringfence_hook::Failure;
use ringfence_hook::annotations::{self, PREFIX};
use ringfence_hook::config::{self, Config, Device};
use ringfence_hook::identity::{Identity, Namespace};
use ringfence_hook::policy::{self, Grant, Origin, Resolution, Setting};
use ringfence_hook::state::Annotations;
use ringfence_hook::{preload_file, rdma_cm, userfaultfd};
use serde::Serialize;
use std::path::{Path, PathBuf};

/// The whole story.
#[derive(Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Explanation {
    /// The container's name in its pod.
    pub container: Option<String>,
    /// The pod's Kubernetes namespace, and whether an engine's word stands behind it.
    pub namespace: Option<String>,
    #[serde(flatten)]
    pub verdict: Verdict,
    /// Annotations of ours that decide nothing.
    pub unused: Vec<Unused>,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "verdict")]
pub enum Verdict {
    /// The container starts without us.
    LeftAlone { reason: String },
    /// The container does not start.
    Refused { code: u8, message: String },
    /// The container gets RDMA.
    Joined { enabled_by: String, device: String, settings: Vec<Value>, mounts: Vec<Mount> },
}

/// A value that holds for the container.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Value {
    pub key: &'static str,
    pub value: String,
    /// Who said so.
    pub from: String,
    /// What an annotation may ask for at most; `None` for anything.
    pub bound: Option<String>,
}

/// What the container would see.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Mount {
    pub destination: PathBuf,
    pub source: String,
    pub read_only: bool,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Unused {
    pub annotation: String,
    pub value: String,
    pub why: String,
}

/// What is known of the container.
pub struct Facts {
    pub annotations: Annotations,
    pub namespace: Namespace,
    /// The administrator's profile that the engine was told to give it.
    pub policy: Option<String>,
}

impl Explanation {
    /// Decides about the container of `facts` as the hook would. `load` is only called where the hook reads its configuration, so
    /// that a broken one is told where it matters.
    pub fn of(facts: &Facts, load: impl FnOnce() -> Result<Config, config::Error>) -> Self {
        let identity = Identity::of(&facts.annotations);
        let verdict = decide(facts, load).unwrap_or_else(|failure| Verdict::Refused {
            code: failure.code as u8,
            // Without the code in front of it, which is beside it here.
            message: one_line(&failure),
        });
        Self {
            container: identity.container.map(str::to_owned),
            namespace: match &facts.namespace {
                Namespace::None => None,
                Namespace::Known(name) => Some(name.clone()),
                Namespace::Claimed(name) => {
                    Some(format!("{name} (claimed by an annotation; no CRI engine vouches for it)"))
                }
            },
            unused: unused(facts, &identity, &verdict),
            verdict,
        }
    }

    /// What the hook would exit with.
    pub fn exit_code(&self) -> u8 {
        match self.verdict {
            Verdict::Refused { code, .. } => code,
            Verdict::LeftAlone { .. } | Verdict::Joined { .. } => 0,
        }
    }
}

fn decide(facts: &Facts, load: impl FnOnce() -> Result<Config, config::Error>) -> Result<Verdict, Failure> {
    let identity = Identity::of(&facts.annotations);
    let policy = facts.policy.as_deref();
    let Some(request) = annotations::wanted(&facts.annotations, policy)? else {
        return Ok(Verdict::LeftAlone { reason: why_left_alone(&facts.annotations, &identity) });
    };
    let config = load()?;
    let Resolution { grant, settings, .. } = policy::resolve(&request, &facts.namespace, &config)?;
    let (device, mounts) = match grant {
        Grant::Proxied(device, _) => (device, proxied(&config, device)),
        Grant::Passthrough(device) => (device, device.nodes.iter().map(|node| passed(node.clone())).collect()),
        Grant::Exclusive(device) => {
            let verbs = Mount {
                destination: "/dev/infiniband/uverbsN".into(),
                source: format!("the node of RDMA device {}, moved to the container's network namespace", device.name),
                read_only: false,
            };
            let others = device.nodes_beside_verbs().map(|node| passed(node.to_owned()));
            (device, others.chain([verbs]).collect())
        }
    };
    let enabled_by = match enable(&facts.annotations, &identity) {
        Some((name, value)) => format!("annotation {name}={value}"),
        None => format!("the engine, with policy {}", policy.unwrap_or_default()),
    };
    let settings = settings.into_iter().map(Value::from).collect();
    Ok(Verdict::Joined { enabled_by, device: device.name.clone(), settings, mounts })
}

impl From<Setting> for Value {
    fn from(setting: Setting) -> Self {
        let Setting { key, value, origin, bound } = setting;
        let from = match origin {
            Origin::Default(table) if table == "device" => "the first device for this mode".into(),
            origin => origin.to_string(),
        };
        Self { key, value, from, bound }
    }
}

/// Where programs read of a device beside verbs.
const SHOWN: [&str; 3] = ["/sys/class/infiniband", "/sys/class/infiniband_verbs", "/dev/infiniband"];

fn proxied(config: &Config, device: &Device) -> Vec<Mount> {
    let directory = &config.inject.container_dir;
    let own = config.run_dir.join("containers").join("ID");
    let mount = |destination: PathBuf, source: String| Mount { destination, source, read_only: true };
    let library = Path::new("/etc").join(preload_file::DIRECTORY);
    let hosts = config.inject.library.display();
    let mut mounts = vec![
        mount(directory.clone(), format!("{}, with the proxy's socket", own.join("mount").display())),
        mount(library.clone(), own.join("library").display().to_string()),
        mount(library.join("libibverbs.so.1"), hosts.to_string()),
        mount(
            "/etc/ld.so.preload".into(),
            format!("{}, then the image's own lines", library.join(preload_file::NAME).display()),
        ),
        mount("the image's own libibverbs.so.1".into(), format!("{hosts}, if it has all symbols of that one")),
        mount(
            "/etc/ld-musl-x86_64.path".into(),
            format!("{}, then the image's own lines, if it has musl", library.display()),
        ),
    ];
    if config.inject.sysfs {
        let shown = "the device as its verbs say it, and no other";
        mounts.extend(SHOWN.map(|path| mount(path.into(), shown.into())));
    }
    if config.inject.userfaultfd().is_some() {
        mounts.push(passed(userfaultfd::PATH.into()));
    }
    if device.rdma_cm {
        mounts.push(passed(rdma_cm::PATH.into()));
    }
    mounts
}

fn passed(node: PathBuf) -> Mount {
    Mount { source: format!("{}, the host's", node.display()), destination: node, read_only: false }
}

/// The annotation by which the container is enabled or not: that of the closest scope.
fn enable<'a>(annotations: &'a Annotations, identity: &Identity<'_>) -> Option<(&'a str, &'a str)> {
    let own = identity.container.map(|name| format!("enable.{PREFIX}container.{name}"));
    let names = own.into_iter().chain([format!("enable.{PREFIX}pod"), format!("{PREFIX}enable")]);
    names
        .into_iter()
        .find_map(|name| annotations.get_key_value(&name))
        .map(|(name, value)| (name.as_str(), value.as_str()))
}

fn why_left_alone(annotations: &Annotations, identity: &Identity<'_>) -> String {
    if identity.is_sandbox {
        return "it is a pod's sandbox, which only holds the pod's namespaces".into();
    }
    if let Some((name, value)) = enable(annotations, identity) {
        return format!("annotation {name}={value} switches it off");
    }
    if annotations.keys().any(|name| annotations::is_ours(name)) {
        return "its pod's annotations enable other containers only".into();
    }
    format!("it has no annotation {PREFIX}enable=true, and no engine was told to enable it")
}

/// Annotations of ours that were overridden or are for others.
fn unused(facts: &Facts, identity: &Identity<'_>, verdict: &Verdict) -> Vec<Unused> {
    let Verdict::Joined { settings, .. } = verdict else { return Vec::new() };
    let enable = enable(&facts.annotations, identity).map(|(name, _)| name);
    let winner = |key: &str| match key {
        "enable" => enable,
        _ => settings.iter().find(|setting| setting.key == key)?.from.strip_prefix("annotation "),
    };
    let ours = facts.annotations.iter().filter(|(name, _)| annotations::is_ours(name));
    ours.filter_map(|(name, value)| {
        let (key, container) = parts(name);
        let why = match (container, winner(key)) {
            (Some(container), _) if identity.container != Some(container) => format!("is for container {container}"),
            (_, Some(winner)) if winner != name => format!("{winner} goes before it"),
            _ => return None,
        };
        Some(Unused { annotation: name.clone(), value: value.clone(), why })
    })
    .collect()
}

/// The key of an annotation of ours, and the container that it is for.
fn parts(name: &str) -> (&str, Option<&str>) {
    if let Some(key) = name.strip_prefix(PREFIX) {
        return (key, None);
    }
    let (domain, scope) = name.split_once('/').unwrap_or((name, ""));
    let key = domain.strip_suffix(PREFIX.trim_end_matches('/')).and_then(|key| key.strip_suffix('.')).unwrap_or(domain);
    (key, scope.strip_prefix("container."))
}

/// The failure's message, as the hook shows it.
fn one_line(failure: &Failure) -> String {
    let shown = failure.to_string();
    shown.split_once(' ').map_or(shown.clone(), |(_, message)| message.to_owned())
}

/// What a bundle says of our hook.
pub enum Registered {
    No,
    Yes { policy: Option<String> },
}

impl Registered {
    /// Looks at the hooks of `config`, the bundle's `config.json`, for the program `hook`.
    pub fn of(config: &serde_json::Value, hook: &std::path::Path) -> Self {
        let stages = ["createRuntime", "prestart"].iter().filter_map(|stage| config["hooks"][stage].as_array());
        let is_ours = |entry: &&serde_json::Value| {
            let path = entry["path"].as_str().map(std::path::Path::new);
            path.is_some_and(|path| path == hook || path.file_name() == Some("ringfence-hook".as_ref()))
        };
        let Some(entry) = stages.flatten().find(is_ours) else { return Self::No };
        let arguments: Vec<_> = entry["args"].as_array().into_iter().flatten().filter_map(|arg| arg.as_str()).collect();
        let policy = arguments.windows(2).find(|pair| pair[0] == "--policy").map(|pair| pair[1].to_owned());
        let joined = || arguments.iter().find_map(|argument| argument.strip_prefix("--policy=")).map(str::to_owned);
        Self::Yes { policy: policy.or_else(joined) }
    }
}

#[cfg(test)]
mod tests;
