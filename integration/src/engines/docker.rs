//! dockerd and its command line.

use super::cli::Cli;
use crate::command::{Running, wait_until};
use crate::node::{ARCHIVE, Node};
use anyhow::{Context, Result};
use std::time::Duration;

/// A running dockerd. Killed, without its containers, when dropped.
#[derive(Debug)]
pub struct Docker {
    daemon: Running,
}

impl Docker {
    /// Starts dockerd with the node's daemon.json and waits until it answers.
    pub fn start(node: &Node) -> Result<Self> {
        let mut daemon = node.spawn(&["dockerd"])?;
        wait_until("dockerd to answer", Duration::from_secs(30), || {
            daemon.has_ended() || node.attempt(&["docker", "version"]).is_ok_and(|ended| ended.status.success())
        })
        .with_context(|| daemon.output())?;
        anyhow::ensure!(!daemon.has_ended(), "dockerd ended at once:\n{}", daemon.output());
        Ok(Self { daemon })
    }

    /// Asks it to end, as an upgrade does; with `live-restore` its containers live on.
    pub fn stop(self, node: &Node) -> Result<()> {
        for pid in node.pids("dockerd")? {
            node.kill("TERM", pid)?;
        }
        self.daemon.wait(Duration::from_secs(20)).map(drop)
    }

    /// What it has logged.
    #[must_use]
    pub fn log(&self) -> String {
        self.daemon.output()
    }
}

/// Its command line.
#[must_use]
pub fn docker(node: &Node) -> Cli<'_> {
    Cli::new(node, &["docker"])
}

/// Loads the image.
pub fn load(node: &Node) -> Result<()> {
    docker(node).run(&["load", "--input", ARCHIVE]).map(drop)
}
