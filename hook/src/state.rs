//! What the runtime says about the container: the state on standard input and the bundle's `config.json`.

mod bundle;

use serde::Deserialize;
use std::collections::BTreeMap;
use std::io::{self, Read};
use std::path::PathBuf;

pub use bundle::{Bundle, Cpu, DeviceRule, Rdma};

/// The largest state or `config.json` that is read; runtimes write a few KiB.
pub const MAX_BYTES: u64 = 4 << 20;
/// The longest id that still makes a file name, with room for our prefixes.
const MAX_ID: usize = 200;

/// A container's annotations.
pub type Annotations = BTreeMap<String, String>;

/// Why the state or the bundle cannot be used.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum Error {
    #[error("the container state on standard input cannot be read: {0}")]
    Unreadable(io::Error),
    #[error("the container state on standard input is empty; the OCI runtime must write it there")]
    Empty,
    #[error("the container state on standard input exceeds {MAX_BYTES} bytes")]
    TooLong,
    #[error("the container state on standard input is not valid: {0}")]
    Malformed(serde_json::Error),
    #[error(
        "the container id {0:?} is not usable: allowed are 1 to {MAX_ID} of A-Z a-z 0-9 _ . + - and no leading dot"
    )]
    Id(String),
    #[error("the container state has no pid of a container's init, but {}", .0.map_or("none".into(), |pid| pid.to_string()))]
    Pid(Option<i64>),
    #[error("{path}: {error}; the bundle named by the container state must hold a config.json")]
    Bundle { path: PathBuf, error: io::Error },
    #[error("{path} exceeds {MAX_BYTES} bytes")]
    BundleTooLong { path: PathBuf },
    #[error("{path} is not a valid OCI configuration: {error}")]
    BundleMalformed { path: PathBuf, error: serde_json::Error },
    #[error("{path} is of another container: its ringfence.dev annotations differ from those of the container state")]
    OtherBundle { path: PathBuf },
    #[error("{0} names no root file system")]
    NoRoot(PathBuf),
}

/// The container as the runtime describes it to hooks.
#[derive(Debug, Deserialize)]
pub struct State {
    id: String,
    #[serde(default)]
    pid: Option<i64>,
    /// Where `config.json` is; not always true, see [`Bundle::load`].
    #[serde(default)]
    pub bundle: PathBuf,
    #[serde(default)]
    annotations: Option<Annotations>,
}

impl State {
    /// Reads all of `input`, also when it is of no use: a runtime may treat a broken pipe as failure of the hook.
    pub fn read(input: impl Read) -> Result<Self, Error> {
        let mut bytes = Vec::with_capacity(4096);
        input.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(Error::Unreadable)?;
        Self::parse(&bytes)
    }

    /// Parses `bytes`.
    pub fn parse(bytes: &[u8]) -> Result<Self, Error> {
        if bytes.len() as u64 > MAX_BYTES {
            return Err(Error::TooLong);
        }
        if bytes.iter().all(u8::is_ascii_whitespace) {
            return Err(Error::Empty);
        }
        serde_json::from_slice(bytes).map_err(Error::Malformed)
    }

    /// The container's id, unique within the runtime's root directory. File names are made of it, so not all that runtimes
    /// take (runc `,`, crun all but `/`) can be one of ours.
    pub fn id(&self) -> Result<&str, Error> {
        let plain = |b: u8| b.is_ascii_alphanumeric() || b"_.+-".contains(&b);
        let usable = (1..=MAX_ID).contains(&self.id.len()) && !self.id.starts_with('.') && self.id.bytes().all(plain);
        if usable { Ok(&self.id) } else { Err(Error::Id(self.id.chars().take(MAX_ID).collect())) }
    }

    /// The annotations of the state; runtimes copy them from `config.json`.
    pub fn annotations(&self) -> impl Iterator<Item = (&str, &str)> {
        self.annotations.iter().flatten().map(|(key, value)| (key.as_str(), value.as_str()))
    }

    /// The container's init. 0 and 1 are what container namespaces show, or nothing at all.
    pub fn pid(&self) -> Result<i32, Error> {
        self.pid.and_then(|pid| i32::try_from(pid).ok()).filter(|pid| *pid > 1).ok_or(Error::Pid(self.pid))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::path::Path;

    const FULL: &str = r#"{"ociVersion":"1.0","id":"c1","status":"creating","pid":4242,"bundle":"\/b",
        "annotations":{"ringfence.dev/enable":"true","x":"\u00e4"},"root":"rootfs"}"#;

    #[test]
    fn a_whole_state_is_read() {
        let state = State::parse(FULL.as_bytes()).unwrap();
        assert_eq!((state.id().unwrap(), state.pid().unwrap(), state.bundle.as_path()), ("c1", 4242, Path::new("/b")));
        assert_eq!(state.annotations().collect::<Vec<_>>(), [("ringfence.dev/enable", "true"), ("x", "ä")]);
    }

    #[test]
    fn a_truncated_state_is_refused_wherever_it_ends() {
        for end in 0..FULL.len() {
            assert!(State::parse(&FULL.as_bytes()[..end]).is_err(), "{end}");
        }
    }

    #[test]
    fn pids() {
        for (text, expected) in [
            (r#"{"id":"a"}"#, None),
            (r#"{"id":"a","pid":null}"#, None),
            (r#"{"id":"a","pid":0}"#, None),
            (r#"{"id":"a","pid":1}"#, None),
            (r#"{"id":"a","pid":-5}"#, None),
            (r#"{"id":"a","pid":99999999999}"#, None),
            (r#"{"id":"a","pid":2}"#, Some(2)),
        ] {
            assert_eq!(State::parse(text.as_bytes()).unwrap().pid().ok(), expected, "{text}");
        }
    }

    #[test]
    fn ids() {
        for (id, usable) in [
            ("c1", true),
            ("0a9f-B_c.d+e", true),
            ("", false),
            (".", false),
            ("..", false),
            (".hidden", false),
            ("a/b", false),
            ("../a", false),
            ("a b", false),
            ("a\\u0000", false),
            ("ä", false),
        ] {
            let state = State::parse(format!(r#"{{"id":"{id}"}}"#).as_bytes()).unwrap();
            assert_eq!(state.id().is_ok(), usable, "{id:?}");
        }
        let long = State::parse(format!(r#"{{"id":"{}"}}"#, "a".repeat(MAX_ID + 1)).as_bytes()).unwrap();
        assert!(long.id().is_err());
    }

    #[test]
    fn null_annotations_are_none() {
        assert_eq!(State::parse(br#"{"id":"a","annotations":null}"#).unwrap().annotations().count(), 0);
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = State::parse(&bytes);
        }

        #[test]
        fn an_accepted_id_is_one_plain_path_component(id in ".{0,40}") {
            let text = serde_json::json!({ "id": id }).to_string();
            if State::parse(text.as_bytes()).unwrap().id().is_ok() {
                let components: Vec<_> = Path::new(&id).components().collect();
                prop_assert!(matches!(components[..], [std::path::Component::Normal(_)]));
            }
        }
    }
}
