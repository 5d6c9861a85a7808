//! A test program whose tests run in the sandbox, and are counted as ignored, loudly, where they cannot run.

use crate::node::{Node, Suite};
use crate::{artifacts, machine, sandbox};
use anyhow::{Context, Result};
use ringfence_trials::{Arguments, Failed, Skipped, Trial};
use std::process::ExitCode;
use std::sync::{Arc, Mutex};

/// What the tests of a program need.
pub struct Needs {
    /// Programs in `PATH`.
    pub programs: &'static [&'static str],
    /// Built files; each function says how to get what is missing.
    pub built: &'static [fn() -> Result<std::path::PathBuf>],
}

/// Runs the tests that `list` returns. One at a time: they measure, and the machine may have two cores.
pub fn main(label: &str, needs: &Needs, list: impl FnOnce() -> Result<Vec<Trial>>) -> ExitCode {
    at_a_time(1, label, needs, list)
}

/// As [`main`], `threads` at a time.
pub fn at_a_time(threads: usize, label: &str, needs: &Needs, list: impl FnOnce() -> Result<Vec<Trial>>) -> ExitCode {
    let mut arguments = Arguments::from_args();
    arguments.test_threads.get_or_insert(threads);
    // Tests that are ignored are so by what they find.
    arguments.ignored = false;
    let missing = needs.built.iter().find_map(|built| built().err());
    let obstacle = machine::obstacle(needs.programs).or_else(|| missing.map(|error| format!("{error:#}")));
    if let Some(reason) = obstacle {
        return ringfence_trials::run(&arguments, vec![skipped(label, reason)]);
    }
    sandbox::run(label, || match list() {
        Ok(trials) => ringfence_trials::run(&arguments, trials),
        Err(error) => {
            eprintln!("{label}: {error:#}");
            ExitCode::FAILURE
        }
    })
}

/// A test that fails with the error that it returns; one that is [`Skipped`] is counted as ignored.
pub fn test(name: impl Into<String>, run: impl FnOnce() -> Result<()> + Send + 'static) -> Trial {
    ringfence_trials::test_with(name, run, |error| match error.downcast_ref::<Skipped>() {
        Some(skipped) => Ok(skipped.clone()),
        None => Err(Failed::from(format!("{error:#}"))),
    })
}

/// Stands for all tests that cannot run for `reason`.
fn skipped(of: &str, reason: String) -> Trial {
    ringfence_trials::test(format!("{of} (all)"), move || ringfence_trials::skip(reason))
}

/// What tests on a node get. The fields drop in order: the daemon before the node.
pub struct Scene<D = ()> {
    /// The engine's daemon, for tests to take and to replace.
    pub daemon: Mutex<Option<D>>,
    /// The node.
    pub node: Node,
}

impl<D> Scene<D> {
    /// A node with a daemon that runs on it.
    pub fn new(node: Node, daemon: D) -> Self {
        Self { daemon: Mutex::new(Some(daemon)), node }
    }
}

/// A test on a node, and its name.
pub type NodeTest<D> = (&'static str, fn(&Scene<D>) -> Result<()>);

/// Runs the tests of an engine on nodes of every Debian release, one node of each for all, two tests beside each other: one leaves a
/// processor idle half of the time. A release without nodes is skipped, loudly.
///
/// `prepare` makes of a node what the tests get; `tests` are those of a release. After each test nothing of ours may be left on
/// it; when a test fails, the next gets a new node.
pub fn on_nodes<D: Send + 'static>(
    label: &str,
    prepare: fn(Node) -> Result<Scene<D>>,
    tests: impl Fn(Suite) -> Vec<NodeTest<D>>,
) -> ExitCode {
    on_nodes_at_a_time(2, label, prepare, tests)
}

/// As [`on_nodes`], `threads` tests at a time.
pub fn on_nodes_at_a_time<D: Send + 'static>(
    threads: usize,
    label: &str,
    prepare: fn(Node) -> Result<Scene<D>>,
    tests: impl Fn(Suite) -> Vec<NodeTest<D>>,
) -> ExitCode {
    let needs = Needs { programs: &["mmdebstrap", "unshare", "nsenter"], built: &[artifacts::package] };
    at_a_time(threads, label, &needs, || Ok(in_turns(Suite::ALL.map(|suite| on_node(suite, prepare, &tests)))))
}

/// A test of each list in turn, as those of one list wait for each other.
pub fn in_turns(lists: impl IntoIterator<Item = Vec<Trial>>) -> Vec<Trial> {
    let mut trials: Vec<_> = lists.into_iter().flat_map(|list| list.into_iter().enumerate()).collect();
    trials.sort_by_key(|(place, _)| *place);
    trials.into_iter().map(|(_, trial)| trial).collect()
}

fn on_node<D: Send + 'static>(
    suite: Suite,
    prepare: fn(Node) -> Result<Scene<D>>,
    tests: impl Fn(Suite) -> Vec<NodeTest<D>>,
) -> Vec<Trial> {
    if let Some(reason) = Node::obstacle(suite) {
        let reason = reason.lines().last().unwrap_or_default().to_owned();
        return vec![skipped(suite.name(), reason)];
    }
    // Gone with the last test that holds it.
    let shared = Arc::new(Mutex::new(None));
    let trial = |(name, run): NodeTest<D>| {
        let shared = Arc::clone(&shared);
        test(format!("{}: {name}", suite.name()), move || {
            let mut scene = shared.lock().expect("no test panics");
            if scene.is_none() {
                let prepared = Node::start(suite).and_then(prepare);
                *scene = Some(prepared.with_context(|| format!("cannot prepare a node of {}", suite.name()))?);
            }
            let prepared = scene.as_ref().context("prepared above")?;
            let outcome = run(prepared).and_then(|()| prepared.node.is_clean());
            if outcome.is_err() {
                *scene = None;
            }
            outcome
        })
    };
    tests(suite).into_iter().map(trial).collect()
}
