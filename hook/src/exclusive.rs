//! Mode exclusive: the container has the card for itself. The card is moved to the container's network namespace, where the kernel shows
//! it to nobody else, and brought back at the end.
//!
//! Nothing of ours holds the namespace meanwhile. When it ends, the kernel itself moves the card back to the initial one, whatever
//! became of hooks, runtimes and records. Only where somebody else keeps the namespace beyond the container's end (a pod's sandbox,
//! `ip netns`, CNI) it is for us to do: then the namespace is found again by its number, which is on record.

use crate::card::{self, Card, Missing};
use crate::config::Config;
use crate::failure::{Code, During, Failure};
use crate::init::Init;
use crate::netns;
use crate::nldev::{Device, Node, Socket, User};
use crate::record::{self, Lent, Record, Records};
use crate::rootless;
use crate::session;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

/// How often it is looked whether the kernel has brought a card back.
const PAUSE: Duration = Duration::from_millis(20);
/// Users of a card that a message names.
const MAX_SHOWN: usize = 4;

/// Moves the card `name` to the network namespace of the container of `record`, which is `init`'s, and returns the card's node: it may
/// be another one there. The record says so before.
pub(crate) fn lend(
    config: &Config,
    records: &Records,
    record: &mut Record,
    name: &str,
    init: &Init,
) -> Result<Node, Failure> {
    let refuse = |message: String| Failure::new(Code::Device, message);
    let sys = Path::new(card::SYS);
    let namespace = init.network_namespace.as_fd();
    if rootless::is_own(namespace) {
        return Err(refuse(format!(
            "mode=exclusive moves RDMA device {name} to the container's network namespace, and the container has the host's; give it one \
             of its own, or use mode=proxied"
        )));
    }
    let found = Card::find(sys, name);
    if let Err(missing @ Missing::NoClass { .. }) = found {
        return Err(refuse(missing.to_string()));
    }
    if !card::is_of_one_namespace(sys) {
        return Err(refuse(SHARED.into()));
    }
    let lock = session::open_run_dir(&config.run_dir).and_then(|run_dir| record::lock_cards(&run_dir));
    let _lock = lock.during(Code::Internal, || format!("cards.lock in {}", config.run_dir.display()))?;
    free(records, &record.container, name).map_err(refuse)?;

    if let Err(missing) = found.map(drop) {
        // It has come back meanwhile, from a container that is gone.
        let there = || netns::inside(namespace, devices);
        match Card::find(sys, name) {
            Ok(_) => {}
            Err(Missing::Elsewhere { .. }) if there().is_ok_and(|there| named(&there, name).is_some()) => {
                return Err(refuse(format!(
                    "RDMA device {name} is in the container's network namespace already, moved by somebody else (rdma-cni), who brings it \
                     back; use mode=passthrough, which leaves it where it is"
                )));
            }
            Err(_) => return Err(refuse(missing.to_string())),
        }
    }
    spare_interfaces(sys, name).map_err(refuse)?;
    let kernel = || "RDMA devices by netlink (modprobe ib_core)".to_owned();
    let socket = Socket::open().during(Code::Device, kernel)?;
    let devices = socket.devices().during(Code::Device, kernel)?;
    let Some(device) = named(&devices, name) else {
        return Err(refuse(Missing::Elsewhere { name: name.to_owned() }.to_string()));
    };
    let users = socket.users(device.index).during(Code::Device, || format!("who uses RDMA device {name}"))?;
    if !users.is_empty() {
        return Err(refuse(busy(name, &users)));
    }

    let own = netns::own().during(Code::Internal, || "/proc/self/ns/net".into())?;
    let number = |fd| netns::number(fd).during(Code::Internal, || "a network namespace".into());
    let (from, to) = (number(own.as_fd())?, number(namespace)?);
    record.lent = Some(Lent { name: name.to_owned(), node_guid: device.guid.to_string(), from, to });
    records.save(record).during(Code::Internal, || "cannot write the container's record".into())?;
    socket.move_to(device.index, namespace).map_err(|error| match error.raw_os_error() {
        Some(libc::EOPNOTSUPP) => refuse(format!(
            "RDMA device {name} cannot be moved to a container: {error}; its driver or this kernel cannot (rxe can with Linux 7.3 and not \
             with 6.12, siw cannot); use mode=proxied or mode=passthrough"
        )),
        _ => refuse(format!("RDMA device {name} cannot be moved to the container's network namespace: {error}")),
    })?;
    let index = device.index;
    let node = netns::inside(namespace, move || Socket::open()?.verbs(index));
    node.during(Code::Device, || format!("the node of RDMA device {name} (modprobe ib_uverbs)"))
}

