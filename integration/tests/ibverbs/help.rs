//! Cards whose drivers have what those of rxe and siw have not, or want what those do not.

use crate::{LIMIT, run_pair};
use anyhow::{Context, Result, ensure};
use ringfence_integration::artifacts;
use ringfence_integration::command::{Running, command, run, wait_until};
use ringfence_integration::direct::Node;
use ringfence_integration::suite::test;
use ringfence_proxy::launch::card::{DESCRIBE, Description};
use ringfence_proxy::launch::marks::Marks;
use ringfence_proxy::launch::{BitRate, Limits};
use ringfence_trials::Trial;
use std::path::Path;

const PROGRAM: &[&str] = &["ibv_rc_pingpong", "-g", "0", "-n", "50"];

/// `peers`: a program that connects a queue pair, and says what comes of it.
pub fn trials(library: &Path, peers: &Path) -> Vec<Trial> {
    let test = |name: &str, run: fn(&Path, &Path) -> Result<()>| {
        let (library, peers) = (library.to_owned(), peers.to_owned());
        test(format!("help::{name}"), move || run(&library, &peers))
    };
    vec![
        test("a_card_is_told_the_rate_of_each_queue_pair", paced),
        test("what_a_card_has_is_described", described),
        test("paths_are_marked_as_the_administrator_says", marked),
        test("a_gid_without_an_interface_is_named", elsewhere),
    ]
}

/// The card sends only from queue pairs that it has been told a rate of, which is the policy's 1 Gbit/s and what headers take.
fn paced(library: &Path, _: &Path) -> Result<()> {
    let node = Node::with_card("paced0", Some(library))?;
    for (bandwidth, sends) in [(BitRate::new(1_000_000_000), true), (BitRate::new(2_000_000_000), false), (None, false)]
    {
        let mut proxy = node.proxy(Limits { bandwidth, ..Limits::default() })?;
        let ended = run_pair(&proxy, &proxy, PROGRAM);
        ensure!(ended.is_ok() == sends, "with bandwidth {bandwidth:?}: {ended:?}");
        ensure!(!proxy.has_ended(), "the proxy has ended");
    }
    Ok(())
}

fn described(library: &Path, _: &Path) -> Result<()> {
    let program = artifacts::ibverbs_proxy()?;
    for (name, offered, detail) in [
        ("paced0", true, "1000 to 100000000 kbit/s"),
        ("test0", false, "its driver has no ibv_query_device_ex"),
        ("test0", false, "its driver is not mlx5, or libmlx5 is older than rdma-core 33"),
    ] {
        let mut describe = command(&[&program.display().to_string(), DESCRIBE, name, "1"]);
        describe.env("LD_LIBRARY_PATH", library.parent().context("a library lies in a directory")?);
        let said = run(describe)?;
        let help = serde_json::from_str::<Description>(&said)?.help;
        ensure!(help.iter().any(|help| help.offered == offered && help.detail == detail), "{name}: {help:?}");
    }
    Ok(())
}

/// The card takes service level 3 and traffic class 104 alone; the program says 1 and 4, and is told what the card has.
fn marked(library: &Path, peers: &Path) -> Result<()> {
    let mut node = Node::with_card("marked0", Some(library))?;
    for (marks, expected) in [
        (r#"{}"#, "marked 22\n"),
        (r#"{"service-level": 3}"#, "marked 22\n"),
        (r#"{"traffic-class": 104}"#, "marked 22\n"),
        (r#"{"service-level": 3, "traffic-class": 104}"#, "sl 3, traffic class 104: marked 0\n"),
    ] {
        node.mark(serde_json::from_str::<Marks>(marks)?);
        let said = connect(&node, peers, "marked")?;
        ensure!(said == expected, "with {marks}: {said}");
    }
    let mut node = Node::with_card("test0", Some(library))?;
    node.mark(serde_json::from_str::<Marks>(r#"{"service-level": 7}"#)?);
    let said = connect(&node, peers, "marked")?;
    ensure!(said == "sl 7, traffic class 4: marked 0\n", "{said}");
    Ok(())
}

/// As with an ib_core that looks for a GID's interface in the network namespace of whoever calls.
fn elsewhere(library: &Path, peers: &Path) -> Result<()> {
    let node = Node::with_card("elsewhere0", Some(library))?;
    let said = connect(&node, peers, "own")?;
    ensure!(said == "own 19\n", "{said}");
    // Where there is no journal, what proxies say is in a file.
    if Path::new("/run/systemd/journal/socket").exists() || Path::new("/dev/log").exists() {
        return Ok(());
    }
    let (file, line) = (node.dir().join("proxies.jsonl"), "(ENODEV): for the kernel, elsewhere0's GID number ");
    wait_until("a line", LIMIT, || std::fs::read_to_string(&file).is_ok_and(|text| text.contains(line)))
}

fn connect(node: &Node, peers: &Path, to: &str) -> Result<String> {
    let proxy = node.proxy(Limits::default())?;
    let mut command = proxy.command(peers)?;
    command.arg(to);
    Running::start(command)?.wait(LIMIT)?.success()
}
