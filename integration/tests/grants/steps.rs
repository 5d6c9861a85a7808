//! Either proxy stopped, and killed, at every step of granting, copying and taking back, whatever the verb that takes back
//! (`clients/steps.c`). The proxies are of the test build that stops where it is told to, so each run meets its step, or fails.

use anyhow::{Context, Result, ensure};
use ringfence_integration::command::{Running, wait_until};
use ringfence_integration::direct::{Node, STEPS};
use ringfence_integration::suite::test;
use ringfence_integration::{artifacts, client};
use ringfence_proxy::launch::Limits;
use ringfence_proxy::steps::Step;
use ringfence_trials::Trial;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(120);

/// What takes a grant back, and what of it says so to the requester by a message.
const VERBS: &[&str] = &["dereg", "reset", "err", "destroy"];
const DEREG: &[&str] = &["dereg"];
/// The same with other rights.
const RIGHTS: &[&str] = &["rights"];
/// Runs at a time: they wait most of the time, for retry timers.
const AT_ONCE: usize = 4;

/// When a proxy comes to a step: a phase of `clients/steps.c`.
struct Moment {
    phase: &'static str,
    who: &'static str,
    /// At which time in that phase.
    passes: u32,
    /// What requests are made of; where there are several, verbs take turns at them.
    kinds: &'static [&'static str],
    verbs: &'static [&'static str],
    /// It happens once in the life of two proxies.
    once: bool,
}

impl Moment {
    const fn new(phase: &'static str, who: &'static str, kinds: &'static [&'static str]) -> Self {
        Self { phase, who, passes: 1, kinds, verbs: VERBS, once: false }
    }

    const fn granting(who: &'static str) -> Self {
        Self::new("grant", who, &["writes", "reads"])
    }

    const fn copying(passes: u32, kinds: &'static [&'static str]) -> Self {
        Self { passes, ..Self::new("copy", "requester", kinds) }
    }

    const fn once(self) -> Self {
        Self { once: true, ..self }
    }

    const fn for_dereg(self) -> Self {
        Self { verbs: DEREG, ..self }
    }
}

/// All kinds that go by the inlined road.
const INLINED: &[&str] = &["writes", "reads", "mixed"];
/// What goes by the road itself.
const SCATTERED: &[&str] = &["scattered"];

/// When proxies come to a step. The compiler sees that none is forgotten.
fn moments(step: Step) -> Vec<Moment> {
    let (requester, responder) = ("requester", "responder");
    match step {
        Step::Wished
        | Step::ShareConfirmed
        | Step::SlotWritten
        | Step::GrantSent
        | Step::Immutable
        | Step::ShareSent => {
            vec![Moment::granting(responder)]
        }
        Step::PageSent | Step::PageTaken => {
            vec![Moment::granting(requester).once(), Moment::granting(responder).once()]
        }
        Step::ShareMapped | Step::ShareTaken | Step::GrantCome | Step::GrantTaken => vec![Moment::granting(requester)],
        Step::Busy | Step::Left => vec![Moment::copying(1, INLINED)],
        // The third of a mixture is an atomic.
        Step::Copied => vec![Moment::copying(3, INLINED)],
        Step::PartCopied => vec![Moment::copying(2, &["writes", "reads", "scattered"])],
        Step::PieceBusy | Step::PieceCopied | Step::PieceLeft => vec![Moment::copying(2, SCATTERED)],
        Step::Clearing | Step::Cleared | Step::FoundBusy | Step::Waiting | Step::Settled => {
            vec![
                Moment::new("revoke", responder, &["writes", "mixed"]),
                Moment::new("behind", responder, &["reads", "writes"]),
            ]
        }
        Step::Unshared => {
            ["revoke", "behind"].map(|phase| Moment::new(phase, responder, INLINED).for_dereg()).into_iter().collect()
        }
        Step::Gone => vec![Moment::new("after", requester, &["writes", "reads", "scattered"])],
        Step::UnshareCome | Step::UnshareTaken => vec![Moment::new("after", requester, INLINED).for_dereg()],
    }
}

