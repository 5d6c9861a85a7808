//! podman: its hooks.d files, and a drop-in of containers.conf.

use super::host::Host;
use super::plan::Plan;
use super::{Options, hooks_d};
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use toml_edit::{Array, DocumentMut, value};

const HEADER: &str = "# Written by `ringfence configure`; `ringfence unconfigure` removes it.\n";
/// The name of our drop-in, here and with CRI-O.
pub const DROP_IN: &str = "50-ringfence.conf";

/// Where podman's files are.
#[derive(Debug)]
pub struct Files {
    /// Files and directories that podman reads in this order, without ours.
    pub read: Vec<PathBuf>,
    /// Ours.
    pub drop_in: PathBuf,
    /// Our hooks.d files are in it.
    pub hooks: PathBuf,
}

impl Files {
    /// root's, or the user's.
    pub fn of(host: &Host, config: Option<&Path>) -> Self {
        let mut read: Vec<PathBuf> = [
            "/usr/share/containers/containers.conf",
            "/etc/containers/containers.conf",
            "/etc/containers/containers.conf.d",
        ]
        .map(PathBuf::from)
        .into();
        let (directory, hooks) = match host.user_config() {
            None => (PathBuf::from("/etc/containers/containers.conf.d"), hooks_d::SYSTEM.into()),
            Some(user) => {
                let user = user.join("containers");
                read.extend([user.join("containers.conf"), user.join("containers.conf.d")]);
                (user.join("containers.conf.d"), user.join("oci/hooks.d"))
            }
        };
        Self { read, drop_in: config.map_or_else(|| directory.join(DROP_IN), Path::to_owned), hooks }
    }

    /// The directories of hooks that podman would use without our drop-in.
    pub fn hooks_directories(&self, host: &Host) -> Result<Option<Vec<PathBuf>>> {
        let files = hooks_d::read_all(host, &self.read, ".conf", &self.drop_in)?;
        hooks_d::directories(&files, "engine")
    }
}

/// Our drop-in. `hooks` are the directories to be named, if that is needed.
pub fn drop_in(runtime: &Path, hooks: Option<&[PathBuf]>, set_as_default: bool) -> Result<String> {
    let mut document = DocumentMut::new();
    let engine = document.entry("engine").or_insert(toml_edit::table()).as_table_mut().context("a table")?;
    engine.set_implicit(true);
    if let Some(hooks) = hooks {
        engine["hooks_dir"] = value(hooks.iter().map(|path| path.display().to_string()).collect::<Array>());
    }
    if set_as_default {
        engine["runtime"] = value("ringfence");
    }
    let runtimes = engine.entry("runtimes").or_insert(toml_edit::table());
    runtimes["ringfence"] = value(Array::from_iter([runtime.to_str().context("runtime.path must be UTF-8")?]));
    Ok(format!("{HEADER}{document}"))
}

/// What registers hooks and runtime.
pub fn configure(host: &Host, options: &Options) -> Result<Plan> {
    let config = host.config()?;
    host.require_program(&config.runtime.path)?;
    let files = Files::of(host, options.config.as_deref());
    // Without any hooks_dir podman has its default, which is SYSTEM, also for root's containers only.
    let directories = files.hooks_directories(host)?.unwrap_or_else(|| vec![hooks_d::SYSTEM.into()]);
    let hooks = hooks_d::with(&directories, &files.hooks);
    let mut plan = Plan::default();
    check_ours(host, &files.drop_in)?;
    plan.set(host, &files.drop_in, Some(drop_in(&config.runtime.path, hooks.as_deref(), options.set_as_default)?))?;
    hooks_d::write(&mut plan, host, &files.hooks, &config.hook)?;
    if let Some(name) = std::env::var_os("CONTAINERS_CONF").filter(|_| host.is_local()) {
        plan.notes.push(format!("CONTAINERS_CONF={} is set: podman then reads no drop-in", name.display()));
    }
    plan.notes.push("containers choose it by `podman run --annotation ringfence.dev/enable=true`".into());
    Ok(plan)
}

/// What takes both out again, the hooks first: podman refuses all containers while a hook's program is missing.
pub fn unconfigure(host: &Host, options: &Options) -> Result<Plan> {
    let files = Files::of(host, options.config.as_deref());
    let mut plan = Plan::default();
    let crio = Path::new(super::crio::DIRECTORY).join(DROP_IN);
    if files.hooks == Path::new(hooks_d::SYSTEM) && host.exists(&crio) {
        plan.notes
            .push(format!("{} stays as it is, CRI-O uses it: ringfence unconfigure --engine crio", hooks_d::SYSTEM));
    } else {
        hooks_d::remove(&mut plan, host, &files.hooks)?;
    }
    remove_drop_in(&mut plan, host, &files.drop_in)?;
    Ok(plan)
}

/// Refuses to replace a file that is not ours.
pub fn check_ours(host: &Host, path: &Path) -> Result<()> {
    match host.read(path)? {
        Some(text) if !text.starts_with(HEADER) && !text.trim().is_empty() => {
            bail!(
                "{} is not written by `ringfence configure`; name another file by --config or remove it",
                path.display()
            )
        }
        _ => Ok(()),
    }
}

/// Has `plan` remove our drop-in; one that is not ours stays.
pub fn remove_drop_in(plan: &mut Plan, host: &Host, path: &Path) -> Result<()> {
    match check_ours(host, path) {
        Ok(()) => plan.set(host, path, None),
        Err(error) => {
            plan.notes.push(error.to_string());
            Ok(())
        }
    }
}

/// `text` behind the line by which [`check_ours`] knows it.
pub fn with_header(text: &str) -> String {
    format!("{HEADER}{text}")
}
