//! Partitions of an InfiniBand subnet: a container is in those that the administrator says, and in no others.

use crate::LIMIT;
use anyhow::{Context, Result, ensure};
use ringfence_integration::client;
use ringfence_integration::command::Running;
use ringfence_integration::direct::Node;
use ringfence_integration::suite::test;
use ringfence_proxy::launch::Limits;
use ringfence_proxy::launch::pkeys::Pkey;
use ringfence_trials::Trial;
use std::path::Path;

/// The card's own table has 0xffff, nothing, 0x8001, and 0x0002.
const CARD: &str = "parted0";

pub fn trials(library: &Path) -> Result<Vec<Trial>> {
    let program = client::compile("partitions", &["check.c"])?;
    let test = |name: &str, run: fn(&Path, &Path) -> Result<()>| {
        let (library, program) = (library.to_owned(), program.clone());
        test(format!("partitions::{name}"), move || run(&library, &program))
    };
    Ok(vec![
        test("a_container_is_in_those_that_it_is_granted", granted),
        test("those_that_change_are_told", changing),
        test("one_that_the_card_has_not_is_refused", absent),
    ])
}

fn node(library: &Path, pkeys: Option<&[i64]>) -> Result<Node> {
    let mut node = Node::with_card(CARD, Some(library))?;
    let pkeys =
        pkeys.map(|keys| keys.iter().map(|key| Pkey::try_from(*key)).collect::<Result<Vec<_>, _>>()).transpose();
    node.grant_pkeys(pkeys.map_err(anyhow::Error::msg)?);
    Ok(node)
}

fn said(library: &Path, program: &Path, pkeys: Option<&[i64]>, words: &[&str], expected: &str) -> Result<()> {
    let node = node(library, pkeys)?;
    let mut proxy = node.proxy(Limits::default())?;
    let mut command = proxy.command(program)?;
    command.args(words);
    let said = Running::start(command)?.wait(LIMIT)?.success()?;
    ensure!(!proxy.has_ended(), "the proxy has ended");
    ensure!(said.trim_end() == expected, "with {pkeys:?} {words:?} said: {said}");
    Ok(())
}

/// Who names an index that is not his gets no queue pair into the card's partition of that index.
fn granted(library: &Path, program: &Path) -> Result<()> {
    said(library, program, None, &["table", "0:0", "0:1", "2:2"], "0xffff@0 reached -22 -22")?;
    let two = Some(&[0x0002, 0x8001][..]);
    said(library, program, two, &["table", "1:1", "0:1", "0:0", "1:2"], "0x0002@0 0x8001@1 reached apart apart -22")?;
    said(library, program, Some(&[0x8001]), &["table", "0:0", "1:1"], "0x8001@0 reached -22")
}

/// Of those of others the container hears nothing.
fn changing(library: &Path, program: &Path) -> Result<()> {
    let expected = "reached event of port 1, it failed 0x0000@0 0xffff@1 -22 reached";
    let words = ["change", "table", "0:0", "1:1"];
    said(library, program, Some(&[0x8001, 0xffff]), &words, expected)?;
    said(library, program, None, &["change", "table"], "reached no event, it lives 0xffff@0")
}

fn absent(library: &Path, _: &Path) -> Result<()> {
    let node = node(library, Some(&[0x8001, 0x8002]))?;
    let error = format!("{:#}", node.proxy(Limits::default()).err().context("it started")?);
    let expected = "RDMA device parted0 has no P_Key 0x8002 at port 1, but 0xffff, 0x8001, 0x0002; correct pkeys of the [[device]]";
    ensure!(error.contains(expected), "{error}");
    Ok(())
}
