//! What a container asks for, by its annotations under [`PREFIX`].

use crate::state::Annotations;
use crate::units;
use ringfence_proxy::launch::Class;
use serde::Deserialize;

/// Every annotation under it is ours, and an unknown one is an error: a misspelt limit must not be no limit.
pub const PREFIX: &str = "ringfence.dev/";

/// The keys, without [`PREFIX`].
const KEYS: [&str; 11] = [
    "enable",
    "mode",
    "device",
    "bandwidth",
    "weight",
    "class",
    "max-qp",
    "max-mr",
    "max-mr-bytes",
    "max-cq",
    "max-qp-depth",
];

/// How a container reaches the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
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

/// What an enabled container asks for; nothing of it is granted yet.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Request {
    pub mode: Option<Mode>,
    pub device: Option<String>,
    pub bandwidth: Option<u64>,
    pub weight: Option<u32>,
    pub class: Option<Class>,
    pub max_qp: Option<u32>,
    pub max_mr: Option<u32>,
    pub max_mr_bytes: Option<u64>,
    pub max_cq: Option<u32>,
    pub max_qp_depth: Option<u32>,
}

/// What the annotations mean for the hook.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wish {
    /// Nothing under our prefix: not our container.
    Absent,
    /// `enable` says no; the other keys are not looked at, so that a template can be switched off by one line.
    Disabled,
    /// The container is to be joined to a device.
    Enabled(Request),
}

/// Why the annotations cannot be understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)]
pub enum Error {
    #[error("annotation {PREFIX}{key} is unknown; allowed are {}", KEYS.join(", "))]
    Unknown { key: String },
    #[error("annotation {PREFIX}{key}={value} is malformed; allowed is {expected}")]
    Malformed { key: &'static str, value: String, expected: &'static str },
    #[error(
        "annotation {PREFIX}{key} is given but {PREFIX}enable is not; add {PREFIX}enable=true, or =false to start without RDMA"
    )]
    NotEnabled { key: String },
}

/// What the container with all these annotations asks for; `None` if it is none of ours.
///
/// `policy` is the administrator's profile that the engine was told to give it, by a CDI device or an argument of
/// `ringfence-runtime`, in which case it needs no annotation.
pub fn wanted(annotations: &Annotations, policy: Option<&str>) -> Result<Option<Request>, Error> {
    if is_sandbox(annotations) {
        return Ok(None);
    }
    match read(annotations.iter().map(|(key, value)| (key.as_str(), value.as_str())))? {
        Wish::Absent if policy.is_some() => Ok(Some(Request::default())),
        Wish::Absent | Wish::Disabled => Ok(None),
        Wish::Enabled(request) => Ok(Some(request)),
    }
}

/// A pod's pause container carries the pod's annotations, but only holds its namespaces.
fn is_sandbox(annotations: &Annotations) -> bool {
    let kinds = ["io.kubernetes.cri.container-type", "io.kubernetes.cri-o.ContainerType"];
    kinds.iter().any(|kind| annotations.get(*kind).is_some_and(|value| value == "sandbox"))
}

/// Reads a container's annotations; those outside [`PREFIX`] are ignored.
pub fn read<'a>(annotations: impl Iterator<Item = (&'a str, &'a str)>) -> Result<Wish, Error> {
    let ours: Vec<_> = annotations.filter_map(|(key, value)| Some((key.strip_prefix(PREFIX)?, value))).collect();
    let Some((first, _)) = ours.first() else { return Ok(Wish::Absent) };
    match ours.iter().find(|(key, _)| *key == "enable") {
        None => match ours.iter().find(|(key, _)| !KEYS.contains(key)) {
            Some((key, _)) => return Err(Error::Unknown { key: shorten(key) }),
            None => return Err(Error::NotEnabled { key: (*first).to_owned() }),
        },
        Some((_, "true" | "1" | "yes")) => {}
        Some((_, "false" | "0" | "no")) => return Ok(Wish::Disabled),
        Some((_, value)) => return Err(malformed("enable", value, "true, 1, yes, false, 0 or no")),
    }
    let mut request = Request::default();
    for (key, value) in ours {
        request.set(key, value)?;
    }
    Ok(Wish::Enabled(request))
}

