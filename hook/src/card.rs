//! RDMA cards, as the kernel shows them in `/sys/class/infiniband`: whether one is there, and what is wrong with it.
//!
//! The proxy opens the card and knows more of it. What is told here can be told without libibverbs, before a proxy is started, and to
//! an operator whose container did not start.

mod trouble;

pub use trouble::{Complaint, Missing};

use std::io;
use std::num::NonZeroU8;
use std::path::Path;

/// The kernel's file system, for everybody but tests.
pub const SYS: &str = "/sys";
/// The class of cards.
const CLASS: &str = "infiniband";
/// What the kernel calls network interfaces of IPoIB, in their `type`.
const ARPHRD_INFINIBAND: &str = "32";
/// Of a network interface's flags that by which it is up.
const IFF_UP: u32 = 1;
/// Where udev makes cards' nodes.
const NODES: &str = "/dev/infiniband";
/// Entries of a GID table that are looked at.
const MAX_GIDS: usize = 256;

/// A card.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Card {
    /// The kernel's name for it.
    pub name: String,
    /// As the kernel writes it.
    pub node_guid: String,
    /// Its firmware's version, if it has one.
    pub firmware: Option<String>,
    /// The driver's name; `None` for a software device of the kernel's.
    pub driver: Option<String>,
    /// Its character device, `uverbs0`; `None` without the kernel's module `ib_uverbs`.
    pub verbs: Option<String>,
    /// From port 1 on.
    pub ports: Vec<Port>,
}

/// A port of a card.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Port {
    /// From 1 on.
    pub number: u32,
    /// `ACTIVE`, `DOWN`, …
    pub state: String,
    /// `100 Gb/sec (4X EDR)`
    pub rate: String,
    /// `Ethernet` or `InfiniBand`.
    pub link_layer: String,
    /// How many GIDs it has.
    pub gids: usize,
    /// The network interfaces that they are of.
    pub interfaces: Vec<String>,
}

/// The names of all cards, in order; none where the kernel knows none.
pub fn names(sys: &Path) -> Vec<String> {
    children(&sys.join("class/infiniband"))
}

fn children(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    names
}

/// A file's one line.
fn line(path: &Path) -> io::Result<String> {
    std::fs::read_to_string(path).map(|text| text.trim().to_owned())
}

impl Card {
    /// The card with this name, which can be used.
    ///
    /// # Errors
    /// With what to do.
    pub fn find(sys: &Path, name: &str) -> Result<Self, Missing> {
        let class = sys.join("class/infiniband");
        let name = name.to_owned();
        if !class.is_dir() {
            return Err(Missing::NoClass { name, class });
        }
        let others = names(sys);
        if !others.contains(&name) {
            if is_anywhere(sys, &name) {
                return Err(Missing::Elsewhere { name });
            }
            let others = if others.is_empty() { "none".into() } else { others.join(", ") };
            return Err(Missing::NoSuchName { name, others });
        }
        let card = Self::read(sys, &name).map_err(|error| Missing::Unreadable { name: name.clone(), error })?;
        if card.verbs.is_none() { Err(Missing::NoVerbs { name }) } else { Ok(card) }
    }

    /// What is known of the card with this name.
    fn read(sys: &Path, name: &str) -> io::Result<Self> {
        let directory = sys.join("class/infiniband").join(name);
        let driver = std::fs::read_link(directory.join("device/driver")).ok();
        let mut numbers: Vec<u32> =
            children(&directory.join("ports")).iter().filter_map(|port| port.parse().ok()).collect();
        numbers.sort_unstable();
        Ok(Self {
            name: name.to_owned(),
            node_guid: line(&directory.join("node_guid"))?,
            firmware: line(&directory.join("fw_ver")).ok().filter(|version| !version.is_empty()),
            driver: driver.and_then(|path| Some(path.file_name()?.to_str()?.to_owned())),
            verbs: verbs_name(sys, name),
            ports: numbers.into_iter().map(|number| Port::read(&directory, number)).collect::<io::Result<_>>()?,
        })
    }

    /// Its port with this number.
    ///
    /// # Errors
    /// With what to do.
    pub fn port(&self, number: NonZeroU8) -> Result<&Port, Missing> {
        let found = self.ports.iter().find(|port| port.number == u32::from(number.get()));
        let last = self.ports.last().map_or(0, |port| port.number);
        found.ok_or_else(|| Missing::NoSuchPort { name: self.name.clone(), port: number, last })
    }

