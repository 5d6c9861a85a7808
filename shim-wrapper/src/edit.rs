//! What becomes of a container's `config.json`: our hook in it, and for modes passthrough and exclusive the device's nodes.

use crate::json::{self, Object};
use ringfence_hook::state::{Annotations, DeviceRule};
use serde::Deserialize;
use serde_json::json;

/// The name by which every registration of our hook calls it, whatever its path: `args[0]`.
const HOOK_NAME: &str = "ringfence-hook";
/// The stages at which our hook joins a container. The second is what `createRuntime` was called before runtime-spec 1.0.2,
/// and may be in what engines and CDI wrote; we write the first, which runc and crun have since 1.0.
const JOINING: [&str; 2] = ["createRuntime", "prestart"];
/// The stage at which it cleans up.
const LEAVING: &str = "poststop";

/// Why `config.json` cannot be edited.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)]
pub enum Error {
    #[error("{member} is no {needed}; the engine that wrote it must make it one")]
    WrongType { member: &'static str, needed: &'static str },
    #[error("{member} is there twice; the engine that wrote it must give it once")]
    Repeated { member: &'static str },
    #[error(
        "{member} is written {found}, which not every runtime takes for it; the engine that wrote it must write it as it is"
    )]
    Misspelt { member: &'static str, found: String },
    #[error(
        "linux.devices has another device at {path} than the host, {found} instead of {expected}; do not give the container a device of that name"
    )]
    OtherDevice { path: String, found: String, expected: String },
}

/// What the decision needs of a `config.json`.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// All annotations.
    pub annotations: Annotations,
    /// Whether there is a process to run.
    pub has_process: bool,
    /// Where the container is accounted.
    pub cgroups_path: Option<String>,
    /// The profile that a hook of ours, put there by the engine or CDI, is already told.
    pub policy: Option<String>,
}

impl Facts {
    /// Reads them from `config`.
    pub fn of(config: &Object<'_>) -> Result<Self, Error> {
        for member in ["annotations", "hooks", "linux", "process"] {
            is_plain(config, member, member)?;
        }
        let annotations = match config.get("annotations") {
            Some(text) => serde_json::from_str(text)
                .map_err(|_| Error::WrongType { member: "annotations", needed: "object of strings" })?,
            None => Annotations::new(),
        };
        let linux = config.get("linux").and_then(|text| serde_json::from_str(text).ok());
        let hooks = config.get("hooks").and_then(|text| Object::parse(text).ok());
        for stage in [JOINING[0], JOINING[1], LEAVING] {
            hooks.as_ref().map_or(Ok(()), |hooks| is_plain(hooks, stage, member_of(stage)))?;
        }
        let joining = JOINING.iter().flat_map(|stage| ours(hooks.as_ref()?.get(stage)?).ok()).flatten();
        Ok(Self {
            annotations,
            has_process: config.get("process").is_some(),
            cgroups_path: linux.and_then(|linux: Linux| linux.cgroups_path),
            policy: joining.filter_map(|entry| entry.policy().map(str::to_owned)).next(),
        })
    }

    /// Whether [`Self::cgroups_path`] is of systemd's form, `slice:prefix:name`, which runtimes take for a directory's name
    /// if nobody tells them.
    pub fn is_systemd_path(&self) -> bool {
        let parts: Vec<_> = self.cgroups_path.as_deref().unwrap_or("").split(':').collect();
        match parts[..] {
            [slice, prefix, name] => {
                let parent = slice.strip_suffix(".slice").unwrap_or("");
                !parent.is_empty() && !slice.contains('/') && !prefix.is_empty() && !name.is_empty()
            }
            _ => false,
        }
    }
}

