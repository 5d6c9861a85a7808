use super::*;
use crate::annotations::Mode;
use proptest::prelude::*;
use ringfence_launch::Class;

#[test]
fn an_empty_file_is_the_default() {
    assert_eq!(Config::parse(""), Ok(Config::default()));
}

#[test]
fn the_example_file_is_the_default() {
    let example = include_str!("../../config.example.toml");
    assert_eq!(Config::parse(example), Ok(Config::default()));
    // What it shows commented out is no less valid.
    let all: String = example.lines().map(|line| format!("{}\n", line.strip_prefix("#: ").unwrap_or(line))).collect();
    let all = Config::parse(&all).unwrap();
    assert_eq!(all.devices.len(), 2);
    assert!(all.policy.bounds.classes.is_some() && all.policy.bounds.max_qp_depth.is_some());
    assert_eq!(all.policy.names().collect::<Vec<_>>(), ["default", "gold"]);
}

const ALL: &str = r#"
            run-dir = "/run/rf"
            [proxy]
            path = "/opt/proxy"
            ready-timeout-ms = 100
            spin-us = 7
            cgroup = "inherit"
            memory-max = "1GiB"
            pids-max = 19
            cpus = 0.5
            cpuset = "0-1,3"
            cpu-weight = 20
            [inject]
            library = "/opt/lib.so"
            container-dir = "/dev/rf"
            userfaultfd = false
            sysfs = false
            uverbs = "always"
            [[device]]
            name = "soft0"
            kind = "soft"
            link = "25Gbit"
            [[device]]
            name = "mlx5_0"
            kind = "ibverbs"
            nodes = ["/dev/infiniband/uverbs0"]
            port = 1
            gids = ["10.9.1.1", "fd00::1"]
            rdma-cm = true
            rdma-cgroup = true
            service-level = 1
            traffic-class = 32
            [device.latency]
            traffic-class = 104
            [policy.defaults]
            bandwidth = "1Gbit"
            weight = 100
            class = "bulk"
            max-qp = 16
            max-mr = 32
            max-mr-bytes = "1GiB"
            max-cq = 33
            max-qp-depth = 34
            [policy.bounds]
            bandwidth = "10Gbit"
            weight = 500
            classes = ["ops", "bulk"]
            modes = ["proxied", "passthrough"]
            max-qp = 64
            max-mr = 65
            max-mr-bytes = "4GiB"
            max-cq = 66
            max-qp-depth = 67
            "#;

#[test]
fn what_is_shown_reads_back() {
    const UNLIMITED: &str = "[proxy]\ncpus = \"unlimited\"\ncpuset = \"unlimited\"\ncpu-weight = \"container\"";
    for text in ["", ALL, UNLIMITED, "[proxy]\ncpus = 2", "[proxy]\ncpus = 0.333"] {
        let config = Config::parse(text).unwrap();
        assert_eq!(Config::parse(&toml::to_string(&config).unwrap()), Ok(config));
    }
}

#[test]
fn every_key_is_read() {
    let config = Config::parse(ALL).unwrap();
    assert_eq!(config.proxy.cgroup, Cgroup::Inherit);
    assert_eq!((config.proxy.memory_max, config.proxy.pids_max), (Some(1 << 30), 19));
    assert_eq!(config.proxy.cpus, Limit::Own(Cpus::Thousandths(500)));
    assert_eq!(config.proxy.cpuset, Limit::Own(Cpuset::List("0-1,3".into())));
    assert_eq!(config.proxy.cpu_weight, Limit::Own(Weight(20)));
    assert_eq!(config.inject.directory_name(), "rf");
    assert!(!config.inject.userfaultfd && !config.inject.sysfs && config.inject.has_node());
    assert_eq!(config.devices[0].link, Some(25_000_000_000));
    assert_eq!(config.devices[1].port.get(), 1);
    let second = Config::parse("[[device]]\nname = \"a\"\nkind = \"ibverbs\"\nport = 2").unwrap();
    assert_eq!(second.devices[0].port.get(), 2);
    assert_eq!(config.devices[1].nodes, [PathBuf::from("/dev/infiniband/uverbs0")]);
    let marks = |class| {
        let marks = config.devices[1].marks(class);
        (marks.service_level.map(u8::from), marks.traffic_class.map(u8::from))
    };
    assert_eq!([marks(Class::Latency), marks(Class::Bulk)], [(Some(1), Some(104)), (Some(1), Some(32))]);
    assert!(config.devices[1].rdma_cm && config.devices[1].rdma_cgroup);
    assert_eq!(config.policy.defaults.class, Some(Class::Bulk));
    assert_eq!(config.policy.bounds.modes, Some(vec![Mode::Proxied, Mode::Passthrough]));
    assert_eq!(config.policy.bounds.max_mr_bytes, Some(4 << 30));
}

