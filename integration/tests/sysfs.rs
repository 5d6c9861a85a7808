//! What programs of a container under runc read of its device beside verbs.

use anyhow::{Context, Result, ensure};
use ringfence_integration::client;
use ringfence_integration::command::{Running, command, run, wait_until};
use ringfence_integration::config::Config;
use ringfence_integration::container::{Builder, Container};
use ringfence_integration::netns::{self, Netns};
use ringfence_integration::rootfs::Image;
use ringfence_integration::suite::{Needs, test};
use ringfence_integration::{artifacts, suite};
use ringfence_trials::{Skipped, Trial};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

const PROGRAM: &str = "/opt/sysfs";
const WITH_NODE: &str = "uverbs = \"always\"";
const DEVICE: &str = "/sys/class/infiniband/soft0";

fn main() -> ExitCode {
    let needs = Needs {
        programs: &["runc", "ip", "nsenter", "unshare", "cc"],
        built: &[artifacts::proxy, artifacts::hook, artifacts::library, Image::source],
    };
    suite::main("ringfence-sysfs", &needs, trials)
}

type ImageTest = fn(&Image) -> Result<()>;

fn trials() -> Result<Vec<Trial>> {
    let image = Image::debian()?;
    let tests: [(&str, ImageTest); 11] = [
        ("what_is_read_is_what_the_verbs_say", as_the_verbs),
        ("a_links_rate_is_the_ports", link_rate),
        ("addresses_that_come_and_go_are_seen", addresses),
        ("a_flood_of_addresses_is_survived", flood),
        ("the_files_end_with_the_container", ends),
        ("rdma_cores_own_library_lists_what_it_knows", stock_library),
        ("hwloc_sees_the_device", hwloc),
        ("ucx_sees_a_device_with_a_node", ucx_with_node),
        ("ucx_does_without_a_device_without_a_node", ucx_without_node),
        ("a_user_namespace_sees_it", user_namespace),
        ("a_killed_proxy_leaves_the_files", killed_proxy),
    ];
    Ok(tests
        .map(|(name, run)| (name, run, image.clone()))
        .map(|(name, run, image)| test(name, move || run(&image)))
        .into())
}

/// Fields drop in order: the container first.
struct One {
    container: Container,
    network: Netns,
    _other: Netns,
    config: Config,
}

fn one(image: &Image, config: Config) -> Result<One> {
    let (network, other) = netns::pair()?;
    let program = client::compile("sysfs", &["check.c"])?;
    let container = Builder::with_rdma(&config, &network).mount(&program, PROGRAM).start(image)?;
    Ok(One { container, network, _other: other, config })
}

impl One {
    fn ip(&self, words: &[&str]) -> Result<()> {
        let netns = self.network.path();
        let netns = netns.file_name().and_then(|name| name.to_str()).context("it has a name")?;
        run(command(&[&["ip", "-n", netns], words].concat())).map(drop)
    }

    /// The GIDs that are shown, each with its interface, compared with the verbs.
    fn gids(&self) -> Result<Vec<String>> {
        Ok(self.container.exec(&[PROGRAM, "soft0"])?.lines().map(str::to_owned).collect())
    }

    fn file(&self, name: &str) -> Result<String> {
        self.container.exec(&["cat", &format!("{DEVICE}/{name}")])
    }

    /// Waits until the entry `index` is `gid` on `interface`, without asking the verbs, which would bring it about.
    fn becomes(&self, index: usize, gid: &str, interface: &str) -> Result<()> {
        let (gids, interfaces) = (format!("ports/1/gids/{index}"), format!("ports/1/gid_attrs/ndevs/{index}"));
        wait_until(&format!("{gids} to be {gid}"), Duration::from_secs(10), || {
            let is = |name: &str, expected: &str| self.file(name).is_ok_and(|shown| shown.trim() == expected);
            is(&gids, gid) && is(&interfaces, interface)
        })
    }
}

const EMPTY: &str = "0000:0000:0000:0000:0000:0000:0000:0000";

/// As the kernel writes that of an IPv4 address.
fn mapped(address: &str) -> Result<String> {
    let parts: Vec<u8> = address.split('.').map(str::parse).collect::<Result<_, _>>()?;
    let [a, b, c, d] = parts[..] else { anyhow::bail!("{address}") };
    Ok(format!("0000:0000:0000:0000:0000:ffff:{a:02x}{b:02x}:{c:02x}{d:02x}"))
}

