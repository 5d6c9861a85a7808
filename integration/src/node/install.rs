//! What is put on a node: the engines' configuration, as little of it as this needs, and Ringfence.

use super::{IMAGE, Node};
use crate::artifacts;
use anyhow::{Context, Result};

/// Limits below those of this process, which may not raise its own.
const CONTAINERS_CONF: &str = r#"
[containers]
default_ulimits = ["nofile=4096:4096", "nproc=32768:32768"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
[network]
network_backend = "netavark"
"#;

const STORAGE_CONF: &str = r#"
[storage]
driver = "overlay"
runroot = "/run/containers/storage"
graphroot = "/var/lib/containers/storage"
"#;

/// Pods of the host's network need no CNI; `restrict_oom_score_adj`, because nobody may lower his own here.
const CONTAINERD: &str = r#"version = 2
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "IMAGE"
  restrict_oom_score_adj = true
  disable_tcp_service = true
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.crun]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.crun.options]
      BinaryName = "/usr/bin/crun"
"#;

/// Containers use the host's network.
const DOCKER: &str = r#"{
  "bridge": "none", "iptables": false, "ip6tables": false, "live-restore": true,
  "default-ulimits": {"nofile": {"Name": "nofile", "Hard": 4096, "Soft": 1024}},
  "runtimes": {"crun": {"path": "/usr/bin/crun"}}
}
"#;

/// Configures the engines; nothing of ours.
pub(super) fn engines(node: &Node) -> Result<()> {
    node.write("/etc/containers/containers.conf", CONTAINERS_CONF)?;
    node.write("/etc/containers/storage.conf", STORAGE_CONF)?;
    node.write("/etc/containerd/config.toml", CONTAINERD.replace("IMAGE", IMAGE))?;
    node.write("/etc/docker/daemon.json", DOCKER)
}

/// Installs Ringfence's package, and registers it with podman; with daemons, before they are started, the tests do.
pub(super) fn ringfence(node: &Node) -> Result<()> {
    let package = "/tmp/ringfence.deb";
    std::fs::copy(artifacts::package()?, node.path(package)).context("cannot copy the package to the node")?;
    node.run(&["dpkg", "--force-unsafe-io", "--install", package])?;
    node.run(&["ringfence", "configure", "--engine", "podman"]).map(drop)
}
