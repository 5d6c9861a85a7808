//! Where a proxy is accounted: beside its container, under the same parent, with limits of its own.
//!
//! Never in the container's own cgroup: runc could not delete that, its freezer would stop the proxy, and the container's
//! memory would be the proxy's. Nothing here can fail a container's start. What cannot be had is a warning on record, and the
//! proxy stays in the cgroups of the runtime that called the hook.

mod cpu;

use crate::cgroup::{self, Membership};
use crate::config;
use crate::rootless;
use crate::state::{Bundle, Rdma};
use crate::systemd::{self, Scope};
use rustix::fs::{Mode, OFlags};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

#[cfg(test)]
pub use cpu::Time;
pub use cpu::{Cpu, USUAL_PERIOD, Weight};

/// Controllers of version 1 in whose hierarchies a proxy is placed. Not freezer or devices, which are none of the proxy's
/// business.
const CONTROLLERS: [&str; 6] = ["memory", "pids", "cpu", "cpuacct", "cpuset", "rdma"];
/// Those that systemd does not manage there.
const NOT_SYSTEMDS: [&str; 2] = ["cpuset", "rdma"];

/// What a proxy may use.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Bytes.
    pub memory_max: Option<u64>,
    /// Threads.
    pub pids_max: u32,
    /// Objects by RDMA device. The kernel charges whoever opens the device, which for this container is the proxy.
    pub rdma: BTreeMap<String, Rdma>,
    /// Processors. The proxy works for the container, and must not be its way around the limits of its own work.
    pub cpu: Cpu,
}

