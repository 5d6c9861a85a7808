//! Container engines on a [`Node`], driven as their users do, and what containers with RDMA must be able to do under any.

pub mod cli;
pub mod containerd;
pub mod cri;
pub mod docker;
pub mod podman;

use crate::command::Running;
use crate::node::Node;
use crate::perftest::{self, Peer};
use anyhow::{Result, ensure};
use std::time::Duration;

/// The annotation that gives a container RDMA.
pub const ENABLE: &str = "ringfence.dev/enable=true";

/// How long `exec` may take.
const LIMIT: Duration = Duration::from_secs(60);

/// A container of a node, in the node's network namespace.
#[derive(Clone, Debug)]
pub struct Member<'a> {
    node: &'a Node,
    /// What runs a program in it, given as further words.
    exec: Vec<String>,
}

impl<'a> Member<'a> {
    fn new(node: &'a Node, exec: &[&str]) -> Self {
        Self { node, exec: exec.iter().map(|word| (*word).to_owned()).collect() }
    }

    /// Runs a program in it; what it said, if it ended well.
    pub fn exec(&self, words: &[&str]) -> Result<String> {
        self.spawn(words)?.wait(LIMIT)?.success()
    }

    /// Fails unless the container sees a device that is ready to be used.
    pub fn has_rdma(&self) -> Result<()> {
        let mut output = self.exec(&["ibv_devinfo"])?;
        // `ctr` of containerd 1.6 sometimes loses all that a short program said, on a busy machine.
        for _ in 0..3 {
            if !output.is_empty() {
                break;
            }
            output = self.exec(&["ibv_devinfo"])?;
        }
        ensure!(output.contains("soft0") && output.contains("PORT_ACTIVE"), "no active soft0:\n{output}");
        Ok(())
    }

    /// Fails if anything of ours is in the container.
    pub fn has_no_rdma(&self) -> Result<()> {
        let output =
            self.exec(&["sh", "-c", "ls -d /dev/ringfence /etc/ld.so.preload 2>&1; ibv_devices 2>&1; true"])?;
        let touched = output.contains("soft0") || output.lines().any(|line| line.starts_with('/'));
        ensure!(!touched, "the container was not left alone:\n{output}");
        Ok(())
    }
}

impl Peer for Member<'_> {
    fn spawn(&self, words: &[&str]) -> Result<Running> {
        let words: Vec<&str> = self.exec.iter().map(String::as_str).chain(words.iter().copied()).collect();
        self.node.spawn(&words)
    }

    fn listens(&self, port: u16) -> bool {
        self.node.listens(port)
    }

    fn address(&self) -> &str {
        "127.0.0.1"
    }
}

/// Fails unless data move from one container to the other.
pub fn exchange(server: &impl Peer, client: &impl Peer) -> Result<()> {
    let output = perftest::run(server, client, "ib_write_bw", &["-F", "-n", "1000", "--report_gbits"])?;
    let rows = perftest::bandwidths(&output);
    ensure!(rows.len() == 1 && rows[0].gbits > 0.0, "no figure in:\n{output}");
    Ok(())
}
