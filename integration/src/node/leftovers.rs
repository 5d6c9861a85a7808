//! What of ours is on a node, and should not be when its containers are gone.

use super::Node;
use crate::command::wait_until;
use anyhow::{Context, Result, bail};
use std::fmt;
use std::path::Path;
use std::time::Duration;

/// How long the last of it may take to go: a proxy drains, and a control group stays busy for a moment.
const PATIENCE: Duration = Duration::from_secs(20);

/// What of ours is on a node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Leftovers {
    /// Command lines of proxies, hooks, runtimes and shims.
    pub processes: Vec<String>,
    /// Mount points, in any process's mount namespace.
    pub mounts: Vec<String>,
    /// Control groups.
    pub cgroups: Vec<String>,
    /// Files, sockets and containers' directories in the run-time directory.
    pub files: Vec<String>,
}

impl Leftovers {
    /// What there is now.
    pub fn of(node: &Node) -> Result<Self> {
        let mut found = Self::default();
        for (pid, words) in node.processes()? {
            let program = words.first().map_or("", String::as_str);
            if Path::new(program).file_name().is_some_and(|name| name.to_string_lossy().contains("ringfence")) {
                found.processes.push(format!("{pid} {}", words.join(" ")));
            }
            found.add_mounts(&node.path(&format!("/proc/{pid}/mountinfo")));
        }
        found.add_mounts(&node.path("/proc/1/mountinfo"));
        found.mounts.sort();
        found.mounts.dedup();
        walk(&node.path("/sys/fs/cgroup"), &mut |path| {
            let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            if path.is_dir() && name.contains("ringfence") {
                found.cgroups.push(path.display().to_string());
            }
        });
        let run_dir = node.path("/run/ringfence");
        walk(&run_dir, &mut |path| {
            let relative = path.strip_prefix(&run_dir).unwrap_or(path);
            // What `ringfence doctor` tells of later, what proxies said, and the tables of all ports; of bounded size.
            if ["failures.jsonl", "proxies.jsonl", "fabric/gids", "fabric/identities"]
                .iter()
                .any(|kept| relative == Path::new(kept))
            {
                return;
            }
            let is_containers = relative.starts_with("containers") && relative.components().count() == 2;
            if is_containers || !path.is_dir() {
                found.files.push(relative.display().to_string());
            }
        });
        Ok(found)
    }

    fn add_mounts(&mut self, mountinfo: &Path) {
        // The process may have ended.
        let text = std::fs::read_to_string(mountinfo).unwrap_or_default();
        for line in text.lines() {
            let mut fields = line.split(' ').skip(3);
            let (root, point) = (fields.next().unwrap_or_default(), fields.next().unwrap_or_default());
            // A control group's mount has the name of the test's sandbox in its root.
            let is_ours = [root, point].iter().any(|path| {
                path.contains("/ringfence/") || path.contains("/ld.so.preload") || path.contains("/ld.so.ringfence")
            }) || point.ends_with("/ringfence");
            if is_ours {
                self.mounts.push(format!("{root} on {point}"));
            }
        }
    }
}

impl fmt::Display for Leftovers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (what, found) in [
            ("processes", &self.processes),
            ("mounts", &self.mounts),
            ("control groups", &self.cgroups),
            ("files in /run/ringfence", &self.files),
        ] {
            if !found.is_empty() {
                writeln!(f, "{what}: {}", found.join("; "))?;
            }
        }
        Ok(())
    }
}

impl Node {
    /// Fails if anything of ours is left, given a moment to go.
    pub fn is_clean(&self) -> Result<()> {
        let mut found = Leftovers::default();
        let mut trouble = None;
        let gone = wait_until("nothing of ours to be left", PATIENCE, || match Leftovers::of(self) {
            Ok(now) => {
                found = now;
                found == Leftovers::default()
            }
            Err(error) => {
                trouble = Some(error);
                true
            }
        });
        match (gone, trouble) {
            (_, Some(error)) => Err(error).context("cannot look for what is left"),
            (Ok(()), None) => Ok(()),
            (Err(_), None) => bail!("left on the node:\n{found}"),
        }
    }

    /// How many descriptors a process of the node has.
    pub fn descriptors(&self, pid: i32) -> Result<usize> {
        let dir = self.path(&format!("/proc/{pid}/fd"));
        Ok(std::fs::read_dir(&dir).with_context(|| format!("no process {pid} on the node"))?.count())
    }
}

/// Calls `see` with everything below `dir`, without following links. What vanishes meanwhile is not seen.
fn walk(dir: &Path, see: &mut dyn FnMut(&Path)) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        see(&path);
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            walk(&path, see);
        }
    }
}
