//! Every value that holds for a container, and why.

use super::tables::{Bounds, Defaults, Effective, Given, show_count};
use super::{Refusal, class_name, names};
use crate::annotations::{PREFIX, Request};
use crate::units::{show_ops, show_rate, show_size};
use ringfence_launch::addresses::Peers;
use ringfence_launch::{BitRate, Bytes, Class, Limits, OpRate, Weight};
use std::fmt;

/// Where a value comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The annotation with this key.
    Annotation(String),
    /// The engine was told so, by a CDI device or an argument of `ringfence-runtime`.
    Engine,
    /// This table of the configuration, `policy.defaults` or a profile's; or `device`, whose first of the kind serves.
    Default(String),
    /// This table of the configuration, `policy.bounds` or a profile's, in want of a default.
    Bound(String),
    /// Nobody says otherwise.
    BuiltIn,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Annotation(name) => write!(f, "annotation {name}"),
            Self::Engine => f.write_str("the engine"),
            Self::Default(table) | Self::Bound(table) => f.write_str(table),
            Self::BuiltIn => f.write_str("built in"),
        }
    }
}

/// A value that holds for a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    /// As in annotations, without prefix.
    pub key: &'static str,
    /// As in annotations; `none` for no limit and no class.
    pub value: String,
    /// Who said so.
    pub origin: Origin,
    /// What an annotation may ask for at most, and which table says so; `None` for anything, where there is neither bound nor
    /// default.
    pub bound: Option<String>,
}

/// The annotation of `request` for `key`.
pub(super) fn source(request: &Request, key: &str) -> String {
    request.sources.get(key).cloned().unwrap_or_else(|| format!("{PREFIX}{key}"))
}

/// Finds the limits of `request`, and notes in `settings` how.
pub(super) fn limits(
    request: &Request,
    effective: Effective<'_>,
    settings: &mut Vec<Setting>,
) -> Result<Limits, Refusal> {
    let built_in = Limits::default();
    let mut chooser = Chooser { request, effective, settings };
    Ok(Limits {
        bandwidth: chooser.quantity(
            "bandwidth",
            request.bandwidth,
            |d| d.bandwidth,
            |b| b.bandwidth,
            show_rate,
            BitRate::new,
        )?,
        bandwidth_rx: chooser.quantity(
            "bandwidth-rx",
            request.bandwidth_rx,
            |d| d.bandwidth_rx,
            |b| b.bandwidth_rx,
            show_rate,
            BitRate::new,
        )?,
        ops: chooser.quantity("ops", request.ops, |d| d.ops, |b| b.ops, show_ops, OpRate::new)?,
        weight: chooser.quantity("weight", request.weight, |d| d.weight, |b| b.weight, show_count, Weight::new)?,
        class: chooser.class()?,
        max_qp: chooser.limit("max-qp", request.max_qp, |d| d.max_qp, |b| b.max_qp, built_in.max_qp, show_count)?,
        max_mr: chooser.limit("max-mr", request.max_mr, |d| d.max_mr, |b| b.max_mr, built_in.max_mr, show_count)?,
        max_mr_bytes: Bytes(chooser.limit(
            "max-mr-bytes",
            request.max_mr_bytes,
            |d| d.max_mr_bytes,
            |b| b.max_mr_bytes,
            built_in.max_mr_bytes.0,
            show_size,
        )?),
        max_cq: chooser.limit("max-cq", request.max_cq, |d| d.max_cq, |b| b.max_cq, built_in.max_cq, show_count)?,
        max_qp_depth: chooser.limit(
            "max-qp-depth",
            request.max_qp_depth,
            |d| d.max_qp_depth,
            |b| b.max_qp_depth,
            built_in.max_qp_depth,
            show_count,
        )?,
        peers: chooser.peers(),
    })
}

struct Chooser<'a, 'b> {
    request: &'b Request,
    effective: Effective<'a>,
    settings: &'b mut Vec<Setting>,
}

