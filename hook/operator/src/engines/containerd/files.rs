//! Which of containerd's files the registration belongs into.
//!
//! containerd 1.x lets an imported file replace the whole CRI section of those before it, 2.x merges them. The last file
//! that has a CRI section is right for both: what stands there counts.

use super::{File, Registration, dump};
use crate::engines::Options;
use crate::engines::host::Host;
use crate::engines::plan::Plan;
use anyhow::{Context, Result, anyhow, bail};
use std::collections::VecDeque;
use std::path::{Path, PathBuf};

/// containerd's main configuration file.
pub const DEFAULT: &str = "/etc/containerd/config.toml";
/// Distributions that render the file of a containerd of their own: program, directory, unit.
const RENDERED: [(&str, &str, &str); 2] = [
    ("k3s", "/var/lib/rancher/k3s/agent/etc/containerd", "systemctl restart k3s (or k3s-agent)"),
    ("rke2", "/var/lib/rancher/rke2/agent/etc/containerd", "systemctl restart rke2-server (or rke2-agent)"),
];
const RESTART: &str = "systemctl restart containerd (running containers stay)";
/// More files than anybody imports; containerd itself has no bound.
const MAX_FILES: usize = 256;

/// A configuration file with what it holds.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// As the host names it.
    pub path: PathBuf,
    /// The whole of it.
    pub text: String,
    /// Parsed.
    pub file: File,
}

/// Where the registration goes.
pub struct Place {
    /// The file that containerd is started with.
    pub main: PathBuf,
    /// All files, in the order in which containerd reads them; none if there is no main file.
    pub files: Vec<Loaded>,
    /// The file to be edited or made; otherwise what the administrator has to do.
    target: Result<PathBuf, String>,
    restart: &'static str,
}

impl Place {
    /// Finds it.
    pub fn find(host: &Host, config: Option<&Path>) -> Result<Self> {
        if let (None, false) = (config, host.exists(Path::new(DEFAULT))) {
            for (program, directory, restart) in RENDERED {
                if host.exists(Path::new(directory)) {
                    return Self::rendered(host, program, Path::new(directory), restart);
                }
            }
        }
        let main = config.unwrap_or(Path::new(DEFAULT)).to_owned();
        let files = load(host, &main)?;
        let owner = files.iter().rev().find(|loaded| loaded.file.has_cri());
        let target = owner.map_or(&main, |owner| &owner.path).clone();
        Ok(Self { main, files, target: Ok(target), restart: RESTART })
    }

    /// k3s writes the main file anew at each start, but lets it import a directory of others.
    fn rendered(host: &Host, program: &str, directory: &Path, restart: &'static str) -> Result<Self> {
        let main = directory.join("config.toml");
        let files = load(host, &main)?;
        let drop_ins = directory.join("config-v3.toml.d");
        let pattern = drop_ins.join("*.toml");
        let imports = files.first().map(|main| main.file.imports()).unwrap_or_default();
        let is_imported = imports.iter().any(|path| Path::new(path) == pattern);
        let merges = files.first().is_some_and(|main| main.file.version() >= 3);
        let target = if is_imported && merges {
            Ok(drop_ins.join("ringfence.toml"))
        } else {
            Err(format!(
                "{program} writes {} anew at each start; put a runtime {} into its template {}, after \
                 {{{{ template \"base\" . }}}}: runtime_type = {:?}, pod_annotations = {:?}, options.BinaryName = {:?}",
                main.display(),
                super::NAME,
                directory.join("config.toml.tmpl").display(),
                super::RUNTIME_TYPE,
                super::ANNOTATIONS,
                host.config()?.runtime.path
            ))
        };
        Ok(Self { main, files, target, restart })
    }

    /// The file of the registration, as it is.
    pub fn loaded(&self) -> Option<&Loaded> {
        let target = self.target.as_ref().ok()?;
        self.files.iter().find(|loaded| loaded.path == *target)
    }
}

