//! What is read of the counters that proxies leave: `stats`.

use crate::node::{Node, json};
use ringfence_launch::counters::{BYTES, FILE, MAGIC, VERSION};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Stdio;

/// The first word of `sent`, RDMA WRITE's operations.
const WRITES: usize = 64;

fn page() -> Vec<u8> {
    let mut bytes = vec![0; BYTES];
    bytes[..8].copy_from_slice(&MAGIC.to_le_bytes());
    bytes[8..16].copy_from_slice(&VERSION.to_le_bytes());
    bytes
}

/// A container with `counters`, if any, whose init is the first process: one that was not started at that time, but stands on
/// record.
fn join(node: &Node, id: &str, counters: Option<&[u8]>) -> PathBuf {
    std::fs::create_dir_all(node.path("run/state")).unwrap();
    let directory = node.path(&format!("run/containers/{id}"));
    std::fs::create_dir_all(&directory).unwrap();
    let record = format!(
        r#"{{"container":"{id}","init":{{"pid":1,"start":1}},"proxy":{{"pid":1,"start":1}},"root":"/x","mount-points":[],"cgroups":[]}}"#
    );
    std::fs::write(node.path(&format!("run/state/{id}.json")), record).unwrap();
    let path = directory.join(FILE);
    if let Some(bytes) = counters {
        std::fs::write(&path, bytes).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).unwrap();
    }
    path
}

pub fn forged_and_short_counters_are_a_line_each() {
    let node = Node::new("");
    assert_eq!(json(&node.succeed(&["stats", "--json"])), serde_json::json!([]));
    let mut forged = vec![0xff; BYTES];
    forged[..16].copy_from_slice(&page()[..16]);
    join(&node, "forged", Some(&forged));
    join(&node, "long", Some(&vec![0; 3 << 20]));
    join(&node, "missing", None);
    join(&node, "nonsense", Some(&vec![0xff; BYTES]));
    join(&node, "short", Some(&page()[..BYTES - 1]));
    let open = join(&node, "writable", Some(&page()));
    std::fs::set_permissions(&open, PermissionsExt::from_mode(0o666)).unwrap();
    let link = join(&node, "link", None);
    std::os::unix::fs::symlink(&open, &link).unwrap();
    std::fs::create_dir(join(&node, "directory", None)).unwrap();

    let shown = node.succeed(&["stats"]);
    let all = json(&node.succeed(&["stats", "--json"]));
    assert_eq!(all.as_array().unwrap().len(), 8);
    for (id, why) in [
        ("directory", "not a regular file"),
        ("link", "symbolic link"),
        ("long", "exceeds 1048576 bytes"),
        ("missing", "there are no counters"),
        ("nonsense", "it begins with 0xffffffffffffffff"),
        ("short", "it has 4095 bytes instead of 4096"),
        ("writable", "mode 666"),
    ] {
        let line = shown.lines().find(|line| line.starts_with(&format!("warning: {id}: "))).unwrap();
        assert!(line.contains(why), "{line}");
        let entry = all.as_array().unwrap().iter().find(|entry| entry["id"] == id).unwrap();
        assert!(entry["error"].as_str().unwrap().contains(why) && entry["counters"].is_null(), "{entry}");
        let outcome = node.run(&["stats", id]);
        assert!(outcome.code == 1 && outcome.err.contains(why), "{}", outcome.err);
    }
    let forged = json(&node.succeed(&["stats", "forged", "--json"]));
    assert_eq!(forged["counters"]["sent"]["send"]["bytes"], u64::MAX);
    assert!(node.succeed(&["stats", "forged"]).contains("18446744073709551615"));
}

pub fn counters_of_one_container_are_chosen_by_its_id() {
    let node = Node::new("");
    let mut bytes = page();
    bytes[WRITES] = 3;
    join(&node, "aa", Some(&bytes));
    join(&node, "ab", Some(&page()));
    let one = json(&node.succeed(&["stats", "aa", "--json"]));
    assert_eq!((&one["id"], &one["counters"]["sent"]["rdma-write"]["operations"]), (&"aa".into(), &3.into()));
    assert!(one["time-ms"].as_u64().unwrap() > 1_500_000_000_000);
    let shown = node.succeed(&["stats", "aa"]);
    let line = shown.lines().find(|line| line.starts_with("rdma-write ")).unwrap();
    assert_eq!(line.split_whitespace().collect::<Vec<_>>(), ["rdma-write", "3", "0", "0", "0"]);
    for (id, why) in [("a", "2 containers"), ("b", "no container b"), ("../aa", "no container ../aa")] {
        let outcome = node.run(&["stats", id]);
        assert!(outcome.code == 1 && outcome.err.contains(why), "{}", outcome.err);
    }
    assert_eq!(node.run(&["stats", "--watch", "0"]).code, 2);
}

pub fn who_watches_may_stop() {
    let node = Node::new("");
    join(&node, "c1", Some(&page()));
    for arguments in [&["stats", "--json", "--watch", "0.1"][..], &["stats", "c1", "--watch", "0.1"]] {
        let mut child = node.command(arguments).stdout(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let first = lines.next().unwrap().unwrap();
        if arguments.contains(&"--json") {
            assert_eq!(json(&first)[0]["id"], "c1");
            assert_eq!(json(&lines.next().unwrap().unwrap())[0]["id"], "c1");
        }
        drop(lines);
        assert!(child.wait().unwrap().success());
    }
}