fn as_the_verbs(image: &Image) -> Result<()> {
    for more in ["", WITH_NODE] {
        let one = one(image, Config::injecting(more, "")?)?;
        let gids = one.gids()?;
        let own = format!("{} eth0", mapped(&one.network.address)?);
        ensure!(gids.contains(&own) && gids[0].starts_with("fe80:") && gids[0].ends_with(" -"), "{gids:?}");
        let nodes = one.container.exec(&["ls", "-A", "/dev/infiniband"])?;
        ensure!(nodes.trim() == if more.is_empty() { "" } else { "uverbs0" }, "{nodes}");
        // Root of the container cannot open it, whatever it asks for.
        let open = "for mode in '<' '>' '<>' '>>'; do (eval \"exec 3$mode/dev/infiniband/uverbs0\") 2>/dev/null && echo opened; done; true";
        let opened = one.container.exec(&["sh", "-c", open])?;
        ensure!(opened.is_empty(), "{opened}");
    }
    Ok(())
}

fn link_rate(image: &Image) -> Result<()> {
    for (link, rate) in [("25Gbit", "25 Gb/sec (1X EDR)"), ("10Mbit", "2.5 Gb/sec (1X SDR)")] {
        let one = one(image, Config::with_link(link, "")?)?;
        one.gids()?;
        let shown = one.file("ports/1/rate")?;
        ensure!(shown.trim() == rate, "{link}: {shown}");
    }
    Ok(())
}

/// As with engines that make a container's network after the hooks.
fn addresses(image: &Image) -> Result<()> {
    let one = one(image, Config::new("")?)?;
    one.ip(&["address", "flush", "dev", "eth0"])?;
    one.becomes(1, EMPTY, "")?;
    one.ip(&["address", "add", "192.0.2.7/24", "dev", "eth0"])?;
    one.becomes(1, &mapped("192.0.2.7")?, "eth0")?;
    one.ip(&["link", "set", "eth0", "down"])?;
    one.ip(&["link", "set", "eth0", "name", "a-longer-name"])?;
    one.becomes(1, &mapped("192.0.2.7")?, "a-longer-name")?;
    one.ip(&["link", "set", "a-longer-name", "name", "e"])?;
    one.becomes(1, &mapped("192.0.2.7")?, "e")?;
    one.gids()?;
    one.ip(&["address", "flush", "dev", "e"])?;
    one.becomes(1, EMPTY, "")
}

/// More than the table shows, as fast as can be.
fn flood(image: &Image) -> Result<()> {
    let one = one(image, Config::new("")?)?;
    let netns = one.network.path();
    let netns = netns.file_name().and_then(|name| name.to_str()).context("it has a name")?;
    let script = "for round in 1 2 3; do \
                    for n in $(seq 1 100); do echo \"address add 198.51.100.$n/32 dev eth0\"; done; \
                    for n in $(seq 1 100); do echo \"address del 198.51.100.$n/32 dev eth0\"; done; \
                  done | ip -n \"$0\" -batch -";
    run(command(&["sh", "-c", script, netns]))?;
    one.becomes(2, EMPTY, "").or_else(|_| one.becomes(3, EMPTY, ""))?;
    let gids = one.gids()?;
    ensure!(gids.contains(&format!("{} eth0", mapped(&one.network.address)?)), "{gids:?}");
    ensure!(!gids.iter().any(|gid| gid.contains(":ffff:c633:64")), "{gids:?}");
    Ok(())
}

/// What the proxy writes to is nobody's then.
fn ends(image: &Image) -> Result<()> {
    let one = one(image, Config::new("")?)?;
    let before = std::fs::read_to_string("/proc/self/mountinfo")?;
    ensure!(!before.contains("infiniband"), "the host sees the container's mounts:\n{before}");
    one.container.delete()?;
    wait_until("the proxy to end", Duration::from_secs(10), || one.config.live_containers().is_empty())
}

/// Runs a program of the container as if ours had not been put into it.
fn without_ours(container: &Container, script: &str) -> Result<String> {
    let libraries =
        "sed -n 's|^[^ ]* [^ ]* [^ ]* [^ ]* \\([^ ]*/libibverbs\\.so[^ ]*\\) .*|\\1|p' /proc/self/mountinfo";
    let script = format!(
        "umount /etc/ld.so.preload && for library in $({libraries}); do umount $library; done; \
         ! grep -q ringfence /proc/self/maps && {script}"
    );
    let pid = container.init().to_string();
    let words =
        ["nsenter", "--target", &pid, "--mount", "--pid", "--net", "--root", "unshare", "--mount", "sh", "-c", &script];
    Running::start(command(&words))?.wait(Duration::from_secs(30))?.success()
}

