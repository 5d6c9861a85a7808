//! The proxy with a real card, without one: its libibverbs is a library whose card carries requests out in memory, as strictly as a
//! card does (`verbs-proxy/ibverbs/tests/provider.c`). Everything else is what it will be: the program, its sandbox, the library in
//! the application, and the interface between proxy and libibverbs, which the provider has from the distribution's header.
//!
//! With RINGFENCE_CARD=NAME in the environment the card is the kernel's of that name, and two proxies use it.

#[path = "ibverbs/edges.rs"]
mod edges;
#[path = "ibverbs/fence.rs"]
mod fence;
#[path = "ibverbs/grants.rs"]
mod grants;
#[path = "ibverbs/help.rs"]
mod help;
#[path = "ibverbs/partitions.rs"]
mod partitions;

use anyhow::{Context, Error, Result, ensure};
use ringfence_integration::command::{Ended, Running, run, wait_until};
use ringfence_integration::direct::{DirectProxy, Node};
use ringfence_integration::suite::{Needs, test};
use ringfence_integration::{artifacts, client, perftest, suite};
use ringfence_proxy::launch::{BitRate, Class, Limits, OpRate};
use ringfence_trials::{Skipped, Trial, huge_pages};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

/// More than the slowest case takes by far.
const LIMIT: Duration = Duration::from_secs(180);

/// What is not as it should be yet, or cannot be shown here.
const NOT_YET: &[(&str, &str)] = &[
    (
        "solicited_events_only",
        "a card's completion does not say that it is solicited: each of a receive request counts as such",
    ),
    ("receiver_not_ready", "there is no time in the card that is not there"),
];

/// Programs of others, with what.
const PROGRAMS: &[&[&str]] = &[
    &["ibv_rc_pingpong", "-g", "0", "-n", "200"],
    &["ibv_rc_pingpong", "-g", "0", "-n", "200", "-e", "-c"],
    &["ib_write_bw", "-s", "65536", "-n", "200"],
    &["ib_write_lat", "-s", "8", "-n", "200"],
    &["ib_read_bw", "-s", "4096", "-n", "200"],
    &["ib_send_bw", "-s", "1024", "-n", "500"],
    &["ib_send_lat", "-e", "-s", "64", "-n", "200"],
    &["ib_atomic_bw", "-n", "200"],
];

fn main() -> ExitCode {
    let compiled = std::env::var_os("RINGFENCE_CLIENTS").is_some();
    let programs: &[&str] = if compiled { &["sleep", "ib_write_bw"] } else { &["cc", "sleep", "ib_write_bw"] };
    let needs = Needs { programs, built: &[artifacts::ibverbs_proxy, artifacts::library] };
    suite::main("ringfence-ibverbs", &needs, trials)
}

/// Which card.
#[derive(Clone, Debug)]
enum Card {
    /// The library, and the name of one of its cards.
    Provider(PathBuf, &'static str),
    Kernel(String),
}

impl Card {
    fn node(&self) -> Result<Node> {
        match self {
            Self::Provider(library, name) => Node::with_card(name, Some(library)),
            Self::Kernel(name) => Node::with_card(name, None),
        }
    }

    /// The cards, of which all that is tested on one may be tested on each.
    fn all() -> Result<Vec<Self>> {
        if let Ok(name) = std::env::var("RINGFENCE_CARD") {
            return Ok(vec![Self::Kernel(name)]);
        }
        let library = client::provider()?;
        Ok(["test0", "late0"].map(|name| Self::Provider(library.clone(), name)).into())
    }

    fn name(&self) -> &str {
        match self {
            Self::Provider(_, name) => name,
            Self::Kernel(name) => name,
        }
    }

