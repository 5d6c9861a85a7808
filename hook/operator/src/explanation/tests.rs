use super::*;
use serde_json::json;

fn facts(pairs: &[(&str, &str)]) -> Facts {
    let annotations = pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    Facts { annotations, namespace: Namespace::None, policy: None }
}

fn explain(facts: &Facts, text: &str) -> Explanation {
    let config = Config::parse(text).unwrap();
    Explanation::of(facts, || Ok(config))
}

#[test]
fn why_a_container_is_left_alone() {
    const NAME: (&str, &str) = ("io.kubernetes.cri.container-name", "app");
    for (pairs, expected) in [
        (vec![], "it has no annotation ringfence.dev/enable=true, and no engine was told to enable it"),
        (vec![("ringfence.dev/enable", "no")], "annotation ringfence.dev/enable=no switches it off"),
        (
            vec![NAME, ("ringfence.dev/enable", "yes"), ("enable.ringfence.dev/container.app", "no")],
            "annotation enable.ringfence.dev/container.app=no switches it off",
        ),
        (
            vec![NAME, ("enable.ringfence.dev/container.other", "yes")],
            "its pod's annotations enable other containers only",
        ),
        (
            vec![("ringfence.dev/enable", "yes"), ("io.kubernetes.cri.container-type", "sandbox")],
            "it is a pod's sandbox, which only holds the pod's namespaces",
        ),
    ] {
        let found = Explanation::of(&facts(&pairs), || panic!("the hook reads no configuration for others"));
        assert_eq!(found.verdict, Verdict::LeftAlone { reason: expected.into() }, "{pairs:?}");
        assert_eq!(found.exit_code(), 0);
    }
}

#[test]
fn every_value_says_who_gave_it() {
    let mut facts = facts(&[
        ("io.kubernetes.cri.container-name", "app"),
        ("ringfence.dev/enable", "true"),
        ("ringfence.dev/bandwidth", "1Gbit"),
        ("bandwidth.ringfence.dev/pod", "2Gbit"),
        ("bandwidth.ringfence.dev/container.app", "3Gbit"),
        ("bandwidth.ringfence.dev/container.other", "4Gbit"),
        ("weight.ringfence.dev/pod", "7"),
    ]);
    facts.namespace = Namespace::Known("team-a".into());
    let found = explain(
        &facts,
        "[policy.defaults]\nmax-qp = 16\n[policy.bounds]\nbandwidth = \"10Gbit\"\nclasses = [\"bulk\"]\n\
         [[device]]\nname = \"soft0\"\nkind = \"soft\"\nlink = \"10Gbit\"",
    );
    assert_eq!((found.container.as_deref(), found.namespace.as_deref()), (Some("app"), Some("team-a")));
    let Verdict::Joined { enabled_by, device, settings, mounts } = &found.verdict else { panic!("{found:?}") };
    assert_eq!((enabled_by.as_str(), device.as_str()), ("annotation ringfence.dev/enable=true", "soft0"));
    let from = |key: &str| {
        let setting = settings.iter().find(|setting| setting.key == key).unwrap();
        (setting.value.as_str(), setting.from.as_str())
    };
    assert_eq!(from("bandwidth"), ("3Gbit", "annotation bandwidth.ringfence.dev/container.app"));
    assert_eq!(from("weight"), ("7", "annotation weight.ringfence.dev/pod"));
    assert_eq!(from("class"), ("bulk", "policy.bounds"));
    assert_eq!(from("max-qp"), ("16", "policy.defaults"));
    assert_eq!(from("max-mr"), ("4096", "built in"));
    assert!(mounts.iter().any(|mount| mount.destination == Path::new("/etc/ld.so.preload")));
    let unused: Vec<_> = found.unused.iter().map(|unused| (unused.annotation.as_str(), unused.why.as_str())).collect();
    assert_eq!(
        unused,
        [
            ("bandwidth.ringfence.dev/container.other", "is for container other"),
            ("bandwidth.ringfence.dev/pod", "bandwidth.ringfence.dev/container.app goes before it"),
            ("ringfence.dev/bandwidth", "bandwidth.ringfence.dev/container.app goes before it"),
        ]
    );
}

