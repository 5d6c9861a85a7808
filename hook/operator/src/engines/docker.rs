//! docker's `daemon.json`: runtimes that enable RDMA.
//!
//! Values that we do not touch keep their text, however they are written.

use super::host::Host;
use super::plan::Plan;
use super::{Options, is_plain_name};
use anyhow::{Context, Result, bail};
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::value::{RawValue, to_raw_value};
use serde_json::{Value, json};
use std::fmt::{self, Write};
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
    let wanted = json!({"path": registration.binary, "runtimeArgs": ["--ringfence-policy", registration.policy]});
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
    let registration = Registration {
        binary: runtime.to_str().context("runtime.path must be UTF-8")?.to_owned(),
        policy: policy.to_owned(),
        set_as_default: options.set_as_default,
    };
    let path = options.config.as_deref().unwrap_or(Path::new(DEFAULT));
    let text = host.read(path)?.unwrap_or_default();
    let new = configure(&text, &registration);
    let new = new.with_context(|| format!("cannot register with {}, nothing was changed", path.display()))?;
    let mut plan = Plan::default();
    plan.set(host, path, Some(new))?;
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
    let path = options.config.as_deref().unwrap_or(Path::new(DEFAULT));
    let mut plan = Plan::default();
    let Some(text) = host.read(path)? else { return Ok(plan) };
    let new = unconfigure(&text).with_context(|| format!("{}; mend it first, nothing was changed", path.display()))?;
    if new.as_deref() != Some(&text) {
        plan.set(host, path, new)?;
        plan.next = Some(RELOAD);
    }
    Ok(plan)
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
    Path::new(path).file_name().is_some_and(|name| name == "ringfence-runtime")
}

fn is_named_ours(name: &str, raw: &RawValue) -> bool {
    (name == NAME || name.starts_with("ringfence-"))
        && serde_json::from_str::<Value>(raw.get()).is_ok_and(|runtime| is_ours(&runtime))
}

/// An object's members in their order, their values as they are written.
#[derive(Debug, Default)]
struct Object {
    members: Vec<(String, Box<RawValue>)>,
}

impl Object {
    /// Parses a whole text; blank and `null` are empty objects, as they are for dockerd.
    fn parse(text: &str) -> Result<Self> {
        if matches!(text.trim(), "" | "null") {
            return Ok(Self::default());
        }
        serde_json::from_str(text).map_err(|error| anyhow::anyhow!("its JSON is broken: {error}"))
    }

    fn get(&self, key: &str) -> Option<&RawValue> {
        self.members.iter().find(|(name, _)| name == key).map(|(_, raw)| &**raw)
    }

    fn set(&mut self, key: &str, value: Box<RawValue>) {
        match self.members.iter_mut().find(|(name, _)| name == key) {
            Some((_, present)) => *present = value,
            None => self.members.push((key.to_owned(), value)),
        }
    }

    fn write(&self, style: &Style, level: usize) -> Result<String> {
        let mut text = String::from("{");
        for (i, (key, raw)) in self.members.iter().enumerate() {
            text.push_str(if i == 0 { "" } else { "," });
            write!(text, "{}{}:{}{}", style.newline(level), serde_json::to_string(key)?, style.space(), raw.get())?;
        }
        if !self.members.is_empty() {
            text.push_str(&style.newline(level - 1));
        }
        text.push('}');
        Ok(text)
    }

    fn to_raw(&self, style: &Style, level: usize) -> Result<Box<RawValue>> {
        Ok(RawValue::from_string(self.write(style, level + 1)?)?)
    }

    /// As a whole file in the style of `text`, its end included.
    fn render(&self, text: &str) -> Result<String> {
        let end = if text.trim().is_empty() { "\n" } else { &text[text.trim_end().len()..] };
        Ok(self.write(&Style::of(text), 1)? + end)
    }
}

impl<'de> Deserialize<'de> for Object {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Members;
        impl<'de> Visitor<'de> for Members {
            type Value = Object;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Object, A::Error> {
                let mut object = Object::default();
                while let Some((key, raw)) = map.next_entry::<String, Box<RawValue>>()? {
                    if object.get(&key).is_some() {
                        return Err(serde::de::Error::custom(format!("the key {key:?} is there twice")));
                    }
                    object.members.push((key, raw));
                }
                Ok(object)
            }
        }
        deserializer.deserialize_map(Members)
    }
}

/// How a file is indented.
struct Style {
    /// `None` if it is all in one line.
    indent: Option<String>,
    line_end: &'static str,
}

impl Style {
    fn of(text: &str) -> Self {
        let line_end = if text.contains("\r\n") { "\r\n" } else { "\n" };
        let first = text.lines().find(|line| line.starts_with([' ', '\t']) && line.trim_start().starts_with('"'));
        let indent = first.map(|line| line[..line.len() - line.trim_start().len()].to_owned());
        let is_one_line = text.trim().contains(':') && !text.trim().contains('\n');
        Self { indent: if is_one_line { None } else { Some(indent.unwrap_or_else(|| "  ".into())) }, line_end }
    }

    fn newline(&self, level: usize) -> String {
        match &self.indent {
            Some(indent) => format!("{}{}", self.line_end, indent.repeat(level)),
            None => String::new(),
        }
    }

    fn space(&self) -> &'static str {
        if self.indent.is_some() { " " } else { "" }
    }
}