    /// What of its port with this number is not as programs need it, and what to do. A container starts all the same, if there is such
    /// a port: it may come later.
    pub fn complaints(&self, number: NonZeroU8) -> Vec<Complaint> {
        let port = match self.port(number) {
            Ok(port) => port,
            Err(missing) => {
                let (what, remedy) = (missing.to_string(), missing.remedy().into());
                return vec![Complaint { what, remedy }];
            }
        };
        let place = format!("port {} of RDMA device {}", port.number, self.name);
        let interface = port.interfaces.first().map_or("its network interface", String::as_str);
        let mut complaints = Vec::new();
        if port.state != "ACTIVE" {
            let remedy = match (port.link_layer.as_str(), port.state.as_str()) {
                ("InfiniBand", "INIT" | "ARMED") => "start a subnet manager (opensm)".to_owned(),
                ("InfiniBand", _) => "check its cable and switch".to_owned(),
                _ => format!("ip link set {interface} up, or check its cable"),
            };
            complaints.push(Complaint { what: format!("{place} is {}", port.state), remedy });
        }
        if port.gids == 0 {
            let remedy = format!("give {interface} an address and set it up");
            complaints.push(Complaint { what: format!("{place} has no GID"), remedy });
        }
        complaints
    }
}

impl Port {
    fn read(card: &Path, number: u32) -> io::Result<Self> {
        let directory = card.join("ports").join(number.to_string());
        // "4: ACTIVE"
        let state = line(&directory.join("state"))?;
        let (mut gids, mut interfaces) = (0, Vec::new());
        for index in 0..MAX_GIDS {
            let Ok(gid) = line(&directory.join(format!("gids/{index}"))) else { break };
            if gid.chars().all(|c| matches!(c, '0' | ':')) {
                continue;
            }
            gids += 1;
            let interface = line(&directory.join(format!("gid_attrs/ndevs/{index}"))).unwrap_or_default();
            if !interface.is_empty() && !interfaces.contains(&interface) {
                interfaces.push(interface);
            }
        }
        Ok(Self {
            number,
            state: state.split_once(": ").map_or(state.as_str(), |(_, name)| name).to_owned(),
            rate: line(&directory.join("rate")).unwrap_or_default(),
            link_layer: line(&directory.join("link_layer")).unwrap_or_default(),
            gids,
            interfaces,
        })
    }
}

/// Whether there is a card with this name, in whichever network namespace: the kernel shows the character devices of all in each.
pub fn is_anywhere(sys: &Path, name: &str) -> bool {
    verbs_name(sys, name).is_some()
}

/// The name of the card whose verbs the character device `major:minor` is for, if it is for one's.
pub fn of_node(sys: &Path, major: u32, minor: u32) -> Option<String> {
    let verbs = sys.join("class/infiniband_verbs");
    let is_it = |node: &String| line(&verbs.join(node).join("dev")).is_ok_and(|dev| dev == format!("{major}:{minor}"));
    line(&verbs.join(children(&verbs).into_iter().find(is_it)?).join("ibdev")).ok()
}

/// Sees to it that one of the device nodes `nodes`, each with its major and minor number, is the card `name`'s, if any is for a card's
/// verbs: the kernel numbers those anew at every start.
///
/// # Errors
/// With the first, which is another card's, and what to do.
pub fn check_nodes<'a>(
    sys: &Path,
    name: &str,
    nodes: impl IntoIterator<Item = (&'a Path, u32, u32)>,
) -> Result<(), Missing> {
    let owned = nodes.into_iter().filter_map(|(path, major, minor)| Some((path, of_node(sys, major, minor)?)));
    let owned: Vec<_> = owned.collect();
    let Some((node, owner)) = owned.first().filter(|_| owned.iter().all(|(_, owner)| owner != name)) else {
        return Ok(());
    };
    let its = verbs_name(sys, name).map(|its| Path::new(NODES).join(its));
    Err(Missing::OthersNode { name: name.to_owned(), node: (*node).to_owned(), owner: owner.clone(), its })
}

/// The character device for verbs of the card `name`, such as `uverbs0`, in whichever network namespace it is.
fn verbs_name(sys: &Path, name: &str) -> Option<String> {
    let verbs = sys.join("class/infiniband_verbs");
    let is_its = |node: &String| line(&verbs.join(node).join("ibdev")).is_ok_and(|device| device == name);
    children(&verbs).into_iter().find(is_its)
}

