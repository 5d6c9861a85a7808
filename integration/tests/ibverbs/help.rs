//! Cards whose drivers have what those of rxe and siw have not, or want what those do not.

use crate::run_pair;
use anyhow::{Context, Result, ensure};
use ringfence_integration::artifacts;
use ringfence_integration::command::{command, run};
use ringfence_integration::direct::Node;
use ringfence_integration::suite::test;
use ringfence_proxy::launch::Limits;
use ringfence_proxy::launch::card::{DESCRIBE, Description};
use ringfence_trials::Trial;
use std::path::{Path, PathBuf};

const PROGRAM: &[&str] = &["ibv_rc_pingpong", "-g", "0", "-n", "50"];

pub fn trials(library: &Path) -> Vec<Trial> {
    let test = |name: &str, run: fn(&PathBuf) -> Result<()>| {
        let library = library.to_owned();
        test(format!("help::{name}"), move || run(&library))
    };
    vec![test("a_card_is_told_the_rate_of_each_queue_pair", paced), test("what_a_card_has_is_described", described)]
}

/// The card sends only from queue pairs that it has been told a rate of, which is the policy's 1 Gbit/s and what headers take.
fn paced(library: &PathBuf) -> Result<()> {
    let node = Node::with_card("paced0", Some(library))?;
    for (bandwidth, sends) in [(Some(1_000_000_000), true), (Some(2_000_000_000), false), (None, false)] {
        let mut proxy = node.proxy(Limits { bandwidth, ..Limits::default() })?;
        let ended = run_pair(&proxy, &proxy, PROGRAM);
        ensure!(ended.is_ok() == sends, "with bandwidth {bandwidth:?}: {ended:?}");
        ensure!(!proxy.has_ended(), "the proxy has ended");
    }
    Ok(())
}

fn described(library: &PathBuf) -> Result<()> {
    let program = artifacts::ibverbs_proxy()?;
    for (name, offered, detail) in
        [("paced0", true, "1000 to 100000000 kbit/s"), ("test0", false, "its driver has no ibv_query_device_ex")]
    {
        let mut describe = command(&[&program.display().to_string(), DESCRIBE, name]);
        describe.env("LD_LIBRARY_PATH", library.parent().context("a library lies in a directory")?);
        let said = run(describe)?;
        let help = serde_json::from_str::<Description>(&said)?.help;
        ensure!(help.iter().any(|help| help.offered == offered && help.detail == detail), "{name}: {help:?}");
    }
    Ok(())
}
