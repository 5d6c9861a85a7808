//! What is made of the configuration: `config`, `info`, `cdi`.

use crate::node::{Node, json};
use serde_json::Value;

pub fn cdi_devices_are_the_profiles_and_go_stale() {
    let node = Node::new("[policy.profiles.gold]\n[policy.profiles.0zero]");
    let (directory, path) = (node.path("cdi"), node.path("cdi/ringfence.json"));
    let list = ["cdi", "list", "--json", "--directory", directory.to_str().unwrap()];
    assert_eq!(json(&node.succeed(&list)), serde_json::json!([]));

    node.succeed(&["cdi", "generate", "--output", path.to_str().unwrap()]);
    let spec = json(&std::fs::read_to_string(&path).unwrap());
    assert_eq!(spec, json(&node.succeed(&["cdi", "generate", "--output", "-"])));
    // A name that begins with a digit needs it.
    assert_eq!(spec["cdiVersion"], "0.5.0");
    let states = |shown: Value| {
        let devices = shown.as_array().unwrap().clone();
        let state = |device: Value| {
            let (name, state) =
                (device["device"].as_str().unwrap().to_owned(), device["state"].as_str().unwrap().to_owned());
            format!("{name} {}", state.split(':').next().unwrap())
        };
        devices.into_iter().map(state).collect::<Vec<_>>()
    };
    assert_eq!(
        states(json(&node.succeed(&list))),
        ["ringfence.dev/rdma=default current", "ringfence.dev/rdma=0zero current", "ringfence.dev/rdma=gold current"]
    );

    node.configure("[policy.profiles.gold]\n[policy.profiles.silver]");
    assert_eq!(
        states(json(&node.succeed(&list))),
        [
            "ringfence.dev/rdma=default current",
            "ringfence.dev/rdma=0zero stale",
            "ringfence.dev/rdma=gold current",
            "ringfence.dev/rdma=silver missing"
        ]
    );
    node.configure("[hook]\ntimeout = 31");
    assert_eq!(states(json(&node.succeed(&list)))[0], "ringfence.dev/rdma=default stale");
}

pub fn drop_ins_count() {
    let node = Node::new("");
    std::fs::create_dir(node.path("conf.d")).unwrap();
    std::fs::write(node.path("conf.d/gold.toml"), "[policy.profiles.gold]\n").unwrap();
    let info = json(&node.succeed(&["info", "--json"]));
    assert_eq!(info["configuration"][1].as_str(), node.path("conf.d/gold.toml").to_str());
    assert_eq!(info["policies"][1], "gold");
    assert_eq!(node.succeed(&["config", "validate"]).matches(": valid\n").count(), 2);
    assert!(node.succeed(&["cdi", "generate", "--output", "-"]).contains("\"gold\""));
    assert!(node.succeed(&["config", "show"]).contains("[policy.profiles.gold"));
}

pub fn the_configuration_is_shown_and_checked() {
    let node = Node::new("[policy.profiles.gold.bounds]\nbandwidth = \"40Gbit\"");
    std::fs::write(node.path("shown.toml"), node.succeed(&["config", "show"])).unwrap();
    let shown = node.path("shown.toml");
    node.succeed(&["config", "validate", shown.to_str().unwrap()]);
    assert_eq!(
        json(&node.succeed(&["config", "show", "--json"]))["policy"]["profiles"]["gold"]["bounds"]["bandwidth"],
        "40Gbit"
    );

    std::fs::write(node.path("default.toml"), node.succeed(&["config", "default"])).unwrap();
    node.succeed(&["config", "validate", node.path("default.toml").to_str().unwrap()]);

    for command in [&["config", "validate"][..], &["list"], &["info"], &["gc"], &["cdi", "list"], &["config", "show"]] {
        node.configure("nonsense = 1");
        let found = node.run(command);
        assert_eq!((found.code, found.err.lines().count()), (1, 1), "{command:?}: {}", found.err);
        assert!(found.err.starts_with("ringfence: ") && found.err.contains("line 2") && found.err.contains("nonsense"));
    }
    let missing = node.run(&["config", "validate", "/nonexistent"]);
    assert!(missing.code == 1 && missing.err.contains("/nonexistent"), "{}", missing.err);
}

