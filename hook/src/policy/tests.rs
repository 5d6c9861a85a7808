use super::*;
use proptest::prelude::*;
use ringfence_launch::{BitRate, Bytes, OpRate, Weight};

fn config(text: &str) -> Config {
    Config::parse(text).unwrap()
}

fn limits(request: &Request, text: &str) -> Result<Limits, String> {
    match resolve(request, &Namespace::None, &config(text)).map(|resolution| resolution.grant) {
        Ok(Grant::Proxied(_, limits)) => Ok(limits),
        Ok(grant) => panic!("{grant:?}"),
        Err(refusal) => Err(refusal.to_string()),
    }
}

#[test]
fn without_a_word_the_built_in_limits_hold() {
    assert_eq!(limits(&Request::default(), ""), Ok(Limits::default()));
}

#[test]
fn bandwidth() {
    const BOTH: &str = "[policy.defaults]\nbandwidth = \"1Gbit\"\n[policy.bounds]\nbandwidth = \"10Gbit\"";
    const BOUND: &str = "[policy.bounds]\nbandwidth = \"10Gbit\"";
    const DEFAULT: &str = "[policy.defaults]\nbandwidth = \"1Gbit\"";
    const G: u64 = 1_000_000_000;
    for (asked, text, expected) in [
        (None, "", Ok(None)),
        (Some(40 * G), "", Ok(Some(40 * G))),
        (None, BOUND, Ok(Some(10 * G))),
        (Some(5 * G), BOUND, Ok(Some(5 * G))),
        (Some(10 * G), BOUND, Ok(Some(10 * G))),
        (None, DEFAULT, Ok(Some(G))),
        (Some(G / 2), DEFAULT, Ok(Some(G / 2))),
        (
            Some(2 * G),
            DEFAULT,
            Err("ringfence.dev/bandwidth=2Gbit is beyond the administrator's bound; allowed is at most 1Gbit"),
        ),
        (None, BOTH, Ok(Some(G))),
        (Some(2 * G), BOTH, Ok(Some(2 * G))),
        (
            Some(40 * G),
            BOTH,
            Err("ringfence.dev/bandwidth=40Gbit is beyond the administrator's bound; allowed is at most 10Gbit"),
        ),
    ] {
        let request = Request { bandwidth: asked, ..Request::default() };
        let found = limits(&request, text).map(|limits| limits.bandwidth.map(BitRate::bits));
        assert_eq!(found, expected.map_err(str::to_owned), "{asked:?} {text}");
    }
}

#[test]
fn rates_of_fetching_and_of_operations_are_bounded_as_bandwidth_is() {
    const BOUND: &str = "[policy.defaults]\nops = \"10k\"\n[policy.bounds]\nbandwidth-rx = \"10Gbit\"\nops = \"1M\"";
    let request = |bandwidth_rx, ops| Request { bandwidth_rx, ops, ..Request::default() };
    let found = |request: &Request| {
        limits(request, BOUND).map(|limits| (limits.bandwidth_rx.map(BitRate::bits), limits.ops.map(OpRate::ops)))
    };
    assert_eq!(found(&request(None, None)), Ok((Some(10_000_000_000), Some(10_000))));
    assert_eq!(found(&request(Some(1), Some(1_000_000))), Ok((Some(1), Some(1_000_000))));
    let beyond = "ringfence.dev/bandwidth-rx=20Gbit is beyond the administrator's bound; allowed is at most 10Gbit";
    assert_eq!(found(&request(Some(20_000_000_000), None)), Err(beyond.into()));
    let beyond = "ringfence.dev/ops=2M is beyond the administrator's bound; allowed is at most 1M";
    assert_eq!(found(&request(None, Some(2_000_000))), Err(beyond.into()));
    let contradiction = Config::parse("[policy.defaults]\nops = \"2M\"\n[policy.bounds]\nops = \"1M\"");
    assert_eq!(contradiction.unwrap_err(), "policy.defaults.ops = 2M is beyond policy.bounds.ops = 1M");
}