/// A limit, as the files of a cgroup take it.
struct Setting {
    /// What it is called, and its value.
    name: String,
    controller: &'static str,
    version_1: Vec<(&'static str, String)>,
    version_2: Vec<(&'static str, String)>,
}

/// The places of one proxy.
#[derive(Debug, Default)]
pub struct Placement {
    /// Directories that the hook makes.
    directories: Vec<Directory>,
    /// What systemd makes.
    scope: Option<Scope>,
    request: Option<systemd::Request>,
    limits: Limits,
    /// Whether controllers are those of version 1.
    version_1: bool,
    warnings: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Directory {
    path: PathBuf,
    /// Empty for version 2.
    controllers: Vec<String>,
}

/// How a new process gets into its cgroups, on the cheapest way that there is: writing to `cgroup.procs` waits for all
/// processors, some 10 ms.
#[derive(Debug, Default)]
pub struct Entrances {
    /// `tasks` of version 1, for a process of one thread to write itself to.
    pub tasks: Vec<File>,
    /// The directory of version 2, to be born in.
    pub unified: Option<OwnedFd>,
}

impl Placement {
    /// Decides where the proxy of the container `id` of `bundle`, whose init is `pid`, is to be. Nothing is made yet.
    pub fn plan(config: &config::Proxy, pid: i32, id: &str, bundle: &Bundle) -> Self {
        // Without root there are no cgroups to make.
        if config.cgroup == config::Cgroup::Inherit || rootless::user().is_some() {
            return Self::default();
        }
        match cgroup::of(pid) {
            Ok(mut memberships) => {
                memberships.retain(|membership| membership.is_root || membership.holds(pid));
                let limits = Limits {
                    memory_max: config.memory_max,
                    pids_max: config.pids_max,
                    rdma: bundle.rdma_limits(),
                    cpu: Cpu::of(config, &memberships, id, &bundle.cpu()),
                };
                Self::among(&memberships, id, limits, systemd::runs())
            }
            Err(error) => {
                let warnings = vec![format!("the container's cgroups cannot be read ({error}); {INHERITED}")];
                Self { warnings, ..Self::default() }
            }
        }
    }

    fn among(memberships: &[Membership], id: &str, limits: Limits, systemd_runs: bool) -> Self {
        let controls = |m: &Membership| CONTROLLERS.iter().any(|controller| m.controls(controller));
        let version_1 = memberships.iter().any(controls);
        let mut placement = Self { limits, version_1, ..Self::default() };
        // In a hybrid the controllers are elsewhere, and version 2 only tracks processes for systemd.
        let matters = |m: &&Membership| !m.is_root && if version_1 { controls(m) } else { m.controllers.is_empty() };
        for membership in memberships.iter().filter(matters) {
            let own = outermost(&membership.directory, id);
            let Some(parent) = own.parent() else { continue };
            let systemds = !NOT_SYSTEMDS.iter().any(|controller| membership.controls(controller));
            if systemd_runs && systemds && has_extension(parent, "slice") {
                placement.scope = Some(Scope::beside(own, parent, id));
            } else {
                let path = parent.join(format!("ringfence-{id}"));
                placement.directories.push(Directory { path, controllers: membership.controllers.clone() });
            }
        }
        if placement.directories.is_empty() && placement.scope.is_none() {
            placement
                .warnings
                .push(format!("the container has no cgroup of its own that can be seen here; {INHERITED}"));
        }
        placement
    }

    /// What the hook is about to make and somebody has to remove.
    pub fn paths(&self) -> Vec<PathBuf> {
        self.directories.iter().map(|directory| directory.path.clone()).collect()
    }

    /// The unit that systemd is to make, and removes itself.
    pub fn unit(&self) -> Option<&str> {
        self.scope.as_ref().map(|scope| scope.unit.as_str())
    }

    /// What was not as it should be.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Makes the directories, sets their limits, and opens the ways into them.
    pub fn make(&mut self) -> Entrances {
        let mut entrances = Entrances::default();
        let mut made = Vec::new();
        for directory in std::mem::take(&mut self.directories) {
            let ready = directory.make().and_then(|()| self.fill(&directory));
            match ready.and_then(|()| directory.open(&mut entrances)) {
                Ok(()) => made.push(directory),
                Err(error) => {
                    self.warnings
                        .push(format!("cgroup {} cannot be used ({error}); {INHERITED}", directory.path.display()));
                }
            }
        }
        self.directories = made;
        if !self.directories.is_empty() {
            self.limit();
        }
        entrances
    }

    /// A cpuset of version 1 takes in nobody before it is told its CPUs and memory nodes; as many as the parent's, if not
    /// those that are wanted.
    fn fill(&mut self, directory: &Directory) -> io::Result<()> {
        if !directory.controls("cpuset") {
            return Ok(());
        }
        let Cpu { cpus, mems, .. } = self.limits.cpu.clone();
        for (file, wanted) in [("cpuset.cpus", cpus), ("cpuset.mems", mems)] {
            let path = directory.path.join(file);
            if let Some(list) = wanted {
                match write_existing(&path, &list) {
                    Ok(()) => continue,
                    Err(error) => {
                        self.warnings.push(format!("{file} = {list} is not enforced: {}: {error}", path.display()));
                    }
                }
            }
            let parents = directory.path.with_file_name(file);
            write_existing(&path, std::fs::read_to_string(parents)?.trim())?;
        }
        Ok(())
    }

    fn limit(&mut self) {
        // The scope has its own way to limits, except for those that systemd does not know.
        if self.scope.is_none() {
            let whole = |name: &str, controller, file_1, file_2, value: String| Setting {
                name: format!("{name} = {value}"),
                controller,
                version_1: vec![(file_1, value.clone())],
                version_2: vec![(file_2, value)],
            };
            if let Some(bytes) = self.limits.memory_max {
                let bytes = bytes.to_string();
                self.set(&whole("memory-max", "memory", "memory.limit_in_bytes", "memory.max", bytes));
            }
            let threads = self.limits.pids_max.to_string();
            self.set(&whole("pids-max", "pids", "pids.max", "pids.max", threads));
            let settings: Vec<_> = self.limits.cpu.first().collect();
            let filled = self.directories.iter().any(|directory| directory.controls("cpuset"));
            settings.iter().filter(|setting| !filled || setting.controller != "cpuset").for_each(|s| self.set(s));
        }
        for (device, limit) in self.limits.rdma.clone() {
            let line = limit.line(&device);
            let name = format!("linux.resources.rdma = {line}");
            let files = vec![("rdma.max", line)];
            self.set(&Setting { name, controller: "rdma", version_1: files.clone(), version_2: files });
        }
    }

    fn set(&mut self, setting: &Setting) {
        let found = self.directories.iter().find_map(|directory| match directory.controllers.is_empty() {
            true => Some((directory, &setting.version_2)),
            false => directory.controls(setting.controller).then_some((directory, &setting.version_1)),
        });
        let Some((directory, files)) = found else {
            let Setting { name, controller, .. } = setting;
            return self.warnings.push(format!("{name} is not enforced: the {controller} controller is not there"));
        };
        let failed = files.iter().find_map(|(file, value)| {
            let path = directory.path.join(file);
            write_existing(&path, value).err().map(|error| (path, error))
        });
        if let Some((path, error)) = failed {
            let warning = setting.refused(&path, &error);
            self.warnings.push(warning);
        }
    }

    /// Asks systemd to take the proxy, which has just been started. It does so meanwhile.
    pub fn ask_systemd(&mut self, proxy: i32) {
        if let Some(scope) = &self.scope {
            let mut limits = self.limits.clone();
            if self.version_1 {
                // A directory of ours has them.
                (limits.cpu.cpus, limits.cpu.mems) = (None, None);
            }
            match scope.request(proxy, &limits) {
                Ok(request) => self.request = Some(request),
                Err(error) => self.refused_by_systemd(&error.to_string()),
            }
        }
    }

    /// Sees that the proxy, which is ready, is where it ought to be, and has it take no more time than it may from now on.
    pub fn check(&mut self, proxy: i32) {
        let in_directories = self.scope.is_none() && !self.directories.is_empty();
        if let Some(request) = self.request.take() {
            match request.wait(proxy) {
                Ok(()) => {
                    let memberships = cgroup::of(proxy).unwrap_or_default();
                    let unified = memberships.into_iter().find(|membership| membership.controllers.is_empty());
                    if let Some(unified) = unified.filter(|_| !self.version_1) {
                        self.check_scope(&unified.directory);
                        self.limit_in_scope(unified.directory);
                    }
                }
                Err(error) => self.refused_by_systemd(&error),
            }
        }
        for directory in &self.directories {
            let path = &directory.path;
            let procs = std::fs::read_to_string(path.join("cgroup.procs")).unwrap_or_default();
            if !procs.lines().any(|line| line.parse() == Ok(proxy)) {
                self.warnings.push(format!("the proxy could not be moved to {}; {INHERITED}", path.display()));
            }
        }
        if let Some(time) = self.limits.cpu.last().filter(|_| in_directories) {
            self.set(&time);
        }
    }

    /// systemd leaves out what the kernel has no controller for, and says nothing of it.
    fn check_scope(&mut self, directory: &Path) {
        let Self { limits, warnings, .. } = self;
        for setting in limits.cpu.first().chain(limits.cpu.last()) {
            for (file, _) in &setting.version_2 {
                let path = directory.join(file);
                match std::fs::read_to_string(&path) {
                    Ok(text) if text.trim().is_empty() || text.starts_with("max ") => {
                        warnings.push(format!("{} is not enforced: systemd did not set {file}", setting.name));
                    }
                    Ok(_) => {}
                    Err(error) => warnings.push(setting.refused(&path, &error)),
                }
            }
        }
    }

    /// systemd has no property for the rdma controller, and leaves it alone.
    fn limit_in_scope(&mut self, directory: PathBuf) {
        if self.limits.rdma.is_empty() || !self.directories.is_empty() {
            return;
        }
        let mut inside = Self {
            directories: vec![Directory { path: directory, controllers: Vec::new() }],
            scope: self.scope.take(),
            limits: std::mem::take(&mut self.limits),
            ..Self::default()
        };
        inside.limit();
        self.warnings.append(&mut inside.warnings);
        (self.scope, self.limits) = (inside.scope.take(), std::mem::take(&mut inside.limits));
    }

    fn refused_by_systemd(&mut self, why: &str) {
        let unit = self.scope.take().map(|scope| scope.unit).unwrap_or_default();
        self.warnings.push(format!("systemd did not make {unit} ({why}); {INHERITED}"));
    }
}

const INHERITED: &str = "the proxy is accounted with the runtime that called the hook, without limits of its own";

/// The outermost cgroup that is the container's: crun puts containers one level below their scope.
fn outermost<'a>(directory: &'a Path, id: &str) -> &'a Path {
    let is_its_scope = |path: &&Path| {
        has_extension(path, "scope") && path.file_stem().is_some_and(|stem| stem.to_string_lossy().contains(id))
    };
    directory.parent().filter(is_its_scope).unwrap_or(directory)
}

fn has_extension(path: &Path, expected: &str) -> bool {
    path.extension().is_some_and(|extension| extension == expected)
}

impl Setting {
    /// What is said of it if the file `path` of a cgroup could not be written.
    fn refused(&self, path: &Path, error: &io::Error) -> String {
        let Self { name, controller, .. } = self;
        let why = match error.kind() {
            io::ErrorKind::NotFound => {
                format!("the {controller} controller is not enabled for {}", path.parent().unwrap_or(path).display())
            }
            _ => format!("{}: {error}", path.display()),
        };
        format!("{name} is not enforced: {why}")
    }
}

impl Directory {
    fn make(&self) -> io::Result<()> {
        match std::fs::create_dir(&self.path) {
            // Left by a crash, or another container's, whose id begins with our prefix.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                if !std::fs::read_to_string(self.path.join("cgroup.procs"))?.is_empty() {
                    return Err(io::Error::other("it is there already and has processes"));
                }
                // Another's limits may stand in it.
                cgroup::remove(&self.path)?;
                std::fs::create_dir(&self.path)
            }
            result => result,
        }
    }

    /// Whether it is of version 1, in the hierarchy of `controller`.
    fn controls(&self, controller: &str) -> bool {
        self.controllers.iter().any(|bound| bound == controller)
    }

    fn open(&self, entrances: &mut Entrances) -> io::Result<()> {
        if self.controllers.is_empty() {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            entrances.unified = Some(rustix::fs::open(&self.path, flags, Mode::empty())?);
        } else {
            entrances.tasks.push(File::options().write(true).open(self.path.join("tasks"))?);
        }
        Ok(())
    }
}

/// Files of a cgroup are the kernel's to create.
fn write_existing(path: &Path, value: &str) -> io::Result<()> {
    File::options().write(true).open(path)?.write_all(value.as_bytes())
}

#[cfg(test)]
mod tests;