/// Whether all runtimes take the same for this member of `object`, called `member` in messages.
fn is_plain(object: &Object<'_>, name: &str, member: &'static str) -> Result<(), Error> {
    if object.repeats(name) {
        return Err(Error::Repeated { member });
    }
    object.misspells(name).map_or(Ok(()), |found| Err(Error::Misspelt { member, found }))
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Linux {
    cgroups_path: Option<String>,
}

/// A hook as `config.json` has it.
#[derive(Deserialize)]
struct Entry {
    #[serde(default)]
    args: Vec<String>,
}

impl Entry {
    fn is_ours(&self) -> bool {
        self.args.first().is_some_and(|name| name == HOOK_NAME)
    }

    fn policy(&self) -> Option<&str> {
        let after = self.args.iter().skip_while(|argument| *argument != "--policy");
        let inline = self.args.iter().find_map(|argument| argument.strip_prefix("--policy="));
        inline.or_else(|| after.map(String::as_str).nth(1))
    }
}

/// Our own among the hooks of a stage.
fn ours(stage: &str) -> serde_json::Result<Vec<Entry>> {
    let entries = json::elements(stage)?.into_iter().filter_map(|entry| serde_json::from_str::<Entry>(entry).ok());
    Ok(entries.filter(Entry::is_ours).collect())
}

/// Our hook, as it is to be called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hook {
    /// The program.
    pub path: String,
    /// Seconds.
    pub timeout: u32,
    /// Its whole environment. Never empty: without one, hooks inherit the runtime's or even the image's.
    pub env: Vec<String>,
    /// The profile that it is told.
    pub policy: Option<String>,
}

/// A device node of the host, to be at the same path in the container.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Node {
    pub path: String,
    pub major: u32,
    pub minor: u32,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
}

/// Device nodes that a container is to have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Nodes {
    /// Made and allowed by the runtime.
    pub made: Vec<Node>,
    /// Numbers, major and minor, of those that are only allowed: the hook brings them.
    pub allowed: Vec<(u32, u32)>,
}

impl Nodes {
    /// Numbers of all that need a rule, where there are `rules` or not: without any, a runtime may allow all devices, and a first
    /// rule would take them away.
    fn numbers(&self, rules: bool) -> impl Iterator<Item = (u32, u32)> {
        let allowed = self.allowed.iter().copied().filter(move |_| rules);
        self.made.iter().map(|node| (node.major, node.minor)).chain(allowed)
    }
}

/// Makes `config` call `hook` and have `nodes`; answers whether anything had to be changed.
pub fn edit(config: &mut Object<'_>, hook: &Hook, nodes: &Nodes) -> Result<bool, Error> {
    let mut changed = within(config, "hooks", "hooks", |hooks| {
        // Both, whatever the first answers.
        Ok(join(hooks, hook)? | leave(hooks, hook)?)
    })?;
    if *nodes != Nodes::default() {
        changed |= within(config, "linux", "linux", |linux| {
            is_plain(linux, "devices", "linux.devices")?;
            is_plain(linux, "resources", "linux.resources")?;
            let mut changed = devices(linux, &nodes.made)?;
            changed |= within(linux, "resources", "linux.resources", |resources| allow(resources, nodes))?;
            Ok(changed)
        })?;
    }
    Ok(changed)
}

/// First in its stage: a hook that fails before ours would leave nothing of ours to undo, and none must see a container that
/// is not joined yet.
fn join(hooks: &mut Object<'_>, hook: &Hook) -> Result<bool, Error> {
    for stage in JOINING {
        let Some(text) = hooks.get(stage) else { continue };
        let found = ours(text).map_err(|_| Error::WrongType { member: member_of(stage), needed: ARRAY })?;
        // One that is told no profile does not serve a container that was enabled by naming one.
        if found.iter().any(|entry| hook.policy.is_none() || entry.policy().is_some()) {
            return Ok(false);
        }
    }
    let mut args = vec![HOOK_NAME, JOINING[0]];
    args.extend(hook.policy.iter().flat_map(|policy| ["--policy", policy]));
    prepend(hooks, JOINING[0], hook.entry(&args))
}

/// First as well: runc skips the hooks that follow one that failed.
fn leave(hooks: &mut Object<'_>, hook: &Hook) -> Result<bool, Error> {
    let found = ours(hooks.get(LEAVING).unwrap_or("[]"));
    let found = found.map_err(|_| Error::WrongType { member: member_of(LEAVING), needed: ARRAY })?;
    if found.is_empty() { prepend(hooks, LEAVING, hook.entry(&[HOOK_NAME, LEAVING])) } else { Ok(false) }
}