/// The words of each run at a step.
fn runs(step: Step, how: &str) -> Vec<Vec<String>> {
    let mut runs = Vec::new();
    for (turn, moment) in moments(step).iter().enumerate() {
        let words = |kind: &str, verbs: &[&str]| {
            let (name, passes) = (format!("{step:?}"), moment.passes.to_string());
            let words = [moment.phase, moment.who, &name, &passes, how, kind];
            words.iter().chain(verbs).map(|word| (*word).to_owned()).collect::<Vec<_>>()
        };
        if how == "stop" && !moment.once {
            runs.extend(moment.kinds.iter().map(|kind| words(kind, moment.verbs)));
            continue;
        }
        let kinds = moment.kinds.iter().cycle().skip(turn);
        // A fifth round would come to two proxies that have found each other stopped too often of late.
        let rights = RIGHTS.iter().filter(|_| how == "kill" && moment.verbs != DEREG);
        runs.extend(moment.verbs.iter().chain(rights).zip(kinds).map(|(verb, kind)| words(kind, &[verb])));
    }
    runs
}

/// The tests: one for each step, and whether a proxy stops or dies there.
pub fn trials() -> Result<Vec<Trial>> {
    let program = client::compile("steps", &["floods.c", "sides.c", "pairs.c", "stops.c", "check.c"])?;
    let ways = Step::ALL.into_iter().flat_map(|step| ["stop", "kill"].map(|how| (step, how)));
    let trials = ways.map(|(step, how)| {
        let program = program.clone();
        test(format!("at_each_step::{step:?}::{how}"), move || all(&program, runs(step, how)))
    });
    Ok(trials.chain([test("at_each_step::no release build stops", release_builds)]).collect())
}

/// Only the test build knows where it would be told to stop.
fn release_builds() -> Result<()> {
    for (program, knows) in [(artifacts::proxy()?, false), (artifacts::obedient_proxy()?, true)] {
        let bytes = std::fs::read(&program).with_context(|| format!("cannot read {}", program.display()))?;
        let found = bytes.windows(STEPS.len()).any(|window| window == STEPS.as_bytes());
        ensure!(found == knows, "{} in {}: {found}", STEPS, program.display());
    }
    Ok(())
}

/// Some runs at a time.
fn all(program: &Path, runs: Vec<Vec<String>>) -> Result<()> {
    let left = Mutex::new(runs);
    let next = || left.lock().expect("nobody panics").pop();
    let program: &PathBuf = &program.to_owned();
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..AT_ONCE)
            .map(|_| {
                scope.spawn(|| {
                    while let Some(words) = next() {
                        run(program, &words).with_context(|| words.join(" "))?;
                    }
                    Ok(())
                })
            })
            .collect();
        workers.into_iter().try_for_each(|worker| worker.join().expect("nobody panics"))
    })
}

fn run(program: &Path, words: &[String]) -> Result<()> {
    let mut node = Node::new(None)?;
    node.obey();
    let mut requester = node.proxy(Limits::default())?;
    let mut responder = node.proxy(Limits::default())?;
    let mut command = requester.command(program)?;
    command.args(words).env("PEER_SOCKET", responder.socket());
    command.env("PROXY_PID", requester.pid().to_string()).env("PEER_PID", responder.pid().to_string());
    command.env("PROXY_STEPS", requester.steps()).env("PEER_STEPS", responder.steps());
    Running::start(command)?.wait(LIMIT)?.success().context("the program")?;
    for (who, proxy) in [("requester", &mut requester), ("responder", &mut responder)] {
        let killed = words[4] == "kill" && words[1] == who;
        if killed {
            wait_until("the proxy that was killed to end", LIMIT, || proxy.has_ended())?;
        }
        ensure!(proxy.has_ended() == killed, "the {who}'s proxy");
    }
    Ok(())
}