/// The main file and all that it imports, in containerd's order.
pub fn load(host: &Host, main: &Path) -> Result<Vec<Loaded>> {
    let mut files: Vec<Loaded> = Vec::new();
    let mut pending = VecDeque::from([main.to_owned()]);
    while let Some(path) = pending.pop_front() {
        if files.iter().any(|loaded| loaded.path == path) {
            continue;
        }
        let text = match host.read(&path)? {
            Some(text) => text,
            None if path == main => return Ok(files),
            None => bail!("{} imports {}, which does not exist; mend that first", main.display(), path.display()),
        };
        let file = File::parse(&text)
            .map_err(|error| anyhow!("{}: {error}; mend it first, nothing was changed", path.display()))?;
        for import in file.imports() {
            pending.extend(resolve(host, &path, &import)?);
        }
        files.push(Loaded { path, text, file });
        if files.len() > MAX_FILES {
            bail!("{} imports more than {MAX_FILES} files", main.display());
        }
    }
    Ok(files)
}

fn resolve(host: &Host, parent: &Path, import: &str) -> Result<Vec<PathBuf>> {
    let path = parent.parent().unwrap_or(Path::new("/")).join(import);
    if !import.contains('*') {
        return Ok(vec![path]);
    }
    let (Some(directory), Some(name)) = (path.parent(), path.file_name().and_then(|name| name.to_str())) else {
        bail!("{}: the import {import:?} cannot be understood", parent.display());
    };
    if directory.to_string_lossy().contains('*') {
        bail!("{}: the import {import:?} has an asterisk in a directory; list the directories", parent.display());
    }
    let pattern = glob::Pattern::new(name)
        .with_context(|| format!("{}: the import {import:?} cannot be understood", parent.display()))?;
    let Ok(entries) = std::fs::read_dir(host.locate(directory)?) else { return Ok(Vec::new()) };
    let mut names: Vec<_> = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
    names.retain(|name| pattern.matches(name));
    names.sort();
    Ok(names.into_iter().map(|name| directory.join(name)).collect())
}

/// What registers the runtime.
pub fn configure(host: &Host, options: &Options) -> Result<Plan> {
    let runtime = host.config()?.runtime.path;
    host.require_program(&runtime)?;
    let place = Place::find(host, options.config.as_deref())?;
    let target = place.target.as_ref().map_err(|advice| anyhow!("{advice}"))?;
    if let Some(loaded) = place.files.iter().find(|loaded| loaded.file.disables_cri()) {
        bail!(
            "{} disables containerd's CRI plugin; ctr and nerdctl need no registration (--runtime \
             io.containerd.ringfence.v2), and for Kubernetes take \"cri\" out of its disabled_plugins first",
            loaded.path.display()
        );
    }
    let registration = Registration {
        binary: runtime.to_str().context("runtime.path must be UTF-8")?.to_owned(),
        set_as_default: options.set_as_default,
        runc: place.files.iter().rev().find_map(|loaded| loaded.file.runc()),
    };
    let new = match place.loaded() {
        Some(loaded) => {
            let new = super::configure(&loaded.text, &registration);
            new.with_context(|| format!("cannot register with {}, nothing was changed", target.display()))?
        }
        None => super::create(&registration, place.files.first().map_or(2, |main| main.file.version()))?,
    };
    let mut plan = Plan::default();
    plan.set(host, target, Some(new.clone()))?;
    if !plan.changes.is_empty() {
        plan.next = Some(place.restart);
        if let Some(program) = dump::program(host).filter(|_| place.restart == RESTART) {
            dump::compare(&program, &place, target, &new, &registration)?;
        }
    }
    if !options.set_as_default {
        plan.notes.push(format!("pods choose it by a RuntimeClass with handler: {}", super::NAME));
    }
    Ok(plan)
}

/// What takes the runtime out again, from all files.
pub fn unconfigure(host: &Host, options: &Options) -> Result<Plan> {
    let mut plan = Plan::default();
    let place = match Place::find(host, options.config.as_deref()) {
        Ok(place) => place,
        // What is wrong there is no business of ours then.
        Err(_) if !names_us(host, options.config.as_deref().unwrap_or(Path::new(DEFAULT))) => return Ok(plan),
        Err(error) => return Err(error),
    };
    for loaded in &place.files {
        let new = super::unconfigure(&loaded.text).map_err(|error| error.context(loaded.path.display().to_string()))?;
        if new.as_deref() != Some(&loaded.text) {
            plan.set(host, &loaded.path, new)?;
            plan.next = Some(place.restart);
        }
    }
    Ok(plan)
}

fn names_us(host: &Host, path: &Path) -> bool {
    !matches!(host.read(path), Ok(text) if !text.as_ref().is_some_and(|text| text.contains(super::NAME)))
}
