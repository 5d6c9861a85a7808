//! Many cases in one container, and what became of each.

use super::Shared;
use super::cases::{Case, UNSUPPORTED};
use super::engine::{Engine, Stage};
use super::surroundings::Surroundings;
use anyhow::{Context, Result, anyhow, bail, ensure};
use ringfence_integration::command::Running;
use ringfence_integration::node::applications::PROGRAMS;
use ringfence_trials::Skipped;
use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// What a case said and its status, in the manner of a shell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The status.
    pub status: i32,
    /// Both outputs.
    pub output: String,
    /// What it took.
    pub seconds: u64,
}

/// Cases for one container.
pub struct Batch {
    engine: Engine,
    around: &'static Surroundings,
    cases: Vec<Case>,
    /// Of those that have been run, or why they could not be.
    outcomes: Mutex<Option<Result<BTreeMap<String, Outcome>, String>>>,
}

impl Batch {
    /// Nothing runs yet.
    pub fn new(engine: Engine, around: &'static Surroundings, cases: Vec<Case>) -> Self {
        let cases = cases.into_iter().filter(|case| around.fits(case)).collect();
        Self { engine, around, cases, outcomes: Mutex::new(None) }
    }

    /// What there is to run.
    pub fn cases(&self) -> &[Case] {
        &self.cases
    }

    /// What became of a case; the first that asks runs all.
    pub fn outcome(&self, shared: &Shared, name: &str) -> Result<()> {
        let mut outcomes = self.outcomes.lock().unwrap_or_else(PoisonError::into_inner);
        let outcomes = outcomes.get_or_insert_with(|| {
            shared.on_stage(|stage| self.run(stage)).map_err(|error| format!("the container: {error:#}"))
        });
        let outcomes = outcomes.as_ref().map_err(|error| anyhow!("{error}"))?;
        let case = self.cases.iter().find(|case| case.name == name).context("no such case")?;
        let outcome = outcomes.get(name).with_context(|| format!("{name} was not run, or did not come to an end"))?;
        case.judge(outcome)
    }

    /// What became of all of them, as lines of those that did not end well.
    pub fn failures(&self, stage: &Stage) -> Result<Vec<String>> {
        let outcomes = self.run(stage)?;
        let judged = self.cases.iter().map(|case| {
            let outcome = outcomes.get(&case.name).context("it was not run, or did not come to an end");
            (case, outcome.and_then(|outcome| case.judge(outcome)))
        });
        // What cannot be run in these surroundings is known from the ordinary ones.
        let failed = judged.filter_map(|(case, judged)| judged.err().map(|error| (case, error)));
        Ok(failed
            .filter(|(_, error)| !error.is::<Skipped>())
            .map(|(case, error)| format!("{}: {error:#}", case.name))
            .collect())
    }

    fn run(&self, stage: &Stage) -> Result<BTreeMap<String, Outcome>> {
        let cli = stage.cli(self.engine)?;
        let list = format!("{PROGRAMS}/cases-{}", self.engine as usize);
        stage.node.write(&list, self.cases.iter().map(Case::line).collect::<String>())?;
        let _policy = self.around.policy(&stage.node)?;
        let mut options = Stage::options(self.engine);
        options.extend(self.around.options().iter().map(|option| (*option).to_owned()));
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        let program = ["/bin/bash", &format!("{PROGRAMS}/run-cases.sh"), &list];
        // Each case's own limit is kept in the container; this is for what stalls the container itself.
        let seconds = self.cases.iter().map(|case| case.seconds + 3).sum::<u64>() + 60;
        let ended = Running::start(cli.once_command(&options, &program))?.wait(Duration::from_secs(seconds))?;
        let outcomes = parse(&ended.output);
        ensure!(!outcomes.is_empty(), "{} said ({}):\n{}", ended.what, ended.status, ended.output);
        Ok(outcomes)
    }
}

impl Case {
    /// Fails unless the outcome is what is expected.
    fn judge(&self, outcome: &Outcome) -> Result<()> {
        let Outcome { status, output, seconds } = outcome;
        let said = || if output.is_empty() { String::new() } else { format!("; it said:\n{}", tail(output)) };
        match status {
            0 => {}
            &UNSUPPORTED => return Err(Skipped(output.lines().last().unwrap_or_default().to_owned()).into()),
            124 => bail!("it did not end within {} s{}", self.seconds, said()),
            129.. => bail!("it was ended by signal {} after {seconds} s{}", status - 128, said()),
            _ => bail!("status {status} after {seconds} s{}", said()),
        }
        // Whatever the program makes of it: its user would see it at each command.
        ensure!(!output.contains("ERROR: ld.so"), "the dynamic linker complains{}", said());
        if let Some(expected) = self.says {
            ensure!(output.trim_end() == expected, "it said not only {expected:?}{}", said());
        }
        Ok(())
    }
}

/// The end of what a program said, as programs that fail in a loop say much.
fn tail(output: &str) -> String {
    let lines: Vec<&str> = output.lines().collect();
    lines[lines.len().saturating_sub(30)..].join("\n")
}

/// What run-cases.sh says. A case that has no end is not in it.
fn parse(output: &str) -> BTreeMap<String, Outcome> {
    let mut outcomes = BTreeMap::new();
    let mut said = String::new();
    for line in output.lines() {
        if line.starts_with(">>> ") {
            said.clear();
        } else if let Some(text) = line.strip_prefix("| ") {
            said.push_str(text);
            said.push('\n');
        } else if let Some((name, status, seconds)) = line.strip_prefix("<<< ").and_then(ending) {
            outcomes.insert(name.to_owned(), Outcome { status, output: std::mem::take(&mut said), seconds });
        }
    }
    outcomes
}

/// A case's name, status and time, of the line that says them.
fn ending(line: &str) -> Option<(&str, i32, u64)> {
    let (rest, seconds) = line.rsplit_once(' ')?;
    let (name, status) = rest.rsplit_once(' ')?;
    Some((name, status.parse().ok()?, seconds.parse().ok()?))
}
