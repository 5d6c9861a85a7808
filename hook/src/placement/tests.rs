use super::*;

fn membership(controllers: &str, directory: &str) -> Membership {
    let controllers = controllers.split(',').filter(|c| !c.is_empty()).map(str::to_owned).collect();
    Membership { controllers, directory: directory.into(), is_root: directory.ends_with('/') }
}

fn plan(memberships: &[(&str, &str)], systemd_runs: bool) -> Placement {
    let memberships: Vec<_> = memberships.iter().map(|(c, d)| membership(c, d)).collect();
    Placement::among(&memberships, "c1", Limits::default(), systemd_runs)
}

fn paths(placement: &Placement) -> Vec<String> {
    placement.paths().iter().map(|path| path.display().to_string()).collect()
}

#[test]
fn version_1_has_a_place_for_each_controller_that_matters() {
    let v1 = [
        ("memory", "/cg/memory/pod/c1"),
        ("cpu,cpuacct", "/cg/cpu/pod/c1"),
        ("cpuset", "/cg/cpuset/pod/c1"),
        ("pids", "/cg/pids/"),
        ("devices", "/cg/devices/pod/c1"),
        ("name=systemd", "/cg/systemd/pod/c1"),
        ("", "/cg/unified/pod/c1"),
    ];
    let expected = ["memory", "cpu", "cpuset"].map(|controller| format!("/cg/{controller}/pod/ringfence-c1"));
    assert_eq!(paths(&plan(&v1, false)), expected);
    // Not in a slice: none of systemd's business.
    assert_eq!(paths(&plan(&v1, true)).len(), 3);
}

#[test]
fn version_2_is_one_place() {
    assert_eq!(paths(&plan(&[("", "/cg/pod/c1")], true)), ["/cg/pod/ringfence-c1"]);
    // A name alone makes no slice of systemd's.
    let placement = plan(&[("", "/cg/x.slice/runc-c1.scope")], false);
    assert_eq!((paths(&placement), placement.unit()), (vec!["/cg/x.slice/ringfence-c1".into()], None));
}

#[test]
fn slices_are_systemds() {
    for (directory, slice, before) in [
        ("/cg/kubepods-pod1.slice/cri-containerd-c1.scope", "kubepods-pod1.slice", Some("cri-containerd-c1.scope")),
        ("/cg/machine.slice/libpod-c1.scope/container", "machine.slice", Some("libpod-c1.scope")),
        ("/cg/system.slice/c1", "system.slice", None),
    ] {
        let placement = plan(&[("", directory)], true);
        let scope = placement.scope.as_ref().unwrap();
        assert_eq!((scope.slice.as_str(), scope.before.as_deref()), (slice, before), "{directory}");
        assert_eq!((placement.unit(), paths(&placement).len()), (Some("ringfence-c1.scope"), 0));
    }
    // A service's own subtree was delegated to it.
    assert_eq!(
        paths(&plan(&[("", "/cg/system.slice/x.service/c1")], true)),
        ["/cg/system.slice/x.service/ringfence-c1"]
    );
    let v1 =
        ["memory", "rdma", "cpuset"].map(|controller| (controller, format!("/cg/{controller}/a.slice/x-c1.scope")));
    let v1: Vec<_> = v1.iter().map(|(controller, directory)| (*controller, directory.as_str())).collect();
    assert_eq!(paths(&plan(&v1, true)), ["/cg/rdma/a.slice/ringfence-c1", "/cg/cpuset/a.slice/ringfence-c1"]);
}

#[test]
fn without_a_cgroup_of_its_own_there_is_a_warning() {
    let placement = plan(&[("", "/cg/")], false);
    assert_eq!((paths(&placement).len(), placement.warnings().len()), (0, 1));
    assert!(placement.warnings()[0].contains("no cgroup of its own"), "{:?}", placement.warnings());
}