#[test]
fn what_is_allowed_is_said_of_every_value() {
    let asked = facts(&[("ringfence.dev/enable", "true")]);
    let allowed = |text: &str, key: &str| {
        let Verdict::Joined { settings, .. } = explain(&asked, text).verdict else { panic!("{text}") };
        settings.into_iter().find(|setting| setting.key == key).unwrap().bound
    };
    const DEFAULTS: &str = "[policy.defaults]\nbandwidth = \"1Gbit\"\nbandwidth-rx = \"2Gbit\"\nops = \"2.5M\"\nweight = 9\n\
         class = \"ops\"";
    for (key, expected) in [
        ("bandwidth", "at most 1Gbit (policy.defaults)"),
        ("bandwidth-rx", "at most 2Gbit (policy.defaults)"),
        ("ops", "at most 2.5M (policy.defaults)"),
        ("weight", "at most 9 (policy.defaults)"),
        ("class", "ops (policy.defaults)"),
    ] {
        assert_eq!(allowed(DEFAULTS, key).as_deref(), Some(expected));
        assert_eq!(allowed("", key), None, "{key} is free where the administrator says nothing");
    }
    let refused = facts(&[("ringfence.dev/enable", "true"), ("ringfence.dev/class", "latency")]);
    let Verdict::Refused { code: 13, message } = explain(&refused, DEFAULTS).verdict else { panic!("not refused") };
    assert!(message.contains("allowed is ops, as long as bounds.classes"), "{message}");
}

#[test]
fn refusals_are_the_hooks() {
    for (pairs, code) in [
        (vec![("ringfence.dev/enable", "maybe")], 12),
        (vec![("ringfence.dev/enable", "1"), ("ringfence.dev/bandwidth", "1Tbit")], 13),
        (vec![("ringfence.dev/enable", "1"), ("ringfence.dev/device", "mlx9")], 14),
    ] {
        let facts = facts(&pairs);
        let found = explain(&facts, "[policy.bounds]\nbandwidth = \"10Gbit\"");
        let Verdict::Refused { message, .. } = &found.verdict else { panic!("{found:?}") };
        assert_eq!(found.exit_code(), code, "{message}");
        let (name, _) = pairs.last().unwrap();
        assert!(message.contains(name), "{message}");
    }
    let broken = || Err(config::Error::Invalid { path: "/etc/x".into(), message: "line 1: nonsense".into() });
    let found = Explanation::of(&facts(&[("ringfence.dev/enable", "1")]), broken);
    let message = "configuration /etc/x: line 1: nonsense".to_owned();
    assert_eq!(found.verdict, Verdict::Refused { code: 11, message });
}

#[test]
fn the_engines_choice_needs_no_annotation() {
    let facts = Facts { policy: Some("gold".into()), ..facts(&[]) };
    let found = explain(&facts, "[policy.profiles.gold.defaults]\nweight = 500");
    let Verdict::Joined { enabled_by, settings, .. } = found.verdict else { panic!("{found:?}") };
    assert_eq!(enabled_by, "the engine, with policy gold");
    let weight = settings.iter().find(|setting| setting.key == "weight").unwrap();
    assert_eq!((weight.value.as_str(), weight.from.as_str()), ("500", "policy.profiles.gold.defaults"));
}

#[test]
fn the_hook_is_found_in_a_bundle() {
    let hook = std::path::Path::new("/opt/hook");
    let found = |config: serde_json::Value| match Registered::of(&config, hook) {
        Registered::No => None,
        Registered::Yes { policy } => Some(policy),
    };
    assert_eq!(found(json!({})), None);
    assert_eq!(found(json!({"hooks": null})), None);
    assert_eq!(found(json!({"hooks": {"createRuntime": [{"path": "/usr/bin/other"}]}})), None);
    assert_eq!(found(json!({"hooks": {"poststop": [{"path": "/opt/hook"}]}})), None);
    assert_eq!(found(json!({"hooks": {"prestart": [{"path": "/opt/hook"}]}})), Some(None));
    let args = json!(["ringfence-hook", "createRuntime", "--policy", "gold"]);
    let entry = json!({"path": "/usr/bin/ringfence-hook", "args": args});
    assert_eq!(found(json!({"hooks": {"createRuntime": [{"path": "/x"}, entry]}})), Some(Some("gold".into())));
}