impl Request {
    fn set(&mut self, key: &str, value: &str) -> Result<(), Error> {
        match key {
            "enable" => {}
            "mode" => {
                self.mode = Some(match value {
                    "proxied" => Mode::Proxied,
                    "passthrough" => Mode::Passthrough,
                    "exclusive" => Mode::Exclusive,
                    _ => return Err(malformed("mode", value, "proxied, passthrough or exclusive")),
                });
            }
            "device" => {
                if !is_device_name(value) {
                    return Err(malformed("device", value, DEVICE_NAME));
                }
                self.device = Some(value.to_owned());
            }
            "bandwidth" => {
                let rate = units::rate(value).ok_or_else(|| malformed("bandwidth", value, units::RATE_EXPECTED))?;
                self.bandwidth = Some(rate);
            }
            "weight" => {
                let weight = units::count(value).filter(|weight| WEIGHTS.contains(weight));
                self.weight = Some(weight.ok_or_else(|| malformed("weight", value, "a whole number from 1 to 1000"))?);
            }
            "class" => {
                self.class = Some(match value {
                    "latency" => Class::Latency,
                    "ops" => Class::Ops,
                    "bulk" => Class::Bulk,
                    _ => return Err(malformed("class", value, "latency, ops or bulk")),
                });
            }
            "max-mr-bytes" => {
                let size = units::size(value).ok_or_else(|| malformed("max-mr-bytes", value, units::SIZE_EXPECTED))?;
                self.max_mr_bytes = Some(size);
            }
            "max-qp" => self.max_qp = Some(count("max-qp", value)?),
            "max-mr" => self.max_mr = Some(count("max-mr", value)?),
            "max-cq" => self.max_cq = Some(count("max-cq", value)?),
            "max-qp-depth" => self.max_qp_depth = Some(count("max-qp-depth", value)?),
            _ => return Err(Error::Unknown { key: shorten(key) }),
        }
        Ok(())
    }
}

/// The weights there are.
pub(crate) const WEIGHTS: std::ops::RangeInclusive<u32> = 1..=1000;
/// What [`is_device_name`] takes, for messages.
pub(crate) const DEVICE_NAME: &str = "a device name of 1 to 63 of A-Z a-z 0-9 _ . -";

/// Whether `name` fits `struct ibv_device`, which has 64 bytes for it, and a path.
pub(crate) fn is_device_name(name: &str) -> bool {
    (1..64).contains(&name.len())
        && !name.starts_with('.')
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b))
}

fn count(key: &'static str, value: &str) -> Result<u32, Error> {
    units::count(value).ok_or_else(|| malformed(key, value, units::COUNT_EXPECTED))
}

fn malformed(key: &'static str, value: &str, expected: &'static str) -> Error {
    Error::Malformed { key, value: shorten(value), expected }
}