/// What reads annotations and tables lets none of this through; a cap that is none must not be lost if it does.
#[test]
fn a_cap_of_nothing_is_no_lack_of_one() {
    for request in [
        Request { bandwidth: Some(0), ..Request::default() },
        Request { bandwidth_rx: Some(0), ..Request::default() },
        Request { ops: Some(0), ..Request::default() },
        Request { weight: Some(1001), ..Request::default() },
    ] {
        assert!(limits(&request, LINKED).unwrap_err().ends_with(" is nothing that could be kept"), "{request:?}");
    }
}

#[test]
fn what_would_do_nothing_is_refused() {
    let weight = Request { weight: Some(300), ..Request::default() };
    let refused = limits(&weight, "").unwrap_err();
    assert_eq!(
        refused,
        "ringfence.dev/weight=300 would do nothing: device soft0 has no modelled link that containers share; remove it, or \
         use a device with a link"
    );
    assert_eq!(limits(&weight, LINKED).unwrap().weight, Weight::new(300));
    for class in [Class::Latency, Class::Ops, Class::Bulk] {
        let request = Request { class: Some(class), ..Request::default() };
        assert!(limits(&request, "").unwrap_err().starts_with("ringfence.dev/class="));
        assert_eq!(limits(&request, LINKED).unwrap().class, class);
        let capped = Request { ops: Some(1), ..request };
        assert_eq!(limits(&capped, "").unwrap().class, class);
        let by_default = "[policy.defaults]\nbandwidth = \"1Gbit\"";
        assert_eq!(limits(&Request { class: Some(class), ..Request::default() }, by_default).unwrap().class, class);
    }
    // Defaults are for all devices, whether or not they have a link.
    assert_eq!(limits(&Request::default(), "[policy.defaults]\nweight = 7").unwrap().weight, Weight::new(7));
}

/// A device with a link, on which weights and classes mean something.
const LINKED: &str = "[[device]]\nname = \"soft0\"\nkind = \"soft\"\nlink = \"10Gbit\"\n";

#[test]
fn weight() {
    const DEFAULT: &str = "[policy.defaults]\nweight = 100";
    const BOTH: &str = "[policy.defaults]\nweight = 100\n[policy.bounds]\nweight = 500";
    for (asked, text, expected) in [
        (Some(1000), "", Ok(Some(1000))),
        (Some(100), DEFAULT, Ok(Some(100))),
        (
            Some(101),
            DEFAULT,
            Err("ringfence.dev/weight=101 is beyond the administrator's bound; allowed is at most 100"),
        ),
        (Some(500), BOTH, Ok(Some(500))),
    ] {
        let request = Request { weight: asked, ..Request::default() };
        let found = limits(&request, &[LINKED, text].concat()).map(|limits| limits.weight.map(Weight::get));
        assert_eq!(found, expected.map_err(str::to_owned), "{asked:?} {text}");
    }
}

#[test]
fn class() {
    for (asked, text, expected) in [
        (None, "", Ok(Class::None)),
        (Some(Class::Latency), "", Ok(Class::Latency)),
        (None, "[policy.defaults]\nclass = \"ops\"", Ok(Class::Ops)),
        (Some(Class::Ops), "[policy.defaults]\nclass = \"ops\"", Ok(Class::Ops)),
        (
            Some(Class::Bulk),
            "[policy.defaults]\nclass = \"ops\"",
            Err(
                "ringfence.dev/class=bulk is not the administrator's default; allowed is ops, as long as bounds.classes \
                 of his configuration allow no others",
            ),
        ),
        (
            Some(Class::Bulk),
            "[policy.defaults]\nclass = \"ops\"\n[policy.bounds]\nclasses = [\"ops\", \"bulk\"]",
            Ok(Class::Bulk),
        ),
        (None, "[policy.bounds]\nclasses = [\"latency\", \"ops\"]", Ok(Class::Ops)),
        (
            Some(Class::Latency),
            "[policy.bounds]\nclasses = [\"ops\", \"bulk\"]",
            Err("ringfence.dev/class=latency is beyond the administrator's bound; allowed is ops, bulk"),
        ),
    ] {
        let request = Request { class: asked, ..Request::default() };
        let found = limits(&request, &[LINKED, text].concat()).map(|limits| limits.class);
        assert_eq!(found, expected.map_err(str::to_owned), "{asked:?} {text}");
    }
}

