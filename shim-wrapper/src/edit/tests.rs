use super::*;
use proptest::prelude::*;
use serde_json::Value;

fn hook(policy: Option<&str>) -> Hook {
    Hook {
        path: "/usr/bin/ringfence-hook".into(),
        timeout: 30,
        env: vec!["PATH=/bin".into()],
        policy: policy.map(Into::into),
    }
}

fn node() -> Node {
    Node { path: "/dev/infiniband/uverbs0".into(), major: 231, minor: 192, mode: 0o666, uid: 0, gid: 0 }
}

const CREATE: &str =
    r#"{"args":["ringfence-hook","createRuntime"],"env":["PATH=/bin"],"path":"/usr/bin/ringfence-hook","timeout":30}"#;
const STOP: &str =
    r#"{"args":["ringfence-hook","poststop"],"env":["PATH=/bin"],"path":"/usr/bin/ringfence-hook","timeout":30}"#;

/// `before` becomes `after`, and `after` stays.
#[track_caller]
fn becomes(before: &str, hook: &Hook, nodes: &[Node], after: &str) {
    becomes_with(before, hook, &made(nodes), after);
}

fn made(nodes: &[Node]) -> Nodes {
    Nodes { made: nodes.to_vec(), allowed: Vec::new() }
}

#[track_caller]
fn becomes_with(before: &str, hook: &Hook, nodes: &Nodes, after: &str) {
    let mut config = Object::parse(before).unwrap();
    assert_eq!(edit(&mut config, hook, nodes), Ok(before != after));
    assert_eq!(config.to_text(), after);
    let mut config = Object::parse(after).unwrap();
    assert_eq!(edit(&mut config, hook, nodes), Ok(false));
    assert_eq!(config.to_text(), after);
}

#[track_caller]
fn refused(before: &str, nodes: &[Node], message: &str) {
    let mut config = Object::parse(before).unwrap();
    assert_eq!(edit(&mut config, &hook(None), &made(nodes)).unwrap_err().to_string(), message);
}