/// Why no card can be moved, as the kernel is.
pub const SHARED: &str = "mode=exclusive needs the kernel to show each RDMA device in one network namespace only, and it shows all in each: write \
     `options ib_core netns_mode=0` to /etc/modprobe.d/ringfence.conf and restart the host, or `rdma system set netns exclusive` before \
     there is any network namespace; or use mode=proxied";

/// Sees to it that no other container than `container` has the card `name`, or why one has it. One that is gone gives it back.
fn free(records: &Records, container: &str, name: &str) -> Result<(), String> {
    let others = records.containers().map_err(|error| format!("records: {error}"))?;
    for other in others.iter().filter(|other| *other != container) {
        // What cannot be read is of no use to anybody: then the kernel says where the card is.
        let Ok(Some(record)) = records.load(other) else { continue };
        let Some(lent) = record.lent.as_ref().filter(|lent| lent.name == name) else { continue };
        if record.init.is_alive() {
            return Err(format!(
                "RDMA device {name} is container {other}'s for itself (mode=exclusive); use another device, or stop that container"
            ));
        }
        let forget = |()| records.save(&Record { lent: None, ..record.clone() });
        let back = bring_back(lent, crate::stop::CARD_PATIENCE).and_then(forget);
        back.map_err(|error| {
            format!("container {other}, which had RDMA device {name} for itself, has ended: {error}")
        })?;
    }
    Ok(())
}

/// Sees to it that no network interface of the host's goes with the card `name`, or says which would. The kernel removes those of IPoIB
/// whenever their card is moved, and with them their addresses; one that is down is nobody's loss.
fn spare_interfaces(sys: &Path, name: &str) -> Result<(), String> {
    let interfaces = card::ipoib_up(sys, name);
    if interfaces.is_empty() {
        return Ok(());
    }
    let down: Vec<_> = interfaces.iter().map(|interface| format!("`ip link set {interface} down`")).collect();
    Err(format!(
        "RDMA device {name} carries IPoIB of the host's by {}, which the kernel would remove with all addresses when the card is moved \
         to the container; take down first what the host can do without ({}), or use another device, or mode=proxied",
        interfaces.join(", "),
        down.join(", ")
    ))
}

/// Brings the card of `record` back, if it has one; the container must have ended, or be about to. The kernel may take `patience`.
pub(crate) fn take_back(config: &Config, records: &Records, record: &Record, patience: Duration) -> io::Result<()> {
    let Some(lent) = &record.lent else { return Ok(()) };
    let _lock = record::lock_cards(&session::open_run_dir(&config.run_dir)?)?;
    // Meanwhile another container may have got it, perhaps in the same namespace.
    match records.load(&record.container)? {
        Some(current) if current.lent == record.lent && current.init == record.init => {
            bring_back(lent, patience)?;
            records.save(&Record { lent: None, ..current })
        }
        _ => Ok(()),
    }
}

