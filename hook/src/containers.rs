//! The containers of this node that were joined.

use crate::config::Config;
use crate::failure::{Code, During, Failure};
use crate::process::Process;
use crate::record::{Record, Records};
use crate::session;
use crate::trust;
use ringfence_launch::Limits;
use ringfence_launch::counters::Page;
use serde::Serialize;
use std::io;
use std::path::PathBuf;

/// A container, as far as its record and the processes tell.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Container {
    /// Its id, unique on the node.
    pub id: String,
    /// Its init; `None` if the record cannot be read.
    pub init: Option<Status>,
    /// Its proxy; `None` in mode passthrough, and before there is one.
    pub proxy: Option<Status>,
    /// Name of its RDMA device; empty if not known.
    pub device: String,
    /// Name of its policy; empty if not known.
    pub policy: String,
    /// The limits that its proxy was started with; `None` in mode passthrough.
    pub limits: Option<Limits>,
    /// When it was made, in seconds since 1970; 0 if not known.
    pub since: u64,
    /// cgroups made for its proxy. Without these and `unit` the proxy is accounted with its runtime.
    pub cgroups: Vec<PathBuf>,
    /// systemd's unit for its proxy.
    pub unit: Option<String>,
    /// What the proxy has in memory.
    pub memory: Option<Memory>,
    /// What is not as it should be, one line each.
    pub warnings: Vec<String>,
}

/// A process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Status {
    /// On the host.
    pub pid: i32,
    /// Whether it is still that process and has not ended.
    pub alive: bool,
}

/// Resident memory of a proxy, in bytes (`proc_pid_status(5)`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Memory {
    /// Its own, and its program (RssAnon, RssFile).
    pub own: u64,
    /// Shared with containers: registered memory and queues (RssShmem).
    pub shared: u64,
}

impl From<Process> for Status {
    fn from(process: Process) -> Self {
        Self { pid: process.pid, alive: process.is_alive() }
    }
}

/// All containers that were joined and not yet cleaned up, by id.
///
/// # Errors
/// If the run-time directory cannot be read. One record that cannot is a container with a warning.
pub fn containers(config: &Config) -> Result<Vec<Container>, Failure> {
    let what = || format!("records in {}", config.run_dir.display());
    let records = match session::open_run_dir(&config.run_dir).and_then(|run_dir| Records::find(&run_dir)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        result => result.during(Code::Internal, what)?,
    };
    let mut ids = records.containers().during(Code::Internal, what)?;
    ids.sort();
    let found = ids.into_iter().filter_map(|id| match trust::load(config, &records, &id) {
        // Gone since it was listed.
        Ok(None) => None,
        Ok(Some(record)) => Some(describe(config, record)),
        Err(error) => Some(unreadable(id, &error)),
    });
    Ok(found.collect())
}

/// What the proxy of a container has counted. Nothing in it is to be believed: a proxy that was taken over writes what it likes.
///
/// # Errors
/// One line that says why there is nothing.
pub fn counters(config: &Config, container: &Container) -> Result<Page, String> {
    match (&container.init, &container.proxy) {
        (None, _) => return Err("its record cannot be read, see ringfence list".into()),
        (Some(_), None) => return Err("it has no proxy: in mode passthrough nobody counts".into()),
        _ => {}
    }
    session::read_counters(&config.run_dir, &container.id).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => "there are no counters: its proxy has ended, or is of an earlier version".into(),
        _ => format!("its counters are of no use: {error}"),
    })
}

fn describe(config: &Config, record: Record) -> Container {
    let (init, proxy) = (Status::from(record.init), record.proxy.map(Status::from));
    let mut warnings = record.warnings;
    match (init.alive, proxy) {
        (true, Some(Status { pid, alive: false })) => warnings.push(format!(
            "its proxy (pid {pid}) has ended, so that all its verbs fail; restart the container, and see the kernel's log"
        )),
        (false, _) => warnings.push("it has ended, and its poststop has not come; ringfence gc removes what is left".into()),
        _ => {}
    }
    Container {
        limits: session::read_launch(&config.run_dir, &record.container).ok().map(|launch| launch.limits),
        memory: record.proxy.filter(|proxy| proxy.is_alive()).and_then(memory),
        id: record.container,
        init: Some(init),
        proxy,
        device: record.device,
        policy: record.policy,
        since: record.since,
        cgroups: record.cgroups,
        unit: record.unit,
        warnings,
    }
}

fn unreadable(id: String, error: &io::Error) -> Container {
    Container {
        id,
        init: None,
        proxy: None,
        device: String::new(),
        policy: String::new(),
        limits: None,
        since: 0,
        cgroups: Vec::new(),
        unit: None,
        memory: None,
        warnings: vec![match trust::is_doubt(error) {
            true => {
                format!("its record is not believed: {error}; ringfence gc removes it, and does nothing that it says")
            }
            false => format!("its record cannot be read: {error}; ringfence gc removes it"),
        }],
    }
}

fn memory(proxy: Process) -> Option<Memory> {
    memory_in(&std::fs::read_to_string(format!("/proc/{}/status", proxy.pid)).ok()?)
}

fn memory_in(status: &str) -> Option<Memory> {
    let field = |name: &str| {
        let value = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        value.trim().strip_suffix(" kB")?.parse::<u64>().ok()?.checked_mul(1024)
    };
    Some(Memory { own: field("RssAnon")?.checked_add(field("RssFile")?)?, shared: field("RssShmem")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_told_apart() {
        let status = "Name:\tx\nRssAnon:\t     100 kB\nRssFile:\t      20 kB\nRssShmem:\t       3 kB\n";
        assert_eq!(memory_in(status), Some(Memory { own: 120 << 10, shared: 3 << 10 }));
        assert_eq!(memory_in("Name:\tx\n"), None);
    }

    #[test]
    fn a_node_without_containers_has_none() {
        let directory = tempfile::tempdir().unwrap();
        for run_dir in [directory.path().to_owned(), directory.path().join("missing")] {
            assert_eq!(containers(&Config { run_dir, ..Config::default() }), Ok(Vec::new()));
        }
    }

    #[test]
    fn a_record_that_cannot_be_read_is_shown() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("state")).unwrap();
        std::fs::write(directory.path().join("state/c1.json"), "{\"container").unwrap();
        let found = containers(&Config { run_dir: directory.path().into(), ..Config::default() }).unwrap();
        assert_eq!((found.len(), found[0].id.as_str(), found[0].init), (1, "c1", None));
        assert!(found[0].warnings[0].contains("cannot be read: EOF"), "{found:?}");
    }
}
