//! docker's `daemon.json`: runtimes that enable RDMA.
//!
//! Values that we do not touch keep their text, however they are written.

pub mod flags;
mod object;
#[cfg(test)]
mod tests;

use super::host::Host;
use super::plan::Plan;
use super::{Options, is_plain_name};
use anyhow::{Context, Result, bail};
use object::{Object, Style};
use serde_json::value::{RawValue, to_raw_value};
use serde_json::{Value, json};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

/// The daemon's configuration file.
pub const DEFAULT: &str = "/etc/docker/daemon.json";
/// The runtime whose profile is `default`; others are `ringfence-<profile>`.
pub const NAME: &str = "ringfence";

/// One runtime of ours.
#[derive(Clone, Debug)]
pub struct Registration {
    /// `ringfence-runtime`, as an absolute path.
    pub binary: String,
    /// The profile of its containers.
    pub policy: String,
    /// Whether the host has a link beside it that stands for that profile: see [`link`].
    pub has_link: bool,
    /// Whether `docker run` without `--runtime` gets it.
    pub set_as_default: bool,
}

impl Registration {
    /// The name for `docker run --runtime`.
    pub fn name(&self) -> String {
        if self.policy == "default" { NAME.into() } else { format!("{NAME}-{}", self.policy) }
    }
}

/// `text` with the registration.
pub fn configure(text: &str, registration: &Registration) -> Result<String> {
    let mut root = Object::parse(text)?;
    let mut runtimes = runtimes(&root)?;
    let name = registration.name();
    let wanted = if registration.has_link {
        json!({"path": link(&registration.binary, &registration.policy)})
    } else {
        json!({"path": registration.binary, "runtimeArgs": ["--ringfence-policy", registration.policy]})
    };
    let present = runtimes.get(&name).and_then(|raw| serde_json::from_str::<Value>(raw.get()).ok());
    let mut changed = false;
    if present.as_ref() != Some(&wanted) {
        if present.is_some_and(|present| !is_ours(&present)) {
            bail!("its runtime {name:?} is not ringfence-runtime; rename or remove it first");
        }
        runtimes.set(&name, to_raw_value(&wanted)?);
        root.set("runtimes", runtimes.to_raw(&Style::of(text), 1)?);
        changed = true;
    }
    if registration.set_as_default {
        let default = root.get("default-runtime").map(|raw| serde_json::from_str::<Value>(raw.get())).transpose()?;
        match default.as_ref().map(|default| default.as_str().unwrap_or("")) {
            Some(default) if *default == name => {}
            None | Some("runc") => {
                root.set("default-runtime", to_raw_value(&name)?);
                changed = true;
            }
            Some(other) => bail!(
                "its default-runtime is {other:?}, which ringfence-runtime would replace for every container; take that out first"
            ),
        }
    }
    if changed { root.render(text) } else { Ok(text.to_owned()) }
}

/// The link to `binary` that stands for a profile. docker calls it as it is; a runtime with arguments by a shell script.
pub fn link(binary: &str, policy: &str) -> String {
    format!("{binary}-{policy}")
}

/// Whether `program` can only be a link to `binary` that stands for a profile.
pub fn is_link(program: &Path, binary: &Path) -> bool {
    let begin = link(&binary.to_string_lossy(), "");
    program.to_str().is_some_and(|program| program.starts_with(&begin))
}

/// `text` without any registration; `None` if nothing else is in it.
pub fn unconfigure(text: &str) -> Result<Option<String>> {
    let mut root = Object::parse(text)?;
    let mut runtimes = runtimes(&root)?;
    let ours: Vec<String> =
        runtimes.members.iter().filter(|(name, raw)| is_named_ours(name, raw)).map(|(name, _)| name.clone()).collect();
    let default = root.get("default-runtime").and_then(|raw| serde_json::from_str::<String>(raw.get()).ok());
    if ours.is_empty() {
        return Ok(Some(text.to_owned()));
    }
    runtimes.members.retain(|(name, _)| !ours.contains(name));
    if runtimes.members.is_empty() {
        root.members.retain(|(key, _)| key != "runtimes");
    } else {
        root.set("runtimes", runtimes.to_raw(&Style::of(text), 1)?);
    }
    if default.is_some_and(|default| ours.contains(&default)) {
        root.members.retain(|(key, _)| key != "default-runtime");
    }
    if root.members.is_empty() { Ok(None) } else { root.render(text).map(Some) }
}

/// The names of our runtimes in `text`, each with its program.
pub fn registered(text: &str) -> Result<Vec<(String, PathBuf)>> {
    let runtimes = runtimes(&Object::parse(text)?)?;
    let ours = runtimes.members.iter().filter(|(name, raw)| is_named_ours(name, raw));
    Ok(ours.map(|(name, raw)| (name.clone(), path_of(raw).unwrap_or_default().into())).collect())
}

