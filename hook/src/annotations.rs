//! What a container asks for, by its annotations under [`PREFIX`] and, in pods, `<key>.ringfence.dev/`.

mod request;
mod scope;

#[cfg(test)]
mod tests;

use crate::identity::Identity;
use crate::state::Annotations;
use scope::{Entry, Scope};

pub use request::{Choice, Mode, Request, is_device_name};
pub(crate) use request::{DEVICE_NAME, POLICY_NAME, WEIGHTS};
pub use scope::is_ours;

/// Every annotation under it is ours, and an unknown one is an error: a misspelt limit must not be no limit.
pub const PREFIX: &str = "ringfence.dev/";

/// The name of the policy that is no profile.
pub const DEFAULT_POLICY: &str = "default";

/// The keys, without [`PREFIX`].
pub const KEYS: [&str; 14] = [
    "enable",
    "policy",
    "mode",
    "device",
    "bandwidth",
    "bandwidth-rx",
    "ops",
    "weight",
    "class",
    "max-qp",
    "max-mr",
    "max-mr-bytes",
    "max-cq",
    "max-qp-depth",
];

/// Why the annotations cannot be understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)]
pub enum Error {
    #[error("annotation {name} is unknown; allowed are {}", KEYS.join(", "))]
    Unknown { name: String },
    #[error("annotation {name} names no scope; allowed are {key}.{PREFIX}pod and {key}.{PREFIX}container.<name>")]
    UnknownScope { name: String, key: &'static str },
    #[error("annotation {name}={value} is malformed; allowed is {expected}")]
    Malformed { name: String, value: String, expected: &'static str },
    #[error(
        "annotation {name} is given but {PREFIX}enable is not; add {PREFIX}enable=true, or =false to start without RDMA"
    )]
    NotEnabled { name: String },
    #[error(
        "annotation {name} is for a container by its name, which this engine does not tell (containerd's CRI and CRI-O do); use {PREFIX}{key}"
    )]
    NoName { name: String, key: &'static str },
    #[error(
        "annotation {name}={asked} contradicts the policy {chosen} that the engine gives this container; remove the annotation"
    )]
    OtherPolicy { name: String, asked: String, chosen: String },
}

/// What the container with all these annotations asks for; `None` if it is none of ours.
///
/// `policy` is the administrator's profile, or [`DEFAULT_POLICY`], that the engine was told to give it, by a CDI device or an
/// argument of `ringfence-runtime`, in which case it needs no annotation.
pub fn wanted(annotations: &Annotations, policy: Option<&str>) -> Result<Option<Request>, Error> {
    let identity = Identity::of(annotations);
    if identity.is_sandbox {
        return Ok(None);
    }
    let ours = annotations.iter().filter_map(|(name, value)| Entry::parse(name, value));
    // Whoever switches it off need not tidy up the rest first.
    let entries: Vec<_> = ours.collect();
    let known = entries.iter().filter_map(|entry| entry.as_ref().ok().copied());
    let mut speaking = Vec::new();
    for entry in known.clone().filter(|entry| entry.key == "enable") {
        if speaks(&entry, &identity)? {
            speaking.push(entry);
        }
    }
    let enable = speaking.into_iter().max_by_key(|entry| entry.scope);
    match enable.map(|entry| entry.value) {
        Some("false" | "0" | "no") => return Ok(None),
        Some("true" | "1" | "yes") | None => {}
        Some(value) => {
            let name = enable.map_or("", |entry| entry.name);
            return Err(malformed(name, value, "true, 1, yes, false, 0 or no"));
        }
    }

    let mut entries = entries.into_iter().collect::<Result<Vec<_>, _>>()?;
    if enable.is_none() && policy.is_none() {
        // Another container of the pod may be the one that is enabled.
        let of_another = entries.iter().any(|entry| entry.key == "enable");
        return match entries.first().filter(|_| !of_another) {
            Some(entry) => Err(Error::NotEnabled { name: show(entry.name) }),
            None => Ok(None),
        };
    }
    entries.sort_by_key(|entry| entry.scope);
    let mut request = Request::default();
    for entry in entries {
        if speaks(&entry, &identity)? {
            request.set(&entry)?;
        }
    }
    if let Some(chosen) = policy {
        request.choose(chosen)?;
    }
    Ok(Some(request))
}

/// Whether `entry` speaks to the container `identity`.
fn speaks(entry: &Entry<'_>, identity: &Identity<'_>) -> Result<bool, Error> {
    match (entry.scope, identity.container) {
        (Scope::Bare | Scope::Pod, _) => Ok(true),
        (Scope::Container(name), Some(own)) => Ok(name == own),
        (Scope::Container(_), None) => Err(Error::NoName { name: show(entry.name), key: entry.key }),
    }
}

impl Request {
    /// Takes the engine's choice of policy, which an annotation may only repeat.
    fn choose(&mut self, chosen: &str) -> Result<(), Error> {
        if let Some(asked) = self.policy.as_ref().filter(|asked| asked.name() != chosen) {
            let name = self.sources.get("policy").map(|name| show(name)).unwrap_or_default();
            return Err(Error::OtherPolicy { name, asked: asked.name().to_owned(), chosen: chosen.to_owned() });
        }
        self.sources.remove("policy");
        self.policy = Some(Choice::Engine(chosen.to_owned()));
        Ok(())
    }
}

fn malformed(name: &str, value: &str, expected: &'static str) -> Error {
    Error::Malformed { name: show(name), value: shorten(value), expected }
}

/// An annotation's key for a message: plainly, if it is one that a human would write.
fn show(name: &str) -> String {
    if name.len() <= 128 && name.bytes().all(|b| b.is_ascii_graphic()) { name.to_owned() } else { shorten(name) }
}

/// Enough of a text to recognise it: annotations may be as long as 256 KiB.
pub(crate) fn shorten(text: &str) -> String {
    const LONGEST: usize = 64;
    let quoted = |text: &str| format!("{text:?}");
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}…", quoted(&text[..end])),
        None => quoted(text),
    }
}
