//! CRI-O: a drop-in, and the hooks.d files that it shares with podman.

use super::host::Host;
use super::plan::Plan;
use super::podman::{DROP_IN, Files, check_ours, remove_drop_in, with_header};
use super::{Options, hooks_d};
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};
use toml_edit::{Array, DocumentMut, Item, Table, value};

/// Drop-ins, read after [`MAIN`] in the order of their names.
pub const DIRECTORY: &str = "/etc/crio/crio.conf.d";
/// The main configuration file.
pub const MAIN: &str = "/etc/crio/crio.conf";
const RESTART: &str = "systemctl restart crio (running containers stay)";
/// CRI-O's packages keep their runc and crun in a directory of their own.
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/usr/libexec/crio";

/// Our drop-in. `hooks` are the directories to be named, if that is needed.
pub fn drop_in(runtime: &Path, hooks: Option<&[PathBuf]>, set_as_default: bool) -> Result<String> {
    let mut handler = Table::new();
    handler["runtime_path"] = value(runtime.to_str().context("runtime.path must be UTF-8")?);
    handler["runtime_type"] = value("oci");
    handler["runtime_root"] = value("/run/runc");
    handler["monitor_env"] = value(Array::from_iter([PATH]));
    let mut section = Table::new();
    section.set_implicit(true);
    if set_as_default {
        section["default_runtime"] = value("ringfence");
    }
    if let Some(hooks) = hooks {
        section["hooks_dir"] = value(hooks.iter().map(|path| path.display().to_string()).collect::<Array>());
    }
    let mut runtimes = Table::new();
    runtimes.set_implicit(true);
    runtimes["ringfence"] = Item::Table(handler);
    section["runtimes"] = Item::Table(runtimes);
    let mut crio = Table::new();
    crio.set_implicit(true);
    crio["runtime"] = Item::Table(section);
    let mut document = DocumentMut::new();
    document["crio"] = Item::Table(crio);
    Ok(with_header(&document.to_string()))
}

/// Ours, or the file that was named.
pub fn path(config: Option<&Path>) -> PathBuf {
    config.map_or_else(|| Path::new(DIRECTORY).join(DROP_IN), Path::to_owned)
}

/// The directories of hooks that CRI-O would use without `drop_in`.
pub fn hooks_directories(host: &Host, drop_in: &Path) -> Result<Option<Vec<PathBuf>>> {
    let files = hooks_d::read_all(host, &[MAIN.into(), DIRECTORY.into()], "", drop_in)?;
    hooks_d::directories(&files, "crio.runtime")
}

/// What registers hooks and runtime.
pub fn configure(host: &Host, options: &Options) -> Result<Plan> {
    let config = host.config()?;
    host.require_program(&config.runtime.path)?;
    let path = path(options.config.as_deref());
    let directories = hooks_directories(host, &path)?.unwrap_or_else(|| vec![hooks_d::SYSTEM.into()]);
    let hooks = hooks_d::with(&directories, Path::new(hooks_d::SYSTEM));
    check_ours(host, &path)?;
    let mut plan = Plan::default();
    plan.set(host, &path, Some(drop_in(&config.runtime.path, hooks.as_deref(), options.set_as_default)?))?;
    hooks_d::write(&mut plan, host, Path::new(hooks_d::SYSTEM), &config.hook)?;
    if !plan.changes.is_empty() {
        plan.next = Some(RESTART);
    }
    plan.notes.push(
        "pods choose it by the annotation ringfence.dev/enable, or by a RuntimeClass with handler: ringfence".into(),
    );
    Ok(plan)
}

/// What takes both out again, the hooks first.
pub fn unconfigure(host: &Host, options: &Options) -> Result<Plan> {
    let path = path(options.config.as_deref());
    let mut plan = Plan::default();
    if host.exists(&Files::of(host, None).drop_in) {
        plan.notes
            .push(format!("{} stays as it is, podman uses it: ringfence unconfigure --engine podman", hooks_d::SYSTEM));
    } else {
        hooks_d::remove(&mut plan, host, Path::new(hooks_d::SYSTEM))?;
    }
    remove_drop_in(&mut plan, host, &path)?;
    if !plan.changes.is_empty() {
        plan.next = Some(RESTART);
    }
    Ok(plan)
}