/// What registers the runtime.
pub fn configure_host(host: &Host, options: &Options) -> Result<Plan> {
    let runtime = host.config()?.runtime.path;
    host.require_program(&runtime)?;
    let policy = options.policy.as_deref().unwrap_or("default");
    if !is_plain_name(policy) {
        bail!("--policy {policy:?} must be letters, digits, dashes, dots and underscores");
    }
    let binary = runtime.to_str().context("runtime.path must be UTF-8")?.to_owned();
    let mut registration = Registration {
        has_link: host.is_program(Path::new(&link(&binary, policy))),
        binary,
        policy: policy.to_owned(),
        set_as_default: options.set_as_default,
    };
    let mut plan = Plan::default();
    if let Some(flag) = flags::find(host, DEFAULT_RUNTIME)?.filter(|_| options.set_as_default) {
        let (file, value) = (flag.file.display(), &flag.value);
        if *value != registration.name() {
            bail!(
                "dockerd is told --{DEFAULT_RUNTIME}={value} in {file}, and does not start when daemon.json names a default, too; \
                 take the flag out of that file first, or have it name {}, nothing was changed",
                registration.name()
            );
        }
        registration.set_as_default = false;
        plan.notes.push(format!("it is the default already, by --{DEFAULT_RUNTIME} in {file}"));
    }
    let path = config_path(host, options)?;
    let text = host.read(&path)?.unwrap_or_default();
    let new = configure(&text, &registration);
    let new = new.with_context(|| format!("cannot register with {}, nothing was changed", path.display()))?;
    plan.set(host, &path, Some(new))?;
    if !plan.changes.is_empty() {
        plan.next = Some(RELOAD);
    }
    plan.notes.push(format!("containers choose it by `docker run --runtime {}`", registration.name()));
    Ok(plan)
}

/// dockerd reads runtimes and the default runtime again on SIGHUP.
const RELOAD: &str = "systemctl reload docker (running containers stay)";

/// What takes all runtimes of ours out.
pub fn unconfigure_host(host: &Host, options: &Options) -> Result<Plan> {
    let path = config_path(host, options)?;
    let mut plan = Plan::default();
    let Some(text) = host.read(&path)?.filter(|text| text.contains(NAME)) else { return Ok(plan) };
    let ours = registered(&text).unwrap_or_default();
    if let Some(flag) =
        flags::find(host, DEFAULT_RUNTIME)?.filter(|flag| ours.iter().any(|(name, _)| *name == flag.value))
    {
        let (file, value) = (flag.file.display(), flag.value);
        bail!(
            "dockerd is told --{DEFAULT_RUNTIME}={value} in {file}, and does not start without that runtime; take the flag out first"
        );
    }
    let new = unconfigure(&text).with_context(|| format!("{}; mend it first, nothing was changed", path.display()))?;
    if new.as_deref() != Some(&text) {
        plan.set(host, &path, new)?;
        plan.next = Some(RELOAD);
    }
    Ok(plan)
}

/// The flag, and without dashes the key of [`DEFAULT`], that names the runtime of containers which ask for none.
pub const DEFAULT_RUNTIME: &str = "default-runtime";

/// The file that dockerd reads: what the administrator says, or else its flag, or else [`DEFAULT`].
pub fn config_path(host: &Host, options: &Options) -> Result<PathBuf> {
    match &options.config {
        Some(path) => Ok(path.clone()),
        None => Ok(flags::find(host, "config-file")?.map_or(DEFAULT.into(), |flag| flag.value.into())),
    }
}

/// What `text` says of [`DEFAULT_RUNTIME`].
pub fn default_runtime(text: &str) -> Result<Option<String>> {
    let root = Object::parse(text)?;
    Ok(root.get(DEFAULT_RUNTIME).and_then(|raw| serde_json::from_str(raw.get()).ok()))
}

fn runtimes(root: &Object) -> Result<Object> {
    match root.get("runtimes") {
        None => Ok(Object::default()),
        Some(raw) => Object::parse(raw.get()).context("its \"runtimes\""),
    }
}

fn path_of(raw: &RawValue) -> Option<String> {
    Some(serde_json::from_str::<Value>(raw.get()).ok()?.get("path")?.as_str()?.to_owned())
}

fn is_ours(runtime: &Value) -> bool {
    let path = runtime.get("path").and_then(Value::as_str).unwrap_or("");
    let name = Path::new(path).file_name().and_then(OsStr::to_str);
    let rest = name.and_then(|name| name.strip_prefix("ringfence-runtime"));
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
}

fn is_named_ours(name: &str, raw: &RawValue) -> bool {
    (name == NAME || name.starts_with("ringfence-"))
        && serde_json::from_str::<Value>(raw.get()).is_ok_and(|runtime| is_ours(&runtime))
}
