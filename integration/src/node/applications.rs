//! What other people's programs run in: a Debian with languages' run times, allocators and tools, whose image is loaded on a
//! node, and the programs of integration/clients, built in that Debian and mounted into containers.

use super::image::tree;
use super::{Node, Suite, run_script};
use crate::command::{Running, command};
use crate::{artifacts, sandbox};
use anyhow::{Context, Result};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

/// The image's name. It has nothing of ours.
pub const IMAGE: &str = "localhost/ringfence-applications:1";

/// The name of an image with musl's dynamic linker, busybox and the programs `musl-hello`, `musl-load` and `musl-linked` in
/// `/bin`.
pub const MUSL: &str = "localhost/ringfence-musl:1";

/// Where the programs are on a node, and to be mounted in a container.
pub const PROGRAMS: &str = "/opt/applications";

/// What runs in the image, and what builds it.
const PACKAGES: [&str; 17] = [
    "busybox-static",
    "default-jre-headless",
    "ecj",
    "gcc",
    "golang-go",
    "ibverbs-providers",
    "libc6-dev",
    "libc6-i386",
    "libibverbs-dev",
    "libibverbs1",
    "libjemalloc2",
    "musl-tools",
    "perftest",
    "python3",
    "python3-pyverbs",
    "util-linux",
    "valgrind",
];

/// What is in the root file system only to build programs, or is the engine's to make.
const NOT_IN_IMAGE: [&str; 13] = [
    "./boot",
    "./dev/*",
    "./proc/*",
    "./sys/*",
    "./usr/include",
    "./usr/lib/gcc",
    "./usr/lib/go-*",
    "./usr/lib/x86_64-linux-gnu/*.a",
    "./usr/libexec/gcc",
    "./usr/share/go-*",
    "./usr/share/java",
    "./var/cache",
    "./var/lib/apt",
];

/// The Debian of a release, and the programs that were built in it for this run.
#[derive(Clone, Debug)]
pub struct Applications {
    root: PathBuf,
    programs: PathBuf,
}

impl Applications {
    /// Of `suite`: the Debian from the cache, or made if it is not there (two minutes and the network).
    pub fn make(suite: Suite) -> Result<Self> {
        let root = root(suite)?;
        let programs = sandbox::work_dir().join(format!("applications-{}", suite.name()));
        let made = Self { root, programs };
        // The last that is put there.
        if made.programs.join("run-cases.sh").exists() {
            return Ok(made);
        }
        let cache = artifacts::cache().join(format!("applications-{}-go", suite.name()));
        for dir in [&made.programs, &cache] {
            std::fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
        }
        let clients = artifacts::client_source("");
        let [root, clients, target, cache] =
            [&made.root, &clients, &made.programs, &cache].map(|path| path.to_str().context("a path is not UTF-8"));
        run_script("applications.sh", &[root?, clients?, target?, cache?]).context("cannot build the programs")?;
        Ok(made)
    }

    /// Why there is none of `suite` here, if there is none.
    #[must_use]
    pub fn obstacle(suite: Suite) -> Option<String> {
        root(suite).err().map(|error| format!("{error:#}"))
    }

    /// Puts the programs on a node.
    pub fn install(&self, node: &Node) -> Result<()> {
        std::fs::create_dir_all(node.path("/opt"))?;
        let [from, to] = [self.programs.clone(), node.path(PROGRAMS)];
        let words = ["cp", "-a", from.to_str().context("not UTF-8")?, to.to_str().context("not UTF-8")?];
        Running::start(command(&words))?.wait(Duration::from_secs(60))?.success().map(drop)
    }

    /// Writes the image's root file system as a tar archive to its standard output.
    #[must_use]
    pub fn image(&self) -> Command {
        let mut tar = Command::new("tar");
        tar.args(["--numeric-owner", "--sort=name", "-C"]).arg(&self.root);
        tar.args(NOT_IN_IMAGE.map(|path| format!("--exclude={path}"))).args(["-c", "."]);
        tar
    }

    /// The same of [`MUSL`].
    pub fn musl_image(&self) -> Result<Command> {
        let layer = sandbox::work_dir().join(format!("{}-musl", self.programs.display()));
        let script =
            "set -eu; umask 022; mkdir -p \"$3/bin\" \"$3/dev\" \"$3/etc\" \"$3/lib\" \"$3/proc\" \"$3/sys\" \"$3/tmp\"
            cp -L \"$1/lib/ld-musl-x86_64.so.1\" \"$3/lib/\"
            cp \"$2\"/musl-* \"$1/bin/busybox\" \"$3/bin/\"
            for applet in sh ls; do ln -sf busybox \"$3/bin/$applet\"; done";
        let words = ["sh", "-c", script, "sh"];
        let mut make = command(&words);
        make.args([&self.root, &self.programs, &layer]);
        Running::start(make)?.wait(Duration::from_secs(60))?.success()?;
        let mut tar = Command::new("tar");
        tar.args(["--numeric-owner", "--owner=0", "--group=0", "-C"]).arg(&layer).args(["-c", "."]);
        Ok(tar)
    }
}

fn root(suite: Suite) -> Result<PathBuf> {
    // The packages of run times expect a directory that is excluded.
    let hook = ["--essential-hook=mkdir -p \"$1/usr/share/man/man1\""];
    let allocators = match suite {
        Suite::Bookworm => ["libmimalloc2.0", "libtcmalloc-minimal4"],
        Suite::Trixie | Suite::Sid => ["libmimalloc3", "libtcmalloc-minimal4t64"],
    };
    tree(suite, "applications", &[&PACKAGES[..], &allocators].concat().join(","), &hook)
}
