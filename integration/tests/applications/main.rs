//! Programs that nobody here wrote, in containers of podman, podman without root and docker under their default seccomp profiles:
//! what works on a device with a kernel driver works here, and a program without verbs notices nothing.
//!
//! One container of an engine runs many cases (`clients/applications/run-cases.sh`); each case is a test of its own.

mod alone;
mod batch;
mod cases;
mod engine;
mod surroundings;
mod sweep;

use anyhow::{Result, anyhow};
use batch::Batch;
use engine::Stage;
use ringfence_integration::artifacts;
use ringfence_integration::node::applications::Applications;
use ringfence_integration::node::{Node, Suite};
use ringfence_integration::suite::{Needs, at_a_time, in_turns, test};
use ringfence_trials::{Arguments, Trial};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};

/// The image is made of these. What moves is not needed to see whether programs run.
const SUITES: [Suite; 2] = [Suite::Bookworm, Suite::Trixie];

fn main() -> ExitCode {
    let needs = Needs { programs: &["mmdebstrap", "unshare", "nsenter", "tar", "cp"], built: &[artifacts::package] };
    // Beside each other, as one leaves a processor idle half of the time.
    at_a_time(SUITES.len(), "ringfence-applications", &needs, || Ok(in_turns(SUITES.map(trials))))
}

/// What a release's tests share: made by the first that needs it, gone with the last.
struct Shared {
    suite: Suite,
    /// Why there is none is as true for the next test.
    stage: Mutex<Option<Result<Stage, String>>>,
}

impl Shared {
    /// Runs `act` on the release's node, and then nothing of ours may be left there; if it is, the next gets a new node.
    fn on_stage<T>(&self, act: impl FnOnce(&Stage) -> Result<T>) -> Result<T> {
        let mut stage = self.stage.lock().unwrap_or_else(PoisonError::into_inner);
        let made = stage.get_or_insert_with(|| Stage::make(self.suite).map_err(|error| format!("{error:#}")));
        let prepared =
            made.as_ref().map_err(|error| anyhow!("cannot prepare a node of {}: {error}", self.suite.name()))?;
        let done = act(prepared);
        let clean = prepared.node.is_clean();
        if clean.is_err() {
            *stage = None;
        }
        done.and_then(|done| clean.map(|()| done))
    }
}

fn trials(suite: Suite) -> Vec<Trial> {
    let shared = Arc::new(Shared { suite, stage: Mutex::new(None) });
    let mut trials = Vec::new();
    for engine in sweep::engines(suite) {
        let title = |case: &str| format!("{}: {}: {case}", suite.name(), engine.name());
        let cases: Vec<_> = cases::all().into_iter().filter(|case| is_chosen(&title(&case.name))).collect();
        let batch = Arc::new(Batch::new(engine, &surroundings::DEFAULT, cases));
        for case in batch.cases() {
            let (shared, batch, name) = (Arc::clone(&shared), Arc::clone(&batch), case.name.clone());
            trials.push(test(title(&name), move || batch.outcome(&shared, &name)));
        }
        for (name, run) in alone::ALL.into_iter().filter(|(name, _)| is_chosen(&title(name))) {
            let shared = Arc::clone(&shared);
            trials.push(test(title(name), move || shared.on_stage(|stage| run(stage, engine))));
        }
        for around in sweep::of(suite, engine) {
            let shared = Arc::clone(&shared);
            let name = title(&format!("all programs: {}", around.name));
            if is_chosen(&name) {
                trials.push(test(name, move || sweep::run(&shared, engine, around)));
            }
        }
    }
    let obstacle = || Node::obstacle(suite).or_else(|| Applications::obstacle(suite));
    match if trials.is_empty() { None } else { obstacle() } {
        None => trials,
        Some(reason) => {
            let reason = reason.lines().last().unwrap_or_default().to_owned();
            vec![ringfence_trials::test(format!("{} (all)", suite.name()), || ringfence_trials::skip(reason))]
        }
    }
}

/// Whether the program's arguments choose a test, so that containers run only what is asked for.
fn is_chosen(title: &str) -> bool {
    let arguments = Arguments::from_args();
    let matches = |filter: &String| if arguments.exact { title == filter } else { title.contains(filter.as_str()) };
    !arguments.skip.iter().any(matches) && arguments.filter.as_ref().is_none_or(matches)
}
