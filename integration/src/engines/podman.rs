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

/// A user of the node who has podman without root, and his session's directory; his home is in memory.
#[derive(Clone, Debug)]
pub struct User {
    name: &'static str,
    home: &'static str,
    /// Where his session's files are.
    pub session: &'static str,
}

impl User {
    /// Makes him, with subordinate ids, Ringfence in his podman and the image in his storage.
    pub fn make(node: &Node) -> Result<Self> {
        let user = Self { name: "tenant", home: "/home/tenant", session: "/run/user/1000" };
        node.run(&["useradd", "--no-create-home", "--home-dir", user.home, "--uid", "1000", user.name])?;
        let script = format!(
            "mkdir -p {home} {session} && mount -t tmpfs -o mode=755 home {home} && chown {name}: {home} {session} && \
             chmod 700 {session} && grep -q ^{name}: /etc/subuid",
            home = user.home,
            session = user.session,
            name = user.name
        );
        node.run(&["sh", "-c", &script])?;
        user.run(node, &["ringfence", "configure", "--engine", "podman", "--user"])?;
        user.podman(node).run(&["load", "--input", ARCHIVE])?;
        Ok(user)
    }

    /// Runs a program as he does.
    pub fn run(&self, node: &Node, words: &[&str]) -> Result<String> {
        let own = self.words();
        node.run(&own.iter().map(String::as_str).chain(words.iter().copied()).collect::<Vec<_>>())
    }

    /// His podman.
    #[must_use]
    pub fn podman<'a>(&self, node: &'a Node) -> Cli<'a> {
        let mut words = self.words();
        let options = ["PODMAN_IGNORE_CGROUPSV1_WARNING=1", "podman", "--runtime=runc", "--cgroup-manager=cgroupfs"];
        words.extend(
            options.iter().chain(&["--storage-driver=overlay", "--events-backend=none"]).map(|w| (*w).to_owned()),
        );
        Cli::new(node, &words.iter().map(String::as_str).collect::<Vec<_>>())
    }

    fn words(&self) -> Vec<String> {
        let (home, session) = (format!("HOME={}", self.home), format!("XDG_RUNTIME_DIR={}", self.session));
        let program = ["setpriv", "--reuid", self.name, "--regid", self.name, "--init-groups", "env", "--chdir=/"];
        program.map(str::to_owned).into_iter().chain([home, session]).collect()
    }
}