/// What stands in for the proxy's program for cards.
const DESCRIBES: &str = r#"#!/bin/sh
test "$1" = --describe || exit 1
cat <<END
{"name": "$2", "max-qp": 1000, "max-qp-depth": 4096, "max-mr": 2000, "max-mr-bytes": 1073741824, "max-sge": 30, "max-rd-atomic": 16,
"atomics": true, "gids": [{"index": 3, "gid": "::ffff:10.9.1.1", "kind": "RoCE v2"}], "pkeys": ["0xffff", "0x8001"],
"help": [{"name": "rate per queue pair", "offered": false, "detail": "its driver has none"}]}
END
"#;

pub fn info_says_what_a_policy_can_grant_of_a_card() {
    let node = Node::new("");
    let proxy = node.path("ringfence-proxy");
    let device = "[[device]]\nname = \"rf-none\"\nkind = \"ibverbs\"\npkeys = [0x8001, 0x12]\n\
                  traffic-class = 32\nlatency = { traffic-class = 104 }\nnodes = [\"/dev/infiniband/uverbs9\"]\n";
    node.configure(&format!("[proxy]\npath = {proxy:?}\n{device}"));
    let card = json(&node.succeed(&["info", "--json"]))["cards"][0].clone();
    assert_eq!((&card["name"], &card["modes"]), (&json("\"rf-none\""), &json("[\"proxied\"]")));
    // No machine has a card of that name, and here is no program that could open it.
    assert!(card["card"].is_null() && card["grants"].is_null());
    let problems = card["problems"].to_string();
    assert!(problems.contains("rf-none") && problems.contains("ringfence-proxy-ibverbs"), "{problems}");
    let program = node.path("ringfence-proxy-ibverbs");
    std::fs::write(&program, DESCRIBES).unwrap();
    std::fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let shown = json(&node.succeed(&["info", "--json"]));
    assert_eq!(shown["cards"][0]["grants"]["max-qp"], 1000);
    assert_eq!(shown["cards"][0]["grants"]["gids"][0]["gid"], "::ffff:10.9.1.1");
    let text = node.succeed(&["info"]);
    assert!(
        text.contains("card rf-none") && text.contains("policies can grant 1000 queue pairs of 4096 requests"),
        "{text}"
    );
    assert!(text.contains("P_Keys 0xffff, 0x8001; atomics"), "{text}");
    assert!(shown["cards"][0]["problems"].to_string().contains("port 1 of rf-none has no P_Key 0x0012"), "{shown}");
    assert!(text.contains("atomics; rate per queue pair: not offered (its driver has none)"), "{text}");
    assert!(text.contains("; counters per queue pair: not offered (the kernel does not say: "), "{text}");
    assert!(
        text.contains(
            "; forced service level and traffic class: offered (traffic class 32; for class latency traffic class 104)"
        ),
        "{text}"
    );
    let help = &shown["cards"][0]["grants"]["help"];
    assert_eq!((&help[0]["offered"], &help[1]["name"]), (&json("false"), &json("\"counters per queue pair\"")));
}

pub fn info_names_devices_and_policies() {
    let node = Node::new("[[device]]\nname = \"soft1\"\nkind = \"soft\"\nlink = \"25Gbit\"\n[policy.profiles.gold]");
    let shown = json(&node.succeed(&["info", "--json"]));
    assert_eq!(shown["devices"][0], "soft1 (soft, 25Gbit)");
    assert_eq!(shown["policies"], serde_json::json!(["default", "gold"]));
    assert_eq!(shown["configuration"][0].as_str(), node.path("config.toml").to_str());
    assert!(node.succeed(&["info"]).contains("soft1"));
}