#[test]
fn a_tenant_cannot_raise_a_limit_that_the_administrator_left_alone() {
    let request = Request { max_mr_bytes: Some(1 << 40), ..Request::default() };
    assert_eq!(
        limits(&request, ""),
        Err("ringfence.dev/max-mr-bytes=1TiB is beyond the administrator's bound; allowed is at most 16GiB".into())
    );
    assert_eq!(limits(&request, "[policy.bounds]\nmax-mr-bytes = \"1TiB\"").unwrap().max_mr_bytes, Bytes(1 << 40));
}

#[test]
fn modes_and_devices() {
    const BOTH: &str = "[[device]]\nname = \"soft0\"\nkind = \"soft\"\n[[device]]\nname = \"mlx5_0\"\nkind = \"ibverbs\"\n\
         nodes = [\"/dev/infiniband/uverbs0\"]\n[policy.bounds]\nmodes = [\"proxied\", \"passthrough\"]";
    const CARD: &str = "[[device]]\nname = \"mlx5_0\"\nkind = \"ibverbs\"\n[policy.bounds]\n\
         modes = [\"proxied\", \"passthrough\"]";
    const EXCLUSIVE: &str = "[[device]]\nname = \"soft0\"\nkind = \"soft\"\n[[device]]\nname = \"mlx5_0\"\nkind = \"ibverbs\"\n\
         [policy.bounds]\nmodes = [\"exclusive\"]";
    for (mode, device, text, expected) in [
        (None, None, "", Ok("soft0")),
        (None, None, BOTH, Ok("soft0")),
        (Some(Mode::Proxied), Some("soft0"), BOTH, Ok("soft0")),
        (Some(Mode::Passthrough), None, BOTH, Ok("mlx5_0")),
        (
            Some(Mode::Passthrough),
            None,
            "",
            Err("ringfence.dev/mode=passthrough is beyond the administrator's bound; allowed is proxied"),
        ),
        (
            Some(Mode::Exclusive),
            None,
            BOTH,
            Err("ringfence.dev/mode=exclusive is beyond the administrator's bound; allowed is proxied, passthrough"),
        ),
        (Some(Mode::Exclusive), None, EXCLUSIVE, Ok("mlx5_0")),
        (None, None, EXCLUSIVE, Ok("mlx5_0")),
        (
            Some(Mode::Exclusive),
            Some("soft0"),
            EXCLUSIVE,
            Err(
                "device soft0 is no card (kind = \"ibverbs\"), so ringfence.dev/mode=exclusive is not possible; there is mlx5_0",
            ),
        ),
        (None, Some("mlx9"), BOTH, Err("ringfence.dev/device=mlx9 is not configured; there is soft0, mlx5_0")),
        (None, Some("mlx5_0"), BOTH, Ok("mlx5_0")),
        (None, None, CARD, Ok("mlx5_0")),
        (
            Some(Mode::Passthrough),
            None,
            CARD,
            Err("device mlx5_0 has no device nodes, so ringfence.dev/mode=passthrough is not possible; there is none"),
        ),
        (
            Some(Mode::Passthrough),
            Some("soft0"),
            BOTH,
            Err("device soft0 has no device nodes, so ringfence.dev/mode=passthrough is not possible; there is mlx5_0"),
        ),
    ] {
        let request = Request { mode, device: device.map(str::to_owned), ..Request::default() };
        let config = config(text);
        let found = resolve(&request, &Namespace::None, &config).map_err(|refusal| refusal.to_string());
        let found = found.map(|resolution| resolution.grant);
        let found = found.map(|(Grant::Proxied(device, _) | Grant::Passthrough(device) | Grant::Exclusive(device))| {
            device.name.as_str()
        });
        assert_eq!(found, expected.map_err(str::to_owned), "{mode:?} {device:?}");
    }
    for (mode, text) in [(Mode::Passthrough, BOTH), (Mode::Exclusive, EXCLUSIVE)] {
        let request = Request { mode: Some(mode), max_qp: Some(1), ..Request::default() };
        let (name, mode) = ("ringfence.dev/max-qp".into(), mode.name());
        assert_eq!(resolve(&request, &Namespace::None, &config(text)), Err(Refusal::Unenforceable { name, mode }));
    }
}