#[test]
fn hooks_missing_null_and_empty() {
    let both = format!(r#""hooks":{{"createRuntime":[{CREATE}],"poststop":[{STOP}]}}"#);
    becomes("{}", &hook(None), &[], &format!("{{{both}}}"));
    becomes(r#"{"hooks":null,"x":1}"#, &hook(None), &[], &format!(r#"{{{both},"x":1}}"#));
    becomes(r#"{"hooks":{}}"#, &hook(None), &[], &format!("{{{both}}}"));
    becomes(r#"{"hooks":{"createRuntime":null,"poststop":[]}}"#, &hook(None), &[], &format!("{{{both}}}"));
}

#[test]
fn other_hooks_stay_and_come_later() {
    let other = r#"{"path":"/x","new":1e99}"#;
    becomes(
        &format!(
            r#"{{"hooks":{{"poststop":[{other}],"createRuntime":[{other}, {{}}],"prestart":[{other}],"z":{other}}}}}"#
        ),
        &hook(None),
        &[],
        &format!(
            r#"{{"hooks":{{"poststop":[{STOP},{other}],"createRuntime":[{CREATE},{other},{{}}],"prestart":[{other}],"z":{other}}}}}"#
        ),
    );
}

#[test]
fn the_policy_is_an_argument() {
    let create = CREATE.replace(r#"createRuntime""#, r#"createRuntime","--policy","gold""#);
    let after = format!(r#"{{"hooks":{{"createRuntime":[{create}],"poststop":[{STOP}]}}}}"#);
    becomes("{}", &hook(Some("gold")), &[], &after);
    assert_eq!(Facts::of(&Object::parse(&after).unwrap()).unwrap().policy.as_deref(), Some("gold"));
}

#[test]
fn a_hook_of_ours_from_elsewhere_serves() {
    // As hooks.d and CDI have it, also in the old stage; with another path and environment.
    for stage in JOINING {
        for arguments in [r#""createRuntime""#, r#""createRuntime","--policy","silver""#] {
            let there = format!(
                r#"{{"hooks":{{"{stage}":[{{}},{{"path":"/opt/h","args":["ringfence-hook",{arguments}]}}],"poststop":[{{"path":"/opt/h","args":["ringfence-hook","poststop"]}}]}}}}"#
            );
            becomes(&there, &hook(None), &[], &there);
        }
    }
}

#[test]
fn a_hook_without_policy_does_not_serve_for_one() {
    let there = format!(r#"{{"hooks":{{"createRuntime":[{CREATE}],"poststop":[{STOP}]}}}}"#);
    let mut config = Object::parse(&there).unwrap();
    assert_eq!(edit(&mut config, &hook(Some("gold")), &Nodes::default()), Ok(true));
    let after: Value = serde_json::from_str(&config.to_text()).unwrap();
    assert_eq!(after["hooks"]["createRuntime"][0]["args"][3], "gold");
    assert_eq!(after["hooks"]["createRuntime"][1], serde_json::from_str::<Value>(CREATE).unwrap());
    assert_eq!(after["hooks"]["poststop"].as_array().unwrap().len(), 1);
    let text = config.to_text();
    becomes(&text, &hook(Some("gold")), &[], &text);
}

#[test]
fn malformed_members_are_named() {
    for (before, message) in [
        (r#"{"hooks":[]}"#, "hooks is no object; the engine that wrote it must make it one"),
        (r#"{"hooks":"x"}"#, "hooks is no object; the engine that wrote it must make it one"),
        (
            r#"{"hooks":{"createRuntime":{}}}"#,
            "hooks.createRuntime is no array; the engine that wrote it must make it one",
        ),
        (r#"{"hooks":{"prestart":7}}"#, "hooks.prestart is no array; the engine that wrote it must make it one"),
        (r#"{"hooks":{"poststop":"x"}}"#, "hooks.poststop is no array; the engine that wrote it must make it one"),
        (r#"{"linux":[]}"#, "linux is no object; the engine that wrote it must make it one"),
        (
            r#"{"linux":{"devices":{}}}"#,
            "linux.devices is no array of devices; the engine that wrote it must make it one",
        ),
        (
            r#"{"linux":{"devices":[7]}}"#,
            "linux.devices is no array of devices; the engine that wrote it must make it one",
        ),
        (r#"{"linux":{"resources":1}}"#, "linux.resources is no object; the engine that wrote it must make it one"),
        (
            r#"{"linux":{"resources":{"devices":[1]}}}"#,
            "linux.resources.devices is no array of rules; the engine that wrote it must make it one",
        ),
    ] {
        refused(before, &[node()], message);
    }
}

#[test]
fn nodes_are_made_and_allowed_last() {
    let hooks = format!(r#""hooks":{{"createRuntime":[{CREATE}],"poststop":[{STOP}]}}"#);
    let device =
        r#"{"fileMode":438,"gid":0,"major":231,"minor":192,"path":"/dev/infiniband/uverbs0","type":"c","uid":0}"#;
    let rule = r#"{"access":"rwm","allow":true,"major":231,"minor":192,"type":"c"}"#;
    let after = |devices: &str, rules: &str| {
        format!(r#"{{{hooks},"linux":{{"devices":[{devices}],"resources":{{"devices":[{rules}]}}}}}}"#)
    };
    becomes(&format!("{{{hooks}}}"), &hook(None), &[node()], &after(device, rule));
    becomes(
        &format!(r#"{{{hooks},"linux":{{"devices":null,"resources":null}}}}"#),
        &hook(None),
        &[node()],
        &after(device, rule),
    );
    let (fuse, deny) =
        (r#"{"path":"/dev/fuse","type":"c","major":10,"minor":229}"#, r#"{"allow":false,"access":"rwm"}"#);
    becomes(&after(fuse, deny), &hook(None), &[node()], &after(&format!("{fuse},{device}"), &format!("{deny},{rule}")));
}

#[test]
fn what_the_hook_brings_is_only_allowed() {
    let hooks = format!(r#""hooks":{{"createRuntime":[{CREATE}],"poststop":[{STOP}]}}"#);
    let nodes = Nodes { made: Vec::new(), allowed: vec![(10, 257)] };
    let rule = r#"{"access":"rwm","allow":true,"major":10,"minor":257,"type":"c"}"#;
    let deny = r#"{"allow":false,"access":"rwm"}"#;
    let config = |rules: &str| format!(r#"{{{hooks},"linux":{{"resources":{{"devices":[{rules}]}}}}}}"#);
    becomes_with(&config(deny), &hook(None), &nodes, &config(&format!("{deny},{rule}")));
    // Where nothing is denied, a rule of ours would deny the rest.
    for config in [config(""), format!(r#"{{{hooks},"linux":{{}}}}"#), format!("{{{hooks}}}")] {
        becomes_with(&config, &hook(None), &nodes, &config);
    }
}

#[test]
fn a_node_that_the_engine_gave_is_not_given_twice() {
    let config = |kind: &str, minor: u32| {
        format!(
            r#"{{"linux":{{"devices":[{{"path":"/dev/infiniband/uverbs0","type":"{kind}","major":231,"minor":{minor}}}]}}}}"#
        )
    };
    for kind in ["c", "u"] {
        let text = config(kind, 192);
        let mut object = Object::parse(&text).unwrap();
        assert_eq!(edit(&mut object, &hook(None), &made(&[node()])), Ok(true));
        let after: Value = serde_json::from_str(&object.to_text()).unwrap();
        assert_eq!(after["linux"]["devices"].as_array().unwrap().len(), 1);
    }
    refused(
        &config("c", 7),
        &[node()],
        "linux.devices has another device at /dev/infiniband/uverbs0 than the host, c 231:7 instead of c 231:192; \
         do not give the container a device of that name",
    );
}

#[test]
fn facts() {
    let facts = |text: &str| Facts::of(&Object::parse(text).unwrap());
    let nothing = Facts::default();
    assert_eq!(facts("{}"), Ok(Facts::default()));
    assert_eq!(facts(r#"{"annotations":null,"process":null,"linux":null,"hooks":null}"#), Ok(nothing));
    let all = facts(r#"{"annotations":{"a":"b"},"process":{},"linux":{"cgroupsPath":"x"},"hooks":[]}"#).unwrap();
    assert_eq!((all.annotations["a"].as_str(), all.has_process), ("b", true));
    assert_eq!(all.cgroups_path.as_deref(), Some("x"));
    for annotations in ["[]", "1", r#"{"a":1}"#, r#"{"a":null}"#] {
        let error = facts(&format!(r#"{{"annotations":{annotations}}}"#)).unwrap_err();
        assert_eq!(error, Error::WrongType { member: "annotations", needed: "object of strings" });
    }
}

#[test]
fn members_that_runtimes_differ_about() {
    let message = "is written Hooks, which not every runtime takes for it";
    let facts = |text: &str| Facts::of(&Object::parse(text).unwrap()).map_err(|error| error.to_string());
    assert!(facts(r#"{"Hooks":{}}"#).unwrap_err().contains(message));
    let poststop = facts(r#"{"hooks":{"Poststop":[]}}"#).unwrap_err();
    assert!(poststop.starts_with("hooks.poststop is written Poststop"), "{poststop}");
    assert!(facts(r#"{"hook":{},"linuxes":1}"#).is_ok());
    for (linux, expected) in [
        (r#"{"devices":[],"Devices":[]}"#, "linux.devices is there twice; the engine that wrote it must give it once"),
        (
            r#"{"Resources":{}}"#,
            "linux.resources is written Resources, which not every runtime takes for it; the engine that wrote it must write it \
             as it is",
        ),
        (
            r#"{"resources":{"devices":[],"devices":[]}}"#,
            "linux.resources.devices is there twice; the engine that wrote it must give it once",
        ),
    ] {
        refused(&format!(r#"{{"linux":{linux}}}"#), &[node()], expected);
    }
}

#[test]
fn paths_of_systemd() {
    for (path, expected) in [
        ("system.slice:docker:0a1b", true),
        ("kubepods-besteffort-pod1.slice:cri-containerd:0a1b", true),
        ("/kubepods/besteffort/pod1/0a1b", false),
        ("/system.slice/docker-0a1b.scope", false),
        ("a/b.slice:docker:x", false),
        ("system:docker:x", false),
        (".slice:docker:x", false),
        ("system.slice:docker", false),
        ("system.slice::x", false),
        ("system.slice:docker:", false),
        ("system.slice:docker:x:y", false),
        ("", false),
    ] {
        let facts = Facts { cgroups_path: Some(path.into()), ..Facts::default() };
        assert_eq!(facts.is_systemd_path(), expected, "{path}");
    }
}

/// Something of the shape of a `config.json`, with anything in it.
fn config() -> impl Strategy<Value = Value> {
    let any = prop_oneof![
        Just(Value::Null),
        Just(json!({})),
        Just(json!([])),
        any::<u64>().prop_map(Value::from),
        ".{0,5}".prop_map(Value::from),
        Just(json!([{"path": "/x", "args": ["x"]}])),
        Just(json!([{"path": "/x", "args": ["ringfence-hook"]}, 1])),
        Just(json!({"createRuntime": [{"path": "/x"}], "poststop": null})),
        Just(json!({"devices": [{"path": "/dev/x"}], "resources": {"devices": [{"allow": false}], "rdma": {}}})),
    ];
    let name = proptest::sample::select(vec!["hooks", "linux", "process", "annotations", "root", "vendor", "mounts"]);
    let inner = prop_oneof![
        any.clone(),
        proptest::collection::btree_map(
            proptest::sample::select(vec!["createRuntime", "prestart", "poststop", "devices", "resources", "x"]),
            any,
            0..4
        )
        .prop_map(|map| Value::Object(map.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()))
    ];
    proptest::collection::btree_map(name, inner, 0..7)
        .prop_map(|map| Value::Object(map.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()))
}

proptest! {
    #[test]
    fn only_what_must_change_does_and_only_once(before in config(), policy in proptest::option::of("[a-z]{1,4}"), devices in any::<bool>()) {
        let hook = hook(policy.as_deref());
        let nodes = if devices { made(&[node()]) } else { Nodes { made: Vec::new(), allowed: vec![(10, 257)] } };
        let text = before.to_string();
        let mut object = Object::parse(&text).unwrap();
        if edit(&mut object, &hook, &nodes).is_err() {
            return Ok(());
        }
        let once = object.to_text();
        let after: Value = serde_json::from_str(&once).unwrap();
        for (key, value) in before.as_object().unwrap() {
            if key != "hooks" && key != "linux" {
                prop_assert_eq!(&after[key], value);
            }
        }
        // Nothing is taken away from hooks, devices and rules.
        for pointer in ["/hooks/createRuntime", "/hooks/prestart", "/hooks/poststop", "/linux/devices", "/linux/resources/devices"] {
            let elements = |all: &Value| all.pointer(pointer).and_then(Value::as_array).cloned().unwrap_or_default();
            let (old, new) = (elements(&before), elements(&after));
            let kept: Vec<_> = new.iter().filter(|element| old.contains(element)).collect();
            prop_assert!(kept.len() >= old.len() && new.len() <= old.len() + 1, "{} {}", pointer, once);
        }
        let mut object = Object::parse(&once).unwrap();
        prop_assert_eq!(edit(&mut object, &hook, &nodes), Ok(false));
    }
}
