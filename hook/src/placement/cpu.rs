//! How much of the processors a proxy gets: as much as its container has, unless the administrator says otherwise.
//!
//! What counts is what stands in the container's own cgroups: runtimes have set them before they call the hook, and read
//! `config.json` in ways of their own. That serves where there is nothing to read.

use super::{Setting, outermost};
use crate::cgroup::Membership;
use crate::config::{self, Cpus, Cpuset, Limit};
use crate::state;
use std::io;
use std::path::{Path, PathBuf};

/// The period of cgroups that nobody gave another, in microseconds.
pub const USUAL_PERIOD: u64 = 100_000;
const USUAL_SHARES: u64 = 1024;
const USUAL_WEIGHT: u64 = 100;

/// Limits of processors, each `None` for what the parent cgroup allows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cpu {
    /// How long.
    pub time: Option<Time>,
    /// The share where they are contended.
    pub weight: Option<Weight>,
    /// Which ones, as a list.
    pub cpus: Option<String>,
    /// Which memory nodes, as a list.
    pub mems: Option<String>,
}

/// Processor time in each period, in microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Time {
    pub quota: u64,
    pub period: u64,
}

/// A share of contended processors, in the terms of the hierarchy that has the controller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weight {
    /// `cpu.shares` of version 1.
    Shares(u64),
    /// `cpu.weight` of version 2.
    Points(u64),
    /// What all others leave.
    Idle,
}

impl Cpu {
    /// The limits for the proxy of the container `id`, which is in `memberships` and whose `config.json` says `said`.
    pub fn of(config: &config::Proxy, memberships: &[Membership], id: &str, said: &state::Cpu) -> Self {
        let container = Self::container(memberships, id, said);
        let time = match config.cpus {
            Limit::Container => container.time,
            Limit::Own(Cpus::Unlimited) => None,
            Limit::Own(Cpus::Thousandths(number)) => {
                Some(Time { quota: u64::from(number) * USUAL_PERIOD / 1000, period: USUAL_PERIOD })
            }
        };
        let (cpus, mems) = match &config.cpuset {
            Limit::Container => (container.cpus, container.mems),
            Limit::Own(Cpuset::Unlimited) => (None, None),
            Limit::Own(Cpuset::List(list)) => (Some(list.clone()), None),
        };
        let weight = match config.cpu_weight {
            Limit::Container => container.weight,
            Limit::Own(config::Weight(weight)) => {
                let weight = u64::from(weight);
                let is_version_1 = Place::of(memberships, "cpu", id).is_some_and(|place| place.is_version_1);
                // As systemd and the kernel convert them.
                Some(match is_version_1 {
                    true => Weight::Shares((weight * USUAL_SHARES / USUAL_WEIGHT).max(2)),
                    false => Weight::Points(weight),
                })
            }
        };
        Self { time, weight, cpus, mems }
    }

    /// The container's own.
    fn container(memberships: &[Membership], id: &str, said: &state::Cpu) -> Self {
        let (cpu, cpuset) = (Place::of(memberships, "cpu", id), Place::of(memberships, "cpuset", id));
        let list = |file: &str, said: &Option<String>| match cpuset.as_ref().and_then(|place| place.list(file)) {
            Some(found) => Some(found).filter(|found| !found.is_empty()),
            None => said.clone().filter(|said| !said.is_empty()),
        };
        Self {
            time: cpu.as_ref().and_then(Place::time).unwrap_or_else(|| Time::said(said)),
            weight: cpu.as_ref().and_then(Place::weight).unwrap_or_else(|| Weight::said(said)),
            cpus: list("cpuset.cpus", &said.cpus),
            mems: list("cpuset.mems", &said.mems),
        }
    }