/// It lists devices for which it has a driver; of a device of this name, rxe's believes that it is its own.
fn stock_library(image: &Image) -> Result<()> {
    let device = "[[device]]\nname = \"rxe_shown\"\nkind = \"soft\"";
    let config = Config::injecting(WITH_NODE, device)?;
    let (network, _other) = netns::pair()?;
    let rdma = Builder::with_rdma(&config, &network).annotation("device", "rxe_shown").start(image)?;
    let ours = rdma.exec(&["ibv_devices"])?;
    let list = "ibv_devices; ibv_devinfo -d rxe_shown 2>&1 || echo refused";
    let stock = without_ours(&rdma, list)?;
    let guid = ours.lines().find(|line| line.contains("rxe_shown")).context("ours")?.trim();
    ensure!(
        stock.contains(guid) && stock.contains("Failed to open device") && stock.contains("refused"),
        "{guid}\n{stock}"
    );
    // One that has no driver is no obstacle.
    let other = Builder::with_rdma(&config, &network).start(image)?;
    let stock = without_ours(&other, "ibv_devices 2>&1")?;
    ensure!(!stock.contains("soft0"), "{stock}");
    Ok(())
}

/// Skipped where the image, such as this machine, has not the program.
fn has(one: &One, program: &str) -> Result<()> {
    if one.container.exec(&["sh", "-c", &format!("command -v {program}")]).is_err() {
        return Err(
            Skipped(format!("the image has no {program}; remove it from integration/.cache to make it anew")).into()
        );
    }
    Ok(())
}

fn hwloc(image: &Image) -> Result<()> {
    let one = one(image, Config::new("")?)?;
    has(&one, "hwloc-info")?;
    let seen = one.container.exec(&["lstopo-no-graphics", "--only", "os", "--of", "console", "--verbose"])?;
    let lines: Vec<_> = seen.lines().filter(|line| line.contains("OpenFabrics")).collect();
    let guid = one.file("node_guid")?;
    let gid = mapped(&one.network.address)?;
    let [line] = lines[..] else { anyhow::bail!("{seen}") };
    for expected in ["\"soft0\"", "Port1State=4", "Port1LID=0x", guid.trim(), &gid] {
        ensure!(line.contains(expected), "no {expected} in {line}");
    }
    Ok(())
}

fn ucx_with_node(image: &Image) -> Result<()> {
    let one = one(image, Config::injecting(WITH_NODE, "")?)?;
    has(&one, "ucx_info")?;
    let seen = one.container.exec(&["ucx_info", "-d"])?;
    ensure!(seen.contains("# Memory domain: soft0") && seen.contains("Device: soft0:1"), "{seen}");
    Ok(())
}

/// It has no shared receive queues yet, without which UCX would end if it saw the device.
fn ucx_without_node(image: &Image) -> Result<()> {
    let one = one(image, Config::new("")?)?;
    has(&one, "ucx_info")?;
    let seen = one.container.exec(&["ucx_info", "-d"])?;
    ensure!(seen.contains("Transport: tcp") && !seen.contains("soft0"), "{seen}");
    // The server listens at port 23337.
    let script = "ucx_perftest -p 23337 >/dev/null 2>&1 &
        until grep -q ':5B29 ' /proc/net/tcp /proc/net/tcp6; do sleep 0.1; done
        ucx_perftest 127.0.0.1 -p 23337 -t tag_lat -n 10 -w 1";
    let moved = one.container.exec(&["sh", "-c", script])?;
    ensure!(moved.contains("Final:"), "{moved}");
    Ok(())
}

/// In one, with the network namespace of another, there is no sysfs but the host's.
fn user_namespace(image: &Image) -> Result<()> {
    let config = Config::injecting(WITH_NODE, "")?;
    let builder = Builder::default().hooked(&config).annotation("enable", "true").in_user_namespace();
    let container = builder.start(image)?;
    let nodes = container.exec(&["ls", "/dev/infiniband"])?;
    ensure!(nodes.trim() == "uverbs0", "{nodes}");
    // The tests' containers have no /sys then.
    ensure!(container.exec(&["ls", "/sys/class"]).is_err(), "a /sys");
    let record = std::fs::read_to_string(config.run_dir().join(format!("state/{}.json", container.id())))?;
    ensure!(record.contains("programs find no device in /sys/class"), "{record}");
    Ok(())
}

/// A proxy that is killed leaves the files as they were, and a container with which nothing else is wrong.
fn killed_proxy(image: &Image) -> Result<()> {
    let one = one(image, Config::new("")?)?;
    let record = std::fs::read_to_string(one.config.run_dir().join(format!("state/{}.json", one.container.id())))?;
    let record: serde_json::Value = serde_json::from_str(&record)?;
    let pid = record["proxy"]["pid"].to_string();
    let guid = one.file("node_guid")?;
    ensure!(Path::new("/proc").join(&pid).exists(), "no proxy {pid}");
    run(command(&["kill", "-KILL", &pid]))?;
    wait_until("the proxy to end", Duration::from_secs(10), || !Path::new("/proc").join(&pid).exists())?;
    let after = one.file("node_guid")?;
    ensure!(after.contains(guid.trim()), "{after}, before: {guid}");
    one.container.delete()
}