#[test]
fn the_kernel_keeps_what_it_can_count_of_the_limits() {
    let passthrough = Request { mode: Some(Mode::Passthrough), ..Request::default() };
    let of = |more: &str, limits: &str, request: &Request| {
        let config = config(&format!(
            "[[device]]\nname = \"mlx5_0\"\nkind = \"ibverbs\"\nnodes = [\"/dev/infiniband/uverbs0\"]\n{more}\n\
             [policy.defaults]\n{limits}\n[policy.bounds]\nmodes = [\"proxied\", \"passthrough\"]"
        ));
        resolve(request, &Namespace::None, &config).unwrap().objects
    };
    let limits = "max-qp = 3\nmax-cq = 5\nmax-mr = 7";
    let expected = Rdma { hca_handles: Some(3), hca_objects: Some(18) };
    assert_eq!(of("rdma-cgroup = true", limits, &passthrough), Some(expected));
    assert_eq!(of("", limits, &passthrough), None);
    assert_eq!(of("rdma-cgroup = true", limits, &Request::default()), None, "its proxy keeps them");
    let exclusive = config(
        "[[device]]\nname = \"mlx5_0\"\nkind = \"ibverbs\"\nrdma-cgroup = true\n[policy.defaults]\nmax-qp = 3\nmax-cq = 5\nmax-mr = 7\n\
         [policy.bounds]\nmodes = [\"exclusive\"]",
    );
    assert_eq!(resolve(&Request::default(), &Namespace::None, &exclusive).unwrap().objects, Some(expected));
    let most = Rdma { hca_handles: Some(i32::MAX as u32), hca_objects: Some(i32::MAX as u32) };
    assert_eq!(of("rdma-cgroup = true", "max-qp = 4294967295", &passthrough), Some(most));
}

#[test]
fn peers_are_the_administrators() {
    const PEERS: &str =
        "[policy.bounds]\npeers = [\"10.9.0.0/16\", \"fd00::/8\"]\n[policy.profiles.alone]\nbounds.peers = []\n";
    let resolve = |policy: Option<&str>, text| {
        let policy = policy.map(|name| Choice::Engine(name.into()));
        let config = config(text);
        let resolution = super::resolve(&Request { policy, ..Request::default() }, &Namespace::None, &config).unwrap();
        let Grant::Proxied(_, limits) = resolution.grant else { panic!("{:?}", resolution.grant) };
        let shown = resolution.settings.iter().find(|setting| setting.key == "peers");
        (
            limits.peers.map(|peers| peers.to_string()),
            shown.map(|setting| format!("{}: {}", setting.origin, setting.value)),
        )
    };
    let owned = |text: &str| Some(text.to_owned());
    assert_eq!(resolve(None, ""), (None, None));
    let expected = (owned("10.9.0.0/16, fd00::/8"), owned("policy.bounds: 10.9.0.0/16, fd00::/8"));
    assert_eq!(resolve(None, PEERS), expected);
    let expected = (owned("nobody"), owned("policy.profiles.alone.bounds: nobody"));
    assert_eq!(resolve(Some("alone"), PEERS), expected);
}

const PROFILES: &str = r#"
    [policy.defaults]
    bandwidth = "1Gbit"
    class = "bulk"
    max-qp = 16
    [policy.bounds]
    bandwidth = "10Gbit"
    [policy.profiles.gold]
    namespaces = ["team-a", "ml-*"]
    bounds.bandwidth = "100Gbit"
    bounds.max-qp = 1024
    [policy.profiles.bronze]
    defaults.bandwidth = "100Mbit"
    defaults.max-qp = 8
    bounds.bandwidth = "500Mbit"
