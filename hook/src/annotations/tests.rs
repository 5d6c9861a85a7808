use super::*;
use crate::units;
use proptest::prelude::*;
use ringfence_launch::Class;

const NAME: &str = "io.kubernetes.cri.container-name";

fn map(pairs: &[(&str, &str)]) -> Annotations {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

/// The bare form of `pairs`.
fn bare(pairs: &[(&str, &str)]) -> Annotations {
    pairs.iter().map(|(key, value)| (format!("{PREFIX}{key}"), (*value).to_owned())).collect()
}

#[track_caller]
fn message(annotations: &Annotations, policy: Option<&str>, expected: &str) {
    assert_eq!(wanted(annotations, policy).unwrap_err().to_string(), expected);
}

#[test]
fn other_annotations_are_not_ours() {
    assert_eq!(wanted(&map(&[("io.kubernetes.cri.x", "y"), ("ringfence.device/x", "y")]), None), Ok(None));
}

#[test]
fn enable_switches() {
    for yes in ["true", "1", "yes"] {
        assert_eq!(wanted(&bare(&[("enable", yes)]), None), Ok(Some(Request::default())));
    }
    for no in ["false", "0", "no"] {
        for policy in [None, Some("gold")] {
            assert_eq!(wanted(&bare(&[("enable", no), ("whatever", "x")]), policy), Ok(None));
        }
    }
    message(
        &bare(&[("enable", "TRUE")]),
        None,
        r#"annotation ringfence.dev/enable="TRUE" is malformed; allowed is true, 1, yes, false, 0 or no"#,
    );
}

#[test]
fn a_sandbox_is_left_alone() {
    let mut annotations = bare(&[("enable", "true"), ("whatever", "x")]);
    annotations.insert("io.kubernetes.cri.container-type".into(), "sandbox".into());
    for policy in [None, Some("gold")] {
        assert_eq!(wanted(&annotations, policy), Ok(None));
    }
}

#[test]
fn all_keys_are_read() {
    let pairs = [
        ("enable", "true"),
        ("policy", "gold"),
        ("mode", "passthrough"),
        ("device", "mlx5_0"),
        ("bandwidth", "10Gbit"),
        ("bandwidth-rx", "5Gbit"),
        ("ops", "10k"),
        ("weight", "1000"),
        ("class", "latency"),
        ("max-qp", "1"),
        ("max-mr", "2"),
        ("max-mr-bytes", "4GiB"),
        ("max-cq", "3"),
        ("max-qp-depth", "4"),
    ];
    let request = Request {
        policy: Some(Choice::Annotation("gold".into())),
        mode: Some(Mode::Passthrough),
        device: Some("mlx5_0".into()),
        bandwidth: Some(10_000_000_000),
        bandwidth_rx: Some(5_000_000_000),
        ops: Some(10_000),
        weight: Some(1000),
        class: Some(Class::Latency),
        max_qp: Some(1),
        max_mr: Some(2),
        max_mr_bytes: Some(4 << 30),
        max_cq: Some(3),
        max_qp_depth: Some(4),
        sources: KEYS[1..].iter().map(|key| (*key, format!("{PREFIX}{key}"))).collect(),
    };
    assert_eq!(wanted(&bare(&pairs), None), Ok(Some(request)));
    assert_eq!(pairs.map(|(key, _)| key), KEYS);
}

#[test]
fn the_narrower_scope_has_precedence() {
    let forms = |key: &str| {
        [format!("{PREFIX}{key}"), format!("{key}.ringfence.dev/pod"), format!("{key}.ringfence.dev/container.app")]
    };
    let (weights, enables) = (forms("weight"), forms("enable"));
    // Which of the scopes speak, as bits.
    for present in 1..8_usize {
        let speaking: Vec<usize> = (0..3).filter(|scope| present & (1 << scope) != 0).collect();
        let narrowest = *speaking.last().unwrap();
        let mut annotations = map(&[(NAME, "app"), ("ringfence.dev/enable", "true")]);
        for scope in &speaking {
            annotations.insert(weights[*scope].clone(), (scope + 1).to_string());
        }
        annotations.insert("weight.ringfence.dev/container.db".into(), "999".into());
        let request = wanted(&annotations, None).unwrap().unwrap();
        assert_eq!(request.weight, Some(narrowest as u32 + 1), "{present:b}");
        assert_eq!(request.sources["weight"], weights[narrowest], "{present:b}");

        for (last, others) in [("true", "false"), ("false", "true")] {
            let mut annotations = map(&[(NAME, "app")]);
            for scope in &speaking {
                let value = if *scope == narrowest { last } else { others };
                annotations.insert(enables[*scope].clone(), value.into());
            }
            assert_eq!(wanted(&annotations, None).unwrap().is_some(), last == "true", "{present:b} {last}");
        }
    }
}

#[test]
fn a_pod_enables_some_of_its_containers() {
    let pod = [
        ("enable.ringfence.dev/container.app", "true"),
        ("bandwidth.ringfence.dev/container.app", "10Gbit"),
        ("weight.ringfence.dev/container.db", "junk"),
        ("ringfence.dev/class", "bulk"),
    ];
    let of = |name: &str, policy| wanted(&map(&[&pod[..], &[(NAME, name)]].concat()), policy);
    // What is for db is db's concern.
    let app = of("app", None).unwrap().unwrap();
    assert_eq!((app.bandwidth, app.weight, app.class), (Some(10_000_000_000), None, Some(Class::Bulk)));
    assert_eq!(of("db", None), Ok(None));
    assert_eq!(of("sidecar", None), Ok(None));
    // Enabled by the engine after all.
    assert_eq!(
        of("db", Some("gold")).unwrap_err().to_string(),
        r#"annotation weight.ringfence.dev/container.db="junk" is malformed; allowed is a whole number from 1 to 1000"#
    );
    let sidecar = of("sidecar", Some("gold")).unwrap().unwrap();
    assert_eq!((sidecar.class, sidecar.policy), (Some(Class::Bulk), Some(Choice::Engine("gold".into()))));
}

#[test]
fn names_that_nobody_told_are_an_error() {
    for key in ["enable", "weight"] {
        let name = format!("{key}.ringfence.dev/container.app");
        let annotations = map(&[("ringfence.dev/enable", "true"), (&name, "1")]);
        let expected = format!(
            "annotation {name} is for a container by its name, which this engine does not tell \
             (containerd's CRI and CRI-O do); use ringfence.dev/{key}"
        );
        message(&annotations, None, &expected);
    }
}

#[test]
fn the_engine_chooses_the_policy() {
    let engine = |name: &str| Ok(Some(Request { policy: Some(Choice::Engine(name.into())), ..Request::default() }));
    for (annotations, expected) in [
        (bare(&[]), engine("gold")),
        (bare(&[("enable", "true")]), engine("gold")),
        (bare(&[("policy", "gold")]), engine("gold")),
        (bare(&[("policy", "gold"), ("enable", "no")]), Ok(None)),
    ] {
        assert_eq!(wanted(&annotations, Some("gold")), expected, "{annotations:?}");
    }
    message(
        &bare(&[("policy", "silver")]),
        Some("default"),
        "annotation ringfence.dev/policy=silver contradicts the policy default that the engine gives this container; \
         remove the annotation",
    );
}

#[test]
fn mistakes_name_key_value_and_what_is_allowed() {
    let all = "enable, policy, mode, device, bandwidth, bandwidth-rx, ops, weight, class, max-qp, max-mr, max-mr-bytes, \
               max-cq, max-qp-depth";
    let malformed = |key: &str, value: &str, expected: &str| {
        (
            format!("{PREFIX}{key}"),
            value.to_owned(),
            format!("{PREFIX}{key}={value:?} is malformed; allowed is {expected}"),
        )
    };
    let unknown = |name: &str| (name.to_owned(), "1Gbit".into(), format!("{name} is unknown; allowed are {all}"));
    for (name, value, expected) in [
        unknown("ringfence.dev/band-width"),
        unknown("band-width.ringfence.dev/pod"),
        unknown("band-width.ringfence.dev/container.db"),
        (
            "class.ringfence.dev/foo".into(),
            "bulk".into(),
            "class.ringfence.dev/foo names no scope; \
             allowed are class.ringfence.dev/pod and class.ringfence.dev/container.<name>"
                .into(),
        ),
        malformed("bandwidth", "10gbps", units::RATE_EXPECTED),
        malformed("bandwidth-rx", "10", units::RATE_EXPECTED),
        malformed("ops", "10K", units::OPS_EXPECTED),
        malformed("weight", "1001", "a whole number from 1 to 1000"),
        malformed("class", "bulky", "latency, ops or bulk"),
        malformed("mode", "a\nb", "proxied, passthrough or exclusive"),
        malformed("max-qp", "-1", "a whole number from 1 to 4294967295"),
        malformed("max-mr-bytes", "4G", units::SIZE_EXPECTED),
        malformed("device", "../sda", DEVICE_NAME),
        malformed("policy", "a/b", POLICY_NAME),
    ] {
        let annotations = map(&[(NAME, "app"), ("ringfence.dev/enable", "true"), (&name, &value)]);
        message(&annotations, None, &format!("annotation {expected}"));
    }
}

#[test]
fn keys_without_enable_fail() {
    for name in ["ringfence.dev/bandwidth", "bandwidth.ringfence.dev/pod", "bandwidth.ringfence.dev/container.db"] {
        message(
            &map(&[(NAME, "app"), (name, "1Gbit")]),
            None,
            &format!(
                "annotation {name} is given but ringfence.dev/enable is not; \
                 add ringfence.dev/enable=true, or =false to start without RDMA"
            ),
        );
    }
    assert!(matches!(wanted(&bare(&[("bandwith", "1Gbit")]), None), Err(Error::Unknown { .. })));
}

#[test]
fn long_texts_are_cut() {
    let long = "ä".repeat(100_000);
    for annotations in [
        bare(&[("enable", &long)]),
        bare(&[("enable", "1"), (&long, "")]),
        map(&[(NAME, &long), (&format!("enable.ringfence.dev/container.{long}"), "x")]),
    ] {
        let text = wanted(&annotations, None).unwrap_err().to_string();
        assert!(text.len() < 500, "{text}");
    }
}

proptest! {
    #[test]
    fn no_annotation_panics_or_is_ignored(key in ".{0,20}", value in ".{0,20}") {
        let result = wanted(&bare(&[("enable", "true"), (&key, &value)]), None);
        let unknown = matches!(result, Err(Error::Unknown { .. }));
        prop_assert!(KEYS.contains(&key.as_str()) || unknown);
    }
}
