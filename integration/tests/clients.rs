//! Verbs programs of our own against proxies without containers: what the specification says about queue pairs, memory
//! registration, processes and quotas.

use anyhow::{Context, Result, ensure};
use ringfence_integration::command::{Running, command, run, wait_until};
use ringfence_integration::direct::{DirectProxy, Node};
use ringfence_integration::suite::{Needs, test};
use ringfence_integration::{artifacts, client, holds, machine, perftest, suite};
use ringfence_proxy::launch::addresses::{Gids, Peers};
use ringfence_proxy::launch::{BitRate, Bytes, Class, Limits, OpRate};
use ringfence_trials::{Trial, huge_pages};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

/// More than the slowest case takes by far.
const LIMIT: Duration = Duration::from_secs(60);

/// A test of a rate: what a proxy may, what the client does for two seconds, bytes per second that this makes at most.
type Rate = (&'static str, fn() -> Limits, &'static [&'static str], f64);

const RATES: [Rate; 5] = [
    (
        "ten_thousand_operations",
        || Limits { ops: OpRate::new(10_000), ..Limits::default() },
        &["cap", "8", "2"],
        80_000.0,
    ),
    (
        "a_million_operations",
        || Limits { ops: OpRate::new(1_000_000), ..Limits::default() },
        &["cap", "64", "2"],
        64_000_000.0,
    ),
    (
        "what_reads_bring_in",
        || Limits { bandwidth_rx: BitRate::new(100_000_000), ..Limits::default() },
        &["cap", "4096", "2", "read"],
        12_500_000.0,
    ),
    (
        "what_is_read_out",
        || Limits { bandwidth: BitRate::new(100_000_000), ..Limits::default() },
        &["cap", "4096", "2", "read"],
        12_500_000.0,
    ),
    (
        "all_at_once_and_none_the_less",
        || Limits {
            bandwidth: BitRate::new(1_000_000_000),
            bandwidth_rx: BitRate::new(1),
            ops: OpRate::new(1_000_000_000),
            class: Class::Latency,
            ..Limits::default()
        },
        &["cap", "16384", "2"],
        125_000_000.0,
    ),
];

type ProcessTest = fn(&Path) -> Result<()>;

fn main() -> ExitCode {
    let needs = Needs { programs: &["cc", "sleep"], built: &[artifacts::proxy, artifacts::library] };
    suite::main("ringfence-clients", &needs, trials)
}

fn trials() -> Result<Vec<Trial>> {
    let semantics = client::compile(
        "semantics",
        &["sides.c", "pairs.c", "check.c", "cases_data.c", "cases_errors.c", "cases_states.c", "cases_events.c"],
    )?;
    let memory = client::compile("memory", &["loop.c", "check.c"])?;
    let shared = client::compile("shared", &["loop.c", "check.c"])?;
    let process = client::compile("process", &["loop.c", "check.c"])?;

    let mut trials = Vec::new();
    for line in list(&semantics)?.lines() {
        let mut words = line.split(' ');
        let case = words.next().context("an empty line among the cases")?.to_owned();
        for sides in words {
            // Of the container's own memory files, the bytes go other ways.
            for (kind, arena) in [("semantics", Arena::Private), ("semantics_of_shared_memory", Arena::Shared)] {
                let (program, case, sides) = (semantics.clone(), case.clone(), sides.to_owned());
                let name = format!("{kind}::{case}::{sides}");
                trials.push(test(name, move || run_semantics(&program, &case, sides == "two", arena)));
            }
        }
    }
    for case in list(&memory)?.lines() {
        let (program, case) = (memory.clone(), case.to_owned());
        trials.push(test(format!("memory::{case}"), move || run_alone(&program, &[&case], Limits::default())));
    }
    for case in list(&shared)?.lines() {
        let (program, case) = (shared.clone(), case.to_owned());
        trials.push(test(format!("shared::{case}"), move || run_shared(&program, &case)));
    }
    trials.push(test("shared::perftest_with_mmap".to_owned(), perftest_with_mmap));
    let closing = client::compile("descriptors", &["descriptors_waits.c", "loop.c", "check.c"])?;
    for case in list(&closing)?.lines() {
        let (program, case) = (closing.clone(), case.to_owned());
        // So few that what somebody keeps who should be gone is missing.
        let limits = Limits { max_qp: 4, max_cq: 4, ..Limits::default() };
        trials.push(test(format!("descriptors::{case}"), move || run_alone(&program, &[&case], limits.clone())));
    }
    trials.push(test("descriptors::processes_begun_by_python", python));
    let program = client::compile("peers", &["check.c"])?;
    trials.push(test("policy::peers", move || only_to_peers(&program)));
    trials.push(test("policy::gids_are_granted_of_cards", gids_of_no_card));
    let program = client::compile("dmabuf", &["loop.c", "check.c"])?;
    trials.push(test("dmabuf::none_without_a_card", move || run_alone(&program, &["refused"], Limits::default())));
    let program = client::compile("legal", &["legal_objects.c", "legal_states.c", "legal_posting.c", "check.c"])?;
    trials.push(test("legal::answers_are_those_of_the_kernels_driver", move || legal(&program)));
    let keep = client::compile("keep", &["keep_memory.c", "keep_limits.c", "loop.c", "check.c"])?;
    for case in list(&keep)?.lines() {
        let (program, case) = (keep.clone(), case.to_owned());
        trials.push(test(format!("keep::{case}"), move || run_alone(&program, &[&case], Limits::default())));
    }
    for case in ["quotas_are_whole", "another_process_finds_room"] {
        let program = keep.clone();
        let limits = Limits { max_mr: 64, max_mr_bytes: Bytes(64 << 20), ..Limits::default() };
        trials.push(test(format!("keep::{case}"), move || run_alone(&program, &[case], limits)));
    }
    let bench = client::compile("bench_pair", &["bench_far.c", "bench_time.c", "check.c"])?;
    for (name, limits, words, most) in RATES {
        let program = bench.clone();
        trials.push(test(format!("rate::{name}"), move || rate(&program, limits, words, most)));
    }
    let tests: [(&str, ProcessTest); 7] = [
        ("forked_and_executed_children_use_verbs", children),
        ("quotas_answer_enomem", quotas),
        ("a_process_without_descriptors_loses_nothing_else", descriptors),
        ("a_killed_process_gives_everything_back", killed),
        ("many_processes_share_a_proxy", many),
        ("the_proxy_ends_with_its_container", ends_with_init),
        ("an_idle_proxy_uses_no_processor", idle),
    ];
    for (name, run) in tests {
        let program = process.clone();
        trials.push(test(format!("process::{name}"), move || run(&program)));
    }
    Ok(trials)
}

fn list(program: &Path) -> Result<String> {
    run(command(&[program.to_str().context("/tmp is not UTF-8")?, "list"]))
}

fn finish(command: Command) -> Result<()> {
    Running::start(command)?.wait(LIMIT)?.success().map(drop)
}

/// What the memory of a side is.
#[derive(Clone, Copy, PartialEq)]
enum Arena {
    Private,
    Shared,
}

fn run_semantics(program: &Path, case: &str, two: bool, arena: Arena) -> Result<()> {
    let node = Node::new(None)?;
    let mut proxy = node.proxy(Limits::default())?;
    let mut peer = node.proxy(Limits::default())?;
    let mut command = proxy.command(program)?;
    command.args([case, if two { "two" } else { "one" }]).env("PEER_SOCKET", peer.socket());
    if arena == Arena::Shared {
        command.env("SHARED_ARENA", "1");
    }
    finish(command)?;
    ensure!(!proxy.has_ended() && !peer.has_ended(), "a proxy has ended");
    Ok(())
}

/// The table has the driver's answers, and ours where they differ.
fn legal(program: &Path) -> Result<()> {
    let table = std::fs::read_to_string(artifacts::client_source("legal.tsv"))?;
    let expected: Vec<&str> = table.lines().filter(|line| !line.starts_with('#')).collect();
    let node = Node::new(None)?;
    let proxy = node.proxy(Limits::default())?;
    let ended = Running::start(proxy.command(program)?)?.wait(LIMIT)?;
    let mut answers = ended.output.lines();
    let mut wrong = Vec::new();
    for line in expected {
        let mut columns = line.split('\t');
        let (question, driver) = (columns.next().unwrap_or_default(), columns.next().unwrap_or_default());
        let ours = columns.next().unwrap_or(driver);
        let wanted = format!("{question}\t{ours}");
        match answers.next() {
            Some(answer) if answer == wanted => {}
            answer => wrong.push(format!("{wanted:?} was expected, {:?} came", answer.unwrap_or_default())),
        }
    }
    wrong.extend(answers.map(|answer| format!("{answer:?} is not in the table")));
    ensure!(wrong.is_empty(), "{} answers differ:\n{}", wrong.len(), wrong.join("\n"));
    ended.success().map(drop)
}

fn python() -> Result<()> {
    if !machine::is_installed("python3") {
        ringfence_trials::skip("python3 is not installed");
    }
    let script = artifacts::client_source("processes.py");
    run_alone(
        Path::new("python3"),
        &[script.to_str().context("the repository's path is not UTF-8")?],
        Limits::default(),
    )
}

fn descriptors(program: &Path) -> Result<()> {
    run_alone(program, &["descriptors"], Limits { max_qp: 4, max_cq: 4, ..Limits::default() })
}

fn run_alone(program: &Path, args: &[&str], limits: Limits) -> Result<()> {
    let node = Node::new(None)?;
    let mut proxy = node.proxy(limits)?;
    let mut command = proxy.command(program)?;
    command.args(args);
    finish(command)?;
    ensure!(!proxy.has_ended(), "the proxy has ended");
    Ok(())
}

fn run_shared(program: &Path, case: &str) -> Result<()> {
    let _pages = (case == "huge_pages").then(|| huge_pages::reserve(4));
    let node = Node::new(None)?;
    let mut proxy = node.proxy(Limits::default())?;
    let mut command = proxy.command(program)?;
    command.arg(case);
    let output = Running::start(command)?.wait(LIMIT)?.success()?;
    ensure!(!proxy.has_ended(), "the proxy has ended");
    if let Some(reason) = output.lines().find_map(|line| line.strip_prefix("SKIPPED: ")) {
        ringfence_trials::skip(reason);
    }
    Ok(())
}

/// A container's own port is a peer by its first GID, which is link-local.
fn only_to_peers(program: &Path) -> Result<()> {
    let peers = Peers(vec!["fe80::/10".parse().map_err(anyhow::Error::msg)?]);
    let node = Node::new(None)?;
    let proxy = node.proxy(Limits { peers: Some(peers), ..Limits::default() })?;
    let mut command = proxy.command(program)?;
    command.args(["own", "2001:db8::1", "lid"]);
    let said = Running::start(command)?.wait(LIMIT)?.success()?;
    ensure!(said == "own 0\n2001:db8::1 13\nlid 13\n", "{said}");
    Ok(())
}

fn gids_of_no_card() -> Result<()> {
    let mut node = Node::new(None)?;
    node.grant_gids(Gids::Host);
    let error = format!("{:#}", node.proxy(Limits::default()).err().context("it started")?);
    ensure!(error.contains("device.gids is for a card"), "{error}");
    Ok(())
}

/// A buffer in a file of tmpfs at either side.
fn perftest_with_mmap() -> Result<()> {
    let node = Node::new(None)?;
    let (server, client) = (node.proxy(Limits::default())?, node.proxy(Limits::default())?);
    // It says so by a failure.
    let help = Running::start(command(&["ib_write_bw", "--help"])).and_then(|running| running.wait(LIMIT));
    if !help.is_ok_and(|help| help.output.contains("--mmap")) {
        ringfence_trials::skip("ib_write_bw is not there, or has no --mmap");
    }
    let buffer = PathBuf::from(format!("/dev/shm/ringfence-perftest-{}", std::process::id()));
    std::fs::File::create_new(&buffer)?.set_len(64 << 20)?;
    let mmap = format!("--mmap={}", buffer.display());
    let ran = perftest::run(&server, &client, "ib_write_bw", &["-s", "65536", "-n", "200", &mmap]);
    std::fs::remove_file(&buffer)?;
    ran.map(drop)
}

fn children(program: &Path) -> Result<()> {
    run_alone(program, &["children"], Limits::default())
}

fn quotas(program: &Path) -> Result<()> {
    let limits = Limits { max_qp: 5, max_mr: 7, max_mr_bytes: Bytes(16 << 20), max_cq: 3, ..Limits::default() };
    run_alone(program, &["quota", "5", "7", "16777216", "3"], limits)
}

/// The limits are just what one process needs: the second works only if the first left nothing behind.
fn killed(program: &Path) -> Result<()> {
    let limits = Limits { max_qp: 2, max_mr: 2, max_mr_bytes: Bytes(4 << 20), max_cq: 1, ..Limits::default() };
    let node = Node::new(None)?;
    let mut proxy = node.proxy(limits)?;
    for round in 0..5 {
        let mut command = proxy.command(program)?;
        command.arg("stream");
        let mut stream = Running::start(command)?;
        wait_until("the stream to run", LIMIT, || stream.output().contains("streaming") || stream.has_ended())?;
        ensure!(!stream.has_ended(), "round {round}: the stream ended: {}", stream.output());
        std::thread::sleep(Duration::from_millis(20 * round));
        stream.kill();
        wait_until("the dead process's objects to be gone", Duration::from_secs(5), || once(&proxy, program).is_ok())
            .with_context(|| format!("round {round}: {:#}", once(&proxy, program).unwrap_err()))?;
    }
    ensure!(!proxy.has_ended(), "the proxy has ended");
    Ok(())
}

fn once(proxy: &DirectProxy, program: &Path) -> Result<()> {
    let mut command = proxy.command(program)?;
    command.arg("once");
    finish(command)
}

fn many(program: &Path) -> Result<()> {
    let node = Node::new(None)?;
    let proxy = node.proxy(Limits::default())?;
    let mut running = Vec::new();
    for _ in 0..20 {
        let mut command = proxy.command(program)?;
        command.arg("once");
        running.push(Running::start(command)?);
    }
    running.into_iter().try_for_each(|running| running.wait(LIMIT)?.success().map(drop))
}

fn ends_with_init(program: &Path) -> Result<()> {
    let node = Node::new(None)?;
    let mut proxy = node.proxy(Limits::default())?;
    let mut command = proxy.command(program)?;
    command.arg("stream");
    let mut stream = Running::start(command)?;
    wait_until("the stream to run", LIMIT, || stream.output().contains("streaming") || stream.has_ended())?;
    proxy.end_init()?;
    wait_until("the proxy to end", Duration::from_secs(2), || proxy.has_ended())?;
    // Its warden clears up.
    wait_until("its socket to be gone", Duration::from_secs(5), || !proxy.socket().exists())
}

fn idle(program: &Path) -> Result<()> {
    let node = Node::new(None)?;
    holds::sleeps(&node.proxy(Limits::default())?, program)
}

fn rate(program: &Path, limits: fn() -> Limits, words: &[&str], most: f64) -> Result<()> {
    let node = Node::new(None)?;
    holds::is_held_to(&node.proxy(limits())?, program, words, most).map(drop)
}