const ARRAY: &str = "array";

fn member_of(stage: &str) -> &'static str {
    match stage {
        "createRuntime" => "hooks.createRuntime",
        "prestart" => "hooks.prestart",
        _ => "hooks.poststop",
    }
}

impl Hook {
    fn entry(&self, args: &[&str]) -> String {
        json!({"path": self.path, "args": args, "env": self.env, "timeout": self.timeout}).to_string()
    }
}

fn prepend(hooks: &mut Object<'_>, stage: &'static str, entry: String) -> Result<bool, Error> {
    let wrong = |_| Error::WrongType { member: member_of(stage), needed: ARRAY };
    let mut entries = json::elements(hooks.get(stage).unwrap_or("[]")).map_err(wrong)?;
    entries.insert(0, &entry);
    let all = json::array(&entries);
    hooks.set(stage, all);
    Ok(true)
}

#[derive(Deserialize)]
#[serde(default)]
#[derive(Default)]
struct Device {
    path: String,
    #[serde(rename = "type")]
    kind: String,
    major: i64,
    minor: i64,
}

fn devices(linux: &mut Object<'_>, nodes: &[Node]) -> Result<bool, Error> {
    let wrong = |_| Error::WrongType { member: "linux.devices", needed: "array of devices" };
    let text = linux.get("devices").unwrap_or("[]");
    let there: Vec<Device> = serde_json::from_str(text).map_err(wrong)?;
    let mut added = Vec::new();
    for node in nodes {
        let Some(found) = there.iter().find(|device| device.path == node.path) else {
            let Node { path, major, minor, mode, uid, gid } = node;
            added.push(
                json!({"path": path, "type": "c", "major": major, "minor": minor, "fileMode": mode, "uid": uid, "gid": gid})
                    .to_string(),
            );
            continue;
        };
        let expected = format!("c {}:{}", node.major, node.minor);
        let found = format!("{} {}:{}", found.kind, found.major, found.minor);
        // `u` is an older name for `c`.
        if found.replacen('u', "c", 1) != expected {
            return Err(Error::OtherDevice { path: node.path.clone(), found, expected });
        }
    }
    append(linux, "devices", &added).map_err(wrong)
}

/// Last, because later rules take precedence and the first usually denies all.
fn allow(resources: &mut Object<'_>, nodes: &Nodes) -> Result<bool, Error> {
    is_plain(resources, "devices", "linux.resources.devices")?;
    let wrong = |_| Error::WrongType { member: "linux.resources.devices", needed: "array of rules" };
    let text = resources.get("devices").unwrap_or("[]");
    let there: Vec<DeviceRule> = serde_json::from_str(text).map_err(wrong)?;
    let numbers = nodes.numbers(!there.is_empty());
    let missing = numbers.filter(|(major, minor)| !there.iter().any(|rule| rule.is_for(*major, *minor)));
    let rule = |(major, minor): (u32, u32)| {
        json!({"allow": true, "type": "c", "major": major, "minor": minor, "access": "rwm"}).to_string()
    };
    let added: Vec<_> = missing.map(rule).collect();
    append(resources, "devices", &added).map_err(wrong)
}

fn append(parent: &mut Object<'_>, name: &str, added: &[String]) -> serde_json::Result<bool> {
    if added.is_empty() {
        return Ok(false);
    }
    let mut all = json::elements(parent.get(name).unwrap_or("[]"))?;
    all.extend(added.iter().map(String::as_str));
    let all = json::array(&all);
    parent.set(name, all);
    Ok(true)
}

/// Changes the object `name` of `parent`, which is made if it is missing or null.
fn within(
    parent: &mut Object<'_>,
    name: &str,
    member: &'static str,
    change: impl FnOnce(&mut Object<'_>) -> Result<bool, Error>,
) -> Result<bool, Error> {
    let text = {
        let wrong = |_| Error::WrongType { member, needed: "object" };
        let mut object = Object::parse(parent.get(name).unwrap_or("{}")).map_err(wrong)?;
        if !change(&mut object)? {
            return Ok(false);
        }
        object.to_text()
    };
    parent.set(name, text);
    Ok(true)
}

#[cfg(test)]
mod tests;
