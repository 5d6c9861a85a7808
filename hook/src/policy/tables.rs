//! The administrator's tables, `[policy]` and its profiles.

use super::{class_name, names};
use crate::annotations::{DEFAULT_POLICY, Mode, POLICY_NAME, WEIGHTS, is_device_name};
use crate::config::{
    optional_ops, optional_rate, optional_size, show_optional_ops, show_optional_rate, show_optional_size,
};
use crate::units::{show_ops, show_rate, show_size};
use ringfence_launch::Class;
use ringfence_launch::addresses::Peers;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;

/// `[policy]`
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Policy {
    /// What a container gets that does not ask.
    pub defaults: Defaults,
    /// What a container may ask for.
    pub bounds: Bounds,
    /// Others, by the name that the engine or an annotation gives.
    pub profiles: BTreeMap<String, Profile>,
}

/// `[policy.profiles.<name>]`. What its tables leave out is as in `[policy]`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Profile {
    /// Kubernetes namespaces whose containers may ask for it by annotation, each exact or with one `*` at its end; `None` for
    /// all containers.
    pub namespaces: Option<Vec<String>>,
    /// What a container gets that does not ask.
    pub defaults: Defaults,
    /// What a container may ask for.
    pub bounds: Bounds,
}

/// `[policy.defaults]`
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
#[allow(missing_docs)]
pub struct Defaults {
    #[serde(deserialize_with = "optional_rate", serialize_with = "show_optional_rate")]
    pub bandwidth: Option<u64>,
    #[serde(deserialize_with = "optional_rate", serialize_with = "show_optional_rate")]
    pub bandwidth_rx: Option<u64>,
    #[serde(deserialize_with = "optional_ops", serialize_with = "show_optional_ops")]
    pub ops: Option<u64>,
    pub weight: Option<u32>,
    pub class: Option<Class>,
    pub max_qp: Option<u32>,
    pub max_mr: Option<u32>,
    #[serde(deserialize_with = "optional_size", serialize_with = "show_optional_size")]
    pub max_mr_bytes: Option<u64>,
    pub max_cq: Option<u32>,
    pub max_qp_depth: Option<u32>,
}

/// `[policy.bounds]`
///
/// Annotations are written by tenants and may only narrow: without a bound, the default is one, and of classes the default is
/// the only one allowed. With neither, rates, `weight` and `class` are free, and what is built in bounds the `max-*`
/// limits.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
#[allow(missing_docs)]
pub struct Bounds {
    /// The first is what a container gets that does not ask; `None` for proxied.
    pub modes: Option<Vec<Mode>>,
    #[serde(deserialize_with = "optional_rate", serialize_with = "show_optional_rate")]
    pub bandwidth: Option<u64>,
    #[serde(deserialize_with = "optional_rate", serialize_with = "show_optional_rate")]
    pub bandwidth_rx: Option<u64>,
    #[serde(deserialize_with = "optional_ops", serialize_with = "show_optional_ops")]
    pub ops: Option<u64>,
    pub weight: Option<u32>,
    pub classes: Option<Vec<Class>>,
    pub max_qp: Option<u32>,
    pub max_mr: Option<u32>,
    #[serde(deserialize_with = "optional_size", serialize_with = "show_optional_size")]
    pub max_mr_bytes: Option<u64>,
    pub max_cq: Option<u32>,
    pub max_qp_depth: Option<u32>,
    /// Whom containers may be connected to; `None` for everybody.
    pub peers: Option<Peers>,
}

/// A value and the table that gives it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Given<T> {
    pub value: T,
    pub table: String,
}

/// The base policy, or a profile with what it leaves out taken from there.
#[derive(Clone, Copy)]
pub(super) struct Effective<'a> {
    pub base: &'a Policy,
    pub profile: Option<(&'a str, &'a Profile)>,
}

