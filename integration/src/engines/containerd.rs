//! containerd and `ctr`.

use super::Member;
use crate::command::{Ended, Running, wait_until};
use crate::node::{ARCHIVE, IMAGE, LIMIT, Node};
use anyhow::{Context, Result};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

static NEXT: AtomicU32 = AtomicU32::new(0);

/// The namespace of containers that `ctr` starts.
const NAMESPACE: &str = "default";

/// A running containerd. Killed, without its containers, when dropped.
#[derive(Debug)]
pub struct Containerd {
    daemon: Running,
}

/// A container that `ctr` started. Killed and removed when dropped.
#[derive(Debug)]
pub struct Container<'a> {
    node: &'a Node,
    id: String,
}

impl Containerd {
    /// Starts containerd with the node's config.toml and waits until it answers.
    pub fn start(node: &Node) -> Result<Self> {
        let mut daemon = node.spawn(&["containerd"])?;
        wait_until("containerd to answer", Duration::from_secs(20), || {
            daemon.has_ended() || node.attempt(&["ctr", "version"]).is_ok_and(|ended| ended.status.success())
        })
        .with_context(|| daemon.output())?;
        anyhow::ensure!(!daemon.has_ended(), "containerd ended at once:\n{}", daemon.output());
        Ok(Self { daemon })
    }

    /// Asks it to end, as an upgrade does; its containers live on.
    pub fn stop(self, node: &Node) -> Result<()> {
        for pid in node.pids("containerd")? {
            node.kill("TERM", pid)?;
        }
        self.daemon.wait(Duration::from_secs(20)).map(drop)
    }

    /// What it has logged.
    #[must_use]
    pub fn log(&self) -> String {
        self.daemon.output()
    }

    /// Its version, such as `1.7`: from the daemon's own answer.
    pub fn version(node: &Node) -> Result<(u32, u32)> {
        // "containerd github.com/containerd/containerd/v2 2.1.9+unknown"
        let output = node.run(&["containerd", "--version"])?;
        let word = output.split_whitespace().nth(2).with_context(|| format!("no version in {output:?}"))?;
        let mut parts = word.trim_start_matches('v').split('.').map(str::parse);
        match (parts.next(), parts.next()) {
            (Some(Ok(major)), Some(Ok(minor))) => Ok((major, minor)),
            _ => anyhow::bail!("{word:?} is no version"),
        }
    }
}

/// Loads the image into a namespace of containerd: `default`, or CRI's `k8s.io`.
pub fn load(node: &Node, namespace: &str) -> Result<()> {
    node.run(&["ctr", "-n", namespace, "images", "import", ARCHIVE]).map(drop)
}

/// Loads the image for `ctr`.
pub fn load_default(node: &Node) -> Result<()> {
    load(node, NAMESPACE)
}

/// `ctr` with these words.
pub fn ctr(node: &Node, words: &[&str]) -> Result<Ended> {
    node.attempt(&[&["ctr", "-n", NAMESPACE], words].concat())
}

/// `ctr run --rm` in the foreground, in the node's network namespace.
#[must_use]
pub fn once_command(node: &Node, options: &[&str], program: &[&str]) -> Command {
    let words = ["ctr", "-n", NAMESPACE, "run", "--rm", "--net-host"];
    node.command(&[&words, options, &[IMAGE, &next_id()], program].concat())
}

/// Runs [`once_command`], however it ends.
pub fn once(node: &Node, options: &[&str], program: &[&str]) -> Result<Ended> {
    Running::start(once_command(node, options, program))?.wait(LIMIT)
}

/// `ctr run --detach` in the node's network namespace. Without a program the container idles.
pub fn start<'a>(node: &'a Node, options: &[&str], program: &[&str]) -> Result<Container<'a>> {
    let container = Container { node, id: next_id() };
    ctr(node, &[&["run", "--detach", "--net-host"], options, &[IMAGE, &container.id], program].concat())?.success()?;
    Ok(container)
}

fn next_id() -> String {
    format!("ctr{}", NEXT.fetch_add(1, Ordering::Relaxed))
}

impl<'a> Container<'a> {
    /// Its id.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// What programs can be run in.
    #[must_use]
    pub fn member(&self) -> Member<'a> {
        member(self.node, NAMESPACE, &self.id)
    }

    /// Pid of its init on the node, while it has a task.
    pub fn init(&self) -> Result<i32> {
        let output = ctr(self.node, &["task", "list"])?.success()?;
        let mut lines = output.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        let line = lines.find(|words| words.first() == Some(&self.id.as_str()));
        line.and_then(|words| words.get(1)?.parse().ok()).with_context(|| format!("no {} in:\n{output}", self.id))
    }

    /// Runs a command of `ctr task`, such as `pause`, on it.
    pub fn task(&self, words: &[&str]) -> Result<String> {
        ctr(self.node, &[&["task"], words, &[self.id.as_str()]].concat())?.success()
    }

    /// Kills its task and removes it; an error if that fails.
    pub fn remove(self) -> Result<()> {
        self.task(&["kill", "--signal", "KILL"]).ok();
        wait_until("the task to be deleted", Duration::from_secs(10), || self.task(&["delete"]).is_ok())?;
        ctr(self.node, &["container", "delete", &self.id])?.success().map(drop)
    }
}

impl Drop for Container<'_> {
    fn drop(&mut self) {
        // All fail if it has been removed already.
        self.task(&["delete", "--force"]).ok();
        ctr(self.node, &["container", "delete", &self.id]).ok();
    }
}

/// A container of any namespace of containerd, by its id.
pub(super) fn member<'a>(node: &'a Node, namespace: &str, id: &str) -> Member<'a> {
    // Every program needs an id of its own, and a shell makes one of its pid.
    let script = "ns=$1; id=$2; shift 2; exec ctr -n $ns task exec --exec-id exec-$$ $id \"$@\"";
    Member::new(node, &["sh", "-c", script, "exec", namespace, id])
}
