//! What holds for every proxy, of one with a card: what it has given up, what its policy takes from containers, and that it sleeps.

use crate::LIMIT;
use anyhow::{Result, ensure};
use ringfence_integration::client;
use ringfence_integration::command::Running;
use ringfence_integration::direct::{DirectProxy, Node};
use ringfence_integration::holds::{self, View};
use ringfence_integration::suite::test;
use ringfence_launch::counters::{FILE, Page, QUOTAS};
use ringfence_proxy::launch::{BitRate, Bytes, Limits, OpRate};
use ringfence_trials::Trial;
use std::path::Path;

pub fn trials(library: &Path) -> Result<Vec<Trial>> {
    let process = client::compile("process", &["loop.c", "check.c"])?;
    let bench = client::compile("bench_pair", &["bench_far.c", "bench_time.c", "check.c"])?;
    let test = |name: &str, program: &Path, run: fn(&Path, &Path) -> Result<()>| {
        let (library, program) = (library.to_owned(), program.to_owned());
        test(format!("fence::{name}"), move || run(&library, &program))
    };
    Ok(vec![
        test("a_proxy_has_given_up_what_it_can", &process, given_up),
        test("quotas_answer_enomem_and_are_shown", &process, quotas),
        test("an_idle_proxy_uses_no_processor", &process, idle),
        test("no_more_leaves_than_the_rate_allows", &bench, bandwidth),
        test("no_more_goes_than_operations_are_allowed", &bench, operations),
    ])
}

fn proxy(library: &Path, limits: Limits) -> Result<(Node, DirectProxy)> {
    let node = Node::with_card("test0", Some(library))?;
    let proxy = node.proxy(limits)?;
    Ok((node, proxy))
}

fn page(proxy: &DirectProxy) -> Result<Page> {
    Ok(Page::read(&std::fs::read(proxy.dir().join(FILE))?)?)
}

/// Its library reads `/sys`, and would open a card's node below `/dev`, of which this one has none.
fn given_up(library: &Path, _: &Path) -> Result<()> {
    let (_node, proxy) = proxy(library, Limits::default())?;
    let view = View {
        root: &["dev", "sys"],
        mounts: &[("/", "ro,nosuid,noexec"), ("/sys", "ro,nosuid,nodev,noexec")],
        // Of a card, `dev` of its directory in `/sys`, which cannot be read any more when the card is gone. This one has no directory.
        held: &["/dev"],
    };
    holds::given_up(&proxy, view).map(drop)
}

fn quotas(library: &Path, process: &Path) -> Result<()> {
    let limits = Limits { max_qp: 5, max_mr: 7, max_mr_bytes: Bytes(16 << 20), max_cq: 3, ..Limits::default() };
    let (_node, proxy) = proxy(library, limits)?;
    let mut command = proxy.command(process)?;
    command.args(["quota", "5", "7", "16777216", "3"]);
    Running::start(command)?.wait(LIMIT)?.success()?;
    let page = page(&proxy)?;
    let limits = ["queue-pairs", "memory-regions", "memory-region-bytes", "completion-queues"]
        .map(|name| QUOTAS.iter().position(|quota| *quota == name).map(|place| page.quotas[place].limit));
    ensure!(limits == [Some(5), Some(7), Some(16 << 20), Some(3)], "limits: {limits:?}");
    Ok(())
}

fn idle(library: &Path, process: &Path) -> Result<()> {
    let (_node, proxy) = proxy(library, Limits::default())?;
    holds::sleeps(&proxy, process)
}

fn bandwidth(library: &Path, bench: &Path) -> Result<()> {
    let limits = Limits { bandwidth: BitRate::new(100_000_000), ..Limits::default() };
    held_to(library, bench, limits, "4096", 12_500_000.0)
}

fn operations(library: &Path, bench: &Path) -> Result<()> {
    held_to(library, bench, Limits { ops: OpRate::new(10_000), ..Limits::default() }, "8", 80_000.0)
}

/// And what is done is counted.
fn held_to(library: &Path, bench: &Path, limits: Limits, bytes: &str, most: f64) -> Result<()> {
    let (_node, proxy) = proxy(library, limits)?;
    let seen = holds::is_held_to(&proxy, bench, &["cap", bytes, "2"], most)?;
    let page = page(&proxy)?;
    let (counted, each) = (page.sent[0], bytes.parse::<u64>()?);
    ensure!(counted.bytes == counted.operations * each && counted.bytes as f64 >= seen, "{counted:?} of {seen} seen");
    ensure!(page.failed() == 0 && page.throttled_ns > 0, "{:?} failed, {} ns", page.errors, page.throttled_ns);
    Ok(())
}