"#;

fn by_annotation(policy: &str) -> Request {
    Request { policy: Some(Choice::Annotation(policy.into())), ..Request::default() }
}

fn by_engine(policy: &str) -> Request {
    Request { policy: Some(Choice::Engine(policy.into())), ..Request::default() }
}

#[test]
fn what_a_profile_leaves_out_is_as_in_the_base() {
    const M: u64 = 1_000_000;
    for (policy, bandwidth, max_qp, bandwidth_bound, qp_bound) in [
        ("default", 1000 * M, 16, 10_000 * M, 16),
        ("gold", 1000 * M, 16, 100_000 * M, 1024),
        ("bronze", 100 * M, 8, 500 * M, 8),
    ] {
        let found = limits(&by_engine(policy), PROFILES).unwrap();
        assert_eq!(
            (found.bandwidth, found.max_qp, found.class),
            (BitRate::new(bandwidth), max_qp, Class::Bulk),
            "{policy}"
        );
        for (bandwidth, max_qp, granted) in [
            (bandwidth_bound, qp_bound, true),
            (bandwidth_bound + 1, qp_bound, false),
            (bandwidth_bound, qp_bound + 1, false),
        ] {
            let request = Request { bandwidth: Some(bandwidth), max_qp: Some(max_qp), ..by_engine(policy) };
            assert_eq!(limits(&request, PROFILES).is_ok(), granted, "{policy} {bandwidth} {max_qp}");
        }
    }
}

#[test]
fn namespaces() {
    let known = |name: &str| Namespace::Known(name.into());
    let denied = |whom: &str| Err(format!("policy gold is denied to {whom}; it is for namespaces team-a, ml-* only"));
    let config = config(PROFILES);
    for (namespace, expected) in [
        (known("team-a"), Ok(())),
        (known("ml-"), Ok(())),
        (known("ml-vision"), Ok(())),
        (known("team-ab"), denied("namespace team-ab")),
        (known("ml"), denied("namespace ml")),
        (Namespace::None, denied("a container without a Kubernetes namespace")),
        (
            Namespace::Claimed("team-a".into()),
            denied("a container that claims to be of namespace \"team-a\" but was not made through CRI"),
        ),
    ] {
        let of = |request: &Request| resolve(request, &namespace, &config).map(drop).map_err(|error| error.to_string());
        assert_eq!(of(&by_annotation("gold")), expected, "{namespace:?}");
        for request in [by_engine("gold"), by_annotation("bronze"), by_annotation("default"), Request::default()] {
            assert_eq!(of(&request), Ok(()), "{namespace:?} {request:?}");
        }
    }
}

#[test]
fn policies_that_are_not_there() {
    let error = |request| resolve(&request, &Namespace::None, &config(PROFILES)).unwrap_err().to_string();
    assert_eq!(
        error(by_annotation("silver")),
        "annotation ringfence.dev/policy=silver names no policy of the administrator's; there is default, bronze, gold"
    );
    assert_eq!(
        error(by_engine("silver")),
        "the engine gives this container the policy silver (--policy), which is not configured; \
         there is default, bronze, gold"
    );
}

