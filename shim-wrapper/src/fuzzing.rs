//! What a fuzzer runs: any `config.json`. `integration/fuzz.sh` builds and runs it; its corpus is a test, too.

use crate::edit::{Facts, Hook, Node, Nodes, edit};
use crate::json::Object;
use ringfence_hook::state::Bundle;
use serde_json::Value;
use std::path::Path;

/// What runs an input.
pub type Target = fn(&[u8]);

/// All of them, by the names of their corpora.
pub const TARGETS: [(&str, Target); 1] = [("config", config)];

/// A `config.json`: edited for the hook, and then read by it.
pub fn config(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(mut object) = Object::parse(text) else {
        // What we do not understand as an object, no other parser may.
        assert!(!serde_json::from_str::<Value>(text).is_ok_and(|value| value.is_object()), "an object is refused");
        return;
    };
    let Ok(facts) = Facts::of(&object) else { return };
    let hook = Hook {
        path: "/usr/bin/ringfence-hook".into(),
        timeout: 30,
        env: vec!["PATH=/bin".into()],
        policy: facts.policy.clone(),
    };
    let node = Node { path: "/dev/x".into(), major: 10, minor: 229, mode: 0o600, uid: 0, gid: 0 };
    let nodes = match data.len() % 3 {
        0 => Nodes { made: vec![node], allowed: Vec::new() },
        1 => Nodes { made: Vec::new(), allowed: vec![(10, 126)] },
        _ => Nodes::default(),
    };
    let Ok(changed) = edit(&mut object, &hook, &nodes) else { return };
    let edited = object.to_text();
    others_stay(text, &edited);

    let mut again = Object::parse(&edited).expect("what was edited can be read");
    let facts_again = Facts::of(&again).expect("what was edited is understood");
    assert_eq!((&facts_again.annotations, &facts_again.cgroups_path), (&facts.annotations, &facts.cgroups_path));
    assert_eq!(edit(&mut again, &hook, &nodes), Ok(false), "edited twice: {edited}");
    assert!(changed || edited.len() <= text.len(), "{text} became {edited} without a word");

    // The hook reads the same file: it must find what the decision was about.
    let Ok(bundle) = Bundle::parse(Path::new("/bundle"), edited.as_bytes()) else { return };
    let read: Vec<_> = bundle.annotations().collect();
    let decided: Vec<_> = facts.annotations.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    assert_eq!(read, decided);
    if !nodes.made.is_empty() {
        assert!(bundle.has_device(Path::new("/dev/x"), 10, 229) && bundle.allows_device(10, 229), "{edited}");
    }
}

/// Every other member is as it was written.
fn others_stay(before: &str, after: &str) {
    let members = |text: &str| match serde_json::from_str(text) {
        Ok(Value::Object(members)) => Some(members),
        _ => None,
    };
    // Numbers that are beyond the parser's, say.
    let (Some(before), Some(after)) = (members(before), members(after)) else { return };
    for (name, value) in &before {
        if name != "hooks" && name != "linux" {
            assert_eq!(after.get(name), Some(value), "{name} has changed");
        }
    }
    assert!(after.keys().all(|name| before.contains_key(name) || name == "hooks" || name == "linux"));
}

#[cfg(test)]
mod tests {
    #[test]
    fn corpora_hold() {
        ringfence_trials::replay(&super::TARGETS);
    }
}