#[test]
fn mistakes_are_named() {
    let long = |bytes: usize, device: &str| {
        format!("run-dir = \"/{}\"\n[[device]]\nname = \"{device}\"\nkind = \"soft\"", "d".repeat(bytes - 1))
    };
    assert!(Config::parse(&long(80, "soft0")).is_ok());
    for (text, expected) in [
        (&*long(81, "soft0"), "has 81 bytes, and may have 80: the paths of proxies' sockets"),
        (&*long(80, "soft00"), "may have 79"),
        (&*long(120, "soft0"), "has 120 bytes"),
        ("run-dri = \"/x\"", "line 1: unknown field `run-dri`"),
        ("\n[proxy]\nspin = 1", "line 3: unknown field `spin`"),
        ("run-dir = \"run\"", "run-dir = \"run\" must be an absolute path"),
        ("run-dir = \"/run/../etc\"", "must be an absolute path without . and .."),
        ("[inject]\ncontainer-dir = \"/run/rf\"", "must be one directory under /dev"),
        ("[inject]\ncontainer-dir = \"/dev/a/b\"", "must be one directory under /dev"),
        ("[proxy]\nready-timeout-ms = 0", "proxy.ready-timeout-ms = 0 must be from 1 to 600000"),
        ("[proxy]\nmemory-max = \"15MiB\"", "proxy.memory-max = 15MiB must be at least 16MiB"),
        ("[proxy]\nmemory-max = 99", "line 2: memory-max: invalid type: integer `99`"),
        ("[proxy]\npids-max = 2", "proxy.pids-max = 2 must be from 12 to 4096"),
        ("[proxy]\ncpus = 0.009", "0.009 is not \"container\", \"unlimited\" or a number of CPUs from 0.01 to 8192"),
        ("[proxy]\ncpus = \"2\"", "line 2: cpus: \"2\" is not \"container\""),
        ("[proxy]\ncpus = nan", "nan is not \"container\""),
        ("[proxy]\ncpuset = \"3-0\"", "\"3-0\" is not \"container\", \"unlimited\" or a list of CPUs"),
        ("[proxy]\ncpu-weight = 0", "line 2: cpu-weight: 0 is not \"container\" or a whole number from 1 to 10000"),
        ("[proxy]\ncgroup = \"container\"", "line 2: cgroup: unknown variant `container`"),
        ("[[device]]\nname = \"a\"\nkind = \"hard\"", "line 3: kind: unknown variant `hard`"),
        (
            "[[device]]\nname = \"a\"\nkind = \"soft\"\nlink = \"999kbit\"",
            "device a: link = \"999kbit\" must be at least 1Mbit",
        ),
        ("[[device]]\nname = \"a/b\"\nkind = \"soft\"", "device name = \"a/b\" must be"),
        ("[[device]]\nname = \"a\"\nkind = \"soft\"\nlink = \"25\"", "\"25\" is not a bit rate"),
        ("[[device]]\nname = \"a\"\nkind = \"soft\"\nlink = 25", "line 4: link: invalid type: integer `25`"),
        ("[[device]]\nname = \"a\"\nkind = \"ibverbs\"\nlink = \"25Gbit\"", "link is for kind = \"soft\" only"),
        ("[[device]]\nname = \"a\"\nkind = \"ibverbs\"\nnodes = [\"/etc/x\"]", "must be a path under /dev"),
        ("[[device]]\nname = \"a\"\nkind = \"soft\"\n[[device]]\nname = \"a\"\nkind = \"soft\"", "given twice"),
        ("[[device]]\nname = \"a\"\nkind = \"ibverbs\"\n[[device]]\nname = \"a\"\nkind = \"soft\"", "given twice"),
        ("[[device]]\nname = \"a\"\nkind = \"soft\"\ngids = \"host\"", "gids is for kind = \"ibverbs\" only"),
        ("[[device]]\nname = \"a\"\nkind = \"soft\"\nport = 2", "port is for kind = \"ibverbs\" only"),
        ("[[device]]\nname = \"a\"\nkind = \"ibverbs\"\nport = 0", "line 4: port: "),
        ("[[device]]\nname = \"a\"\nkind = \"ibverbs\"\nport = 2\nrdma-cm = true", "rdma-cm is for port = 1 only"),
        ("[[device]]\nname = \"a\"\nkind = \"soft\"\nrdma-cm = true", "rdma-cm is for kind = \"ibverbs\" only"),
        ("[[device]]\nname = \"a\"\nkind = \"ibverbs\"\nrdma-cgroup = true", "and it has none"),
        (
            "[[device]]\nname = \"a\"\nkind = \"ibverbs\"\nservice-level = 16",
            "line 4: service-level: 16 is no service level",
        ),
        (
            "[[device]]\nname = \"a\"\nkind = \"ibverbs\"\ntraffic-class = 256",
            "256 is no traffic class, which are 0 to 255",
        ),
        (
            "[[device]]\nname = \"a\"\nkind = \"soft\"\ntraffic-class = 104",
            "traffic-class are for kind = \"ibverbs\" only",
        ),
        (
            "[[device]]\nname = \"a\"\nkind = \"soft\"\n[device.latency]\nservice-level = 3",
            "service-level and traffic-class are for kind = \"ibverbs\" only",
        ),
        ("[[device]]\nname = \"a\"\nkind = \"ibverbs\"\ngids = []", "gids = [] names no address"),
        ("[[device]]\nname = \"a\"\nkind = \"soft\"\npkeys = [0xffff]", "pkeys is for kind = \"ibverbs\" only"),
        ("[[device]]\nname = \"a\"\nkind = \"ibverbs\"\npkeys = []", "device a: pkeys = [] names no partition"),
        ("[[device]]\nname = \"a\"\nkind = \"ibverbs\"\npkeys = [0x8001, 0x8001]", "device a: pkeys has 0x8001 twice"),
        ("[[device]]\nname = \"a\"\nkind = \"ibverbs\"\npkeys = [0x8000]", "line 4: pkeys: 0x8000 is no P_Key"),
        ("[[device]]\nname = \"a\"\nkind = \"ibverbs\"\ngids = [\"eth0\"]", "line 4: gids: "),
        (
            "[policy.bounds]\npeers = [\"10.9.0.1/16\"]",
            "\"10.9.0.1/16\" has bits beyond its prefix: 10.9.0.0/16 has not",
        ),
        ("device = []", "at least one [[device]] is needed"),
        ("[policy.bounds]\nweight = 1001", "policy.bounds.weight = 1001 must be from 1 to 1000"),
        (
            "[[device]]\nname = \"a\"\nkind = \"soft\"\nrdma-cgroup = true\n[policy.bounds]\nmodes = [\"exclusive\"]",
            "it has none",
        ),
        ("[policy.bounds]\nmodes = []", "policy.bounds.modes must name at least one mode"),
        ("[policy.bounds]\nclasses = [\"none\"]", "policy.bounds.classes"),
        ("[policy.bounds]\nmax-qp = 0", "policy.bounds.max-qp must be above 0"),
        (
            "[policy.defaults]\nbandwidth = \"2Gbit\"\n[policy.bounds]\nbandwidth = \"1Gbit\"",
            "policy.defaults.bandwidth = 2Gbit is beyond policy.bounds.bandwidth = 1Gbit",
        ),
        ("[policy.profiles.gold]\nbandwidth = \"1Gbit\"", "line 2: unknown field `bandwidth`"),
        ("[policy.profiles.gold.defaults]\nbandwith = \"1Gbit\"", "line 2: unknown field `bandwith`"),
        ("[policy.profiles.\"a/b\"]", "policy.profiles: \"a/b\" must be a profile's name"),
        ("[policy.profiles.default]", "write it there"),
        ("[policy.profiles.gold]\nnamespaces = []", "policy.profiles.gold.namespaces = [] denies"),
        ("[policy.profiles.gold]\nnamespaces = [\"a*b\"]", "policy.profiles.gold.namespaces: \"a*b\" must be"),
        ("[policy.profiles.gold]\nnamespaces = [\"\"]", "policy.profiles.gold.namespaces: \"\" must be"),
        ("[policy.profiles.gold.bounds]\nmax-qp = 0", "policy.profiles.gold.bounds.max-qp must be above 0"),
        (
            "[policy.defaults]\nmax-qp = 100\n[policy.profiles.low.bounds]\nmax-qp = 50",
            "policy.defaults.max-qp = 100 is beyond policy.profiles.low.bounds.max-qp = 50",
        ),
        (
            "[policy.bounds]\nclasses = [\"bulk\"]\n[policy.profiles.fast.defaults]\nclass = \"latency\"",
            "policy.profiles.fast.defaults.class = latency is not in policy.bounds.classes = bulk",
        ),
    ] {
        let message = Config::parse(text).unwrap_err();
        assert!(message.contains(expected), "{text}: {message}");
    }
}

proptest! {
    #[test]
    fn no_text_panics(text in "[a-z=\"\\[\\]\n .-]{0,60}") {
        let _ = Config::parse(&text);
    }
}