    /// What holds from the proxy's start on.
    pub(super) fn first(&self) -> impl Iterator<Item = Setting> {
        let weight = self.weight.map(|weight| {
            let (name, version_1, version_2) = match weight {
                // Which of the two it is says which file there is.
                Weight::Shares(shares) => {
                    (format!("cpu.shares = {shares}"), ("cpu.shares", shares), ("cpu.weight", USUAL_WEIGHT))
                }
                Weight::Points(weight) => {
                    (format!("cpu-weight = {weight}"), ("cpu.shares", USUAL_SHARES), ("cpu.weight", weight))
                }
                Weight::Idle => ("cpu.idle = 1".to_owned(), ("cpu.idle", 1), ("cpu.idle", 1)),
            };
            let of = |(file, value): (&'static str, u64)| vec![(file, value.to_string())];
            Setting { name, controller: "cpu", version_1: of(version_1), version_2: of(version_2) }
        });
        let cpuset = [("cpuset", "cpuset.cpus", &self.cpus), ("cpuset.mems", "cpuset.mems", &self.mems)];
        let cpuset = cpuset.map(|(name, file, list)| {
            let list = list.clone()?;
            let files = vec![(file, list.clone())];
            let name = format!("{name} = {list}");
            Some(Setting { name, controller: "cpuset", version_1: files.clone(), version_2: files })
        });
        weight.into_iter().chain(cpuset.into_iter().flatten())
    }

    /// What holds once the proxy is ready: its start is no longer for a short limit, and the container does not run yet.
    pub(super) fn last(&self) -> Option<Setting> {
        let Time { quota, period } = self.time?;
        Some(Setting {
            name: format!("cpus = {}", quota as f64 / period as f64),
            controller: "cpu",
            version_1: vec![("cpu.cfs_period_us", period.to_string()), ("cpu.cfs_quota_us", quota.to_string())],
            version_2: vec![("cpu.max", format!("{quota} {period}"))],
        })
    }
}

/// A container's cgroups of one controller, from its init's to the outermost that is its own.
struct Place {
    levels: Vec<PathBuf>,
    is_version_1: bool,
}

impl Place {
    /// `None` if the container has none of its own. A controller that version 1 has, version 2 has not.
    fn of(memberships: &[Membership], controller: &str, id: &str) -> Option<Self> {
        let of = |wanted: &dyn Fn(&Membership) -> bool| memberships.iter().find(|membership| wanted(membership));
        let found = of(&|m| m.controls(controller)).or_else(|| of(&|m| m.controllers.is_empty()))?;
        let own = outermost(&found.directory, id);
        let levels = found.directory.ancestors().take_while(|level| level.starts_with(own));
        let levels = levels.map(Path::to_owned).collect();
        (!found.is_root).then_some(Self { levels, is_version_1: !found.controllers.is_empty() })
    }

    /// The tightest limit of all levels; `None` if none can be read.
    fn time(&self) -> Option<Option<Time>> {
        let read =
            |level: &PathBuf| if self.is_version_1 { Time::of_version_1(level) } else { Time::of_version_2(level) };
        let found: Vec<_> = self.levels.iter().filter_map(|level| read(level).ok()).collect();
        if found.is_empty() {
            return None;
        }
        let tighter = |a: &Time, b: &Time| {
            let product = |quota: u64, period: u64| u128::from(quota) * u128::from(period);
            product(a.quota, b.period).cmp(&product(b.quota, a.period))
        };
        Some(found.into_iter().flatten().min_by(tighter))
    }

    /// That of the outermost level, which is the one that competes with others; `None` if it cannot be read.
    fn weight(&self) -> Option<Option<Weight>> {
        let outermost = self.levels.last()?;
        if read(outermost, "cpu.idle").is_ok_and(|idle| idle == "1") {
            return Some(Some(Weight::Idle));
        }
        let (file, usual) = if self.is_version_1 { ("cpu.shares", USUAL_SHARES) } else { ("cpu.weight", USUAL_WEIGHT) };
        let value = read(outermost, file).ok()?.parse().ok()?;
        let weight = if self.is_version_1 { Weight::Shares(value) } else { Weight::Points(value) };
        Some(Some(weight).filter(|_| value != usual))
    }