/// Enough of a value to recognise it: annotations may be as long as 256 KiB.
fn shorten(value: &str) -> String {
    const LONGEST: usize = 64;
    let quoted = |text: &str| format!("{text:?}");
    match value.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}…", quoted(&value[..end])),
        None => quoted(value),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read_pairs(pairs: &[(&str, &str)]) -> Result<Wish, Error> {
        let pairs: Vec<_> = pairs.iter().map(|(key, value)| (format!("{PREFIX}{key}"), *value)).collect();
        read(pairs.iter().map(|(key, value)| (key.as_str(), *value)))
    }

    #[track_caller]
    fn message(pairs: &[(&str, &str)], expected: &str) {
        assert_eq!(read_pairs(pairs).unwrap_err().to_string(), expected);
    }

    #[test]
    fn other_annotations_are_not_ours() {
        assert_eq!(read([("io.kubernetes.cri.x", "y"), ("ringfence.device/x", "y")].into_iter()), Ok(Wish::Absent));
    }

    #[test]
    fn enable_switches() {
        for yes in ["true", "1", "yes"] {
            assert_eq!(read_pairs(&[("enable", yes)]), Ok(Wish::Enabled(Request::default())));
        }
        for no in ["false", "0", "no"] {
            assert_eq!(read_pairs(&[("enable", no), ("whatever", "x")]), Ok(Wish::Disabled));
        }
        message(
            &[("enable", "TRUE")],
            r#"annotation ringfence.dev/enable="TRUE" is malformed; allowed is true, 1, yes, false, 0 or no"#,
        );
    }

    #[test]
    fn all_keys_are_read() {
        let request = Request {
            mode: Some(Mode::Passthrough),
            device: Some("mlx5_0".into()),
            bandwidth: Some(10_000_000_000),
            weight: Some(1000),
            class: Some(Class::Latency),
            max_qp: Some(1),
            max_mr: Some(2),
            max_mr_bytes: Some(4 << 30),
            max_cq: Some(3),
            max_qp_depth: Some(4),
        };
        let pairs = [
            ("enable", "true"),
            ("mode", "passthrough"),
            ("device", "mlx5_0"),
            ("bandwidth", "10Gbit"),
            ("weight", "1000"),
            ("class", "latency"),
            ("max-qp", "1"),
            ("max-mr", "2"),
            ("max-mr-bytes", "4GiB"),
            ("max-cq", "3"),
            ("max-qp-depth", "4"),
        ];
        assert_eq!(read_pairs(&pairs), Ok(Wish::Enabled(request)));
        assert_eq!(pairs.map(|(key, _)| key), KEYS);
    }

    #[test]
    fn mistakes_name_key_value_and_what_is_allowed() {
        let all = "enable, mode, device, bandwidth, weight, class, max-qp, max-mr, max-mr-bytes, max-cq, max-qp-depth";
        for (key, value, expected) in [
            ("band-width", "1Gbit", format!(r#"annotation ringfence.dev/"band-width" is unknown; allowed are {all}"#)),
            (
                "bandwidth",
                "10gbps",
                format!(
                    r#"annotation ringfence.dev/bandwidth="10gbps" is malformed; allowed is {}"#,
                    units::RATE_EXPECTED
                ),
            ),
            (
                "weight",
                "1001",
                r#"annotation ringfence.dev/weight="1001" is malformed; allowed is a whole number from 1 to 1000"#
                    .into(),
            ),
            (
                "class",
                "bulky",
                r#"annotation ringfence.dev/class="bulky" is malformed; allowed is latency, ops or bulk"#.into(),
            ),
            (
                "mode",
                "a\nb",
                r#"annotation ringfence.dev/mode="a\nb" is malformed; allowed is proxied, passthrough or exclusive"#
                    .into(),
            ),
            (
                "max-qp",
                "-1",
                r#"annotation ringfence.dev/max-qp="-1" is malformed; allowed is a whole number from 1 to 4294967295"#
                    .into(),
            ),
            (
                "max-mr-bytes",
                "4G",
                format!(
                    r#"annotation ringfence.dev/max-mr-bytes="4G" is malformed; allowed is {}"#,
                    units::SIZE_EXPECTED
                ),
            ),
            (
                "device",
                "../sda",
                format!(r#"annotation ringfence.dev/device="../sda" is malformed; allowed is {DEVICE_NAME}"#),
            ),
        ] {
            message(&[("enable", "true"), (key, value)], &expected);
        }
    }

    #[test]
    fn keys_without_enable_fail() {
        message(
            &[("bandwidth", "1Gbit")],
            "annotation ringfence.dev/bandwidth is given but ringfence.dev/enable is not; \
             add ringfence.dev/enable=true, or =false to start without RDMA",
        );
        assert!(matches!(read_pairs(&[("bandwith", "1Gbit")]), Err(Error::Unknown { .. })));
    }

    #[test]
    fn long_values_are_cut() {
        let text = read_pairs(&[("enable", &"ä".repeat(100_000))]).unwrap_err().to_string();
        assert!(text.len() < 300, "{text}");
    }

    proptest! {
        #[test]
        fn no_annotation_panics_or_is_ignored(key in ".{0,20}", value in ".{0,20}") {
            let result = read_pairs(&[("enable", "true"), (&key, &value)]);
            let unknown = matches!(result, Err(Error::Unknown { .. }));
            prop_assert!(KEYS.contains(&key.as_str()) || unknown);
        }
    }
}