#[test]
fn every_value_has_an_origin() {
    let bandwidth = "bandwidth.ringfence.dev/container.app";
    let request = Request {
        bandwidth: Some(2_000_000_000),
        sources: [("bandwidth", bandwidth.to_owned())].into(),
        ..by_engine("gold")
    };
    let config = config(PROFILES);
    let found = resolve(&request, &Namespace::None, &config).unwrap();
    assert_eq!(found.policy, "gold");
    let shown: Vec<_> = found
        .settings
        .iter()
        .map(|s| format!("{}={} by {}, bound {}", s.key, s.value, s.origin, s.bound.as_deref().unwrap_or("-")))
        .collect();
    assert_eq!(
        shown,
        [
            "policy=gold by the engine, bound by annotation, from namespaces team-a, ml-*",
            "mode=proxied by built in, bound proxied (built in)",
            "device=soft0 by device, bound soft0 (device)",
            "bandwidth=2Gbit by annotation bandwidth.ringfence.dev/container.app, \
             bound at most 100Gbit (policy.profiles.gold.bounds)",
            "bandwidth-rx=none by built in, bound -",
            "ops=none by built in, bound -",
            "weight=none by built in, bound -",
            "class=bulk by policy.defaults, bound bulk (policy.defaults)",
            "max-qp=16 by policy.defaults, bound at most 1024 (policy.profiles.gold.bounds)",
            "max-mr=4096 by built in, bound at most 4096 (built in)",
            "max-mr-bytes=16GiB by built in, bound at most 16GiB (built in)",
            "max-cq=256 by built in, bound at most 256 (built in)",
            "max-qp-depth=16384 by built in, bound at most 16384 (built in)",
        ]
    );
    // A bound serves where there is no default.
    let text = "[policy.bounds]\nbandwidth = \"1Gbit\"\nclasses = [\"ops\"]\nmax-qp = 8";
    let config = self::config(text);
    let found = resolve(&Request::default(), &Namespace::None, &config).unwrap();
    for key in ["bandwidth", "class", "max-qp"] {
        let setting = found.settings.iter().find(|setting| setting.key == key).unwrap();
        assert_eq!(setting.origin, Origin::Bound("policy.bounds".into()), "{key}");
    }
}

fn some<T: Clone + std::fmt::Debug + 'static>(values: impl Strategy<Value = T> + 'static) -> BoxedStrategy<Option<T>> {
    proptest::option::of(values).boxed()
}

proptest! {
    #[test]
    fn what_is_granted_never_exceeds_the_bounds(
        asked in (some(1..100u64), some(1..=1000u32), some(1..100u32), some(1..100u64)),
        bound in (some(1..100u64), some(1..=1000u32), some(1..100u32), some(1..100u64)),
        default in (some(1..100u64), some(1..=1000u32), some(1..100u32), some(1..100u64)),
    ) {
        let request = Request {
            bandwidth: asked.0, weight: asked.1, max_qp: asked.2, max_mr_bytes: asked.3, ..Request::default()
        };
        let bounds = Bounds {
            bandwidth: bound.0, weight: bound.1, max_qp: bound.2, max_mr_bytes: bound.3, ..Bounds::default()
        };
        let defaults = Defaults {
            bandwidth: default.0, weight: default.1, max_qp: default.2, max_mr_bytes: default.3, ..Defaults::default()
        };
        let policy = Policy { bounds, defaults, ..Policy::default() };
        // Annotations only narrow: what bounds them is the bound or else the default.
        let limit = (bound.0.or(default.0), bound.1.or(default.1), bound.2.or(default.2), bound.3.or(default.3));
        fn exceeds<T: PartialOrd>(asked: Option<T>, limit: Option<T>) -> bool {
            matches!((asked, limit), (Some(asked), Some(limit)) if asked > limit)
        }
        let beyond = exceeds(asked.0, limit.0) || exceeds(asked.1, limit.1)
            || exceeds(asked.2, limit.2) || exceeds(asked.3, limit.3);
        match settings::limits(&request, policy.effective("default").unwrap(), &mut Vec::new()) {
            Err(_) => prop_assert!(beyond),
            Ok(limits) => {
                prop_assert!(!beyond);
                prop_assert_eq!(limits.bandwidth.map(BitRate::bits), asked.0.or(default.0).or(bound.0));
                prop_assert_eq!(limits.weight.map(Weight::get), asked.1.or(default.1).or(bound.1));
                prop_assert!(asked.2.is_none() || limits.max_qp <= limit.2.unwrap_or(256));
                prop_assert!(asked.2.is_none_or(|asked| limits.max_qp == asked));
                prop_assert!(asked.3.is_none() || limits.max_mr_bytes.0 <= limit.3.unwrap_or(16 << 30));
            }
        }
    }
}