#[test]
fn what_cannot_be_limited_is_a_warning() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("pod/ringfence-c1");
    std::fs::create_dir_all(&path).unwrap();
    std::fs::write(path.join("pids.max"), "").unwrap();
    let rdma = BTreeMap::from([("mlx5_0".to_owned(), Rdma { hca_handles: Some(3), hca_objects: None })]);
    let mut placement = Placement {
        directories: vec![Directory { path: path.clone(), controllers: Vec::new() }],
        limits: Limits { memory_max: Some(1 << 30), pids_max: 9, rdma, cpu: Cpu::default() },
        ..Placement::default()
    };
    placement.limit();
    assert_eq!(std::fs::read_to_string(path.join("pids.max")).unwrap(), "9");
    let at = path.display();
    assert_eq!(
        placement.warnings(),
        [
            format!("memory-max = 1073741824 is not enforced: the memory controller is not enabled for {at}"),
            format!(
                "linux.resources.rdma = mlx5_0 hca_handle=3 is not enforced: the rdma controller is not enabled for {at}"
            ),
        ]
    );
}

#[test]
fn somebody_elses_cgroup_is_not_used() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("ringfence-c1");
    std::fs::create_dir(&path).unwrap();
    std::fs::write(path.join("cgroup.procs"), "17\n").unwrap();
    let mut placement =
        Placement { directories: vec![Directory { path, controllers: Vec::new() }], ..Placement::default() };
    assert!(placement.make().unified.is_none() && placement.paths().is_empty());
    assert!(placement.warnings()[0].contains("has processes"), "{:?}", placement.warnings());
}

fn limited() -> Limits {
    let cpu = Cpu {
        time: Some(Time { quota: 10_000, period: 50_000 }),
        weight: Some(Weight::Shares(512)),
        cpus: Some("1".into()),
        mems: Some("0".into()),
    };
    Limits { pids_max: 9, cpu, ..Limits::default() }
}

/// Cgroups of the proxy, each with empty files.
fn directories(root: &Path, cgroups: &[(&str, &[&str])]) -> Vec<Directory> {
    let make = |(controllers, files): &(&str, &[&str])| {
        let path = root.join(controllers).join("pod/ringfence-c1");
        std::fs::create_dir_all(&path).unwrap();
        files.iter().for_each(|file| std::fs::write(path.join(file), "").unwrap());
        let controllers = controllers.split(',').filter(|c| !c.is_empty()).map(str::to_owned).collect();
        Directory { path, controllers }
    };
    cgroups.iter().map(make).collect()
}

#[test]
fn processors_are_limited_in_version_1() {
    let root = tempfile::tempdir().unwrap();
    let files: [(&str, &[&str]); 3] = [
        ("cpu,cpuacct", &["cpu.shares", "cpu.cfs_period_us", "cpu.cfs_quota_us", "cgroup.procs"]),
        ("cpuset", &["cpuset.cpus", "cpuset.mems", "cgroup.procs"]),
        ("pids", &["pids.max", "cgroup.procs"]),
    ];
    let directories = directories(root.path(), &files);
    let read = |file: &str| std::fs::read_to_string(root.path().join(file)).unwrap();
    let mut placement = Placement { limits: limited(), version_1: true, ..Placement::default() };
    directories.iter().for_each(|directory| placement.fill(directory).unwrap());
    placement.directories = directories;
    placement.limit();
    let (cpu, cpuset) = ("cpu,cpuacct/pod/ringfence-c1", "cpuset/pod/ringfence-c1");
    assert_eq!(
        (read(&format!("{cpuset}/cpuset.cpus")), read(&format!("{cpuset}/cpuset.mems"))),
        ("1".into(), "0".into())
    );
    assert_eq!(read(&format!("{cpu}/cpu.shares")), "512");
    assert_eq!(read(&format!("{cpu}/cpu.cfs_quota_us")), "", "not before it is ready");
    placement.warnings.clear();
    std::fs::write(placement.directories[0].path.join("cgroup.procs"), "17\n").unwrap();
    placement.check(17);
    assert_eq!(read(&format!("{cpu}/cpu.cfs_period_us")), "50000");
    assert_eq!(read(&format!("{cpu}/cpu.cfs_quota_us")), "10000");
    // Of the two others it is said that the proxy is not there.
    assert_eq!(placement.warnings().len(), 2, "{:?}", placement.warnings());
}

