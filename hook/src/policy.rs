//! What one container may do: its request within the administrator's bounds.

mod settings;
mod tables;

#[cfg(test)]
mod tests;

use crate::annotations::{Choice, DEFAULT_POLICY, Mode, PREFIX, Request, shorten};
use crate::config::{Config, Device};
use crate::identity::Namespace;
use crate::state::Rdma;
use ringfence_launch::{Class, Limits};
use settings::source;
use tables::Effective;

pub use settings::{Origin, Setting};
pub use tables::{Bounds, Defaults, Policy, Profile};

/// Why a request is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)]
pub enum Refusal {
    #[error("annotation {name}={policy} names no policy of the administrator's; there is {known}")]
    NoPolicy { name: String, policy: String, known: String },
    #[error(
        "the engine gives this container the policy {policy} (--policy), which is not configured; there is {known}"
    )]
    NoPolicyOfEngine { policy: String, known: String },
    #[error("policy {policy} is denied to {whom}; it is for namespaces {allowed} only")]
    Namespace { policy: String, whom: String, allowed: String },
    #[error("{name}={value} is beyond the administrator's bound; allowed is {allowed}")]
    Beyond { name: String, value: String, allowed: String },
    #[error(
        "{name}={value} is not the administrator's default; allowed is {default}, as long as bounds.classes of his \
         configuration allow no others"
    )]
    NotDefault { name: String, value: String, default: String },
    #[error("{name}={device} is not configured; there is {known}")]
    NoDevice { name: String, device: String, known: String },
    #[error("device {device} has no device nodes, so {PREFIX}mode=passthrough is not possible; there is {known}")]
    NoNodes { device: String, known: String },
    #[error(
        "device {device} is no card (kind = \"ibverbs\"), so {PREFIX}mode=exclusive is not possible; there is {known}"
    )]
    NoCard { device: String, known: String },
    #[error("{name}={value} would do nothing: device {device} has no modelled link that containers share; {instead}")]
    NoEffect { name: String, value: String, device: String, instead: &'static str },
    #[error("{name}={value} is nothing that could be kept")]
    NoQuantity { name: String, value: String },
    #[error("{name} cannot be enforced with {PREFIX}mode={mode}; remove it or use mode=proxied")]
    Unenforceable { name: String, mode: &'static str },
}

/// What a container gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Grant<'a> {
    /// A proxy, with these limits.
    Proxied(&'a Device, Limits),
    /// The device's nodes.
    Passthrough(&'a Device),
    /// The card, for itself.
    Exclusive(&'a Device),
}

/// The decision about a request, and its reasons.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolution<'a> {
    /// What the container gets.
    pub grant: Grant<'a>,
    /// What the kernel's rdma controller is to hold a container to that has the device's nodes or the card for itself, if it is to.
    pub objects: Option<Rdma>,
    /// The policy's name.
    pub policy: String,
    /// Every value that holds, in the order of [`KEYS`](crate::annotations::KEYS).
    pub settings: Vec<Setting>,
}

/// Decides about `request` of a container of `namespace`.
pub fn resolve<'a>(request: &Request, namespace: &Namespace, config: &'a Config) -> Result<Resolution<'a>, Refusal> {
    let (effective, policy) = policy(request, namespace, config)?;
    let mut settings = vec![policy];
    let (mode, setting) = mode(request, effective)?;
    settings.push(setting);
    let mut objects = None;
    let grant = match mode {
        Mode::Proxied => {
            let device = device(request, config, mode)?;
            settings.push(device.1);
            let limits = settings::limits(request, effective, &mut settings)?;
            refuse_idle_words(request, device.0, &limits)?;
            Grant::Proxied(device.0, limits)
        }
        Mode::Passthrough | Mode::Exclusive => {
            if let Some(key) = request.limits_asked().next() {
                return Err(Refusal::Unenforceable { name: source(request, key), mode: mode.name() });
            }
            let device = device(request, config, mode)?;
            settings.push(device.1);
            if device.0.rdma_cgroup {
                objects = Some(rdma(&settings::limits(request, effective, &mut Vec::new())?));
            }
            if mode == Mode::Exclusive { Grant::Exclusive(device.0) } else { Grant::Passthrough(device.0) }
        }
    };
    Ok(Resolution { grant, objects, policy: settings[0].value.clone(), settings })
}

/// What the rdma controller can keep of `limits`: it counts contexts, and all other objects as one number. No program needs more
/// contexts, nor more protection domains, than it has queue pairs.
fn rdma(limits: &Limits) -> Rdma {
    let objects = [limits.max_qp, limits.max_qp, limits.max_cq, limits.max_mr];
    // The kernel's numbers are an `int`'s.
    let sum = objects.iter().fold(0_u32, |sum, count| sum.saturating_add(*count)).min(i32::MAX as u32);
    Rdma { hca_handles: Some(limits.max_qp.min(i32::MAX as u32)), hca_objects: Some(sum) }
}

/// Refuses what the container asks for and what would change nothing. The administrator's defaults are for all devices.
fn refuse_idle_words(request: &Request, device: &Device, limits: &Limits) -> Result<(), Refusal> {
    if device.link.is_some() {
        return Ok(());
    }
    let refusal = |key, value, instead| {
        Err(Refusal::NoEffect { name: source(request, key), value, device: device.name.clone(), instead })
    };
    if let Some(weight) = request.weight {
        return refusal("weight", weight.to_string(), "remove it, or use a device with a link");
    }
    let capped = limits.bandwidth.or(limits.bandwidth_rx).is_some() || limits.ops.is_some();
    match request.class {
        Some(class) if !capped => {
            let instead = "remove it, or set bandwidth, bandwidth-rx or ops, under which it orders what waits";
            refusal("class", class_name(class).into(), instead)
        }
        _ => Ok(()),
    }
}

