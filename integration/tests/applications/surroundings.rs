//! What an engine's user, or an administrator, may do to a container besides giving it RDMA.

pub mod kills;

use super::cases::{Case, Needs};
use anyhow::{Context, Result};
use ringfence_integration::node::Node;
use std::path::PathBuf;

/// One way to run a container.
#[derive(Debug)]
pub struct Surroundings {
    /// What the README and the tests call it.
    pub name: &'static str,
    options: &'static [&'static str],
    /// What the administrator writes, as a file of `conf.d`.
    config: Option<&'static str>,
    /// What cannot be had there, on any device.
    lacks: &'static [Needs],
    /// Cases that fail there without us.
    impossible: &'static [&'static str],
    /// Whether it is tested only by hand: as a rule what another one of the list tests as well.
    pub by_hand: bool,
}

/// As the engine makes it.
pub const DEFAULT: Surroundings = Surroundings {
    name: "as the engine makes it",
    options: &[],
    config: None,
    lacks: &[],
    impossible: &[],
    by_hand: false,
};

const fn preload(name: &'static str, options: &'static [&'static str]) -> Surroundings {
    Surroundings { name, options, lacks: &[Needs::NoPreload], by_hand: true, ..DEFAULT }
}

/// The others.
pub const OTHERS: [Surroundings; 12] = [
    Surroundings {
        name: "--cap-drop all",
        options: &["--cap-drop=all"],
        impossible: &["memory: beyond_the_memlock_limit", "without verbs: a setuid program"],
        ..DEFAULT
    },
    Surroundings { name: "--read-only", options: &["--read-only", "--tmpfs=/tmp"], by_hand: true, ..DEFAULT },
    Surroundings { name: "--pids-limit 20", options: &["--pids-limit=20"], lacks: &[Needs::Much], ..DEFAULT },
    Surroundings {
        name: "--ulimit nofile=64",
        options: &["--ulimit=nofile=64:64", "--ulimit=nproc=20000:20000"],
        ..DEFAULT
    },
    Surroundings {
        name: "seccomp that kills",
        options: &["--security-opt=seccomp=/etc/seccomp-kills.json"],
        ..DEFAULT
    },
    preload("jemalloc", &["--env=LD_PRELOAD=/opt/applications/jemalloc.so"]),
    preload("tcmalloc", &["--env=LD_PRELOAD=/opt/applications/tcmalloc.so"]),
    preload("mimalloc", &["--env=LD_PRELOAD=/opt/applications/mimalloc.so"]),
    Surroundings {
        name: "without /dev/userfaultfd",
        config: Some("[inject]\nuserfaultfd = false\n"),
        by_hand: true,
        ..DEFAULT
    },
    Surroundings {
        name: "held by userfaultfd alone",
        options: &["--env=RINGFENCE_HOLD=userfaultfd"],
        by_hand: true,
        ..DEFAULT
    },
    Surroundings {
        name: "held by stopping threads alone",
        options: &["--env=RINGFENCE_HOLD=stop"],
        // It knows no such process as the one that stops threads; unless forced, the library goes another way there.
        impossible: &["valgrind"],
        ..DEFAULT
    },
    Surroundings {
        name: "held by signals alone",
        options: &["--env=RINGFENCE_HOLD=signals"],
        // What this way leaves (verbs-proxy/README.md): it refuses where a thread blocks SIGSEGV, system calls that write to
        // the pages fail, attributes of memory are lost, and what was one mapping stays three.
        impossible: &[
            "attributes: huge_pages",
            "attributes: not_dumped",
            "attributes: wiped_on_fork",
            "attributes: wiped_on_fork_later",
            "attributes: policy_of_nodes",
            "bystanders: neighbours_blocked",
            "bystanders: neighbours_read",
            "bystanders: forkblocked",
            "bystanders: forkread",
            "keep: what_is_kept_is_bounded",
            "memory: system_calls_write_meanwhile",
            "resources: vma_downwards",
            "resources: vma_upwards",
        ],
        by_hand: true,
        ..DEFAULT
    },
];

impl Surroundings {
    /// Options for the engine's `run`.
    pub fn options(&self) -> &'static [&'static str] {
        self.options
    }

    /// Whether a case could be well there.
    pub fn fits(&self, case: &Case) -> bool {
        !self.lacks.contains(&case.needs) && !self.impossible.contains(&case.name.as_str())
    }

    /// Puts the administrator's part in force until what is returned is dropped.
    pub fn policy(&self, node: &Node) -> Result<Option<Policy>> {
        const FILE: &str = "/etc/ringfence/conf.d/99-surroundings.toml";
        let Some(text) = self.config else { return Ok(None) };
        node.write(FILE, text)?;
        let policy = Policy { file: node.path(FILE) };
        node.run(&["ringfence", "config", "validate"]).context("the configuration is refused")?;
        Ok(Some(policy))
    }
}

/// A file of the administrator's. Gone when dropped.
#[derive(Debug)]
pub struct Policy {
    file: PathBuf,
}

impl Drop for Policy {
    fn drop(&mut self) {
        // What remains is removed with the node.
        std::fs::remove_file(&self.file).ok();
    }
}
