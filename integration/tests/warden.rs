//! The proxy's second process: what it keeps, and what it does when either of them ends.

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use ringfence_integration::command::{is_warden, wait_until};
use ringfence_integration::direct::{DirectProxy, Node};
use ringfence_integration::holds::{View, given_up, status};
use ringfence_integration::raw::Raw;
use ringfence_integration::suite::{Needs, test};
use ringfence_integration::{artifacts, suite};
use ringfence_proxy::fabric::ports::{MAX_PORTS, Taken};
use ringfence_proxy::launch::Limits;
use rustix::io::Errno;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

/// The warden gives a proxy a second; the machine may need more.
const SOON: Duration = Duration::from_secs(10);

type Test = fn() -> Result<()>;

fn main() -> ExitCode {
    let needs = Needs { programs: &["sleep"], built: &[artifacts::proxy] };
    suite::main("ringfence-warden", &needs, || {
        let tests: [(&str, Test); 8] = [
            ("a_proxy_has_given_up_what_it_can", nothing_kept),
            ("a_warden_keeps_four_capabilities", warden_keeps),
            ("a_killed_proxy_leaves_nothing", killed_proxy),
            ("a_stopped_proxy_ends_with_its_container", stopped_proxy),
            ("a_proxy_ends_with_its_warden", killed_warden),
            ("a_warden_that_is_told_to_ends_both", told_warden),
            ("a_port_ends_with_its_proxy_and_another_takes_its_lid", lid_again),
            ("a_full_run_dir_is_an_error_and_no_signal", full_run_dir),
        ];
        Ok(tests.map(|(name, run)| test(name, run)).into())
    })
}

/// The warden of a proxy: its only child.
fn warden(proxy: &DirectProxy) -> Result<i32> {
    let children = std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", proxy.pid()))?;
    let pid: i32 = children.trim().parse().with_context(|| format!("children {children:?}"))?;
    ensure!(is_warden(Path::new(&format!("/proc/{pid}"))), "{pid} is no warden");
    Ok(pid)
}

fn signal(pid: i32, signal: Signal) -> Result<()> {
    Ok(kill(Pid::from_raw(pid), signal)?)
}

/// What the proxies of `node` have in its fabric's directories: LIDs and sockets.
fn ports(node: &Node) -> Vec<PathBuf> {
    let entries = ["lids", "soft0/sockets"].map(|name| std::fs::read_dir(node.dir().join("fabric").join(name)));
    entries.into_iter().flatten().flatten().flatten().map(|entry| entry.path()).collect()
}

fn is_gone(node: &Node, proxy: &DirectProxy, warden: i32) -> Result<()> {
    wait_until("the warden to end", SOON, || !Path::new(&format!("/proc/{warden}/cwd")).exists())?;
    ensure!(!proxy.dir().exists(), "{} is left", proxy.dir().display());
    let left = ports(node);
    ensure!(left.is_empty(), "{left:?} are left");
    Ok(())
}

fn nothing_kept() -> Result<()> {
    let node = Node::new(None)?;
    let (one, two) = (node.proxy(Limits::default())?, node.proxy(Limits::default())?);
    let view = View { root: &["1", "2"], mounts: &[("/", "ro,nosuid,nodev,noexec")], held: &[] };
    let users = [given_up(&one, view)?, given_up(&two, view)?];
    ensure!(users[0] != users[1], "both are user {}", users[0]);
    Ok(())
}