/// The policy that `request` names, if the container may.
fn policy<'a>(
    request: &Request,
    namespace: &Namespace,
    config: &'a Config,
) -> Result<(Effective<'a>, Setting), Refusal> {
    let name = request.policy.as_ref().map_or(DEFAULT_POLICY, Choice::name);
    let Some(effective) = config.policy.effective(name) else {
        let (policy, known) = (name.to_owned(), config.policy.names().collect::<Vec<_>>().join(", "));
        return Err(match request.policy {
            Some(Choice::Engine(_)) => Refusal::NoPolicyOfEngine { policy, known },
            _ => Refusal::NoPolicy { name: source(request, "policy"), policy, known },
        });
    };
    let origin = match request.policy {
        None => Origin::BuiltIn,
        // The engine's configuration is the administrator's, too: he gave the container this profile, whatever it asks for.
        Some(Choice::Engine(_)) => Origin::Engine,
        Some(Choice::Annotation(_)) => Origin::Annotation(source(request, "policy")),
    };
    let restricted = effective.profile.and_then(|(_, profile)| Some((profile, profile.namespaces.as_ref()?)));
    let bound = restricted.map(|(_, patterns)| format!("by annotation, from namespaces {}", patterns.join(", ")));
    if let (Some((profile, patterns)), Some(Choice::Annotation(_))) = (restricted, &request.policy) {
        let whom = match namespace {
            Namespace::Known(namespace) if profile.is_for(namespace) => None,
            Namespace::Known(namespace) => Some(format!("namespace {namespace}")),
            Namespace::None => Some("a container without a Kubernetes namespace".into()),
            Namespace::Claimed(namespace) => Some(format!(
                "a container that claims to be of namespace {} but was not made through CRI",
                shorten(namespace)
            )),
        };
        if let Some(whom) = whom {
            return Err(Refusal::Namespace { policy: name.to_owned(), whom, allowed: patterns.join(", ") });
        }
    }
    Ok((effective, Setting { key: "policy", value: name.to_owned(), origin, bound }))
}

fn mode(request: &Request, effective: Effective<'_>) -> Result<(Mode, Setting), Refusal> {
    let bound = effective.bound(|bounds| bounds.modes.as_ref());
    let allowed = bound.as_ref().map_or(&[Mode::Proxied][..], |bound| bound.value);
    let table = bound.as_ref().map_or("built in", |bound| bound.table.as_str());
    let (mode, origin) = match request.mode {
        Some(mode) if !allowed.contains(&mode) => {
            return Err(Refusal::Beyond {
                name: source(request, "mode"),
                value: mode.name().into(),
                allowed: names(allowed, Mode::name),
            });
        }
        Some(mode) => (mode, Origin::Annotation(source(request, "mode"))),
        None => {
            let origin = bound.as_ref().map_or(Origin::BuiltIn, |bound| Origin::Bound(bound.table.clone()));
            (allowed.first().copied().unwrap_or(Mode::Proxied), origin)
        }
    };
    let bound = Some(format!("{} ({table})", names(allowed, Mode::name)));
    Ok((mode, Setting { key: "mode", value: mode.name().into(), origin, bound }))
}

/// The device that `request` names, or the first that `mode` can give.
fn device<'a>(request: &Request, config: &'a Config, mode: Mode) -> Result<(&'a Device, Setting), Refusal> {
    let known = |mode: Option<Mode>| {
        let serving = config.devices.iter().filter(|device| mode.is_none_or(|mode| device.serves(mode)));
        let names: Vec<_> = serving.map(|device| device.name.as_str()).collect();
        if names.is_empty() { "none".to_owned() } else { names.join(", ") }
    };
    // A proxy there can be for each.
    let missing = |name: &str| {
        let (device, known) = (name.to_owned(), known(Some(mode)));
        if mode == Mode::Exclusive { Refusal::NoCard { device, known } } else { Refusal::NoNodes { device, known } }
    };
    let (device, origin) = match &request.device {
        None => {
            let first = config.devices.iter().find(|device| device.serves(mode));
            (first.ok_or_else(|| missing(&known(None)))?, Origin::Default("device".into()))
        }
        Some(asked) => match config.devices.iter().find(|device| device.name == *asked) {
            None => {
                let (name, device) = (source(request, "device"), asked.clone());
                return Err(Refusal::NoDevice { name, device, known: known(None) });
            }
            Some(device) if !device.serves(mode) => return Err(missing(asked)),
            Some(device) => (device, Origin::Annotation(source(request, "device"))),
        },
    };
    let bound = Some(format!("{} (device)", known(Some(mode))));
    Ok((device, Setting { key: "device", value: device.name.clone(), origin, bound }))
}

impl Request {
    fn limits_asked(&self) -> impl Iterator<Item = &'static str> {
        [
            ("bandwidth", self.bandwidth.is_some()),
            ("bandwidth-rx", self.bandwidth_rx.is_some()),
            ("ops", self.ops.is_some()),
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