/// Major and minor number of the character device for verbs of the card `name`.
pub fn verbs_of(sys: &Path, name: &str) -> Option<(u32, u32)> {
    let dev = line(&sys.join("class/infiniband_verbs").join(verbs_name(sys, name)?).join("dev")).ok()?;
    let (major, minor) = dev.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// What `/sys/class` has of the cards whose verbs the character devices `nodes` are for, and of these nodes, each with its class. All
/// classes of InfiniBand's begin with the same word.
pub fn entries(sys: &Path, nodes: &[(u32, u32)]) -> Vec<(String, String)> {
    let cards: Vec<_> = nodes.iter().filter_map(|(major, minor)| of_node(sys, *major, *minor)).collect();
    let numbers: Vec<_> = nodes.iter().map(|(major, minor)| format!("{major}:{minor}")).collect();
    let classes = children(&sys.join("class")).into_iter().filter(|class| class.starts_with(CLASS));
    let of_class = |class: String| {
        let directory = sys.join("class").join(&class);
        let is_theirs = |name: &String| match class.as_str() {
            CLASS => cards.contains(name),
            _ => line(&directory.join(name).join("dev")).is_ok_and(|dev| numbers.contains(&dev)),
        };
        let names: Vec<_> = children(&directory).into_iter().filter(is_theirs).collect();
        names.into_iter().map(move |name| (class.clone(), name))
    };
    classes.flat_map(of_class).collect()
}

/// The names of cards that speak iWARP, in order.
pub fn iwarp(sys: &Path) -> Vec<String> {
    // "4: RNIC"
    let is_iwarp = |name: &String| {
        let kind = line(&sys.join("class/infiniband").join(name).join("node_type"));
        kind.is_ok_and(|kind| kind.starts_with("4:"))
    };
    names(sys).into_iter().filter(is_iwarp).collect()
}

/// The network interfaces of IPoIB over the card `name` that are up, in order, of the network namespace whose `/sys` this is.
pub fn ipoib_up(sys: &Path, name: &str) -> Vec<String> {
    let interfaces = sys.join("class/infiniband").join(name).join("device/net");
    let is_ipoib = |interface: &Path| line(&interface.join("type")).is_ok_and(|kind| kind == ARPHRD_INFINIBAND);
    let is_up = |interface: &Path| {
        let flags = line(&interface.join("flags")).ok();
        let flags = flags.and_then(|flags| u32::from_str_radix(flags.strip_prefix("0x")?, 16).ok());
        flags.is_some_and(|flags| flags & IFF_UP != 0)
    };
    let names = children(&interfaces).into_iter();
    names.filter(|name| is_ipoib(&interfaces.join(name)) && is_up(&interfaces.join(name))).collect()
}

/// Whether the kernel shows each card in one network namespace only, so that a proxy in its container's finds none of the host's.
pub fn is_of_one_namespace(sys: &Path) -> bool {
    line(&sys.join("module/ib_core/parameters/netns_mode")).is_ok_and(|mode| mode == "N")
}

#[cfg(test)]
mod tests {
    use super::*;
    use ringfence_launch::FIRST_PORT;

    struct Sys(tempfile::TempDir);

    impl Sys {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn write(&self, path: &str, text: &str) {
            let path = self.0.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }

        /// As the kernel has it.
        fn card(name: &str, state: &str, gid: &str) -> Self {
            let sys = Self::new();
            let card = format!("class/infiniband/{name}");
            sys.write(&format!("{card}/node_guid"), "5054:00ff:fe12:3456\n");
            sys.write(&format!("{card}/fw_ver"), "\n");
            for (file, text) in [("state", state), ("rate", "100 Gb/sec (4X EDR)"), ("link_layer", "Ethernet")] {
                sys.write(&format!("{card}/ports/1/{file}"), &format!("{text}\n"));
            }
            for (index, gid) in ["0000:0000:0000:0000:0000:0000:0000:0000", gid].into_iter().enumerate() {
                sys.write(&format!("{card}/ports/1/gids/{index}"), &format!("{gid}\n"));
            }
            sys.write(&format!("{card}/ports/1/gid_attrs/ndevs/1"), "eth1\n");
            sys.write("class/infiniband_verbs/abi_version", "6\n");
            sys.write("class/infiniband_verbs/uverbs3/ibdev", &format!("{name}\n"));
            sys
        }

        fn find(&self, name: &str) -> Result<Card, String> {
            Card::find(self.0.path(), name).map_err(|missing| missing.to_string())
        }
    }

    const GID: &str = "0000:0000:0000:0000:0000:ffff:0a09:0101";

    #[test]
    fn a_card_is_read() {
        let card = Sys::card("mlx5_0", "4: ACTIVE", GID).find("mlx5_0").unwrap();
        assert_eq!((card.node_guid.as_str(), card.verbs.as_deref()), ("5054:00ff:fe12:3456", Some("uverbs3")));
        assert_eq!((card.firmware.as_deref(), card.driver.as_deref()), (None, None));
        let port = Port {
            number: 1,
            state: "ACTIVE".into(),
            rate: "100 Gb/sec (4X EDR)".into(),
            link_layer: "Ethernet".into(),
            gids: 1,
            interfaces: vec!["eth1".into()],
        };
        assert_eq!((card.ports.as_slice(), card.complaints(FIRST_PORT)), (&[port][..], vec![]));
    }

    #[test]
    fn what_is_missing_is_told_with_what_to_do() {
        let error = Sys::new().find("mlx5_0").unwrap_err();
        assert!(error.contains("this kernel has no RDMA devices") && error.contains("modprobe"), "{error}");
        let sys = Sys::card("mlx5_0", "4: ACTIVE", GID);
        let error = sys.find("mlx5_9").unwrap_err();
        assert!(error.starts_with("no RDMA device has the name mlx5_9: there is mlx5_0; correct the name"), "{error}");
        std::fs::remove_dir_all(sys.0.path().join("class/infiniband_verbs")).unwrap();
        let error = sys.find("mlx5_0").unwrap_err();
        assert_eq!(error, "RDMA device mlx5_0 has no character device for verbs: modprobe ib_uverbs");
        sys.write("class/infiniband_verbs/uverbs9/ibdev", "mlx5_7\n");
        let error = sys.find("mlx5_7").unwrap_err();
        assert!(error.starts_with("RDMA device mlx5_7 is in another network namespace"), "{error}");
        std::fs::remove_dir_all(sys.0.path().join("class/infiniband/mlx5_0")).unwrap();
        assert!(sys.find("mlx5_0").unwrap_err().contains("there is none"));
    }

    #[test]
    fn the_port_that_is_used_is_looked_at() {
        let sys = Sys::card("mlx5_0", "1: DOWN", GID);
        for (file, text) in
            [("state", "4: ACTIVE"), ("rate", "100 Gb/sec (4X EDR)"), ("link_layer", "Ethernet"), ("gids/0", GID)]
        {
            sys.write(&format!("class/infiniband/mlx5_0/ports/2/{file}"), &format!("{text}\n"));
        }
        let card = sys.find("mlx5_0").unwrap();
        let [second, third] = [2, 3].map(|number| NonZeroU8::new(number).unwrap());
        assert_eq!((card.complaints(FIRST_PORT).len(), card.complaints(second)), (1, vec![]));
        assert_eq!(card.port(second).unwrap().state, "ACTIVE");
        let error = card.port(third).unwrap_err().to_string();
        assert!(error.starts_with("RDMA device mlx5_0 has no port 3: its last is 2; correct port of the"), "{error}");
        assert!(card.complaints(third)[0].to_string().starts_with(&error), "{:?}", card.complaints(third));
    }

    #[test]
    fn a_port_that_is_down_and_one_without_addresses_are_told() {
        let card = Sys::card("mlx5_0", "1: DOWN", GID).find("mlx5_0").unwrap();
        let down = "port 1 of RDMA device mlx5_0 is DOWN: ip link set eth1 up, or check its cable";
        assert_eq!(card.complaints(FIRST_PORT).iter().map(ToString::to_string).collect::<Vec<_>>(), [down]);
        let sys = Sys::card("mlx5_0", "4: ACTIVE", "0000:0000:0000:0000:0000:0000:0000:0000");
        let complaints = sys.find("mlx5_0").unwrap().complaints(FIRST_PORT);
        assert_eq!(complaints.len(), 1, "{complaints:?}");
        assert!(complaints[0].to_string().contains("has no GID: give its network interface an"), "{complaints:?}");
        sys.write("class/infiniband/mlx5_0/ports/1/link_layer", "InfiniBand\n");
        sys.write("class/infiniband/mlx5_0/ports/1/state", "2: INIT\n");
        assert!(sys.find("mlx5_0").unwrap().complaints(FIRST_PORT)[0].remedy.contains("subnet manager"));
    }

    #[test]
    fn a_card_is_found_by_its_node() {
        let sys = Sys::card("mlx5_0", "4: ACTIVE", GID);
        sys.write("class/infiniband_verbs/uverbs3/dev", "231:195\n");
        assert_eq!(of_node(sys.0.path(), 231, 195).as_deref(), Some("mlx5_0"));
        assert_eq!(of_node(sys.0.path(), 231, 19), None);
        assert_eq!(verbs_of(sys.0.path(), "mlx5_0"), Some((231, 195)));
        assert_eq!(verbs_of(sys.0.path(), "mlx5_9"), None);
        sys.write("class/infiniband_verbs/uverbs0/dev", "231:192\n");
        sys.write("class/infiniband_verbs/uverbs0/ibdev", "mlx5_1\n");
        sys.write("class/infiniband/mlx5_1/node_guid", "\n");
        sys.write("class/infiniband_mad/umad0/dev", "231:0\n");
        sys.write("class/net/eth0/dev", "231:195\n");
        let entry = |class: &str, name: &str| (class.to_owned(), name.to_owned());
        let verbs = [entry("infiniband", "mlx5_0"), entry("infiniband_verbs", "uverbs3")];
        assert_eq!(entries(sys.0.path(), &[(231, 195), (10, 1)]), verbs);
        assert_eq!(entries(sys.0.path(), &[(231, 0)]), [entry("infiniband_mad", "umad0")]);
    }

    #[test]
    fn a_node_of_another_card_is_told_with_the_right_one() {
        let sys = Sys::card("mlx5_0", "4: ACTIVE", GID);
        sys.write("class/infiniband_verbs/uverbs3/dev", "231:195\n");
        sys.write("class/infiniband_verbs/uverbs0/dev", "231:192\n");
        sys.write("class/infiniband_verbs/uverbs0/ibdev", "mlx5_1\n");
        let [own, others, manager] = [("uverbs3", 231, 195), ("uverbs0", 231, 192), ("rdma_cm", 10, 122)];
        let check = |name: &str, nodes: &[(&str, u32, u32)]| {
            let paths: Vec<_> = nodes.iter().map(|(node, ..)| Path::new("/dev/infiniband").join(node)).collect();
            let nodes = paths.iter().zip(nodes).map(|(path, (_, major, minor))| (path.as_path(), *major, *minor));
            check_nodes(sys.0.path(), name, nodes).map_err(|missing| missing.to_string())
        };
        assert_eq!(check("mlx5_0", &[own, manager]), Ok(()));
        assert_eq!(check("mlx5_1", &[others]), Ok(()));
        // Of several cards one is that which the device is called after.
        assert_eq!(check("mlx5_0", &[others, own]), Ok(()));
        // Those of no card are nobody's, whatever the device is called.
        assert_eq!(check("mlx5_9", &[manager]), Ok(()));
        let error = "/dev/infiniband/uverbs0 is mlx5_1's, not mlx5_0's, whose node is /dev/infiniband/uverbs3; correct nodes of the \
             [[device]]";
        assert_eq!(check("mlx5_0", &[manager, others]).unwrap_err(), error);
        let error = check("mlx5_9", &[others]).unwrap_err();
        let expected = "/dev/infiniband/uverbs0 is mlx5_1's, not mlx5_9's, of which this kernel has no node; correct name or nodes of the";
        assert!(error.starts_with(expected), "{error}");
    }

    #[test]
    fn cards_of_iwarp_are_known() {
        let sys = Sys::card("mlx5_0", "4: ACTIVE", GID);
        sys.write("class/infiniband/mlx5_0/node_type", "1: CA\n");
        assert_eq!(iwarp(sys.0.path()), Vec::<String>::new());
        sys.write("class/infiniband/siw0/node_type", "4: RNIC\n");
        assert_eq!(iwarp(sys.0.path()), ["siw0"]);
    }

    #[test]
    fn interfaces_of_ipoib_that_are_up_are_seen() {
        let sys = Sys::card("mlx5_0", "4: ACTIVE", GID);
        assert_eq!(ipoib_up(sys.0.path(), "mlx5_0"), Vec::<String>::new());
        for (interface, kind, flags) in [
            ("ib1", "32\n", "0x1003\n"),
            ("ib0", "32\n", "0x1043\n"),
            ("ib2", "32\n", "0x1002\n"),
            ("eth0", "1\n", "0x1003\n"),
            ("ib3", "32\n", "nonsense\n"),
        ] {
            let directory = format!("class/infiniband/mlx5_0/device/net/{interface}");
            sys.write(&format!("{directory}/type"), kind);
            sys.write(&format!("{directory}/flags"), flags);
        }
        assert_eq!(ipoib_up(sys.0.path(), "mlx5_0"), ["ib0", "ib1"]);
        assert_eq!(ipoib_up(sys.0.path(), "mlx5_1"), Vec::<String>::new());
    }

    #[test]
    fn the_kernel_s_mode_is_read() {
        let sys = Sys::new();
        for (mode, expected) in [("Y\n", false), ("N\n", true)] {
            sys.write("module/ib_core/parameters/netns_mode", mode);
            assert_eq!(is_of_one_namespace(sys.0.path()), expected);
        }
        assert!(!is_of_one_namespace(Path::new("/nowhere")));
    }
}