impl<'a> Effective<'a> {
    /// What `get` finds among the defaults.
    pub fn default<T>(&self, get: impl Fn(&'a Defaults) -> Option<T>) -> Option<Given<T>> {
        self.find("defaults", |profile| get(&profile.defaults), || get(&self.base.defaults))
    }

    /// What `get` finds among the bounds.
    pub fn bound<T>(&self, get: impl Fn(&'a Bounds) -> Option<T>) -> Option<Given<T>> {
        self.find("bounds", |profile| get(&profile.bounds), || get(&self.base.bounds))
    }

    fn find<T>(
        &self,
        table: &str,
        in_profile: impl Fn(&'a Profile) -> Option<T>,
        in_base: impl Fn() -> Option<T>,
    ) -> Option<Given<T>> {
        let own = self.profile.and_then(|(name, profile)| {
            Some(Given { value: in_profile(profile)?, table: format!("policy.profiles.{name}.{table}") })
        });
        own.or_else(|| Some(Given { value: in_base()?, table: format!("policy.{table}") }))
    }

    /// Whether the administrator contradicts himself.
    fn check(&self) -> Result<(), String> {
        let modes = self.bound(|bounds| bounds.modes.as_ref());
        if let Some(Given { table, .. }) = modes.filter(|modes| modes.value.is_empty()) {
            return Err(format!("{table}.modes must name at least one mode"));
        }
        for weight in [self.default(|defaults| defaults.weight), self.bound(|bounds| bounds.weight)] {
            if let Some(Given { value, table }) = weight.filter(|weight| !WEIGHTS.contains(&weight.value)) {
                return Err(format!("{table}.weight = {value} must be from 1 to 1000"));
            }
        }
        if let Some(Given { value, table }) = self.bound(|bounds| bounds.classes.as_ref()) {
            if value.is_empty() || value.contains(&Class::None) {
                return Err(format!("{table}.classes must name some of latency, ops, bulk"));
            }
            let default = self.default(|defaults| defaults.class);
            if let Some(class) = default.filter(|class| !value.contains(&class.value)) {
                let (name, allowed) = (class_name(class.value), names(value, class_name));
                return Err(format!("{}.class = {name} is not in {table}.classes = {allowed}", class.table));
            }
        }
        self.within("bandwidth", |defaults| defaults.bandwidth, |bounds| bounds.bandwidth, show_rate)?;
        self.within("bandwidth-rx", |defaults| defaults.bandwidth_rx, |bounds| bounds.bandwidth_rx, show_rate)?;
        self.within("ops", |defaults| defaults.ops, |bounds| bounds.ops, show_ops)?;
        self.within("weight", |defaults| defaults.weight, |bounds| bounds.weight, show_count)?;
        self.within("max-qp", |defaults| defaults.max_qp, |bounds| bounds.max_qp, show_count)?;
        self.within("max-mr", |defaults| defaults.max_mr, |bounds| bounds.max_mr, show_count)?;
        self.within("max-mr-bytes", |defaults| defaults.max_mr_bytes, |bounds| bounds.max_mr_bytes, show_size)?;
        self.within("max-cq", |defaults| defaults.max_cq, |bounds| bounds.max_cq, show_count)?;
        self.within("max-qp-depth", |defaults| defaults.max_qp_depth, |bounds| bounds.max_qp_depth, show_count)
    }

    fn within<T: Copy + PartialOrd + Default>(
        &self,
        key: &str,
        default: impl Fn(&'a Defaults) -> Option<T>,
        bound: impl Fn(&'a Bounds) -> Option<T>,
        show: impl Fn(T) -> String,
    ) -> Result<(), String> {
        let (default, bound) = (self.default(default), self.bound(bound));
        for Given { value, table } in [&default, &bound].into_iter().flatten() {
            if *value == T::default() {
                return Err(format!("{table}.{key} must be above 0"));
            }
        }
        match (default, bound) {
            (Some(default), Some(bound)) if default.value > bound.value => Err(format!(
                "{}.{key} = {} is beyond {}.{key} = {}",
                default.table,
                show(default.value),
                bound.table,
                show(bound.value)
            )),
            _ => Ok(()),
        }
    }
}

impl Policy {
    /// The policy called `name`; `None` if there is none.
    pub(super) fn effective(&self, name: &str) -> Option<Effective<'_>> {
        let profile = match name {
            DEFAULT_POLICY => None,
            _ => Some(self.profiles.get_key_value(name).map(|(name, profile)| (name.as_str(), profile))?),
        };
        Some(Effective { base: self, profile })
    }

    /// The names of all policies.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        std::iter::once(DEFAULT_POLICY).chain(self.profiles.keys().map(String::as_str))
    }

    /// The tables that give containers a weight which they do not ask for.
    pub fn weights_by_default(&self) -> impl Iterator<Item = String> {
        let tables = self.names().filter_map(|name| {
            let effective = self.effective(name)?;
            effective.default(|defaults| defaults.weight).map(|weight| weight.table)
        });
        tables.collect::<BTreeSet<_>>().into_iter()
    }

    /// Whether some policy allows `mode`.
    pub fn allows(&self, mode: Mode) -> bool {
        let allows = |modes: Option<&Vec<Mode>>| modes.map_or(mode == Mode::Proxied, |modes| modes.contains(&mode));
        let base = self.bounds.modes.as_ref();
        allows(base) || self.profiles.values().any(|profile| allows(profile.bounds.modes.as_ref().or(base)))
    }

    /// Whether the administrator contradicts himself.
    pub(crate) fn check(&self) -> Result<(), String> {
        Effective { base: self, profile: None }.check()?;
        for (name, profile) in &self.profiles {
            if !is_device_name(name) {
                return Err(format!("policy.profiles: {name:?} must be {POLICY_NAME}"));
            }
            if name == DEFAULT_POLICY {
                return Err(format!(
                    "policy.profiles.{DEFAULT_POLICY}: this is the name of what [policy.defaults] and [policy.bounds] say; \
                     write it there"
                ));
            }
            profile.check_namespaces().map_err(|message| format!("policy.profiles.{name}.namespaces{message}"))?;
            Effective { base: self, profile: Some((name, profile)) }.check()?;
        }
        Ok(())
    }
}

impl Profile {
    /// Whether containers of `namespace` may ask for it.
    pub(super) fn is_for(&self, namespace: &str) -> bool {
        self.namespaces.as_ref().is_none_or(|patterns| {
            patterns.iter().any(|pattern| match pattern.strip_suffix('*') {
                Some(start) => namespace.starts_with(start),
                None => namespace == pattern,
            })
        })
    }

    fn check_namespaces(&self) -> Result<(), String> {
        let Some(patterns) = &self.namespaces else { return Ok(()) };
        if patterns.is_empty() {
            return Err(" = [] denies the profile to all; name some, or remove the key to allow it to all".into());
        }
        let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        let wrong = patterns.iter().find(|pattern| {
            let start = pattern.strip_suffix('*').unwrap_or(pattern);
            pattern.is_empty() || start.len() > 63 || !start.bytes().all(plain)
        });
        match wrong {
            Some(pattern) => Err(format!(": {pattern:?} must be a namespace's name, or the start of one and *")),
            None => Ok(()),
        }
    }
}

pub(super) fn show_count(count: impl Display) -> String {
    count.to_string()
}
