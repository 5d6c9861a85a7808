//! What one container may do: its request within the administrator's bounds.

use crate::annotations::{Mode, PREFIX, Request, WEIGHTS};
use crate::config::{Config, Device, Kind, optional_rate, optional_size};
use crate::units::{show_rate, show_size};
use ringfence_proxy::launch::{Class, Limits};
use serde::Deserialize;
use std::fmt::Display;

/// `[policy]`
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Policy {
    /// What a container gets that does not ask.
    pub defaults: Defaults,
    /// What a container may ask for.
    pub bounds: Bounds,
}

/// `[policy.defaults]`
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
#[allow(missing_docs)]
pub struct Defaults {
    #[serde(deserialize_with = "optional_rate")]
    pub bandwidth: Option<u64>,
    pub weight: Option<u32>,
    pub class: Option<Class>,
    pub max_qp: Option<u32>,
    pub max_mr: Option<u32>,
    #[serde(deserialize_with = "optional_size")]
    pub max_mr_bytes: Option<u64>,
    pub max_cq: Option<u32>,
    pub max_qp_depth: Option<u32>,
}

/// `[policy.bounds]`
///
/// Without a bound, `bandwidth`, `weight` and `class` are free; the `max-*` limits are still bound by the default, because
/// annotations are written by tenants and may only narrow.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
#[allow(missing_docs)]
pub struct Bounds {
    pub modes: Vec<Mode>,
    #[serde(deserialize_with = "optional_rate")]
    pub bandwidth: Option<u64>,
    pub weight: Option<u32>,
    pub classes: Option<Vec<Class>>,
    pub max_qp: Option<u32>,
    pub max_mr: Option<u32>,
    #[serde(deserialize_with = "optional_size")]
    pub max_mr_bytes: Option<u64>,
    pub max_cq: Option<u32>,
    pub max_qp_depth: Option<u32>,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            modes: vec![Mode::Proxied],
            bandwidth: None,
            weight: None,
            classes: None,
            max_qp: None,
            max_mr: None,
            max_mr_bytes: None,
            max_cq: None,
            max_qp_depth: None,
        }
    }
}

/// Why a request is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)]
pub enum Refusal {
    #[error("{PREFIX}{key}={value} is beyond the administrator's bound; allowed is {allowed}")]
    Beyond { key: &'static str, value: String, allowed: String },
    #[error("{PREFIX}mode=exclusive is not offered yet; use proxied")]
    NotOffered,
    #[error("{PREFIX}device={name} is not configured; there is {known}")]
    NoDevice { name: String, known: String },
    #[error("device {name} has no device nodes, so {PREFIX}mode=passthrough is not possible; there is {known}")]
    NoNodes { name: String, known: String },
    #[error("device {name} serves {PREFIX}mode=passthrough only; mode=proxied needs a device of kind soft: {known}")]
    NotProxied { name: String, known: String },
    #[error("{PREFIX}{key} cannot be enforced with {PREFIX}mode=passthrough; remove it or use mode=proxied")]
    Unenforceable { key: &'static str },
}

/// What a container gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Grant<'a> {
    /// A proxy, with these limits.
    Proxied(&'a Device, Limits),
    /// The device's nodes.
    Passthrough(&'a Device),
}

/// Decides about `request`.
pub fn resolve<'a>(request: &Request, config: &'a Config) -> Result<Grant<'a>, Refusal> {
    let bounds = &config.policy.bounds;
    let mode = match request.mode {
        Some(Mode::Exclusive) => return Err(Refusal::NotOffered),
        Some(mode) if !bounds.modes.contains(&mode) => {
            return Err(Refusal::Beyond {
                key: "mode",
                value: mode.name().into(),
                allowed: names(&bounds.modes, Mode::name),
            });
        }
        Some(mode) => mode,
        None => bounds.modes.first().copied().unwrap_or(Mode::Proxied),
    };
    match mode {
        Mode::Proxied => {
            let device = device(request, config, Kind::Soft)?;
            Ok(Grant::Proxied(device, config.policy.limits(request)?))
        }
        Mode::Passthrough => {
            if let Some(key) = request.limits_asked().next() {
                return Err(Refusal::Unenforceable { key });
            }
            device(request, config, Kind::Ibverbs).map(Grant::Passthrough)
        }
        Mode::Exclusive => Err(Refusal::NotOffered),
    }
}

/// The device that `request` names, or the first of the kind that its mode needs.
fn device<'a>(request: &Request, config: &'a Config, kind: Kind) -> Result<&'a Device, Refusal> {
    let known = |kind: Option<Kind>| {
        let of_kind = config.devices.iter().filter(|device| kind.is_none_or(|kind| kind == device.kind));
        let names: Vec<_> = of_kind.map(|device| device.name.as_str()).collect();
        if names.is_empty() { "none".to_owned() } else { names.join(", ") }
    };
    let missing = |name: &str| {
        let (name, known) = (name.to_owned(), known(Some(kind)));
        match kind {
            Kind::Soft => Refusal::NotProxied { name, known },
            Kind::Ibverbs => Refusal::NoNodes { name, known },
        }
    };
    match &request.device {
        None => {
            let first = config.devices.iter().find(|device| device.kind == kind);
            first.ok_or_else(|| missing(&known(None)))
        }
        Some(name) => match config.devices.iter().find(|device| device.name == *name) {
            None => Err(Refusal::NoDevice { name: name.clone(), known: known(None) }),
            Some(device) if device.kind != kind => Err(missing(name)),
            Some(device) => Ok(device),
        },
    }
}

