//! `ringfence stats` of a container that the hook has given a proxy, while its program has what it used.

use super::LIMIT;
use anyhow::{Context, Result, ensure};
use ringfence_integration::command::{Running, run, wait_until};
use ringfence_integration::config::Config;
use ringfence_integration::container::{Builder, Container};
use ringfence_integration::rootfs::Image;
use ringfence_integration::{artifacts, machine, netns};
use serde_json::{Value, json};
use std::path::Path;
use std::process::{Command, Stdio};

const PROGRAM: &str = "/opt/counted";

/// What the program's case `work` does within one container, as both ends count it: operations and bytes.
const WORK: [(&str, u64, u64); 7] = [
    ("rdma-write", 14, 13 * 8 + (1 << 20)),
    ("rdma-write-with-imm", 2, 32),
    ("send", 4, 300),
    ("send-with-imm", 2, 100),
    ("rdma-read", 5, 4 * 4096 + (1 << 20)),
    ("compare-and-swap", 1, 8),
    ("fetch-and-add", 6, 48),
];

/// What it holds then, and what the policy allows, as JSON and as people read it.
const HELD: [(&str, u64, u64, &str); 4] = [
    ("queue-pairs", 2, 16, "2 16"),
    ("completion-queues", 4, 256, "4 256"),
    ("memory-regions", 2, 4096, "2 4096"),
    ("memory-region-bytes", 4 << 20, 64 << 20, "4MiB 64MiB"),
];

/// The lines of a table, with one space between words.
fn lines(table: &str) -> Vec<String> {
    table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect()
}

/// The node's administrator.
struct Operator {
    config: Config,
}

impl Operator {
    fn command(&self, words: &[&str]) -> Result<Command> {
        let mut command = Command::new(artifacts::operator()?);
        command.arg("stats").args(words).env("RINGFENCE_CONFIG", self.config.path());
        Ok(command)
    }

    fn shown(&self, words: &[&str]) -> Result<Vec<String>> {
        Ok(lines(&run(self.command(words)?)?))
    }

    fn json(&self, words: &[&str]) -> Result<Value> {
        let words = [words, &["--json"]].concat();
        Ok(serde_json::from_str(&run(self.command(&words)?)?)?)
    }
}

fn has(shown: &[String], line: &str) -> Result<()> {
    ensure!(shown.iter().any(|found| found == line), "no line {line:?} in\n{}", shown.join("\n"));
    Ok(())
}

/// Counts, limits and quotas while the program holds what it has, and what is left of them afterwards.
pub fn shows(program: &Path) -> Result<()> {
    let missing = [artifacts::hook, artifacts::operator, Image::source].iter().find_map(|built| built().err());
    let obstacle = machine::obstacle(&["runc", "ip"]).or_else(|| missing.map(|error| format!("{error:#}")));
    if let Some(obstacle) = obstacle {
        ringfence_trials::skip(obstacle);
    }
    let operator = Operator { config: Config::new("")? };
    ensure!(operator.json(&[])? == json!([]), "containers before there is one");
    let (network, _other) = netns::pair()?;
    let policy = [("bandwidth", "10Gbit"), ("ops", "1M"), ("max-qp", "16"), ("max-mr-bytes", "64Mi")];
    let builder = Builder::with_rdma(&operator.config, &network).mount(program, PROGRAM);
    let builder = policy.iter().fold(builder, |builder, (key, value)| builder.annotation(key, value));
    let container = builder.start(&Image::debian()?)?;

    let (input, keep) = std::io::pipe()?;
    let mut running = container.spawn_reading(&[PROGRAM, "work", "one"], Stdio::from(input))?;
    wait_until("the program to be done", LIMIT, || running.output().contains("done") || running.has_ended())?;
    if !running.has_ended() {
        busy(&operator, &container)?;
    }
    drop(keep);
    running.wait(LIMIT)?.success()?;
    idle(&operator, &container)?;

    container.delete()?;
    ensure!(operator.json(&[])? == json!([]), "containers after the last one");
    let ended = Running::start(operator.command(&[container.id()])?)?.wait(LIMIT)?;
    let expected = format!("no container {}", container.id());
    ensure!(!ended.status.success() && ended.output.contains(&expected), "{}: {}", ended.status, ended.output);
    Ok(())
}

fn busy(operator: &Operator, container: &Container) -> Result<()> {
    let id = container.id();
    let one = operator.json(&[id])?;
    ensure!(one["id"] == id, "{one}");
    for (limit, expected) in [
        ("bandwidth", json!(10_000_000_000u64)),
        ("ops", json!(1_000_000)),
        ("max_qp", json!(16)),
        ("weight", json!(null)),
    ] {
        ensure!(one["limits"][limit] == expected, "{limit}: {}", one["limits"]);
    }
    let counters = &one["counters"];
    for (opcode, operations, bytes) in WORK {
        let expected = json!({ "operations": operations, "bytes": bytes });
        for side in ["sent", "received"] {
            ensure!(counters[side][opcode] == expected, "{opcode} {side}: {}", counters[side][opcode]);
        }
    }
    for (quota, used, limit, _) in HELD {
        let expected = json!({ "used": used, "limit": limit });
        ensure!(counters["quotas"][quota] == expected, "{quota}: {}", counters["quotas"]);
    }

    let shown = operator.shown(&[id])?;
    has(&shown, &format!("container {id}"))?;
    has(&shown, "REQUESTS SENT BYTES RECEIVED BYTES")?;
    for (opcode, operations, bytes) in WORK {
        has(&shown, &format!("{opcode} {operations} {bytes} {operations} {bytes}"))?;
    }
    for (quota, _, _, held) in HELD {
        has(&shown, &format!("{quota} {held}"))?;
    }
    // Nothing has moved for the moment in which rates are measured.
    has(&shown, "out 0bit 10Gbit")?;
    has(&shown, "operations 0 1M")?;

    let all = operator.shown(&[])?;
    let line = all.iter().find(|line| line.starts_with(id)).with_context(|| format!("{id} is not in {all:?}"))?;
    ensure!(line.contains(" 0bit/10Gbit ") && line.ends_with(" 2/16 4MiB/64MiB"), "{line}");
    Ok(())
}

/// The program has ended: what was done stays, and nothing is held.
fn idle(operator: &Operator, container: &Container) -> Result<()> {
    let mut found = Value::Null;
    let given_back = wait_until("everything to be given back", LIMIT, || {
        found = operator.json(&[container.id()]).unwrap_or_default()["counters"].take();
        HELD.iter().all(|(quota, ..)| found["quotas"][quota]["used"] == 0)
    });
    given_back.with_context(|| format!("{}", found["quotas"]))?;
    let (_, operations, bytes) = WORK[0];
    let expected = json!({ "operations": operations, "bytes": bytes });
    ensure!(found["sent"]["rdma-write"] == expected, "{}", found["sent"]);
    Ok(())
}
