//! Whether everything that `bench.sh` measures can be measured. The figures of these runs mean nothing.

use anyhow::{Context, Result, ensure};
use ringfence_integration::command::{Running, command};
use ringfence_integration::suite::{Needs, test};
use ringfence_integration::{artifacts, sandbox, suite};
use ringfence_trials::Trial;
use serde_json::Value;
use std::process::ExitCode;
use std::time::Duration;

const BENCH: &str = env!("CARGO_BIN_EXE_ringfence-bench");

/// A few seconds by far on a machine that is not busy.
const LIMIT: Duration = Duration::from_secs(180);

/// What takes a node with all engines, which `engine_*` have; it is measured by hand.
const BY_HAND: &str = "startup";

fn main() -> ExitCode {
    let built = &[artifacts::proxy, artifacts::library, artifacts::hook, artifacts::ibverbs_proxy];
    let needs = Needs { programs: &["cc", "runc", "sleep"], built };
    suite::main("ringfence-bench-test", &needs, trials)
}

fn trials() -> Result<Vec<Trial>> {
    let listed = Running::start(command(&[BENCH, "--list"]))?.wait(LIMIT)?.success()?;
    let names = listed.lines().filter_map(|line| line.split_whitespace().next()).filter(|name| *name != BY_HAND);
    let mut trials: Vec<Trial> = names
        .map(|name| {
            let name = name.to_owned();
            test(format!("group::{name}"), move || group(&name))
        })
        .collect();
    ensure!(trials.len() > 10, "the list has but {} groups:\n{listed}", trials.len());
    trials.push(test("a_group_that_there_is_not", unknown));
    Ok(trials)
}

fn group(name: &str) -> Result<()> {
    let path = |ending: &str| sandbox::work_dir().join(format!("{name}.{ending}"));
    let (json, svg) = (path("json"), path("svg"));
    let words = [BENCH, "--quick", "--only", name, "--json"].map(str::to_owned);
    let mut bench = command(&words.each_ref().map(String::as_str));
    sandbox::nest(&mut bench);
    bench.arg(&json).arg("--svg").arg(&svg);
    let said = Running::start(bench)?.wait(LIMIT)?.success()?;
    if said.contains("SKIPPED: ") {
        ringfence_trials::skip(said.lines().find(|line| line.contains("SKIPPED: ")).unwrap_or_default());
    }
    let report: Value = serde_json::from_slice(&std::fs::read(&json)?)?;
    for of in ["date", "kernel", "cpu"] {
        ensure!(report[of].as_str().is_some_and(|text| !text.is_empty()), "no {of} in {report}");
    }
    let groups = report["groups"].as_array().context("no groups")?;
    ensure!(groups.len() == 1 && groups[0]["name"] == name, "not the one group: {report}");
    let figures = groups[0]["figures"].as_array().context("no figures")?;
    ensure!(!figures.is_empty(), "no figures in {report}");
    for figure in figures {
        let name = figure["name"].as_str().context("a figure without a name")?;
        ensure!(figure["value"].as_f64().is_some_and(f64::is_finite), "no value: {figure}");
        ensure!(said.contains(name), "{name} is not in the table:\n{said}");
        // A goal is one that can be judged.
        ensure!(figure["goal"].is_string() == figure["met"].is_boolean(), "a goal without a word about it: {figure}");
    }
    ensure!(std::fs::read_to_string(&svg)?.ends_with("</svg>\n"), "no chart");
    Ok(())
}

fn unknown() -> Result<()> {
    let mut bench = command(&[BENCH, "--quick", "--only", "latencies"]);
    sandbox::nest(&mut bench);
    let ended = Running::start(bench)?.wait(LIMIT)?;
    ensure!(!ended.status.success(), "it succeeds: {}", ended.output);
    ensure!(
        ended.output.contains("no group \"latencies\"") && ended.output.contains("across-rate"),
        "{}",
        ended.output
    );
    Ok(())
}