impl<'a> Chooser<'a, '_> {
    /// A limit that need not exist, as what the scheduler takes. Whatever reads annotations and tables refuses those that are none.
    fn quantity<T: Copy + PartialOrd, U>(
        &mut self,
        key: &'static str,
        asked: Option<T>,
        default: impl Fn(&'a Defaults) -> Option<T>,
        bound: impl Fn(&'a Bounds) -> Option<T>,
        show: impl Fn(T) -> String,
        quantity: impl Fn(T) -> Option<U>,
    ) -> Result<Option<U>, Refusal> {
        let Some(value) = self.optional(key, asked, default, bound, &show)? else { return Ok(None) };
        let refusal = || Refusal::NoQuantity { name: source(self.request, key), value: show(value) };
        quantity(value).map(Some).ok_or_else(refusal)
    }

    /// A limit that need not exist: with a bound or a default, it does. A default without a bound is one, too: an annotation
    /// that could go beyond it would undo what the administrator gave to all.
    fn optional<T: Copy + PartialOrd>(
        &mut self,
        key: &'static str,
        asked: Option<T>,
        default: impl Fn(&'a Defaults) -> Option<T>,
        bound: impl Fn(&'a Bounds) -> Option<T>,
        show: impl Fn(T) -> String,
    ) -> Result<Option<T>, Refusal> {
        let (default, bound) = (self.effective.default(default), self.effective.bound(bound));
        let limit = bound.as_ref().or(default.as_ref()).map(|given| (given.value, given.table.as_str()));
        self.refuse_beyond(key, asked, limit, &show)?;
        let (value, origin) = match (asked, &default, &bound) {
            (Some(asked), _, _) => (Some(asked), Origin::Annotation(source(self.request, key))),
            (None, Some(default), _) => (Some(default.value), Origin::Default(default.table.clone())),
            (None, None, Some(bound)) => (Some(bound.value), Origin::Bound(bound.table.clone())),
            (None, None, None) => (None, Origin::BuiltIn),
        };
        let bound = limit.map(|(bound, table)| format!("at most {} ({table})", show(bound)));
        self.note(key, value.map_or_else(|| "none".into(), show), origin, bound);
        Ok(value)
    }

    /// A limit that always exists. Where the administrator gives none, what is built in bounds and serves as default.
    fn limit<T: Copy + PartialOrd>(
        &mut self,
        key: &'static str,
        asked: Option<T>,
        default: impl Fn(&'a Defaults) -> Option<T>,
        bound: impl Fn(&'a Bounds) -> Option<T>,
        built_in: T,
        show: impl Fn(T) -> String,
    ) -> Result<T, Refusal> {
        let (default, bound) = (self.effective.default(default), self.effective.bound(bound));
        let (limit, table) = match (&bound, &default) {
            (Some(given), _) | (None, Some(given)) => (given.value, given.table.as_str()),
            (None, None) => (built_in, "built in"),
        };
        self.refuse_beyond(key, asked, Some((limit, table)), &show)?;
        let (value, origin) = match (asked, &default) {
            (Some(asked), _) => (asked, Origin::Annotation(source(self.request, key))),
            (None, Some(default)) => (default.value, Origin::Default(default.table.clone())),
            (None, None) if built_in > limit => (limit, Origin::Bound(table.to_owned())),
            (None, None) => (built_in, Origin::BuiltIn),
        };
        self.note(key, show(value), origin, Some(format!("at most {} ({table})", show(limit))));
        Ok(value)
    }

    /// The administrator's alone: there is no annotation.
    fn peers(&mut self) -> Option<Peers> {
        let Given { value, table } = self.effective.bound(|bounds| bounds.peers.as_ref())?;
        self.note("peers", value.to_string(), Origin::Bound(table), None);
        Some(value.clone())
    }

    /// With a default and no bound, only that class: none is less than another in all respects.
    fn class(&mut self) -> Result<Class, Refusal> {
        let (default, bound) =
            (self.effective.default(|defaults| defaults.class), self.effective.bound(|bounds| bounds.classes.as_ref()));
        let allowed = match (&bound, &default) {
            (Some(Given { value, table }), _) => Some((value.as_slice(), table.as_str())),
            (None, Some(Given { value, table })) => Some((std::slice::from_ref(value), table.as_str())),
            (None, None) => None,
        };
        if let (Some(asked), Some((allowed, _))) = (self.request.class, allowed)
            && !allowed.contains(&asked)
        {
            let allowed = names(allowed, class_name);
            let (name, value) = (source(self.request, "class"), class_name(asked).into());
            return Err(match bound {
                Some(_) => Refusal::Beyond { name, value, allowed },
                None => Refusal::NotDefault { name, value, default: allowed },
            });
        }
        let (class, origin) = match (self.request.class, &default, &bound) {
            (Some(asked), _, _) => (asked, Origin::Annotation(source(self.request, "class"))),
            (None, Some(default), _) => (default.value, Origin::Default(default.table.clone())),
            // Saying nothing must not escape the bound: the least privileged of the allowed classes.
            (None, None, Some(Given { value, table })) => {
                let by_privilege = [Class::Bulk, Class::Ops, Class::Latency];
                let class = by_privilege.into_iter().find(|class| value.contains(class)).unwrap_or_default();
                (class, Origin::Bound(table.clone()))
            }
            (None, None, None) => (Class::default(), Origin::BuiltIn),
        };
        let allowed = allowed.map(|(allowed, table)| format!("{} ({table})", names(allowed, class_name)));
        self.note("class", class_name(class).into(), origin, allowed);
        Ok(class)
    }

    fn refuse_beyond<T: Copy + PartialOrd>(
        &self,
        key: &str,
        asked: Option<T>,
        bound: Option<(T, &str)>,
        show: &impl Fn(T) -> String,
    ) -> Result<(), Refusal> {
        match (asked, bound) {
            (Some(asked), Some((bound, _))) if asked > bound => Err(Refusal::Beyond {
                name: source(self.request, key),
                value: show(asked),
                allowed: format!("at most {}", show(bound)),
            }),
            _ => Ok(()),
        }
    }

    fn note(&mut self, key: &'static str, value: String, origin: Origin, bound: Option<String>) {
        self.settings.push(Setting { key, value, origin, bound });
    }
}
