//! Network namespaces joined by a veth pair.

use crate::command::{command, run};
use anyhow::Result;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

static NEXT: AtomicU32 = AtomicU32::new(0);

/// A network namespace; gone when dropped.
#[derive(Debug)]
pub struct Netns {
    name: String,
    /// The address of its end of the pair; none if it is [`alone`].
    pub address: String,
}

impl Netns {
    /// The file that stands for the namespace.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        PathBuf::from("/run/netns").join(&self.name)
    }

    fn new(name: String, address: &str) -> Result<Self> {
        run(command(&["ip", "netns", "add", &name]))?;
        let netns = Self { name, address: address.to_owned() };
        run(command(&["ip", "-n", &netns.name, "link", "set", "lo", "up"]))?;
        Ok(netns)
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        run(command(&["ip", "netns", "delete", &self.name])).ok();
    }
}

/// Two namespaces, `10.77.<n>.1` and `10.77.<n>.2`, joined by a veth pair. No two pairs have the same addresses: on one
/// fabric an address names one container.
pub fn pair() -> Result<(Netns, Netns)> {
    let n = NEXT.fetch_add(1, Ordering::Relaxed) % 256;
    let a = Netns::new(format!("rf{n}a"), &format!("10.77.{n}.1"))?;
    let b = Netns::new(format!("rf{n}b"), &format!("10.77.{n}.2"))?;
    let link =
        ["ip", "link", "add", "eth0", "netns", &a.name, "type", "veth", "peer", "name", "eth0", "netns", &b.name];
    run(command(&link))?;
    for netns in [&a, &b] {
        let address = format!("{}/24", netns.address);
        run(command(&["ip", "-n", &netns.name, "address", "add", &address, "dev", "eth0"]))?;
        run(command(&["ip", "-n", &netns.name, "link", "set", "eth0", "up"]))?;
    }
    Ok((a, b))
}

/// One without an address but its loopback's.
pub fn alone() -> Result<Netns> {
    Netns::new(format!("rf{}a", NEXT.fetch_add(1, Ordering::Relaxed) % 256), "")
}

/// Whether something listens to a TCP port in the network namespace of the process `pid`.
#[must_use]
pub fn listens(pid: i32, port: u16) -> bool {
    let local = format!(":{port:04X}");
    ["tcp", "tcp6"].iter().any(|table| {
        let text = std::fs::read_to_string(format!("/proc/{pid}/net/{table}")).unwrap_or_default();
        text.lines().any(|line| {
            let mut fields = line.split_whitespace().skip(1);
            fields.next().is_some_and(|address| address.ends_with(&local)) && fields.nth(1) == Some("0A")
        })
    })
}
