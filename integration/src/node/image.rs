//! Root file systems of nodes and the container image for them, kept between runs.

use super::{Suite, run_script};
use crate::command::{Running, command};
use crate::{artifacts, sandbox};
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The container image's name: busybox, `ibv_devices`, `ibv_devinfo` and `ib_write_bw`; it idles until SIGTERM.
pub const IMAGE: &str = "localhost/ringfence-verbs:1";

/// Where the image's archive lies on a node.
pub const ARCHIVE: &str = "/var/lib/ringfence-verbs.tar";

/// What is on a node besides Debian's minimum.
const PACKAGES: [&str; 15] = [
    "aardvark-dns",
    "busybox-static",
    "catatonit",
    "conmon",
    "containerd",
    "crun",
    "docker.io",
    "ibverbs-utils",
    "iproute2",
    "iptables",
    "netavark",
    "perftest",
    "podman",
    "runc",
    "uidmap",
];

/// Where a node's root file system says which packages it was made with.
const MADE_WITH: &str = "var/lib/ringfence-node-packages";

/// The root file system of `suite`'s nodes.
pub(super) fn root(suite: Suite) -> Result<PathBuf> {
    tree(suite, "node", &packages(suite), &[])
}

/// A root file system of `suite`, of mmdebstrap's `options`; from the cache, or made (half a minute and the network) if it is not
/// there or has not the same packages.
pub(super) fn tree(suite: Suite, name: &str, packages: &str, options: &[&str]) -> Result<PathBuf> {
    let dir = artifacts::cache().join(format!("{name}-{}", suite.name()));
    if std::fs::read_to_string(dir.join(MADE_WITH)).ok().as_deref() != Some(packages) {
        make(suite, packages, options, &dir)
            .with_context(|| format!("cannot make {name} of Debian's {}", suite.name()))?;
    }
    Ok(dir)
}

fn packages(suite: Suite) -> String {
    let mut packages = PACKAGES.to_vec();
    if suite != Suite::Bookworm {
        // Until Debian 12 it was part of docker.io.
        packages.push("docker-cli");
    }
    packages.join(",")
}

fn make(suite: Suite, packages: &str, options: &[&str], dir: &Path) -> Result<()> {
    std::fs::create_dir_all(artifacts::cache())?;
    let partial = sandbox::partial_dir();
    let target = partial.to_str().context("the repository's path is not UTF-8")?;
    let include = format!("--include={packages}");
    let words = [
        "mmdebstrap",
        "--variant=minbase",
        "--aptopt=APT::Install-Recommends false",
        // A mirror's sid may be weeks old.
        "--aptopt=Acquire::Check-Valid-Until false",
        "--dpkgopt=path-exclude=/usr/share/doc/*",
        "--dpkgopt=path-exclude=/usr/share/man/*",
        "--dpkgopt=path-exclude=/usr/share/locale/*",
        &include,
    ];
    let words = [&words, options, &[suite.name(), target]].concat();
    let made = Running::start(command(&words))?.wait(Duration::from_secs(600))?.success();
    let made = made.and_then(|_| Ok(std::fs::write(partial.join(MADE_WITH), packages)?));
    if made.is_err() {
        std::fs::remove_dir_all(&partial).ok();
    }
    made?;
    if dir.exists() {
        std::fs::remove_dir_all(dir).with_context(|| format!("cannot remove {}", dir.display()))?;
    }
    std::fs::rename(&partial, dir).with_context(|| format!("cannot move {target} to {}", dir.display()))
}

/// The archive of the container image, made of `suite`'s programs.
pub(super) fn archive(suite: Suite) -> Result<PathBuf> {
    let file = artifacts::cache().join(format!("image-{}.tar", suite.name()));
    if !file.exists() {
        let root = root(suite)?;
        let [root, target] = [&root, &file].map(|path| path.to_str().context("the repository's path is not UTF-8"));
        run_script("image.sh", &[root?, target?, IMAGE])?;
    }
    Ok(file)
}