impl Request {
    fn limits_asked(&self) -> impl Iterator<Item = &'static str> {
        [
            ("bandwidth", self.bandwidth.is_some()),
            ("weight", self.weight.is_some()),
            ("class", self.class.is_some()),
            ("max-qp", self.max_qp.is_some()),
            ("max-mr", self.max_mr.is_some()),
            ("max-mr-bytes", self.max_mr_bytes.is_some()),
            ("max-cq", self.max_cq.is_some()),
            ("max-qp-depth", self.max_qp_depth.is_some()),
        ]
        .into_iter()
        .filter_map(|(key, asked)| asked.then_some(key))
    }
}

impl Policy {
    fn limits(&self, request: &Request) -> Result<Limits, Refusal> {
        let (defaults, bounds, built_in) = (&self.defaults, &self.bounds, Limits::default());
        Ok(Limits {
            bandwidth: optional("bandwidth", request.bandwidth, defaults.bandwidth, bounds.bandwidth, show_rate)?,
            weight: optional("weight", request.weight, defaults.weight, bounds.weight, |n| n.to_string())?,
            class: self.class(request)?,
            max_qp: limit("max-qp", request.max_qp, defaults.max_qp, bounds.max_qp, built_in.max_qp, |n| {
                n.to_string()
            })?,
            max_mr: limit("max-mr", request.max_mr, defaults.max_mr, bounds.max_mr, built_in.max_mr, |n| {
                n.to_string()
            })?,
            max_mr_bytes: limit(
                "max-mr-bytes",
                request.max_mr_bytes,
                defaults.max_mr_bytes,
                bounds.max_mr_bytes,
                built_in.max_mr_bytes,
                show_size,
            )?,
            max_cq: limit("max-cq", request.max_cq, defaults.max_cq, bounds.max_cq, built_in.max_cq, |n| {
                n.to_string()
            })?,
            max_qp_depth: limit(
                "max-qp-depth",
                request.max_qp_depth,
                defaults.max_qp_depth,
                bounds.max_qp_depth,
                built_in.max_qp_depth,
                |n| n.to_string(),
            )?,
        })
    }

