//! podman, as root.

use super::cli::Cli;
use crate::node::{ARCHIVE, Node};
use anyhow::Result;

/// podman with one of the node's runtimes. An empty command line of its own: all else is in its configuration.
#[must_use]
pub fn podman<'a>(node: &'a Node, runtime: &str) -> Cli<'a> {
    // It warns of the first version of control groups at every call.
    Cli::new(node, &["env", "PODMAN_IGNORE_CGROUPSV1_WARNING=1", "podman", "--runtime", runtime])
}

/// Loads the image.
pub fn load(node: &Node) -> Result<()> {
    podman(node, "runc").run(&["load", "--input", ARCHIVE]).map(drop)
}
