//! The user ids that proxies run under: one each, which nobody else on the node has.

use crate::failure::{Code, Failure};
use ringfence_launch::Uids;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use std::fmt;
use std::io;

/// As many ids as a node has LIDs, between the ranges that systemd gives out and those that it reserves
/// (<https://systemd.io/UIDS-GIDS>), far above all that `subuid(5)` ranges start with.
const DEFAULT: Range = Range { first: 2_000_000_000, last: 2_000_001_022 };
/// For user namespaces, which have 65,536 ids as a rule: a range that neither systemd nor Debian uses for anything.
const IN_NAMESPACES: Range = Range { first: 60_578, last: 61_183 };

/// A range of ids, `first-last` in the configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    first: u32,
    last: u32,
}

impl Range {
    fn parse(text: &str) -> Result<Self, String> {
        let range = text.split_once('-').and_then(|(first, last)| {
            Some(Self { first: first.trim().parse().ok()?, last: last.trim().parse().ok()? })
        });
        match range {
            // The highest number means "unchanged" to the kernel.
            Some(range) if range.first > 0 && range.first <= range.last && range.last < u32::MAX => Ok(range),
            _ => Err(format!("{text:?} must be a range of ids without 0, such as \"{DEFAULT}\"")),
        }
    }

    fn uids(self) -> Uids {
        Uids { first: self.first, count: self.last - self.first + 1 }
    }

    /// Whether a `uid_map` or `gid_map` has all of it.
    fn is_in(self, map: &str) -> bool {
        let ranges = map.lines().filter_map(|line| {
            let mut fields = line.split_ascii_whitespace().map(|field| field.parse::<u64>().ok());
            let (inside, _, count) = (fields.next()??, fields.next()??, fields.next()??);
            Some(inside..inside.saturating_add(count))
        });
        let ranges: Vec<_> = ranges.collect();
        let mut next = u64::from(self.first);
        while next <= u64::from(self.last) {
            match ranges.iter().find(|range| range.contains(&next)) {
                Some(range) => next = range.end,
                None => return false,
            }
        }
        true
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.first, self.last)
    }
}

impl<'de> Deserialize<'de> for Range {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::parse(&String::deserialize(deserializer)?).map_err(de::Error::custom)
    }
}

impl Serialize for Range {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// The ids for proxies that this process starts; `None` if its user namespace has none to spare, or does not let anybody drop
/// groups, so that they stay who we are.
///
/// # Errors
/// If `configured` has ids that do not exist here, or cannot be taken.
pub fn for_proxies(configured: Option<Range>) -> Result<Option<Uids>, Failure> {
    let read = |file: &str| std::fs::read_to_string(format!("/proc/self/{file}"));
    let maps = read("uid_map").and_then(|uids| Ok([uids, read("gid_map")?]));
    // Where that file is missing it cannot be forbidden.
    let keeps_groups = read("setgroups").is_ok_and(|text| text.trim() == "deny");
    choose(configured, maps, keeps_groups)
}

fn choose(
    configured: Option<Range>,
    maps: io::Result<[String; 2]>,
    keeps_groups: bool,
) -> Result<Option<Uids>, Failure> {
    let maps = maps.map_err(|error| Failure::new(Code::Internal, format!("/proc/self/uid_map: {error}")))?;
    let exists = |range: &Range| maps.iter().all(|map| range.is_in(map));
    match configured {
        Some(range) if keeps_groups => {
            let message = format!(
                "proxy.uids = \"{range}\" cannot be had: the engine's user namespace lets nobody drop groups \
                 (/proc/self/setgroups there says deny); map it with newgidmap, or remove the key"
            );
            Err(Failure::new(Code::Config, message))
        }
        None if keeps_groups => Ok(None),
        Some(range) if exists(&range) => Ok(Some(range.uids())),
        Some(range) => {
            let message = format!(
                "proxy.uids = \"{range}\" does not exist in the engine's user namespace (see /proc/self/uid_map and gid_map \
                 there); give a range that does, or remove the key"
            );
            Err(Failure::new(Code::Config, message))
        }
        None => Ok([DEFAULT, IN_NAMESPACES].into_iter().find(exists).map(Range::uids)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: &str = "         0          0 4294967295\n";
    const ROOTLESS: &str = "         0       1000          1\n         1     100000      65536\n";

    fn chosen(configured: Option<&str>, uids: &str, gids: &str) -> Result<Option<u32>, String> {
        chosen_in(configured, uids, gids, false)
    }

    fn chosen_in(configured: Option<&str>, uids: &str, gids: &str, denied: bool) -> Result<Option<u32>, String> {
        let configured = configured.map(|text| Range::parse(text).unwrap());
        choose(configured, Ok([uids.into(), gids.into()]), denied)
            .map(|uids| uids.map(|uids| uids.first))
            .map_err(|f| f.message)
    }

    #[test]
    fn each_namespace_has_its_range() {
        assert_eq!(chosen(None, HOST, HOST), Ok(Some(2_000_000_000)));
        assert_eq!(chosen(None, ROOTLESS, ROOTLESS), Ok(Some(60_578)));
        assert_eq!(chosen(None, ROOTLESS, "0 1000 1"), Ok(None));
        assert_eq!(chosen(None, "0 1000 1", "0 1000 1"), Ok(None));
        assert_eq!(chosen(Some("5000-5099"), HOST, HOST), Ok(Some(5000)));
        let pieces = "0 1000 1\n1000 300000 4050\n1 100000 999\n";
        assert_eq!(chosen(Some("500-5049"), pieces, ROOTLESS), Ok(Some(500)));
        assert!(chosen(Some("500-5050"), pieces, ROOTLESS).is_err());
        let refused = chosen(Some("70000-70010"), ROOTLESS, ROOTLESS).unwrap_err();
        assert!(refused.starts_with("proxy.uids = \"70000-70010\" does not exist"), "{refused}");
    }

    #[test]
    fn who_cannot_drop_groups_stays_who_he_is() {
        assert_eq!(chosen_in(None, ROOTLESS, ROOTLESS, true), Ok(None));
        let refused = chosen_in(Some("5000-5099"), ROOTLESS, ROOTLESS, true).unwrap_err();
        assert!(
            refused.contains("\"5000-5099\" cannot be had") && refused.contains("/proc/self/setgroups"),
            "{refused}"
        );
    }

    #[test]
    fn a_range_has_two_ends_and_no_root() {
        let range = Range::parse("7 - 9").unwrap();
        assert_eq!((range.uids().count, range.to_string()), (3, "7-9".into()));
        for wrong in ["", "7", "0-9", "9-7", "7-4294967295", "-", "a-b", "1-99999999999"] {
            assert!(Range::parse(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn the_default_has_an_id_for_every_lid() {
        assert_eq!(DEFAULT.uids().count, u32::from(ringfence_proxy::fabric::ports::MAX_PORTS));
    }
}