/// Waits for the kernel to bring the card back, or does it where its namespace is kept. A card that has gone from the kernel altogether,
/// with its driver or its network interface, is none that is missing.
fn bring_back(lent: &Lent, patience: Duration) -> io::Result<()> {
    let own = netns::own()?;
    if netns::number(own.as_fd())? != lent.from {
        let message =
            format!("RDMA device {} is another network namespace's; try again in that of the host", lent.name);
        return Err(io::Error::other(message));
    }
    let deadline = Instant::now() + patience;
    loop {
        if has(&devices()?, lent) {
            return Ok(());
        }
        if let Some(namespace) = netns::find(lent.to) {
            let back = netns::inside(namespace.as_fd(), || match devices()?.iter().find(|device| is(device, lent)) {
                Some(device) => Socket::open()?.move_to(device.index, own.as_fd()),
                None => Ok(()),
            });
            match back {
                // The kernel was about to do it, or something else has ended the card.
                Err(error) if error.raw_os_error() == Some(libc::ENODEV) => {}
                result => result?,
            }
            if has(&devices()?, lent) {
                return Ok(());
            }
        }
        if !card::is_anywhere(Path::new(card::SYS), &lent.name) {
            return Ok(());
        }
        if Instant::now() >= deadline {
            let Lent { name, to, .. } = lent;
            return Err(io::Error::other(format!(
                "RDMA device {name} is still in network namespace net:[{to}], which something keeps that cannot be seen from here, such as a \
                 socket; it comes back when that ends"
            )));
        }
        std::thread::sleep(PAUSE);
    }
}

/// The devices of the namespace that the calling thread is in; none where the kernel's module has gone.
fn devices() -> io::Result<Vec<Device>> {
    match Socket::open() {
        Err(error) if error.raw_os_error() == Some(libc::EPROTONOSUPPORT) => Ok(Vec::new()),
        socket => socket?.devices(),
    }
}

fn named<'a>(devices: &'a [Device], name: &str) -> Option<&'a Device> {
    devices.iter().find(|device| device.name == name)
}

fn has(devices: &[Device], lent: &Lent) -> bool {
    devices.iter().any(|device| is(device, lent))
}

/// Whether `device` is that which was lent: its name may have been changed meanwhile. Some virtual functions have no GUID.
fn is(device: &Device, lent: &Lent) -> bool {
    device.guid.to_string() == lent.node_guid && (device.guid.0 != 0 || device.name == lent.name)
}

fn busy(name: &str, users: &[User]) -> String {
    let show = |user: &User| match user {
        User::Process(pid) => {
            let program = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            format!("process {pid} ({})", program.trim())
        }
        User::Kernel(part) => format!("the kernel's {part}"),
    };
    let mut shown: Vec<_> = users.iter().take(MAX_SHOWN).map(show).collect();
    shown.extend((users.len() > MAX_SHOWN).then(|| format!("{} more", users.len() - MAX_SHOWN)));
    format!(
        "RDMA device {name} is in use by {}, which would lose it by a move to the container; end that (a ringfence-proxy is that of a \
         container with mode=proxied), or use another device",
        shown.join(", ")
    )
}

/// Where a card is.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case", tag = "place", content = "container")]
pub enum Place {
    /// In this network namespace, that of the host.
    Host,
    /// In that of the container of this id, which has it for itself.
    Container(String),
    /// In another.
    Elsewhere,
    /// Nowhere.
    Nowhere,
}

/// Where the card `name` is, and who has it.
pub fn place(config: &Config, name: &str) -> Place {
    let sys = Path::new(card::SYS);
    if card::names(sys).iter().any(|card| card == name) {
        return Place::Host;
    }
    if !card::is_anywhere(sys, name) {
        return Place::Nowhere;
    }
    let records = session::open_run_dir(&config.run_dir).and_then(|run_dir| Records::find(&run_dir));
    let has_it = |records: &Records, container: &String| {
        let record = records.load(container).ok().flatten();
        record.and_then(|record| record.lent).is_some_and(|lent| lent.name == name)
    };
    let holder = records.ok().and_then(|records| {
        let containers = records.containers().unwrap_or_default();
        containers.into_iter().find(|container| has_it(&records, container))
    });
    holder.map_or(Place::Elsewhere, Place::Container)
}

#[cfg(test)]
mod tests;