    /// Whether what two proxies do reaches the other.
    fn has_a_wire(&self) -> bool {
        matches!(self, Self::Kernel(_))
    }
}

fn trials() -> Result<Vec<Trial>> {
    let cards = Card::all()?;
    let card = cards[0].clone();
    let semantics = client::compile(
        "semantics",
        &["sides.c", "pairs.c", "check.c", "cases_data.c", "cases_errors.c", "cases_states.c", "cases_events.c"],
    )?;
    let mut trials = Vec::new();
    for card in &cards {
        trials.extend(semantics_trials(card, &semantics)?);
        let orders = client::compile("orders", &["sides.c", "pairs.c", "check.c"])?;
        for seed in 1..=4 {
            let (card, program) = (card.clone(), orders.clone());
            let name = format!("orders::{}::{seed}", card.name());
            trials.push(test(name, move || run_orders(&card, &program, seed, Limits::default())));
        }
        for class in [Class::Latency, Class::Bulk] {
            let (card, program) = (card.clone(), orders.clone());
            let name = format!("orders::{}::shaped::{class:?}", card.name()).to_lowercase();
            trials.push(test(name, move || run_orders(&card, &program, 5, shaped(class))));
        }
    }
    let absence = client::compile("absence", &["sides.c", "pairs.c", "check.c"])?;
    match &card {
        Card::Provider(..) => trials.extend(absence_trials(&cards, &absence)),
        Card::Kernel(name) => {
            let (name, program) = (name.clone(), absence.clone());
            trials.push(test("absence::removed", move || run_removed(&name, &program)));
        }
    }
    let memory = client::compile("memory", &["loop.c", "check.c"])?;
    for case in list(&memory)?.lines() {
        let (card, program, case) = (card.clone(), memory.clone(), case.to_owned());
        trials.push(test(format!("memory::{case}"), move || run_memory(&card, &program, &case)));
    }
    let shared = client::compile("shared", &["loop.c", "check.c"])?;
    for case in list(&shared)?.lines() {
        let (card, program, case) = (card.clone(), shared.clone(), case.to_owned());
        trials.push(test(format!("shared::{case}"), move || run_shared(&card, &program, &case)));
    }
    let dmabuf = client::compile("dmabuf", &["loop.c", "check.c"])?;
    let of_dmabuf = card.clone();
    trials.push(test("dmabuf", move || run_dmabuf(&of_dmabuf, &dmabuf)));
    let peers = client::compile("peers", &["check.c"])?;
    trials.extend(grants::trials(&card, peers.clone()));
    if let Card::Provider(library, _) = &card {
        trials.extend(help::trials(library, &peers));
        trials.extend(edges::trials(library, &semantics, &absence));
        trials.extend(partitions::trials(library)?);
        trials.extend(fence::trials(library)?);
    }
    for words in PROGRAMS {
        let card = card.clone();
        trials.push(test(format!("programs::{}", words.join("_")), move || run_program(&card, words)));
    }
    let named = card.clone();
    trials.push(test("a_card_that_is_not_there_is_named", move || no_such_card(&named)));
    if !card.has_a_wire() {
        trials.push(test("an_iwarp_card_is_refused", move || iwarp(&card)));
    }
    Ok(trials)
}

fn semantics_trials(card: &Card, program: &Path) -> Result<Vec<Trial>> {
    let mut trials = Vec::new();
    for line in list(program)?.lines() {
        let mut words = line.split(' ');
        let case = words.next().context("an empty line among the cases")?.to_owned();
        for sides in words {
            let two = sides == "two";
            if two && !card.has_a_wire() {
                continue;
            }
            let name = format!("semantics::{case}::{}::{sides}", card.name());
            let reason = NOT_YET.iter().find(|(not_yet, _)| *not_yet == case).map(|(_, reason)| *reason);
            if let Some(reason) = reason.filter(|_| !card.has_a_wire() || case != "receiver_not_ready") {
                trials.push(ringfence_trials::test(name, move || ringfence_trials::skip(reason)));
                continue;
            }
            let (card, program, case) = (card.clone(), program.to_owned(), case.clone());
            trials.push(test(name, move || run_semantics(&card, &program, &case, two)));
        }
    }
    Ok(trials)
}

/// Events of port and card, a card that goes and comes, and one that is given up.
fn absence_trials(cards: &[Card], program: &Path) -> Vec<Trial> {
    let mut trials = Vec::new();
    for card in cards {
        for case in ["port", "fatal", "queue", "drain"] {
            let (card, program) = (card.clone(), program.to_owned());
            trials.push(test(format!("absence::{case}::{}", card.name()), move || run_absence(&card, &program, case)));
        }
    }
    trials
}

/// The kernel's card is deleted while it is busy, and made again on the same interface, with which it has the same GUID.
fn run_removed(card: &str, program: &Path) -> Result<()> {
    let node = Node::with_card(card, None)?;
    let (mut proxy, mut idle) = (node.proxy(Limits::default())?, node.proxy(Limits::default())?);
    let mut command = proxy.command(program)?;
    command.arg("removed");
    let running = Running::start(command)?;
    wait_until("the program is ready", LIMIT, || running.output().contains("ready"))?;
    std::thread::sleep(Duration::from_millis(200));
    let parent = std::fs::read_to_string(format!("/sys/class/infiniband/{card}/parent"))?;
    // With a driver that cannot take its device from those who have it, this waits until the last has closed it.
    let rdma = |words: &[&str]| run(ringfence_integration::command::command(&[&["rdma", "link"], words].concat()));
    rdma(&["delete", card])?;
    rdma(&["add", card, "type", "rxe", "netdev", parent.trim_end()])?;
    running.wait(LIMIT)?.success().context("the program")?;
    // Neither does a proxy that has nothing to do with it keep the card, or miss that it is back.
    let mut command = idle.command(program)?;
    command.arg("works");
    Running::start(command)?.wait(LIMIT)?.success().context("the other container's program")?;
    ensure!(!proxy.has_ended() && !idle.has_ended(), "a proxy has ended");
    Ok(())
}

fn run_absence(card: &Card, program: &Path, case: &str) -> Result<()> {
    absence_on(card.node()?, card.name(), program, case)
}

fn absence_on(mut node: Node, card: &str, program: &Path, case: &str) -> Result<()> {
    node.show();
    let mut proxy = node.proxy(Limits::default())?;
    let mut command = proxy.command(program)?;
    command.arg(case);
    if case == "port" {
        command.arg(proxy.sys().join("class/infiniband").join(card).join("ports/1"));
    }
    if case == "drain" {
        let sockets = node.dir().join("fabric").join(card).join("sockets");
        let socket = std::fs::read_dir(&sockets)?.next().context("no socket")??.path();
        command.arg(socket);
    }
    Running::start(command)?.wait(LIMIT)?.success().context("the program")?;
    ensure!(!proxy.has_ended(), "the proxy has ended");
    Ok(())
}

fn list(program: &Path) -> Result<String> {
    let mut list = Command::new(program);
    list.arg("list");
    Running::start(list)?.wait(LIMIT)?.success().context("the list of cases")
}

fn run_memory(card: &Card, program: &Path, case: &str) -> Result<()> {
    let node = card.node()?;
    let mut proxy = node.proxy(Limits::default())?;
    let mut command = proxy.command(program)?;
    command.arg(case);
    Running::start(command)?.wait(LIMIT)?.success().context("the program")?;
    ensure!(!proxy.has_ended(), "the proxy has ended");
    Ok(())
}

/// To rxe no descriptor of these is a dma-buf; the card that is not there takes memory files for such.
fn run_dmabuf(card: &Card, program: &Path) -> Result<()> {
    let node = card.node()?;
    let mut proxy = node.proxy(Limits::default())?;
    let mut command = proxy.command(program)?;
    command.args(card.has_a_wire().then_some("refused"));
    Running::start(command)?.wait(LIMIT)?.success().context("the program")?;
    ensure!(!proxy.has_ended(), "the proxy has ended");
    Ok(())
}

/// Shared memory whose pages are taken away: those that were registered are pinned, and the card goes on with them.
const TAKEN_AWAY: &[&str] = &["shrunk", "punched", "taken_away_all_the_time", "huge_pages"];

fn run_shared(card: &Card, program: &Path, case: &str) -> Result<()> {
    if !card.has_a_wire() && TAKEN_AWAY.contains(&case) {
        ringfence_trials::skip("the card that is not there pins no pages");
    }
    let _pages = (case == "huge_pages").then(|| huge_pages::reserve(4));
    let node = card.node()?;
    let mut proxy = node.proxy(Limits::default())?;
    let mut command = proxy.command(program)?;
    command.arg(case).env("PAGES_ARE_PINNED", "1");
    let output = Running::start(command)?.wait(LIMIT)?.success()?;
    ensure!(!proxy.has_ended(), "the proxy has ended");
    if let Some(reason) = output.lines().find_map(|line| line.strip_prefix("SKIPPED: ")) {
        ringfence_trials::skip(reason);
    }
    Ok(())
}

/// Rates at which some requests go unasked, others must ask, and some wait.
fn shaped(class: Class) -> Limits {
    Limits { bandwidth: BitRate::new(4_000_000_000), ops: OpRate::new(5_000), class, ..Limits::default() }
}

/// What happens to a queue pair while it is busy; on rxe, whose errors take their time, not as often.
fn run_orders(card: &Card, program: &Path, seed: u32, limits: Limits) -> Result<()> {
    let node = card.node()?;
    let mut proxy = node.proxy(limits)?;
    let mut command = proxy.command(program)?;
    let seed = seed.to_string();
    let arguments = [seed.as_str(), if card.has_a_wire() { "10" } else { "40" }];
    command.args(arguments);
    let ended = Running::start(command)?.wait(LIMIT)?.success().context("the program");
    ensure!(!proxy.has_ended(), "the proxy has ended");
    match (ended, card) {
        (Err(error), Card::Kernel(name)) => Err(as_without_proxy(name, program, &arguments, error)),
        (ended, _) => ended.map(drop),
    }
}

fn run_semantics(card: &Card, program: &Path, case: &str, two: bool) -> Result<()> {
    let node = card.node()?;
    let mut proxy = node.proxy(Limits::default())?;
    let mut peer = node.proxy(Limits::default())?;
    let mut command = proxy.command(program)?;
    command.args([case, if two { "two" } else { "one" }]).env("PEER_SOCKET", peer.socket());
    let ended = Running::start(command)?.wait(LIMIT)?.success().context("the program");
    ensure!(!proxy.has_ended() && !peer.has_ended(), "a proxy has ended");
    match (ended, card) {
        (Err(error), Card::Kernel(name)) => Err(as_without_proxy(name, program, &[case, "one"], error)),
        (ended, _) => ended.map(drop),
    }
}

/// What the kernel's card does not do by itself, its proxy cannot. Such a case counts as one that could not be shown.
fn as_without_proxy(card: &str, program: &Path, arguments: &[&str], error: Error) -> Error {
    let mut alone = Command::new(program);
    alone.args(arguments);
    let native = Running::start(alone).and_then(|running| running.wait(LIMIT)).and_then(Ended::success);
    match native {
        Ok(_) => error.context("it does not fail without a proxy"),
        Err(native) => {
            let last = |error: &Error| format!("{error:#}").lines().last().unwrap_or_default().to_owned();
            let (native, proxied) = (last(&native), last(&error));
            Error::new(Skipped(format!("{card} itself fails it: {native}; with a proxy: {proxied}")))
        }
    }
}

/// Client and server are two processes of one container, or those of two.
fn run_program(card: &Card, words: &[&str]) -> Result<()> {
    let node = card.node()?;
    let server = node.proxy(Limits::default())?;
    let other = if card.has_a_wire() { Some(node.proxy(Limits::default())?) } else { None };
    run_pair(&server, other.as_ref().unwrap_or(&server), words)
}

fn run_pair(server: &DirectProxy, client: &DirectProxy, words: &[&str]) -> Result<()> {
    perftest::run(server, client, words[0], &words[1..]).map(drop)
}

fn iwarp(card: &Card) -> Result<()> {
    let mut node = card.node()?;
    node.rename_device("iwarp0");
    let error = format!("{:#}", node.proxy(Limits::default()).err().context("it started")?);
    ensure!(error.contains("RDMA device iwarp0 is iWARP") && error.contains("mode=passthrough"), "{error}");
    Ok(())
}

fn no_such_card(card: &Card) -> Result<()> {
    let node = match card {
        Card::Provider(library, _) => Node::with_card("mlx5_9", Some(library))?,
        Card::Kernel(_) => Node::with_card("mlx5_9", None)?,
    };
    let error = format!("{:#}", node.proxy(Limits::default()).err().context("it started")?);
    ensure!(error.contains("no RDMA device has the name mlx5_9: there is "), "{error}");
    Ok(())
}
