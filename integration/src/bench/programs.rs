//! The programs that measure, under one proxy or under two.

use anyhow::{Context, Result};
use ringfence_integration::client;
use ringfence_integration::command::Running;
use ringfence_integration::direct::{DirectProxy, Node};
use ringfence_proxy::launch::Limits;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// How much is done for a figure.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// So little that figures mean nothing, to see that they come.
    pub quick: bool,
    /// Containers that are started of each kind, where that is what is measured.
    pub starts: usize,
}

/// How long one of the programs may take, on a machine that is busy with something else.
const PATIENCE: Duration = Duration::from_secs(180);

/// Measures memory and registrations, within one process.
pub fn alone() -> Result<PathBuf> {
    client::compile("bench", &["bench_time.c", "loop.c", "check.c"])
}

/// Measures what goes from one process to another.
pub fn pair() -> Result<PathBuf> {
    client::compile("bench_pair", &["bench_far.c", "bench_time.c", "check.c"])
}

/// What a program has said: values by name, several of one name in order.
#[derive(Debug)]
pub struct Said(HashMap<String, Vec<f64>>);

impl Said {
    fn of(output: &str) -> Result<Self> {
        let mut values: HashMap<String, Vec<f64>> = HashMap::new();
        for line in output.lines().filter(|line| *line != "ready") {
            let (name, value) = line.split_once(' ').with_context(|| format!("no value in {line:?}"))?;
            values.entry(name.to_owned()).or_default().push(value.parse().with_context(|| format!("in {line:?}"))?);
        }
        Ok(Self(values))
    }

    /// The first value of this name.
    pub fn one(&self, name: &str) -> Result<f64> {
        Ok(self.all(name)?[0])
    }

    /// All values of this name, of which there is one at least.
    pub fn all(&self, name: &str) -> Result<&[f64]> {
        self.0.get(name).map(Vec::as_slice).with_context(|| format!("the program said no {name}"))
    }
}

/// Waits for a program's end.
pub fn finish(running: Running) -> Result<Said> {
    Said::of(&running.wait(PATIENCE)?.success()?)
}

/// Runs a program under this proxy.
pub fn run(proxy: &DirectProxy, program: &Path, words: &[&str], effort: Effort) -> Result<Said> {
    finish(start(proxy, None, program, words, effort)?)
}

fn start(
    near: &DirectProxy,
    far: Option<&DirectProxy>,
    program: &Path,
    words: &[&str],
    effort: Effort,
) -> Result<Running> {
    Running::start(command(near, far, program, words, effort)?)
}

/// The command for a program whose far end is another container's, or the same one's.
pub fn command(
    near: &DirectProxy,
    far: Option<&DirectProxy>,
    program: &Path,
    words: &[&str],
    effort: Effort,
) -> Result<Command> {
    let mut command = near.command(program)?;
    command.args(words);
    if let Some(far) = far {
        command.env("RINGFENCE_FAR", far.socket());
    }
    if effort.quick {
        command.env("BENCH_QUICK", "1");
    }
    Ok(command)
}

/// Between which ends something is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Two processes of one container.
    Inside,
    /// Two containers.
    Across,
}

/// Two ends, and the proxies that they use.
#[derive(Debug)]
pub struct Ends {
    near: DirectProxy,
    far: Option<DirectProxy>,
    effort: Effort,
    // After those that live on it.
    _node: Node,
}

impl Ends {
    /// The far end has the same policy as the near one.
    pub fn new(place: Place, limits: &Limits, effort: Effort) -> Result<Self> {
        let far = (place == Place::Across).then(|| limits.clone());
        Self::on(None, limits.clone(), far, effort)
    }

    /// On a node with a modelled link, or without; between two containers if `far` is another's policy.
    pub fn on(link: Option<u64>, near: Limits, far: Option<Limits>, effort: Effort) -> Result<Self> {
        let node = Node::new(link)?;
        let near = node.proxy(near)?;
        let far = far.map(|limits| node.proxy(limits)).transpose()?;
        Ok(Self { near, far, effort, _node: node })
    }

    /// Measures between the two.
    pub fn measure(&self, words: &[&str]) -> Result<Said> {
        finish(start(&self.near, self.far.as_ref(), &pair()?, words, self.effort)?)
    }
}
