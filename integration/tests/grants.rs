//! One-sided operations that need no responder: that they do without, and that nothing of them lands once the responder has taken
//! its leave back, wherever the requester's proxy was stopped, stepped through, or killed. And that what goes by the responder does not
//! take along what was written to memory after its queue pair or region had gone.

#[path = "grants/steps.rs"]
mod steps;

use anyhow::{Context, Result, ensure};
use ringfence_integration::command::Running;
use ringfence_integration::direct::Node;
use ringfence_integration::suite::{Needs, test};
use ringfence_integration::{artifacts, client, suite};
use ringfence_proxy::launch::Limits;
use ringfence_trials::Trial;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(300);

/// What takes a grant back.
const VERBS: [&str; 5] = ["dereg", "reset", "err", "destroy", "rights"];

/// What ends a requester's work.
const ENDS: [&str; 5] = ["dereg", "reset", "err", "destroy", "timeout"];

fn main() -> ExitCode {
    let needs =
        Needs { programs: &["cc", "sleep"], built: &[artifacts::proxy, artifacts::library, artifacts::obedient_proxy] };
    suite::main("ringfence-grants", &needs, trials)
}

fn trials() -> Result<Vec<Trial>> {
    let others = ["sides.c", "pairs.c", "stops.c", "check.c"];
    let with_floods = [&["floods.c"], &others[..]].concat();
    let [grants, names] = [client::compile("grants", &with_floods)?, client::compile("names", &others)?];
    let mut trials = steps::trials()?;
    let mut add_to = |program: &Path, name: String, words: &[&str]| {
        let (program, words) = (program.to_owned(), words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>());
        trials.push(test(name, move || {
            print!("{}", run(&program, &words)?);
            Ok(())
        }));
    };
    for (kind, verb) in ["send", "write"].into_iter().flat_map(|kind| ENDS.map(|verb| (kind, verb))) {
        add_to(&names, format!("what_is_written_later_stays::{kind}::{verb}"), &[kind, verb, "3"]);
    }
    for verb in VERBS {
        add_to(&names, format!("what_is_written_later_stays::read::{verb}"), &["read", verb, "3"]);
    }
    let mut add = |name: String, words: &[&str]| add_to(&grants, name, words);
    add("they_need_no_responder".into(), &["alone"]);
    add("reads_are_granted_whenever_they_come".into(), &["reads"]);
    add("edges_go_by_the_responder".into(), &["edges"]);
    for verb in VERBS {
        add(format!("a_requester_that_is_stopped::{verb}"), &["stop", verb, "4"]);
        add(format!("a_requester_that_is_stepped_through::{verb}"), &["step", verb, "2"]);
    }
    for who in ["requester", "responder"] {
        for verb in VERBS {
            add(format!("a_proxy_that_is_stopped_for_a_while::{who}::{verb}"), &["pause", who, verb, "3"]);
        }
    }
    Ok(trials)
}

/// What the program says.
fn run(program: &Path, words: &[String]) -> Result<String> {
    let node = Node::new(None)?;
    let mut proxy = node.proxy(Limits::default())?;
    let mut peer = node.proxy(Limits::default())?;
    let mut command = proxy.command(program)?;
    command.args(words).env("PEER_SOCKET", peer.socket());
    command.env("PROXY_PID", proxy.pid().to_string()).env("PEER_PID", peer.pid().to_string());
    let ended = Running::start(command)?.wait(LIMIT)?.success().context("the program")?;
    for (who, proxy) in [("requester", &mut proxy), ("responder", &mut peer)] {
        ensure!(!proxy.has_ended(), "the {who}'s proxy has ended");
    }
    Ok(ended.to_string())
}