fn warden_keeps() -> Result<()> {
    let node = Node::new(None)?;
    let proxy = node.proxy(Limits::default())?;
    let warden = warden(&proxy)?;
    // CAP_DAC_OVERRIDE, CAP_FOWNER, CAP_KILL and CAP_LINUX_IMMUTABLE (`linux/capability.h`).
    for (field, expected) in
        [("CapEff", "000000000000022a"), ("CapPrm", "000000000000022a"), ("NoNewPrivs", "1"), ("Seccomp", "2")]
    {
        let found = status(warden, field)?;
        ensure!(found == expected, "{field} is {found:?}");
    }
    // Above all not the container's socket, which must answer nobody when the proxy is gone.
    // It may have some more for a moment, such as while it opens a file of its proxy's.
    let held = || std::fs::read_dir(format!("/proc/{warden}/fd")).map_or(0, Iterator::count);
    wait_until("the warden to hold its own descriptors alone", SOON, || (1..=15).contains(&held()))
        .with_context(|| format!("it holds {} descriptors", held()))
}

fn killed_proxy() -> Result<()> {
    let node = Node::new(None)?;
    let proxy = node.proxy(Limits::default())?;
    let warden = warden(&proxy)?;
    signal(proxy.pid(), Signal::SIGKILL)?;
    is_gone(&node, &proxy, warden)
}

/// As one does that was taken over and would rather stay.
fn stopped_proxy() -> Result<()> {
    let node = Node::new(None)?;
    let mut proxy = node.proxy(Limits::default())?;
    let warden = warden(&proxy)?;
    signal(proxy.pid(), Signal::SIGSTOP)?;
    proxy.end_init()?;
    wait_until("the proxy to end", SOON, || proxy.has_ended())?;
    is_gone(&node, &proxy, warden)
}

fn killed_warden() -> Result<()> {
    let node = Node::new(None)?;
    let mut proxy = node.proxy(Limits::default())?;
    signal(warden(&proxy)?, Signal::SIGKILL)?;
    wait_until("the proxy to end", SOON, || proxy.has_ended())
}

fn told_warden() -> Result<()> {
    let node = Node::new(None)?;
    let mut proxy = node.proxy(Limits::default())?;
    let warden = warden(&proxy)?;
    signal(warden, Signal::SIGTERM)?;
    wait_until("the proxy to end", SOON, || proxy.has_ended())?;
    is_gone(&node, &proxy, warden)
}

fn lid_again() -> Result<()> {
    let node = Node::new(None)?;
    let lid_of = |proxy: &DirectProxy| -> Result<u32> {
        let uid = status(proxy.pid(), "Uid")?;
        Ok(uid.split(' ').next().context("an id")?.parse::<u32>()? - 1_999_999_999)
    };
    let (mut one, two) = (node.proxy(Limits::default())?, node.proxy(Limits::default())?);
    ensure!((lid_of(&one)?, lid_of(&two)?) == (1, 2));
    let warden = warden(&one)?;
    one.end_init()?;
    wait_until("the warden to end", SOON, || !Path::new(&format!("/proc/{warden}/cwd")).exists())?;
    let three = node.proxy(Limits::default())?;
    ensure!(lid_of(&three)? == 1, "LID {}", lid_of(&three)?);
    Raw::greet(&three.socket()).map(drop)
}

/// The ports' tables are written through mappings, where a file system without room is a SIGBUS.
fn full_run_dir() -> Result<()> {
    use nix::mount::{MsFlags, mount};
    use nix::sched::{CloneFlags, unshare};
    let node = Node::new(None)?;
    let take = || -> Result<()> {
        // Of this thread alone.
        unshare(CloneFlags::CLONE_NEWNS)?;
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)?;
        mount(Some("tmpfs"), node.dir(), Some("tmpfs"), MsFlags::empty(), Some("size=64k"))?;
        for (filler, expected) in [(64 << 10, Err(Errno::NOSPC)), (0, Ok(()))] {
            std::fs::write(node.dir().join("filler"), vec![0; filler])?;
            let taken = Taken::take(node.dir(), "soft0", 1, MAX_PORTS).map(|taken| taken.tenure.end());
            ensure!(taken == expected, "{taken:?} beside {filler} bytes of 65536");
        }
        Ok(())
    };
    std::thread::scope(|scope| scope.spawn(take).join().expect("does not panic"))
}
