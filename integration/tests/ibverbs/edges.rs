//! Cards with more ports than one, and with fewer states than the specification's.

use crate::grants::said_to_the_operator;
use crate::{LIMIT, absence_on, list};
use anyhow::{Context, Result, ensure};
use ringfence_integration::artifacts;
use ringfence_integration::command::{Running, command, run};
use ringfence_integration::direct::Node;
use ringfence_integration::suite::test;
use ringfence_proxy::launch::Limits;
use ringfence_proxy::launch::card::{DESCRIBE, Description};
use ringfence_trials::Trial;
use std::num::NonZeroU8;
use std::path::{Path, PathBuf};

/// Of a port of the card's that is the container's first, no program may see a difference.
const CASES: &[&str] =
    &["reset_and_reuse", "missing_attributes", "drained_is_told_once_to_who_asks", "a_drained_queue_takes_attributes"];

/// `semantics` and `absence`: the programs of these names.
pub fn trials(library: &Path, semantics: &Path, absence: &Path) -> Vec<Trial> {
    struct Programs {
        library: PathBuf,
        semantics: PathBuf,
        absence: PathBuf,
    }
    let test = |name: &str, run: fn(&Path, &Path) -> Result<()>, pick: fn(&Programs) -> &Path| {
        let (library, semantics, absence) = (library.to_owned(), semantics.to_owned(), absence.to_owned());
        let programs = Programs { library, semantics, absence };
        test(format!("edges::{name}"), move || run(&programs.library, pick(&programs)))
    };
    vec![
        test("a_second_port_works_as_a_first", second_port, |programs| &programs.semantics),
        test("events_of_a_second_port_are_those_of_a_first", second_ports_events, |programs| &programs.absence),
        test("a_card_that_comes_back_is_used_by_the_same_port", second_port_again, |programs| &programs.absence),
        test("what_comes_back_with_another_guid_is_left_alone", another, |programs| &programs.absence),
        test("a_port_that_is_not_there_is_refused", no_such_port, |programs| &programs.semantics),
        test("a_card_that_cannot_drain_refuses_and_goes_on", undrained, |programs| &programs.semantics),
        test("a_card_that_never_says_that_it_has_drained_is_told", draining, |programs| &programs.semantics),
    ]
}

fn port(number: u8) -> Result<NonZeroU8> {
    NonZeroU8::new(number).context("ports are counted from 1")
}

fn on_second_port(library: &Path) -> Result<Node> {
    let mut node = Node::with_card("twoport0", Some(library))?;
    node.use_port(port(2)?);
    Ok(node)
}

fn run_case(node: &Node, semantics: &Path, case: &str) -> Result<()> {
    let mut proxy = node.proxy(Limits::default())?;
    let mut command = proxy.command(semantics)?;
    command.args([case, "one"]);
    let ended = Running::start(command)?.wait(LIMIT)?.success();
    ensure!(!proxy.has_ended(), "the proxy has ended");
    ended.map(drop).with_context(|| case.to_owned())
}

/// The card takes requests of its second port alone, and the first has somebody else's address.
fn second_port(library: &Path, semantics: &Path) -> Result<()> {
    let (node, known) = (on_second_port(library)?, list(semantics)?);
    for case in CASES {
        ensure!(known.contains(case), "there is no case {case}");
        run_case(&node, semantics, case)?;
    }
    Ok(())
}

fn second_ports_events(library: &Path, absence: &Path) -> Result<()> {
    absence_on(on_second_port(library)?, "twoport0", absence, "port")
}

fn second_port_again(library: &Path, absence: &Path) -> Result<()> {
    absence_on(on_second_port(library)?, "twoport0", absence, "fatal")
}

fn another(library: &Path, absence: &Path) -> Result<()> {
    let node = Node::with_card("replaced0", Some(library))?;
    let mut proxy = node.proxy(Limits::default())?;
    let mut command = proxy.command(absence)?;
    command.arg("another");
    Running::start(command)?.wait(LIMIT)?.success()?;
    ensure!(!proxy.has_ended(), "the proxy has ended");
    said_to_the_operator(
        &node,
        "the card of this name has GUID 0200:0000:0000:014c, and it had 0200:0000:0000:004c: start the container again",
    )
}

fn no_such_port(library: &Path, _: &Path) -> Result<()> {
    for (card, number, last) in [("twoport0", 3, 2), ("test0", 2, 1)] {
        let mut node = Node::with_card(card, Some(library))?;
        node.use_port(port(number)?);
        let expected =
            format!("RDMA device {card} has no port {number}: its last is {last}; correct port of the [[device]]");
        let error = format!("{:#}", node.proxy(Limits::default()).err().context("it started")?);
        ensure!(error.contains(&expected), "{error}");
    }
    // One that is there and has no GID of the container's is no reason to refuse: it may come.
    drop(Node::with_card("twoport0", Some(library))?.proxy(Limits::default())?);
    let program = artifacts::ibverbs_proxy()?;
    let describe = |card: &str, port: &str| {
        let mut describe = command(&[&program.display().to_string(), DESCRIBE, card, port]);
        describe.env("LD_LIBRARY_PATH", library.parent().context("a library lies in a directory")?);
        run(describe)
    };
    let [first, second] =
        ["1", "2"].map(|port| -> Result<Description> { Ok(serde_json::from_str(&describe("twoport0", port)?)?) });
    let (first, second) = (first?, second?);
    ensure!(first.gids.len() == 1 && first.gids[0].index == 3 && second.gids.len() > 1, "{first:?}\n{second:?}");
    let error = format!("{:#}", describe("twoport0", "3").err().context("port 3 is described")?);
    ensure!(error.contains("has no port 3"), "{error}");
    Ok(())
}

/// What only a drained card takes is refused, and everything else is as on any.
fn undrained(library: &Path, semantics: &Path) -> Result<()> {
    let node = Node::with_card("undrained0", Some(library))?;
    run_case(&node, semantics, "send_queue_drained")?;
    run_case(&node, semantics, "a_queue_that_cannot_be_told_goes_on")
}

/// As rxe, of a queue that has gone round once.
fn draining(library: &Path, semantics: &Path) -> Result<()> {
    let node = Node::with_card("draining0", Some(library))?;
    CASES.iter().try_for_each(|case| run_case(&node, semantics, case))?;
    run_case(&node, semantics, "misaligned_atomic_behind_a_write")
}
