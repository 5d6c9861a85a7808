//! The command line that podman and docker share.

use super::Member;
use crate::command::{Ended, Running, wait_until};
use crate::node::{IMAGE, LIMIT, Node};
use anyhow::{Context, Result, ensure};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

static NEXT: AtomicU32 = AtomicU32::new(0);

/// How long an image may take.
const IMPORT: Duration = Duration::from_secs(180);

/// podman or docker, with its global options.
#[derive(Clone, Debug)]
pub struct Cli<'a> {
    node: &'a Node,
    words: Vec<String>,
    /// What its containers are made of.
    image: &'static str,
}

/// A container in the background. Removed by force when dropped.
#[derive(Debug)]
pub struct Container<'a> {
    cli: Cli<'a>,
    name: String,
}

impl<'a> Cli<'a> {
    pub(super) fn new(node: &'a Node, words: &[&str]) -> Self {
        Self { node, words: words.iter().map(|word| (*word).to_owned()).collect(), image: IMAGE }
    }

    /// The same for containers of another image than [`IMAGE`].
    #[must_use]
    pub fn of_image(self, image: &'static str) -> Self {
        Self { image, ..self }
    }

    /// Makes the image `name` of the root file system that `archive` writes to its standard output by tar.
    pub fn import(&self, name: &str, mut archive: Command) -> Result<()> {
        let mut tar = archive.stdout(Stdio::piped()).spawn().context("cannot start tar")?;
        let input = tar.stdout.take().context("it is piped")?;
        let imported = Running::start_reading(self.command(&["import", "-", name]), input.into())?.wait(IMPORT);
        let made = tar.wait()?;
        imported?.success()?;
        ensure!(made.success(), "tar: {made}");
        Ok(())
    }

    /// The same with further global options.
    #[must_use]
    pub fn with(&self, options: &[&str]) -> Self {
        let words = self.words.iter().map(String::as_str).chain(options.iter().copied()).collect::<Vec<_>>();
        Self { image: self.image, ..Self::new(self.node, &words) }
    }

    /// The node that it runs on.
    #[must_use]
    pub fn node(&self) -> &'a Node {
        self.node
    }

    /// A command of it.
    #[must_use]
    pub fn command(&self, words: &[&str]) -> Command {
        let words: Vec<&str> = self.words.iter().map(String::as_str).chain(words.iter().copied()).collect();
        self.node.command(&words)
    }

    /// Runs a command of it, however it ends.
    pub fn attempt(&self, words: &[&str]) -> Result<Ended> {
        Running::start(self.command(words))?.wait(LIMIT)
    }

    /// Runs a command of it; what it said, if it ended well.
    pub fn run(&self, words: &[&str]) -> Result<String> {
        self.attempt(words)?.success()
    }

    /// What programs can be run in, of the container `name`.
    #[must_use]
    pub fn member(&self, name: &str) -> Member<'a> {
        let words: Vec<&str> = self.words.iter().map(String::as_str).chain(["exec", name]).collect();
        Member::new(self.node, &words)
    }

    /// `run --rm` in the foreground, in the node's network namespace.
    #[must_use]
    pub fn once_command(&self, options: &[&str], program: &[&str]) -> Command {
        self.command(&[&["run", "--rm", "--network=host"], options, &[self.image], program].concat())
    }

    /// Runs [`Self::once_command`], however it ends.
    pub fn once(&self, options: &[&str], program: &[&str]) -> Result<Ended> {
        Running::start(self.once_command(options, program))?.wait(LIMIT)
    }

    /// `run --detach` in the node's network namespace. Without a program the container idles.
    pub fn start(&self, options: &[&str], program: &[&str]) -> Result<Container<'a>> {
        self.start_in("host", options, program)
    }

    /// [`Self::start`] in another network.
    pub fn start_in(&self, network: &str, options: &[&str], program: &[&str]) -> Result<Container<'a>> {
        // Not the beginning of any id: of a name that is gone, docker makes the container whose id begins with it.
        let name = format!("one-{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let container = Container { cli: self.clone(), name };
        let words = ["run", "--detach", "--network", network, "--name", &container.name];
        self.run(&[&words, options, &[self.image], program].concat())?;
        Ok(container)
    }
}

impl<'a> Container<'a> {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What programs can be run in.
    #[must_use]
    pub fn member(&self) -> Member<'a> {
        self.cli.member(&self.name)
    }

    /// A field of `inspect`, as a Go template.
    pub fn inspect(&self, template: &str) -> Result<String> {
        let output = self.cli.run(&["inspect", "--type=container", "--format", template, &self.name])?;
        // podman of Debian 13 warns about the version of control groups on standard error.
        Ok(output.lines().last().unwrap_or_default().trim().to_owned())
    }

    /// Pid of its init on the node.
    pub fn init(&self) -> Result<i32> {
        self.inspect("{{.State.Pid}}")?.parse().context("no pid")
    }

    /// Waits until it is in a state, such as `exited`.
    pub fn wait_for(&self, state: &str) -> Result<()> {
        let mut found = String::new();
        wait_until(&format!("{} to be {state}", self.name), Duration::from_secs(15), || {
            found = self.inspect("{{.State.Status}}").unwrap_or_default();
            found == state
        })
        .with_context(|| format!("it is {found}"))
    }

    /// Runs a command, such as `pause`, on it.
    pub fn act(&self, words: &[&str]) -> Result<String> {
        self.cli.run(&[words, &[&self.name]].concat())
    }

    /// Removes it by force; an error if that fails.
    pub fn remove(self) -> Result<()> {
        self.act(&["rm", "--force"]).map(drop)
    }
}

impl Drop for Container<'_> {
    fn drop(&mut self) {
        // Fails if it has been removed already.
        self.act(&["rm", "--force"]).ok();
    }
}
