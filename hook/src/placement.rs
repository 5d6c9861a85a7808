//! Where a proxy is accounted: beside its container, under the same parent, with limits of its own.
//!
//! Never in the container's own cgroup: runc could not delete that, its freezer would stop the proxy, and the container's
//! limits would be the proxy's. Nothing here can fail a container's start. What cannot be had is a warning on record, and the
//! proxy stays in the cgroups of the runtime that called the hook.

use crate::cgroup::{self, Membership};
use crate::config;
use crate::rootless;
use crate::state::Rdma;
use crate::systemd::{self, Scope};
use rustix::fs::{Mode, OFlags};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// Controllers of version 1 in whose hierarchies a proxy is placed. Not cpuset, which needs to be told its CPUs before anything
/// runs in it; not freezer or devices, which are none of the proxy's business.
const CONTROLLERS: [&str; 5] = ["memory", "pids", "cpu", "cpuacct", "rdma"];
/// Those that systemd does not manage.
const NOT_SYSTEMDS: [&str; 1] = ["rdma"];

/// What a proxy may use.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Bytes.
    pub memory_max: Option<u64>,
    /// Threads.
    pub pids_max: u32,
    /// Objects by RDMA device. The kernel charges whoever opens the device, which for this container is the proxy.
    pub rdma: BTreeMap<String, Rdma>,
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
    /// Decides where the proxy of the container `id`, whose init is `pid`, is to be. Nothing is made yet.
    pub fn plan(config: &config::Proxy, pid: i32, id: &str, rdma: BTreeMap<String, Rdma>) -> Self {
        // Without root there are no cgroups to make.
        if config.cgroup == config::Cgroup::Inherit || rootless::user().is_some() {
            return Self::default();
        }
        let limits = Limits { memory_max: config.memory_max, pids_max: config.pids_max, rdma };
        match cgroup::of(pid) {
            Ok(mut memberships) => {
                memberships.retain(|membership| membership.is_root || membership.holds(pid));
                Self::among(&memberships, id, limits, systemd::runs())
            }
            Err(error) => {
                let warnings = vec![format!("the container's cgroups cannot be read ({error}); {INHERITED}")];
                Self { warnings, ..Self::default() }
            }
        }
    }

    fn among(memberships: &[Membership], id: &str, limits: Limits, systemd_runs: bool) -> Self {
        let mut placement = Self { limits, ..Self::default() };
        let controls = |m: &Membership| CONTROLLERS.iter().any(|controller| m.controls(controller));
        let version_1 = memberships.iter().any(controls);
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
            match directory.make().and_then(|()| directory.open(&mut entrances)) {
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

    fn limit(&mut self) {
        // The scope has its own way to limits, except for those that systemd does not know.
        if self.scope.is_none() {
            if let Some(bytes) = self.limits.memory_max {
                self.set("memory", "memory-max", "memory.limit_in_bytes", "memory.max", &bytes.to_string());
            }
            self.set("pids", "pids-max", "pids.max", "pids.max", &self.limits.pids_max.to_string());
        }
        for (device, limit) in self.limits.rdma.clone() {
            self.set("rdma", "linux.resources.rdma", "rdma.max", "rdma.max", &limit.line(&device));
        }
    }

    fn set(&mut self, controller: &str, name: &str, version_1: &str, version_2: &str, value: &str) {
        let found = self.directories.iter().find_map(|directory| match directory.controllers.is_empty() {
            true => Some(directory.path.join(version_2)),
            false => directory.controllers.iter().any(|c| c == controller).then(|| directory.path.join(version_1)),
        });
        let why = match found.map(|path| write_existing(&path, value).map_err(|error| (path, error))) {
            Some(Ok(())) => return,
            Some(Err((path, error))) if error.kind() == io::ErrorKind::NotFound => {
                format!("the {controller} controller is not enabled for {}", path.parent().unwrap_or(&path).display())
            }
            Some(Err((path, error))) => format!("{}: {error}", path.display()),
            None => format!("the {controller} controller is not there"),
        };
        self.warnings.push(format!("{name} = {value} is not enforced: {why}"));
    }

    /// Asks systemd to take the proxy, which has just been started. It does so meanwhile.
    pub fn ask_systemd(&mut self, proxy: i32) {
        if let Some(scope) = &self.scope {
            match scope.request(proxy, &self.limits) {
                Ok(request) => self.request = Some(request),
                Err(error) => self.refused_by_systemd(&error.to_string()),
            }
        }
    }

    /// Sees that the proxy, which is ready, is where it ought to be.
    pub fn check(&mut self, proxy: i32) {
        if let Some(request) = self.request.take() {
            match request.wait(proxy) {
                Ok(()) => self.limit_in_scope(proxy),
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
    }

    /// systemd has no property for the rdma controller, and leaves it alone.
    fn limit_in_scope(&mut self, proxy: i32) {
        if self.limits.rdma.is_empty() || !self.directories.is_empty() {
            return;
        }
        let unified = cgroup::of(proxy).unwrap_or_default().into_iter().find(|m| m.controllers.is_empty());
        let mut inside = Self {
            directories: unified
                .map(|m| Directory { path: m.directory, controllers: Vec::new() })
                .into_iter()
                .collect(),
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

impl Directory {
    fn make(&self) -> io::Result<()> {
        match std::fs::create_dir(&self.path) {
            // Left by a crash, or another container's, whose id begins with our prefix.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                match std::fs::read_to_string(self.path.join("cgroup.procs"))?.is_empty() {
                    true => Ok(()),
                    false => Err(io::Error::other("it is there already and has processes")),
                }
            }
            result => result,
        }
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
mod tests {
    use super::*;

    fn membership(controllers: &str, directory: &str) -> Membership {
        let controllers = controllers.split(',').filter(|c| !c.is_empty()).map(str::to_owned).collect();
        Membership { controllers, directory: directory.into(), is_root: directory.ends_with('/') }
    }

    fn plan(memberships: &[(&str, &str)], systemd_runs: bool) -> Placement {
        let memberships: Vec<_> = memberships.iter().map(|(c, d)| membership(c, d)).collect();
        Placement::among(&memberships, "c1", Limits::default(), systemd_runs)
    }

    fn paths(placement: &Placement) -> Vec<String> {
        placement.paths().iter().map(|path| path.display().to_string()).collect()
    }

    #[test]
    fn version_1_has_a_place_for_each_controller_that_matters() {
        let v1 = [
            ("memory", "/cg/memory/pod/c1"),
            ("cpu,cpuacct", "/cg/cpu/pod/c1"),
            ("pids", "/cg/pids/"),
            ("devices", "/cg/devices/pod/c1"),
            ("name=systemd", "/cg/systemd/pod/c1"),
            ("", "/cg/unified/pod/c1"),
        ];
        assert_eq!(paths(&plan(&v1, false)), ["/cg/memory/pod/ringfence-c1", "/cg/cpu/pod/ringfence-c1"]);
        // Not in a slice: none of systemd's business.
        assert_eq!(paths(&plan(&v1, true)).len(), 2);
    }

    #[test]
    fn version_2_is_one_place() {
        assert_eq!(paths(&plan(&[("", "/cg/pod/c1")], true)), ["/cg/pod/ringfence-c1"]);
        // A name alone makes no slice of systemd's.
        let placement = plan(&[("", "/cg/x.slice/runc-c1.scope")], false);
        assert_eq!((paths(&placement), placement.unit()), (vec!["/cg/x.slice/ringfence-c1".into()], None));
    }

    #[test]
    fn slices_are_systemds() {
        for (directory, slice, before) in [
            ("/cg/kubepods-pod1.slice/cri-containerd-c1.scope", "kubepods-pod1.slice", Some("cri-containerd-c1.scope")),
            ("/cg/machine.slice/libpod-c1.scope/container", "machine.slice", Some("libpod-c1.scope")),
            ("/cg/system.slice/c1", "system.slice", None),
        ] {
            let placement = plan(&[("", directory)], true);
            let scope = placement.scope.as_ref().unwrap();
            assert_eq!((scope.slice.as_str(), scope.before.as_deref()), (slice, before), "{directory}");
            assert_eq!((placement.unit(), paths(&placement).len()), (Some("ringfence-c1.scope"), 0));
        }
        // A service's own subtree was delegated to it.
        assert_eq!(
            paths(&plan(&[("", "/cg/system.slice/x.service/c1")], true)),
            ["/cg/system.slice/x.service/ringfence-c1"]
        );
        let v1 = [("memory", "/cg/memory/a.slice/x-c1.scope"), ("rdma", "/cg/rdma/a.slice/x-c1.scope")];
        assert_eq!(paths(&plan(&v1, true)), ["/cg/rdma/a.slice/ringfence-c1"]);
    }

    #[test]
    fn without_a_cgroup_of_its_own_there_is_a_warning() {
        let placement = plan(&[("", "/cg/")], false);
        assert_eq!((paths(&placement).len(), placement.warnings().len()), (0, 1));
        assert!(placement.warnings()[0].contains("no cgroup of its own"), "{:?}", placement.warnings());
    }

    #[test]
    fn what_cannot_be_limited_is_a_warning() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pod/ringfence-c1");
        std::fs::create_dir_all(&path).unwrap();
        std::fs::write(path.join("pids.max"), "").unwrap();
        let rdma = BTreeMap::from([("mlx5_0".to_owned(), Rdma { hca_handles: Some(3), hca_objects: None })]);
        let mut placement = Placement {
            directories: vec![Directory { path: path.clone(), controllers: Vec::new() }],
            limits: Limits { memory_max: Some(1 << 30), pids_max: 9, rdma },
            ..Placement::default()
        };
        placement.limit();
        assert_eq!(std::fs::read_to_string(path.join("pids.max")).unwrap(), "9");
        let at = path.display();
        assert_eq!(
            placement.warnings(),
            [
                format!("memory-max = 1073741824 is not enforced: the memory controller is not enabled for {at}"),
                format!(
                    "linux.resources.rdma = mlx5_0 hca_handle=3 is not enforced: the rdma controller is not enabled for {at}"
                ),
            ]
        );
    }

    #[test]
    fn somebody_elses_cgroup_is_not_used() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ringfence-c1");
        std::fs::create_dir(&path).unwrap();
        std::fs::write(path.join("cgroup.procs"), "17\n").unwrap();
        let mut placement =
            Placement { directories: vec![Directory { path, controllers: Vec::new() }], ..Placement::default() };
        assert!(placement.make().unified.is_none() && placement.paths().is_empty());
        assert!(placement.warnings()[0].contains("has processes"), "{:?}", placement.warnings());
    }
}