    fn class(&self, request: &Request) -> Result<Class, Refusal> {
        let Some(allowed) = &self.bounds.classes else {
            return Ok(request.class.or(self.defaults.class).unwrap_or_default());
        };
        match request.class {
            Some(class) if !allowed.contains(&class) => Err(Refusal::Beyond {
                key: "class",
                value: class_name(class).into(),
                allowed: names(allowed, class_name),
            }),
            Some(class) => Ok(class),
            // Saying nothing must not escape the bound: the least privileged of the allowed classes.
            None => Ok(self.defaults.class.unwrap_or_else(|| {
                let by_privilege = [Class::Bulk, Class::Ops, Class::Latency];
                by_privilege.into_iter().find(|class| allowed.contains(class)).unwrap_or_default()
            })),
        }
    }

    /// Whether the administrator contradicts himself.
    pub(crate) fn check(&self) -> Result<(), String> {
        let (defaults, bounds) = (&self.defaults, &self.bounds);
        if bounds.modes.is_empty() {
            return Err("policy.bounds.modes must name at least one mode".into());
        }
        if bounds.modes.contains(&Mode::Exclusive) {
            return Err("policy.bounds.modes: exclusive is not offered yet".into());
        }
        for (key, weight) in [("defaults", defaults.weight), ("bounds", bounds.weight)] {
            if let Some(weight) = weight.filter(|weight| !WEIGHTS.contains(weight)) {
                return Err(format!("policy.{key}.weight = {weight} must be from 1 to 1000"));
            }
        }
        if let Some(classes) = &bounds.classes {
            if classes.is_empty() || classes.contains(&Class::None) {
                return Err("policy.bounds.classes must name some of latency, ops, bulk".into());
            }
            if let Some(class) = defaults.class.filter(|class| !classes.contains(class)) {
                let (class, allowed) = (class_name(class), names(classes, class_name));
                return Err(format!("policy.defaults.class = {class} is not in policy.bounds.classes = {allowed}"));
            }
        }
        let count = |n: u32| n.to_string();
        within("bandwidth", defaults.bandwidth, bounds.bandwidth, show_rate)?;
        within("weight", defaults.weight, bounds.weight, count)?;
        within("max-qp", defaults.max_qp, bounds.max_qp, count)?;
        within("max-mr", defaults.max_mr, bounds.max_mr, count)?;
        within("max-mr-bytes", defaults.max_mr_bytes, bounds.max_mr_bytes, show_size)?;
        within("max-cq", defaults.max_cq, bounds.max_cq, count)?;
        within("max-qp-depth", defaults.max_qp_depth, bounds.max_qp_depth, count)
    }
}

/// A limit that need not exist: with a bound, it does.
fn optional<T: Copy + PartialOrd + Display>(
    key: &'static str,
    asked: Option<T>,
    default: Option<T>,
    bound: Option<T>,
    show: impl Fn(T) -> String,
) -> Result<Option<T>, Refusal> {
    match (asked, bound) {
        (Some(asked), Some(bound)) if asked > bound => {
            Err(Refusal::Beyond { key, value: show(asked), allowed: format!("at most {}", show(bound)) })
        }
        _ => Ok(asked.or(default).or(bound)),
    }
}

/// A limit that always exists. Where the administrator gives none, what is built in bounds and serves as default.
fn limit<T: Copy + Ord + Display>(
    key: &'static str,
    asked: Option<T>,
    default: Option<T>,
    bound: Option<T>,
    built_in: T,
    show: impl Fn(T) -> String,
) -> Result<T, Refusal> {
    let bound = bound.unwrap_or(default.unwrap_or(built_in));
    let default = default.unwrap_or(built_in).min(bound);
    Ok(optional(key, asked, Some(default), Some(bound), show)?.unwrap_or(default))
}

fn within<T: Copy + PartialOrd + Default>(
    key: &str,
    default: Option<T>,
    bound: Option<T>,
    show: impl Fn(T) -> String,
) -> Result<(), String> {
    for (table, value) in [("defaults", default), ("bounds", bound)] {
        if value == Some(T::default()) {
            return Err(format!("policy.{table}.{key} must be above 0"));
        }
    }
    match (default, bound) {
        (Some(default), Some(bound)) if default > bound => {
            let (default, bound) = (show(default), show(bound));
            Err(format!("policy.defaults.{key} = {default} is beyond policy.bounds.{key} = {bound}"))
        }
        _ => Ok(()),
    }
}

