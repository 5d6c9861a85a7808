//! Addresses that a policy names: which of a card's GIDs are a container's, and whom its queue pairs may be connected to.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::str::FromStr;

/// Which of a card's GIDs the container sees, and speaks under.
///
/// In JSON and in the configuration: `"namespace"`, `"host"`, or a list of addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Gids {
    /// Those that are addresses of the container's own network namespace: a macvlan, an ipvlan or a virtual function that was moved
    /// there, or the host's namespace if the container shares it.
    #[default]
    Namespace,
    /// Those that are addresses of the host's network namespace, for a container with a network of its own that the card knows
    /// nothing of. Its requests are the host's in the eyes of others.
    Host,
    /// Of those of the host's only these.
    #[serde(untagged)]
    List(Vec<IpAddr>),
}

impl Gids {
    /// Whether they are the host's: the proxy stays in the host's network namespace then, in which the card looks up how a peer is
    /// reached.
    #[must_use]
    pub fn are_of_host(&self) -> bool {
        *self != Self::Namespace
    }

    /// Whether a GID of the namespace that they are of is one of them.
    #[must_use]
    pub fn contain(&self, gid: &[u8; 16]) -> bool {
        match self {
            Self::Namespace | Self::Host => true,
            Self::List(list) => list.iter().any(|address| octets(*address) == *gid),
        }
    }
}

/// As a GID: IPv4 addresses are mapped.
fn octets(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    }
}

/// Addresses with a common beginning, such as `10.9.0.0/16` or `fd00::/8`; without `/`, one address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Network {
    /// Zero beyond the prefix.
    address: u128,
    /// Of the GID: 96 more than that of an IPv4 address.
    prefix: u8,
}

/// Bits before an IPv4 address in a GID.
const MAPPED: u8 = 96;

impl Network {
    const fn mask(prefix: u8) -> u128 {
        match prefix {
            0 => 0,
            prefix => u128::MAX << (128 - prefix),
        }
    }

    /// Whether a GID is one of these.
    #[must_use]
    pub fn contains(&self, gid: &[u8; 16]) -> bool {
        u128::from_be_bytes(*gid) & Self::mask(self.prefix) == self.address
    }
}

impl FromStr for Network {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is no address or network, as 10.9.0.7, 10.9.0.0/16 or fd00::/8 are");
        let (address, prefix) = match text.split_once('/') {
            Some((address, prefix)) => (address, Some(prefix)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| wrong())?;
        let (longest, mapped) = if address.is_ipv4() { (32, MAPPED) } else { (128, 0) };
        let prefix = match prefix {
            None => longest,
            // `parse` takes a sign.
            Some(prefix) if prefix.bytes().all(|byte| byte.is_ascii_digit()) => prefix.parse().map_err(|_| wrong())?,
            Some(_) => return Err(wrong()),
        };
        if prefix > longest {
            return Err(format!("{text:?}: a prefix has no more than {longest} bits"));
        }
        let (prefix, whole) = (prefix + mapped, u128::from_be_bytes(octets(address)));
        let network = Self { address: whole & Self::mask(prefix), prefix };
        if network.address == whole {
            Ok(network)
        } else {
            Err(format!("{text:?} has bits beyond its prefix: {network} has not"))
        }
    }
}

impl fmt::Display for Network {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let address = Ipv6Addr::from(self.address);
        match address.to_ipv4_mapped() {
            Some(v4) if self.prefix == 128 => write!(formatter, "{v4}"),
            Some(v4) if self.prefix >= MAPPED => write!(formatter, "{v4}/{}", self.prefix - MAPPED),
            _ if self.prefix == 128 => write!(formatter, "{address}"),
            _ => write!(formatter, "{address}/{}", self.prefix),
        }
    }
}

