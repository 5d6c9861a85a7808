//! What fuzzers run: annotations, states and files of images as the fuzzer likes, and what must hold of what is made of them.
//! `integration/fuzz.sh` builds and runs them; their corpora are tests, too.

use crate::annotations::{self, KEYS, Request};
use crate::config::Config;
use crate::elf::{self, Offers};
use crate::identity::Namespace;
use crate::policy::{self, Grant};
use crate::state::{Annotations, State};
use ringfence_proxy::launch::{BitRate, Limits, OpRate};
use std::path::{Component, Path};
use std::sync::OnceLock;

/// What runs an input.
pub type Target = fn(&[u8]);

/// All of them, by the names of their corpora.
pub const TARGETS: [(&str, Target); 3] = [("annotations", annotations), ("state", state), ("library", library)];

/// Bounds of every kind.
const BOUNDED: &str = r#"
[[device]]
name = "soft0"
kind = "soft"
link = "25Gbit"
[policy.defaults]
bandwidth = "1Gbit"
class = "bulk"
[policy.bounds]
bandwidth = "10Gbit"
bandwidth-rx = "5Gbit"
ops = "100k"
weight = 200
classes = ["bulk", "ops"]
max-qp = 64
max-mr = 64
max-mr-bytes = "1GiB"
max-cq = 64
max-qp-depth = 64
"#;

fn bounded() -> &'static Config {
    static CONFIG: OnceLock<Config> = OnceLock::new();
    CONFIG.get_or_init(|| Config::parse(BOUNDED).expect("as it is meant"))
}

/// Lines of `name=value`, and the administrator's choice in the first.
pub fn annotations(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let mut lines = text.lines();
    let chosen = lines.next().filter(|line| annotations::is_device_name(line));
    let annotations: Annotations =
        lines.filter_map(|line| line.split_once('=')).map(|(name, value)| (name.into(), value.into())).collect();
    let ours = annotations.keys().any(|name| annotations::is_ours(name));
    let Ok(wanted) = annotations::wanted(&annotations, chosen) else {
        assert!(ours || chosen.is_some(), "an error without a word of ours: {annotations:?}");
        return;
    };
    let Some(request) = wanted else { return };
    assert!(ours || chosen.is_some(), "joined without being asked: {annotations:?}");
    for (key, name) in &request.sources {
        assert!(KEYS.contains(key) && annotations.contains_key(name), "{key} is from {name}, which nobody wrote");
    }
    resolves(&request, bounded());
}

/// Whatever is granted is within what the administrator allows.
fn resolves(request: &Request, config: &Config) {
    let Ok(resolution) = policy::resolve(request, &Namespace::None, config) else { return };
    let Grant::Proxied(_, limits) = resolution.grant else { panic!("nodes are granted, which nobody allows") };
    let Limits { bandwidth, bandwidth_rx, ops, weight, max_qp, max_mr, max_mr_bytes, max_cq, max_qp_depth, .. } =
        limits;
    let (out, fetched, ops) = (bandwidth.map(BitRate::bits), bandwidth_rx.map(BitRate::bits), ops.map(OpRate::ops));
    for (rate, most) in [(out, 10_000_000_000), (fetched, 5_000_000_000), (ops, 100_000)] {
        assert!(rate.is_some_and(|rate| rate <= most), "{limits:?} of {request:?}");
    }
    assert!(weight.is_none_or(|weight| weight.get() <= 200), "{limits:?} of {request:?}");
    assert!([max_qp, max_mr, max_cq, max_qp_depth].into_iter().all(|count| count <= 64), "{limits:?} of {request:?}");
    assert!(max_mr_bytes.0 <= 1 << 30, "{limits:?} of {request:?}");
}

/// A state, as a runtime writes it.
pub fn state(data: &[u8]) {
    let Ok(state) = State::parse(data) else { return };
    if let Ok(id) = state.id() {
        let components: Vec<_> = Path::new(id).components().collect();
        assert!(matches!(components[..], [Component::Normal(_)]), "{id:?} is no file's name");
    }
    assert!(state.pid().is_ok_and(|pid| pid > 1) || state.pid().is_err());
    assert!(state.annotations().count() <= data.len());
}

/// A file of an image that says it is a library.
pub fn library(data: &[u8]) {
    let offers = Offers::of(data);
    if let Some(offers) = &offers {
        let text: usize = offers.symbols.iter().map(String::len).sum();
        // Names and nodes, with what stands between them.
        assert!(text <= (2 << 20), "{text} bytes of names");
    }
    let mut nameless = data.to_vec();
    let taken = elf::take_name(&mut nameless);
    assert!(nameless.len() == data.len() && (taken.is_some() || nameless == data), "changed beyond its name");
    let changed = nameless.iter().zip(data).filter(|(new, old)| new != old).count();
    assert!(changed <= 8, "{changed} bytes are changed");
}

#[cfg(test)]
mod tests {
    #[test]
    fn corpora_hold() {
        ringfence_trials::replay(&super::TARGETS);
    }
}