    /// The list of the innermost level that has one, empty if none does; `None` if none can be read.
    fn list(&self, file: &str) -> Option<String> {
        let found: Vec<_> = self.levels.iter().filter_map(|level| read(level, file).ok()).collect();
        let last = found.last().cloned();
        found.into_iter().find(|list| !list.is_empty()).or(last)
    }
}

impl Time {
    fn of_version_1(level: &Path) -> io::Result<Option<Self>> {
        let number = |file| number(&read(level, file)?);
        let (quota, period) = (number("cpu.cfs_quota_us")?, number("cpu.cfs_period_us")?);
        Ok(Self::new(quota, period))
    }

    fn of_version_2(level: &Path) -> io::Result<Option<Self>> {
        let max = read(level, "cpu.max")?;
        let (quota, period) = max.split_once(' ').unwrap_or((&max, ""));
        if quota == "max" {
            return Ok(None);
        }
        Ok(Self::new(number(quota)?, number(period)?))
    }

    fn said(said: &state::Cpu) -> Option<Self> {
        let period = said.period.filter(|period| *period > 0).unwrap_or(USUAL_PERIOD);
        Self::new(said.quota?, i64::try_from(period).ok()?)
    }

    /// No limit, if the quota is not above 0.
    fn new(quota: i64, period: i64) -> Option<Self> {
        let positive = |number: i64| u64::try_from(number).ok().filter(|number| *number > 0);
        Some(Self { quota: positive(quota)?, period: positive(period)? })
    }
}

impl Weight {
    /// As runtimes have always converted shares for version 2. Where there is version 1 it can be read.
    fn said(said: &state::Cpu) -> Option<Self> {
        if said.idle == Some(1) {
            return Some(Self::Idle);
        }
        let shares = said.shares.filter(|shares| ![0, USUAL_SHARES].contains(shares))?.clamp(2, 262_144);
        Some(Self::Points(1 + (shares - 2) * 9999 / 262_142))
    }
}

fn read(directory: &Path, file: &str) -> io::Result<String> {
    std::fs::read_to_string(directory.join(file)).map(|text| text.trim().to_owned())
}

fn number(text: &str) -> io::Result<i64> {
    text.parse().map_err(|_| io::Error::from(io::ErrorKind::InvalidData))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Proxy;

    /// A directory with cgroups `pod/c1` and the files of them.
    fn cgroups(files: &[(&str, &str)]) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        for (file, text) in files {
            let path = directory.path().join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, format!("{text}\n")).unwrap();
        }
        directory
    }

    fn membership(controllers: &str, directory: PathBuf) -> Membership {
        let controllers = controllers.split(',').filter(|c| !c.is_empty()).map(str::to_owned).collect();
        Membership { controllers, directory, is_root: false }
    }

    fn said(quota: i64) -> state::Cpu {
        state::Cpu { quota: Some(quota), cpus: Some("7".into()), shares: Some(2), ..state::Cpu::default() }
    }

    #[test]
    fn version_1_is_read_where_each_controller_is() {
        let root = cgroups(&[
            ("cpu/pod/c1/cpu.cfs_quota_us", "10000"),
            ("cpu/pod/c1/cpu.cfs_period_us", "50000"),
            ("cpu/pod/c1/cpu.shares", "512"),
            ("cpu/pod/c1/cpu.idle", "0"),
            ("cpuset/pod/c1/cpuset.cpus", "1"),
            ("cpuset/pod/c1/cpuset.mems", "0"),
        ]);
        let memberships = [
            membership("cpu,cpuacct", root.path().join("cpu/pod/c1")),
            membership("cpuset", root.path().join("cpuset/pod/c1")),
            membership("", root.path().join("unified/pod/c1")),
        ];
        let found = Cpu::of(&Proxy::default(), &memberships, "c1", &said(1));
        let expected = Cpu {
            time: Some(Time { quota: 10_000, period: 50_000 }),
            weight: Some(Weight::Shares(512)),
            cpus: Some("1".into()),
            mems: Some("0".into()),
        };
        assert_eq!(found, expected);
        // What stands there is the truth, also where it is no limit.
        let unlimited =
            cgroups(&[("c1/cpu.cfs_quota_us", "-1"), ("c1/cpu.cfs_period_us", "100000"), ("c1/cpu.shares", "1024")]);
        let memberships = [membership("cpu", unlimited.path().join("c1"))];
        let found = Cpu::of(&Proxy::default(), &memberships, "c1", &said(1));
        assert_eq!((found.time, found.weight, found.cpus.as_deref()), (None, None, Some("7")));
    }

    #[test]
    fn version_2_is_read_at_all_levels_of_a_scope() {
        let root = cgroups(&[
            ("a.slice/x-c1.scope/cpu.max", "20000 100000"),
            ("a.slice/x-c1.scope/cpu.weight", "50"),
            ("a.slice/x-c1.scope/cpuset.cpus", "0-1"),
            ("a.slice/x-c1.scope/cpuset.mems", ""),
            ("a.slice/x-c1.scope/container/cpu.max", "max 100000"),
            ("a.slice/x-c1.scope/container/cpu.weight", "9"),
            ("a.slice/x-c1.scope/container/cpuset.cpus", ""),
            ("a.slice/cpu.max", "1000 100000"),
        ]);
        let memberships = [membership("", root.path().join("a.slice/x-c1.scope/container"))];
        let found = Cpu::of(&Proxy::default(), &memberships, "c1", &said(1));
        let expected = Cpu {
            time: Some(Time { quota: 20_000, period: 100_000 }),
            weight: Some(Weight::Points(50)),
            cpus: Some("0-1".into()),
            mems: None,
        };
        assert_eq!(found, expected);
        let idle = cgroups(&[("c1/cpu.idle", "1"), ("c1/cpu.weight", "0"), ("c1/cpu.max", "max 100000")]);
        let found = Cpu::of(&Proxy::default(), &[membership("", idle.path().join("c1"))], "c1", &said(1));
        assert_eq!((found.time, found.weight), (None, Some(Weight::Idle)));
    }

    #[test]
    fn config_json_serves_where_nothing_can_be_read() {
        let nowhere = [membership("", "/nonexistent/pod/c1".into())];
        let found = |said| Cpu::of(&Proxy::default(), &nowhere, "c1", &said);
        assert_eq!(
            found(said(5000)),
            Cpu {
                time: Some(Time { quota: 5000, period: 100_000 }),
                weight: Some(Weight::Points(1)),
                cpus: Some("7".into()),
                mems: None,
            }
        );
        assert_eq!(found(said(-1)).time, None);
        assert_eq!(found(state::Cpu { cpus: Some(String::new()), shares: Some(0), ..said(0) }), Cpu::default());
    }

    #[test]
    fn the_administrators_word_goes_before_the_containers() {
        let nowhere = |controllers: &str| [membership(controllers, "/nonexistent/pod/c1".into())];
        let own = Proxy {
            cpus: Limit::Own(Cpus::Thousandths(2500)),
            cpuset: Limit::Own(Cpuset::List("0-1".into())),
            cpu_weight: Limit::Own(config::Weight(50)),
            ..Proxy::default()
        };
        let expected = Cpu {
            time: Some(Time { quota: 250_000, period: 100_000 }),
            weight: Some(Weight::Points(50)),
            cpus: Some("0-1".into()),
            mems: None,
        };
        let mems = state::Cpu { mems: Some("0".into()), ..said(1) };
        assert_eq!(Cpu::of(&own, &nowhere(""), "c1", &mems), expected);
        assert_eq!(Cpu::of(&own, &nowhere("cpu"), "c1", &mems).weight, Some(Weight::Shares(512)));
        let free = Proxy {
            cpus: Limit::Own(Cpus::Unlimited),
            cpuset: Limit::Own(Cpuset::Unlimited),
            cpu_weight: Limit::Own(config::Weight(100)),
            ..Proxy::default()
        };
        let expected = Cpu { weight: Some(Weight::Points(100)), ..Cpu::default() };
        assert_eq!(Cpu::of(&free, &nowhere(""), "c1", &mems), expected);
    }
}