impl TryFrom<String> for Network {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Network> for String {
    fn from(network: Network) -> Self {
        network.to_string()
    }
}

/// Whom queue pairs may be connected to: by GID, which every connection on Ethernet has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Peers(pub Vec<Network>);

impl Peers {
    /// Whether the port with this GID is one of them. One that is named by its LID alone is none.
    #[must_use]
    pub fn allow(&self, gid: Option<&[u8; 16]>) -> bool {
        gid.is_some_and(|gid| self.0.iter().any(|network| network.contains(gid)))
    }
}

impl fmt::Display for Peers {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return formatter.write_str("nobody");
        }
        for (index, network) in self.0.iter().enumerate() {
            let comma = if index == 0 { "" } else { ", " };
            write!(formatter, "{comma}{network}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gid(address: &str) -> [u8; 16] {
        octets(address.parse().unwrap())
    }

    #[test]
    fn gids_are_a_word_or_a_list() {
        let read = |text: &str| serde_json::from_str::<Gids>(text);
        assert_eq!(read("\"namespace\"").unwrap(), Gids::Namespace);
        assert_eq!(read("\"host\"").unwrap(), Gids::Host);
        let list = read("[\"10.9.1.1\", \"fe80::1\"]").unwrap();
        assert_eq!(serde_json::to_string(&list).unwrap(), "[\"10.9.1.1\",\"fe80::1\"]");
        assert!(list.are_of_host() && list.contain(&gid("::ffff:10.9.1.1")) && list.contain(&gid("fe80::1")));
        assert!(!list.contain(&gid("10.9.1.2")));
        assert!(read("\"all\"").is_err() && read("[\"eth0\"]").is_err());
    }

    #[test]
    fn networks_are_what_their_prefix_says() {
        for (network, inside, outside) in [
            ("10.9.1.1", "10.9.1.1", "10.9.1.2"),
            ("10.9.0.0/16", "10.9.255.1", "10.10.0.1"),
            ("0.0.0.0/0", "255.255.255.255", "fe80::1"),
            ("::/0", "10.9.1.1", ""),
            ("fd00::/8", "fdff::1", "fe00::1"),
            ("fe80::1", "fe80::1", "fe80::2"),
            ("::ffff:10.0.0.0/104", "10.1.2.3", "11.1.2.3"),
        ] {
            let parsed: Network = network.parse().unwrap();
            assert!(parsed.contains(&gid(inside)), "{network} {inside}");
            assert!(outside.is_empty() || !parsed.contains(&gid(outside)), "{network} {outside}");
            assert_eq!(parsed.to_string().parse::<Network>().unwrap(), parsed, "{parsed}");
        }
    }

    #[test]
    fn what_is_no_network_is_refused_with_what_is_wrong() {
        for text in ["", "10.9", "10.9.0.0/", "10.9.0.0/+8", "10.9.0.0/-1", "10.9.0.0/999", "host", "10.9.1.1/8/8"] {
            assert!(text.parse::<Network>().unwrap_err().contains("is no address or network"), "{text}");
        }
        assert!("10.9.0.0/33".parse::<Network>().unwrap_err().ends_with("no more than 32 bits"));
        assert!("10.9.0.1/16".parse::<Network>().unwrap_err().ends_with("10.9.0.0/16 has not"));
    }

    #[test]
    fn peers_are_named_by_gid() {
        let peers: Peers = serde_json::from_str("[\"10.9.0.0/16\", \"fd00::1\"]").unwrap();
        assert!(peers.allow(Some(&gid("10.9.7.7"))) && peers.allow(Some(&gid("fd00::1"))));
        assert!(!peers.allow(Some(&gid("10.8.7.7"))) && !peers.allow(None));
        assert!(!Peers(Vec::new()).allow(Some(&gid("10.9.7.7"))));
        assert_eq!(peers.to_string(), "10.9.0.0/16, fd00::1");
        assert_eq!(serde_json::to_string(&peers).unwrap(), "[\"10.9.0.0/16\",\"fd00::1\"]");
    }
}
