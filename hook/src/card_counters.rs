//! What a card itself counts of the queue pairs that containers' proxies have on it, if the operator has it count.
//!
//! A proxy counts what passes through it; what others READ out of a container's memory the card serves without it, and is seen only
//! here.

use crate::containers::{Container, Status};
use crate::nldev::Socket;
use crate::nldev::counters::{Counted, Mode};
use ringfence_launch::card::Help;
use serde::Serialize;
use std::collections::BTreeMap;
use std::io;
use std::num::NonZeroU8;
use std::path::Path;

/// What a card counts of one container.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct CardCounters {
    /// Queue pairs that are counted now.
    pub queue_pairs: usize,
    /// By the names that the card's driver has for them, since the first of them was bound; when all are gone it begins anew.
    pub values: BTreeMap<String, u64>,
}

/// What all cards count at one moment.
#[derive(Debug, Default)]
pub struct Reading {
    by_card: BTreeMap<String, Vec<Counted>>,
}

impl Reading {
    /// Reads it. Where the kernel has no cards, or none that counts queue pairs, it is empty.
    #[must_use]
    pub fn take() -> Self {
        let Ok(socket) = Socket::open() else { return Self::default() };
        let devices = socket.devices().unwrap_or_default();
        let counted = devices.into_iter().filter_map(|device| Some((device.name, socket.counted(device.index).ok()?)));
        Self { by_card: counted.collect() }
    }

    /// What the container's card counts of its proxy's queue pairs; `None` if it counts none.
    #[must_use]
    pub fn of(&self, container: &Container) -> Option<CardCounters> {
        let counted = self.by_card.get(&container.device).filter(|counted| !counted.is_empty())?;
        let Status { pid, .. } = container.proxy.filter(|proxy| proxy.alive)?;
        sum(counted, &threads(pid))
    }
}

/// The threads of a process, one of which made its queue pairs.
fn threads(pid: i32) -> Vec<i32> {
    let tasks = std::fs::read_dir(Path::new("/proc").join(pid.to_string()).join("task"));
    tasks.into_iter().flatten().flatten().filter_map(|task| task.file_name().to_str()?.parse().ok()).collect()
}

/// A process has several where they are kept by type as well, or were bound one by one.
fn sum(counted: &[Counted], threads: &[i32]) -> Option<CardCounters> {
    let ours = counted.iter().filter(|counted| counted.thread.is_some_and(|thread| threads.contains(&thread)));
    let mut sum = None;
    for Counted { queue_pairs, values, .. } in ours {
        let sum: &mut CardCounters = sum.get_or_insert_default();
        sum.queue_pairs += queue_pairs.len();
        for (name, value) in values {
            let total = sum.values.entry(name.clone()).or_default();
            *total = total.saturating_add(*value);
        }
    }
    sum
}

/// Whether the port of the card with this name counts queue pairs, for `ringfence info`.
#[must_use]
pub fn help(card: &str, port: NonZeroU8) -> Help {
    let asked = Socket::open().and_then(|socket| {
        let devices = socket.devices()?;
        let device = devices.iter().find(|device| device.name == card);
        let index = device.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?.index;
        Ok((socket.counter_mode(index, port.get().into())?, socket.counted(index)?.len()))
    });
    let (offered, detail) = match asked {
        Ok((mode, counters)) => told(card, port, mode, counters),
        Err(error) => (false, format!("the kernel does not say: {error}")),
    };
    Help { name: "counters per queue pair".into(), offered, detail }
}

/// The kernel tells of nobody's card whether it could: one that has counters bound can.
fn told(card: &str, port: NonZeroU8, mode: Mode, counters: usize) -> (bool, String) {
    let command = format!("rdma statistic qp set link {card}/{port} auto pid on");
    let detail = match (mode, counters) {
        (Mode::None, 0) => {
            return (false, format!("none is bound; where the driver can, as mlx5's, `{command}` has them bound"));
        }
        (Mode::Auto { .. }, 0) => {
            return (
                false,
                "none is bound, though the kernel is to: there are no queue pairs, or its driver cannot".into(),
            );
        }
        (Mode::Auto { by_process: true }, _) => "the kernel binds each process's, and ringfence stats shows them",
        (Mode::Auto { by_process: false }, _) => {
            return (true, format!("bound by type, containers' together; by container with `{command}`"));
        }
        (Mode::None | Mode::Manual, _) => "bound one by one; ringfence stats shows those of proxies",
    };
    (true, detail.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counted(thread: Option<i32>, queue_pairs: &[u32], values: &[(&str, u64)]) -> Counted {
        let values = values.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect();
        Counted { thread, queue_pairs: queue_pairs.to_vec(), values }
    }

    #[test]
    fn a_container_has_what_any_thread_of_its_proxy_has_bound_and_nobody_elses() {
        let all = [
            counted(Some(10), &[1, 2], &[("tx", 7), ("rx", 1)]),
            counted(Some(99), &[3], &[("tx", 1000)]),
            counted(Some(11), &[4], &[("tx", u64::MAX)]),
            counted(None, &[5], &[("tx", 1000)]),
        ];
        let found = sum(&all, &[10, 11, 12]).unwrap();
        assert_eq!(found.queue_pairs, 3);
        assert_eq!(found.values, BTreeMap::from([("tx".into(), u64::MAX), ("rx".into(), 1)]));
        assert_eq!(sum(&all, &[12]), None);
        let json = serde_json::to_value(sum(&all, &[10])).unwrap();
        assert_eq!(json, serde_json::json!({"queue-pairs": 2, "values": {"rx": 1, "tx": 7}}));
    }

    #[test]
    fn threads_are_found() {
        let own = i32::try_from(std::process::id()).unwrap();
        // The test has a thread of its own beside the first.
        let threads = threads(own);
        assert!(threads.contains(&own) && threads.len() > 1, "{threads:?}");
    }

    #[test]
    fn only_what_counts_is_offered() {
        let auto = |by_process| Mode::Auto { by_process };
        for (mode, counters, offered, said) in [
            (Mode::None, 0, false, "`rdma statistic qp set link mlx5_0/1 auto pid on` has"),
            (auto(true), 0, false, "or its driver cannot"),
            (auto(true), 2, true, "each process's"),
            (auto(false), 1, true, "by type"),
            (Mode::Manual, 1, true, "one by one"),
        ] {
            let (is_offered, detail) = told("mlx5_0", NonZeroU8::MIN, mode, counters);
            assert!(is_offered == offered && detail.contains(said), "{mode:?} {counters}: {detail}");
        }
        let help = help("rf-none", NonZeroU8::MIN);
        assert!(!help.offered && help.detail.starts_with("the kernel does not say: "), "{help:?}");
    }
}
