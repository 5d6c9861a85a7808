//! What the hook and containers leave: `list`, `gc`.

use crate::node::{Node, json};
use ringfence_trials::needs_root;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;

pub fn what_is_left_behind_is_listed_and_removed() {
    let node = Node::new("");
    assert_eq!(node.succeed(&["list"]).lines().count(), 1);
    assert_eq!(node.succeed(&["gc"]), "");
    std::fs::create_dir_all(node.path("run/state")).unwrap();
    std::fs::create_dir_all(node.path("run/containers/c1/mount")).unwrap();
    // There is a process 1, but it was not started at that time.
    let record = r#"{"container":"c1","policy":"gold","init":{"pid":1,"start":1},"proxy":null,"root":"/nonexistent",
        "mount-points":[],"cgroups":[],"device":"soft0","since":1}"#;
    std::fs::write(node.path("run/state/c1.json"), record).unwrap();

    let shown = node.succeed(&["list"]);
    let words: Vec<_> = shown.lines().nth(1).unwrap().split_whitespace().collect();
    assert_eq!((words[0], words[3], words[4], *words.last().unwrap()), ("c1", "soft0", "gold", "ended"), "{shown}");
    assert_eq!(json(&node.succeed(&["list", "--json"]))[0]["id"], "c1");
    assert!(node.succeed(&["gc", "--dry-run"]).starts_with("would remove c1: its record"));
    assert!(node.path("run/containers/c1").exists());
    let removed = node.succeed(&["gc"]);
    assert!(removed.starts_with("removed c1: ") && removed.contains("state/c1.json"), "{removed}");
    assert!(!node.path("run/containers/c1").exists() && !node.path("run/state/c1.json").exists());
    assert_eq!(json(&node.succeed(&["gc", "--json"])), serde_json::json!({"removed": [], "left": []}));
}

pub fn failures_of_the_hook_are_listed() {
    let node = Node::new("");
    assert_eq!(json(&node.succeed(&["list", "--failures", "--json"])), serde_json::json!([]));
    std::fs::create_dir(node.path("run")).unwrap();
    let entries = "{\"time\":1,\"container\":\"c1\",\"code\":13,\"message\":\"too\\nmuch\"}\n\
         {\"time\":2,\"container\":null,\"code\":10,\"message\":\"no state\"}\n";
    std::fs::write(node.path("run/failures.jsonl"), entries).unwrap();
    let shown = node.succeed(&["list", "--failures"]);
    let words: Vec<Vec<_>> = shown.lines().map(|line| line.split_whitespace().skip(1).collect()).collect();
    assert_eq!(words[1..], [vec!["c1", "E13", "too\u{fffd}much"], vec!["-", "E10", "no", "state"]]);
    assert_eq!(json(&node.succeed(&["list", "--failures", "--json"]))[1]["message"], "no state");
}

/// What the hooks of his engine put there, without root.
pub fn a_user_is_shown_his_own() {
    needs_root("it acts as another user");
    const USER: u32 = 60_177;
    let node = Node::new("");
    std::fs::write(node.path("config.toml"), "").unwrap();
    // A directory of the test's own is nobody else's.
    std::fs::set_permissions(node.path(""), PermissionsExt::from_mode(0o755)).unwrap();
    let directory = PathBuf::from(format!("/run/user/{USER}"));
    let run = |arguments: &[&str]| {
        let output = node.command(arguments).uid(USER).gid(USER).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
        text
    };
    assert_eq!(json(&run(&["list", "--json"])), serde_json::json!([]), "he has no containers");
    std::fs::create_dir_all(directory.join("ringfence/state")).unwrap();
    let record =
        r#"{"container":"c1","init":{"pid":1,"start":1},"proxy":null,"root":"/x","mount-points":[],"cgroups":[]}"#;
    std::fs::write(directory.join("ringfence/state/c1.json"), record).unwrap();
    for path in ["", "ringfence", "ringfence/state", "ringfence/state/c1.json"] {
        chown(directory.join(path), Some(USER), Some(USER)).unwrap();
    }
    let shown = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let info = json(&run(&["info", "--json"]));
        (info["run-dir"].clone(), json(&run(&["list", "--json"]))[0]["id"].clone(), run(&["gc"]))
    }));
    std::fs::remove_dir_all(&directory).unwrap();
    let (run_dir, listed, collected) = shown.expect("all three succeed");
    assert_eq!((run_dir, listed), (directory.join("ringfence").to_str().unwrap().into(), "c1".into()));
    assert!(collected.starts_with("removed c1: "), "{collected}");
}
