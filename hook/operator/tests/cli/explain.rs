//! `ringfence explain`

use crate::node::{Node, json};
use ringfence_trials::skip;
use serde_json::Value;
use std::path::Path;

pub fn explain_refuses_as_the_hook_does() {
    // Both by the default configuration: the hook takes the test's own environment.
    if Path::new("/etc/ringfence/config.toml").exists() || std::env::var_os("RINGFENCE_CONFIG").is_some() {
        skip("it needs a machine without a configuration");
    }
    let node = Node::new("");
    for (annotation, code) in [
        (r#"{"ringfence.dev/enable":"maybe"}"#, 12),
        (r#"{"ringfence.dev/enable":"1","ringfence.dev/max-mr-bytes":"1TiB"}"#, 13),
        (r#"{"ringfence.dev/enable":"1","ringfence.dev/device":"mlx9"}"#, 14),
        (r#"{"ringfence.dev/enable":"1","bandwidth.ringfence.dev/pot":"1Gbit"}"#, 12),
        (r#"{"weight.ringfence.dev/pod":"7"}"#, 12),
    ] {
        let bundle = node.bundle(&json(annotation), &Value::Null);
        let state = serde_json::json!({"id": "c1", "pid": 2, "bundle": bundle, "annotations": json(annotation)});
        let failure = ringfence_hook::create(state.to_string().as_bytes(), None).unwrap_err();
        let found = node.run(&["explain", "--bundle", &bundle]);
        assert_eq!((found.code, found.err.as_str()), (code, ""), "{annotation}");
        assert_eq!(found.out, format!("refused: {failure}\n"));
        assert_eq!(failure.code as i32, code);
    }
}

pub fn explain_tells_all_values_as_json() {
    let node =
        Node::new("[policy.profiles.gold]\nnamespaces = [\"team-*\"]\n[policy.profiles.gold.bounds]\nweight = 9");
    let wish = ["--annotation", "ringfence.dev/enable=1", "--annotation", "ringfence.dev/policy=gold"];
    let arguments = |more: &[&'static str]| [&["explain", "--json"], &wish[..], more].concat();
    let shown = json(&node.succeed(&arguments(&["--namespace", "team-a"])));
    assert_eq!((&shown["verdict"], &shown["namespace"]), (&"joined".into(), &"team-a".into()));
    let weight = shown["settings"].as_array().unwrap().iter().find(|setting| setting["key"] == "weight").unwrap();
    assert_eq!((&weight["value"], &weight["from"]), (&"9".into(), &"policy.profiles.gold.bounds".into()));
    assert_eq!(shown["mounts"][0]["destination"], "/dev/ringfence");

    let found = node.run(&arguments(&["--namespace", "others"]));
    let shown = json(&found.out);
    assert_eq!((found.code, &shown["verdict"], &shown["code"]), (13, &"refused".into(), &13.into()));
    assert!(shown["message"].as_str().unwrap().contains("team-*"), "{shown}");
    assert!(!node.path("run").exists(), "explaining makes nothing");
}

pub fn explain_goes_by_the_hook_that_the_bundle_names() {
    let node = Node::new("[policy.profiles.gold.defaults]\nweight = 5");
    let entry = |arguments: Value| serde_json::json!({"createRuntime": [{"path": "/usr/bin/ringfence-hook", "args": arguments}]});
    let enabled = serde_json::json!({"ringfence.dev/enable": "true"});

    let bundle = node.bundle(&enabled, &Value::Null);
    assert!(node.succeed(&["explain", "--bundle", &bundle]).contains("does not name ringfence-hook"));
    let bundle = node.bundle(&enabled, &entry(serde_json::json!(["ringfence-hook", "createRuntime"])));
    assert!(!node.succeed(&["explain", "--bundle", &bundle]).contains("warning"));
    let by_cdi = entry(serde_json::json!(["ringfence-hook", "createRuntime", "--policy", "gold"]));
    let bundle = node.bundle(&serde_json::json!({}), &by_cdi);
    let shown = node.succeed(&["explain", "--bundle", &bundle]);
    assert!(shown.contains("enabled by the engine, with policy gold"), "{shown}");
}

/// The manifests' annotations are what they say they are, by the configuration that they come with.
pub fn the_examples_for_kubernetes_are_granted() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/kubernetes");
    let read = |name: &str| std::fs::read_to_string(directory.join(name)).unwrap();
    let install = read("install.yaml");
    let (_, config) = install.split_once("config.toml: |\n").unwrap();
    let config: String =
        config.lines().take_while(|line| *line != "---").map(|line| format!("{}\n", line.trim())).collect();
    let node = Node::new(&config);
    let explain = |manifest: &str, container: &str| {
        let mut arguments = vec!["explain".to_owned(), "--json".into(), "--container".into(), container.into()];
        for line in
            manifest.lines().map(str::trim).filter(|line| line.contains("ringfence.dev/") && !line.starts_with('#'))
        {
            let (key, value) = line.split_once(": ").unwrap();
            arguments.extend(["--annotation".into(), format!("{key}={}", value.trim_matches('"'))]);
        }
        let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
        json(&node.succeed(&arguments))
    };
    let value = |shown: &Value, key: &str| {
        let settings = shown["settings"].as_array().unwrap();
        settings.iter().find(|setting| setting["key"] == key).unwrap()["value"].clone()
    };
    let pod = read("containers.yaml");
    assert_eq!(explain(&pod, "fetch")["verdict"], "left-alone");
    let (train, monitor) = (explain(&pod, "train"), explain(&pod, "monitor"));
    assert_eq!(
        [value(&train, "bandwidth"), value(&train, "class"), value(&train, "max-mr-bytes")],
        ["20Gbit", "bulk", "4GiB"]
    );
    assert_eq!([value(&monitor, "bandwidth"), value(&monitor, "class")], ["100Mbit", "latency"]);
    let pods = read("bandwidth.yaml");
    let bandwidths: Vec<_> =
        pods.split("---").skip(1).map(|pod| value(&explain(pod, "ib-write-bw"), "bandwidth")).collect();
    assert_eq!(bandwidths, ["25Gbit", "10Gbit"]);
}