#[test]
fn a_cpuset_without_a_wish_is_the_parents() {
    let root = tempfile::tempdir().unwrap();
    let directory = directories(root.path(), &[("cpuset", &["cpuset.cpus", "cpuset.mems"])]).remove(0);
    std::fs::write(root.path().join("cpuset/pod/cpuset.cpus"), "0-1\n").unwrap();
    std::fs::write(root.path().join("cpuset/pod/cpuset.mems"), "0\n").unwrap();
    Placement::default().fill(&directory).unwrap();
    assert_eq!(std::fs::read_to_string(directory.path.join("cpuset.cpus")).unwrap(), "0-1");
    assert_eq!(std::fs::read_to_string(directory.path.join("cpuset.mems")).unwrap(), "0");
}

#[test]
fn processors_are_limited_in_version_2() {
    let root = tempfile::tempdir().unwrap();
    let files: &[&str] = &["cpu.max", "cpu.weight", "cpuset.cpus", "cpuset.mems", "pids.max", "cgroup.procs"];
    let mut limits = limited();
    limits.cpu.weight = Some(Weight::Points(50));
    let mut placement =
        Placement { directories: directories(root.path(), &[("", files)]), limits, ..Placement::default() };
    let path = placement.directories[0].path.clone();
    placement.limit();
    let read = |file: &str| std::fs::read_to_string(path.join(file)).unwrap();
    assert_eq!([read("cpu.weight"), read("cpuset.cpus"), read("cpuset.mems"), read("cpu.max")], ["50", "1", "0", ""]);
    std::fs::write(path.join("cgroup.procs"), "17\n").unwrap();
    placement.check(17);
    assert_eq!((read("cpu.max"), placement.warnings()), ("10000 50000".into(), &[][..]));
}

#[test]
fn a_controller_that_only_the_container_has_is_a_warning() {
    let root = tempfile::tempdir().unwrap();
    let mut limits = limited();
    limits.cpu.weight = Some(Weight::Idle);
    let directories = directories(root.path(), &[("", &["pids.max", "cgroup.procs"])]);
    let mut placement = Placement { directories, limits: limits.clone(), ..Placement::default() };
    let at = placement.directories[0].path.clone();
    std::fs::write(at.join("cgroup.procs"), "17\n").unwrap();
    placement.limit();
    placement.check(17);
    let expected =
        [("cpu.idle = 1", "cpu"), ("cpuset = 1", "cpuset"), ("cpuset.mems = 0", "cpuset"), ("cpus = 0.2", "cpu")];
    let expected = expected.map(|(name, controller)| {
        format!("{name} is not enforced: the {controller} controller is not enabled for {}", at.display())
    });
    assert_eq!(placement.warnings(), expected);
    // The same in a scope, for which systemd says nothing of it.
    let mut placement = Placement { limits, ..Placement::default() };
    placement.check_scope(&at);
    assert_eq!(placement.warnings(), expected);
    for (file, text) in [("cpu.idle", "1"), ("cpuset.cpus", "1"), ("cpuset.mems", ""), ("cpu.max", "max 100000\n")] {
        std::fs::write(at.join(file), text).unwrap();
    }
    placement.warnings.clear();
    placement.check_scope(&at);
    assert_eq!(
        placement.warnings(),
        [
            "cpuset.mems = 0 is not enforced: systemd did not set cpuset.mems",
            "cpus = 0.2 is not enforced: systemd did not set cpu.max"
        ]
    );
}