fn class_name(class: Class) -> &'static str {
    match class {
        Class::Latency => "latency",
        Class::Ops => "ops",
        Class::Bulk => "bulk",
        Class::None => "none",
    }
}

fn names<T: Copy>(values: &[T], name: impl Fn(T) -> &'static str) -> String {
    values.iter().map(|value| name(*value)).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn config(text: &str) -> Config {
        Config::parse(text).unwrap()
    }

    fn limits(request: &Request, text: &str) -> Result<Limits, String> {
        match resolve(request, &config(text)) {
            Ok(Grant::Proxied(_, limits)) => Ok(limits),
            Ok(grant) => panic!("{grant:?}"),
            Err(refusal) => Err(refusal.to_string()),
        }
    }

    #[test]
    fn without_a_word_the_built_in_limits_hold() {
        assert_eq!(limits(&Request::default(), ""), Ok(Limits::default()));
    }

    #[test]
    fn bandwidth() {
        const BOTH: &str = "[policy.defaults]\nbandwidth = \"1Gbit\"\n[policy.bounds]\nbandwidth = \"10Gbit\"";
        const BOUND: &str = "[policy.bounds]\nbandwidth = \"10Gbit\"";
        const G: u64 = 1_000_000_000;
        for (asked, text, expected) in [
            (None, "", Ok(None)),
            (Some(40 * G), "", Ok(Some(40 * G))),
            (None, BOUND, Ok(Some(10 * G))),
            (Some(5 * G), BOUND, Ok(Some(5 * G))),
            (Some(10 * G), BOUND, Ok(Some(10 * G))),
            (None, BOTH, Ok(Some(G))),
            (Some(2 * G), BOTH, Ok(Some(2 * G))),
            (
                Some(40 * G),
                BOTH,
                Err("ringfence.dev/bandwidth=40Gbit is beyond the administrator's bound; allowed is at most 10Gbit"),
            ),
        ] {
            let request = Request { bandwidth: asked, ..Request::default() };
            let found = limits(&request, text).map(|limits| limits.bandwidth);
            assert_eq!(found, expected.map_err(str::to_owned), "{asked:?} {text}");
        }
    }

    #[test]
    fn class() {
        for (asked, text, expected) in [
            (None, "", Ok(Class::None)),
            (Some(Class::Latency), "", Ok(Class::Latency)),
            (None, "[policy.defaults]\nclass = \"ops\"", Ok(Class::Ops)),
            (None, "[policy.bounds]\nclasses = [\"latency\", \"ops\"]", Ok(Class::Ops)),
            (
                Some(Class::Latency),
                "[policy.bounds]\nclasses = [\"ops\", \"bulk\"]",
                Err("ringfence.dev/class=latency is beyond the administrator's bound; allowed is ops, bulk"),
            ),
        ] {
            let request = Request { class: asked, ..Request::default() };
            let found = limits(&request, text).map(|limits| limits.class);
            assert_eq!(found, expected.map_err(str::to_owned), "{asked:?} {text}");
        }
    }

    #[test]
    fn a_tenant_cannot_raise_a_limit_that_the_administrator_left_alone() {
        let request = Request { max_mr_bytes: Some(1 << 40), ..Request::default() };
        assert_eq!(
            limits(&request, ""),
            Err("ringfence.dev/max-mr-bytes=1TiB is beyond the administrator's bound; allowed is at most 16GiB".into())
        );
        assert_eq!(limits(&request, "[policy.bounds]\nmax-mr-bytes = \"1TiB\"").unwrap().max_mr_bytes, 1 << 40);
    }

    #[test]
    fn modes_and_devices() {
        const BOTH: &str = "[[device]]\nname = \"soft0\"\nkind = \"soft\"\n[[device]]\nname = \"mlx5_0\"\nkind = \"ibverbs\"\n\
             nodes = [\"/dev/infiniband/uverbs0\"]\n[policy.bounds]\nmodes = [\"proxied\", \"passthrough\"]";
        for (mode, device, text, expected) in [
            (None, None, "", Ok("soft0")),
            (None, None, BOTH, Ok("soft0")),
            (Some(Mode::Proxied), Some("soft0"), BOTH, Ok("soft0")),
            (Some(Mode::Passthrough), None, BOTH, Ok("mlx5_0")),
            (
                Some(Mode::Passthrough),
                None,
                "",
                Err("ringfence.dev/mode=passthrough is beyond the administrator's bound; allowed is proxied"),
            ),
            (Some(Mode::Exclusive), None, BOTH, Err("ringfence.dev/mode=exclusive is not offered yet; use proxied")),
            (None, Some("mlx9"), BOTH, Err("ringfence.dev/device=mlx9 is not configured; there is soft0, mlx5_0")),
            (
                None,
                Some("mlx5_0"),
                BOTH,
                Err(
                    "device mlx5_0 serves ringfence.dev/mode=passthrough only; mode=proxied needs a device of kind soft: soft0",
                ),
            ),
            (
                Some(Mode::Passthrough),
                Some("soft0"),
                BOTH,
                Err(
                    "device soft0 has no device nodes, so ringfence.dev/mode=passthrough is not possible; there is mlx5_0",
                ),
            ),
        ] {
            let request = Request { mode, device: device.map(str::to_owned), ..Request::default() };
            let config = config(text);
            let found = resolve(&request, &config).map_err(|refusal| refusal.to_string());
            let found = found.map(|(Grant::Proxied(device, _) | Grant::Passthrough(device))| device.name.as_str());
            assert_eq!(found, expected.map_err(str::to_owned), "{mode:?} {device:?}");
        }
        let request = Request { mode: Some(Mode::Passthrough), max_qp: Some(1), ..Request::default() };
        assert_eq!(resolve(&request, &config(BOTH)), Err(Refusal::Unenforceable { key: "max-qp" }));
    }

    fn some<T: Clone + std::fmt::Debug + 'static>(
        values: impl Strategy<Value = T> + 'static,
    ) -> BoxedStrategy<Option<T>> {
        proptest::option::of(values).boxed()
    }

    proptest! {
        #[test]
        fn what_is_granted_never_exceeds_the_bounds(
            asked in (some(1..100u64), some(1..=1000u32), some(1..100u32), some(1..100u64)),
            bound in (some(1..100u64), some(1..=1000u32), some(1..100u32), some(1..100u64)),
        ) {
            let request = Request {
                bandwidth: asked.0, weight: asked.1, max_qp: asked.2, max_mr_bytes: asked.3, ..Request::default()
            };
            let bounds = Bounds {
                bandwidth: bound.0, weight: bound.1, max_qp: bound.2, max_mr_bytes: bound.3, ..Bounds::default()
            };
            let policy = Policy { bounds, ..Policy::default() };
            fn exceeds<T: PartialOrd>(asked: Option<T>, bound: Option<T>) -> bool {
                matches!((asked, bound), (Some(asked), Some(bound)) if asked > bound)
            }
            let beyond = exceeds(asked.0, bound.0) || exceeds(asked.1, bound.1)
                || exceeds(asked.2, bound.2) || exceeds(asked.3, bound.3);
            match policy.limits(&request) {
                Err(_) => prop_assert!(beyond),
                Ok(limits) => {
                    prop_assert!(!beyond);
                    prop_assert_eq!(limits.bandwidth, asked.0.or(bound.0));
                    prop_assert_eq!(limits.weight, asked.1.or(bound.1));
                    prop_assert!(limits.max_qp <= bound.2.unwrap_or(256));
                    prop_assert!(asked.2.is_none_or(|asked| limits.max_qp == asked));
                    prop_assert!(limits.max_mr_bytes <= bound.3.unwrap_or(16 << 30));
                }
            }
        }
    }
}
