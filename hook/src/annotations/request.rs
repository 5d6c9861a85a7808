//! What an enabled container asks for.

use super::scope::Entry;
use super::{Error, malformed};
use crate::units;
use ringfence_launch::Class;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// How a container reaches the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Through a proxy.
    Proxied,
    /// By the device's own nodes, without any scheduling: for trusted containers.
    Passthrough,
    /// A device of its own.
    Exclusive,
}

impl Mode {
    /// As users write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Proxied => "proxied",
            Self::Passthrough => "passthrough",
            Self::Exclusive => "exclusive",
        }
    }
}

/// A policy, by the name of its profile, and who chose it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Choice {
    /// The administrator, who had the engine call the hook with `--policy`.
    Engine(String),
    /// Whoever wrote the annotations.
    Annotation(String),
}

impl Choice {
    /// The profile's name, or [`DEFAULT_POLICY`](super::DEFAULT_POLICY).
    pub fn name(&self) -> &str {
        match self {
            Self::Engine(name) | Self::Annotation(name) => name,
        }
    }
}

/// What an enabled container asks for; nothing of it is granted yet.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Request {
    pub policy: Option<Choice>,
    pub mode: Option<Mode>,
    pub device: Option<String>,
    pub bandwidth: Option<u64>,
    pub bandwidth_rx: Option<u64>,
    pub ops: Option<u64>,
    pub weight: Option<u32>,
    pub class: Option<Class>,
    pub max_qp: Option<u32>,
    pub max_mr: Option<u32>,
    pub max_mr_bytes: Option<u64>,
    pub max_cq: Option<u32>,
    pub max_qp_depth: Option<u32>,
    /// The annotation that says each, by its key.
    pub sources: BTreeMap<&'static str, String>,
}

impl Request {
    /// Takes `entry` over from its annotation, in place of an earlier one of the same key.
    pub(super) fn set(&mut self, entry: &Entry<'_>) -> Result<(), Error> {
        let value = entry.value;
        let wrong = |expected| malformed(entry.name, value, expected);
        let count = || units::count(value).ok_or_else(|| wrong(units::COUNT_EXPECTED));
        let rate = || units::rate(value).ok_or_else(|| wrong(units::RATE_EXPECTED));
        match entry.key {
            "policy" => {
                if !is_device_name(value) {
                    return Err(wrong(POLICY_NAME));
                }
                self.policy = Some(Choice::Annotation(value.to_owned()));
            }
            "mode" => {
                self.mode = Some(match value {
                    "proxied" => Mode::Proxied,
                    "passthrough" => Mode::Passthrough,
                    "exclusive" => Mode::Exclusive,
                    _ => return Err(wrong("proxied, passthrough or exclusive")),
                });
            }
            "device" => {
                if !is_device_name(value) {
                    return Err(wrong(DEVICE_NAME));
                }
                self.device = Some(value.to_owned());
            }
            "bandwidth" => self.bandwidth = Some(rate()?),
            "bandwidth-rx" => self.bandwidth_rx = Some(rate()?),
            "ops" => self.ops = Some(units::ops(value).ok_or_else(|| wrong(units::OPS_EXPECTED))?),
            "weight" => {
                let weight = units::count(value).filter(|weight| WEIGHTS.contains(weight));
                self.weight = Some(weight.ok_or_else(|| wrong("a whole number from 1 to 1000"))?);
            }
            "class" => {
                self.class = Some(match value {
                    "latency" => Class::Latency,
                    "ops" => Class::Ops,
                    "bulk" => Class::Bulk,
                    _ => return Err(wrong("latency, ops or bulk")),
                });
            }
            "max-mr-bytes" => {
                self.max_mr_bytes = Some(units::size(value).ok_or_else(|| wrong(units::SIZE_EXPECTED))?);
            }
            "max-qp" => self.max_qp = Some(count()?),
            "max-mr" => self.max_mr = Some(count()?),
            "max-cq" => self.max_cq = Some(count()?),
            "max-qp-depth" => self.max_qp_depth = Some(count()?),
            // `enable`, which has been decided about.
            _ => return Ok(()),
        }
        self.sources.insert(entry.key, entry.name.to_owned());
        Ok(())
    }
}

/// The weights there are.
pub(crate) const WEIGHTS: std::ops::RangeInclusive<u32> = 1..=1000;
/// What [`is_device_name`] takes, for messages.
pub(crate) const DEVICE_NAME: &str = "a device name of 1 to 63 of A-Z a-z 0-9 _ . -";
/// What [`is_device_name`] takes, for messages about profiles.
pub(crate) const POLICY_NAME: &str = "a profile's name of 1 to 63 of A-Z a-z 0-9 _ . -";

/// Whether `name` fits `struct ibv_device`, which has 64 bytes for it, and a path. Profiles' names have the same form: CDI
/// makes devices of them.
pub fn is_device_name(name: &str) -> bool {
    (1..64).contains(&name.len())
        && !name.starts_with('.')
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b))
}
