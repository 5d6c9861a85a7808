//! What the hook and containers leave: `list`, `gc`.

use crate::node::{Node, json};

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
