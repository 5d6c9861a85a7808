//! What the administrator grants of a card: its GIDs, and the peers to which queue pairs may be connected.

use crate::{Card, LIMIT, run_pair};
use anyhow::{Context, Result, ensure};
use ringfence_integration::command::{Running, wait_until};
use ringfence_integration::direct::{DirectProxy, Node};
use ringfence_integration::netns;
use ringfence_integration::suite::test;
use ringfence_proxy::launch::Limits;
use ringfence_proxy::launch::addresses::{Gids, Peers};
use ringfence_trials::Trial;
use std::net::{IpAddr, Ipv6Addr};
use std::path::{Path, PathBuf};

/// Nobody's (RFC 3849).
const STRANGER: &str = "2001:db8::1";

pub fn trials(card: &Card, peers: PathBuf) -> Vec<Trial> {
    let (one, two, three, four) = (card.clone(), card.clone(), card.clone(), card.clone());
    let program = peers.clone();
    vec![
        test("grants::gids_of_another_namespace", move || gids_of_another_namespace(&one)),
        test("grants::gids_that_are_listed", move || gids_that_are_listed(&two)),
        test("grants::peers", move || only_to_peers(&three, &peers)),
        test("grants::a_card_of_another_host_with_the_same_name", move || same_name(&four, &program)),
    ]
}

/// The GIDs that a program sees, each once, whatever its types are.
fn gids(proxy: &DirectProxy) -> Result<Vec<Ipv6Addr>> {
    let mut command = proxy.command(Path::new("ibv_devinfo"))?;
    command.arg("-v");
    let output = Running::start(command)?.wait(LIMIT)?.success()?;
    let mut gids = Vec::new();
    let entries = output.lines().filter_map(|line| line.trim().strip_prefix("GID["));
    for (index, entry) in entries.enumerate() {
        let (number, gid) = entry.split_once("]:").context("an entry without an index")?;
        ensure!(number.trim() == index.to_string(), "the table has a gap before {number}: {output}");
        let gid = gid.split(',').next().unwrap_or_default().trim();
        let gid: Ipv6Addr = gid.parse().with_context(|| format!("{gid:?} of {output}"))?;
        if !gids.contains(&gid) {
            gids.push(gid);
        }
    }
    Ok(gids)
}

/// A container with a network of its own, of which the card knows nothing, has no GID; with the host's it can be spoken to.
fn gids_of_another_namespace(card: &Card) -> Result<()> {
    let (own, _other) = netns::pair()?;
    let mut node = card.node()?;
    node.in_netns(&own);
    let proxy = node.proxy(Limits::default())?;
    let seen = gids(&proxy)?;
    let address: IpAddr = own.address.parse()?;
    // The card that is not there has one for every address of the namespace in which it is opened.
    ensure!(seen.iter().all(|gid| gid.to_canonical() == address || gid.is_unicast_link_local()), "{seen:?}");
    ensure!(seen.is_empty() || !card.has_a_wire(), "{seen:?}");
    drop(proxy);
    node.grant_gids(Gids::Host);
    let (server, client) = (node.proxy(Limits::default())?, node.proxy(Limits::default())?);
    let seen = gids(&server)?;
    ensure!(!seen.is_empty() && seen.iter().all(|gid| gid.to_canonical() != address), "{seen:?}");
    ensure!(seen == gids(&client)?, "the same order in every container");
    let client = if card.has_a_wire() { &client } else { &server };
    run_pair(&server, client, &["ibv_rc_pingpong", "-g", "0", "-n", "200"])
}

fn gids_that_are_listed(card: &Card) -> Result<()> {
    let mut node = card.node()?;
    let all = gids(&node.proxy(Limits::default())?)?;
    let last = *all.last().context("the card has no GID here")?;
    node.grant_gids(Gids::List(vec![last.to_canonical(), STRANGER.parse()?]));
    let proxy = node.proxy(Limits::default())?;
    let seen = gids(&proxy)?;
    ensure!(seen == [last], "{seen:?} of {all:?}");
    run_pair(&proxy, &proxy, &["ibv_rc_pingpong", "-g", "0", "-n", "200"])
}

/// A queue pair goes to RTR only towards those whom the policy names; others are refused, the reader of the journal is told.
fn only_to_peers(card: &Card, program: &Path) -> Result<()> {
    let node = card.node()?;
    let named = gids(&node.proxy(Limits::default())?)?.first().context("the card has no GID here")?.to_canonical();
    for (peers, expected) in [
        (Some(named.to_string()), "own 0\n2001:db8::1 13\nlid 13\n"),
        (Some("2001:db8:1::/48".to_owned()), "own 13\n2001:db8::1 13\nlid 13\n"),
        (None, "own 0\n"),
    ] {
        let limited = peers.is_some();
        let peers =
            peers.map(|peers| anyhow::Ok(Peers(vec![peers.parse().map_err(anyhow::Error::msg)?]))).transpose()?;
        let proxy = node.proxy(Limits { peers, ..Limits::default() })?;
        let mut command = proxy.command(program)?;
        command.arg("own");
        if limited {
            command.args([STRANGER, "lid"]);
        }
        let said = Running::start(command)?.wait(LIMIT)?.success()?;
        ensure!(said == expected, "{said}");
    }
    said_to_the_operator(&node, "was to be connected to 2001:db8::1, which is none of the policy's peers: ")
}

/// Names of cards are each host's own: that a peer's has the same says nothing of it, and neither helps nor hinders. Two nodes' run-time
/// directories are two hosts as far as proxies know.
fn same_name(card: &Card, program: &Path) -> Result<()> {
    let (here, there) = (card.node()?, card.node()?);
    let far = there.proxy(Limits::default())?;
    let gid = gids(&far)?.first().context("the card has no GID here")?.to_canonical();
    let peers = Peers(vec![gid.to_string().parse().map_err(anyhow::Error::msg)?]);
    let near = here.proxy(Limits { peers: Some(peers), ..Limits::default() })?;
    let mut command = near.command(program)?;
    command.args([&far_gid(gid), STRANGER]);
    let said = Running::start(command)?.wait(LIMIT)?.success()?;
    ensure!(said == format!("{} 0\n{STRANGER} 13\n", far_gid(gid)), "{said}");
    let client = if card.has_a_wire() { &near } else { &far };
    run_pair(&far, client, &["ibv_rc_pingpong", "-g", "0", "-n", "200"])?;
    // A program that is given a device's name finds its own.
    run_pair(&far, client, &["ibv_rc_pingpong", "-d", card.name(), "-g", "0", "-n", "200"])
}

/// As IPv6 is written, which a GID always is.
fn far_gid(gid: IpAddr) -> String {
    match gid {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().to_string(),
        IpAddr::V6(v6) => v6.to_string(),
    }
}

/// Where there is no journal, what proxies say is in a file.
pub fn said_to_the_operator(node: &Node, line: &str) -> Result<()> {
    let file = node.dir().join("proxies.jsonl");
    if Path::new("/run/systemd/journal/socket").exists() || Path::new("/dev/log").exists() {
        return Ok(());
    }
    wait_until("a line", LIMIT, || std::fs::read_to_string(&file).is_ok_and(|text| text.contains(line)))
}
