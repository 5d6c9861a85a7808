use super::*;
use crate::nldev::Guid;
use crate::process::Process;
use crate::record::lock_cards;

fn device(name: &str, guid: u64) -> Device {
    Device { index: 0, name: name.into(), guid: Guid(guid) }
}

fn lent(name: &str, guid: u64) -> Lent {
    Lent { name: name.into(), node_guid: Guid(guid).to_string(), from: 1, to: 2 }
}

#[test]
fn a_card_is_known_by_its_guid_or_without_one_by_its_name() {
    assert!(is(&device("mlx5_0", 7), &lent("mlx5_0", 7)));
    assert!(is(&device("renamed", 7), &lent("mlx5_0", 7)));
    assert!(!is(&device("mlx5_0", 8), &lent("mlx5_0", 7)), "another has its name meanwhile");
    assert!(is(&device("vf0", 0), &lent("vf0", 0)));
    assert!(!is(&device("vf1", 0), &lent("vf0", 0)));
}

#[test]
fn who_keeps_a_card_busy_is_named() {
    let own = std::process::id() as i32;
    let message = busy("mlx5_0", &[User::Process(own), User::Kernel("nvme".into())]);
    assert!(message.starts_with(&format!("RDMA device mlx5_0 is in use by process {own} (")), "{message}");
    assert!(message.contains("), the kernel's nvme, which would lose it"), "{message}");
    let many: Vec<_> = (0..6).map(|part| User::Kernel(part.to_string())).collect();
    assert!(busy("mlx5_0", &many).contains("the kernel's 3, 2 more, which"));
}

#[test]
fn a_card_that_carries_an_interface_of_the_host_s_is_refused() {
    let sys = tempfile::tempdir().unwrap();
    let write = |interface: &str, file: &str, text: &str| {
        let directory = sys.path().join("class/infiniband/mlx5_0/device/net").join(interface);
        std::fs::create_dir_all(&directory).unwrap();
        std::fs::write(directory.join(file), text).unwrap();
    };
    spare_interfaces(sys.path(), "mlx5_0").unwrap();
    // One of RoCE stays where it is.
    write("eth0", "type", "1\n");
    write("eth0", "flags", "0x1003\n");
    write("ib0", "type", "32\n");
    write("ib0", "flags", "0x1002\n");
    spare_interfaces(sys.path(), "mlx5_0").unwrap();
    write("ib0", "flags", "0x1003\n");
    let error = spare_interfaces(sys.path(), "mlx5_0").unwrap_err();
    assert!(error.starts_with("RDMA device mlx5_0 carries IPoIB of the host's by ib0, which the kernel"), "{error}");
    assert!(error.contains("take down first what the host can do without (`ip link set ib0 down`), or"), "{error}");
}

struct Node {
    config: Config,
    records: Records,
    _directory: tempfile::TempDir,
}

impl Node {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let run_dir = session::open_run_dir(directory.path()).unwrap();
        let config = Config { run_dir: directory.path().into(), ..Config::default() };
        Self { config, records: Records::open(&run_dir).unwrap(), _directory: directory }
    }

    fn record(&self, container: &str, init: Process, lent: Option<Lent>) -> Record {
        let record = Record {
            container: container.into(),
            policy: "default".into(),
            init,
            proxy: None,
            root: "/rootfs".into(),
            mount_points: Vec::new(),
            cgroups: Vec::new(),
            unit: None,
            device: "mlx5_0".into(),
            since: 0,
            warnings: Vec::new(),
            lent,
        };
        self.records.save(&record).unwrap();
        record
    }
}

/// One that runs, and one that has ended.
fn inits() -> (Process, Process) {
    let (alive, _) = Process::open(std::process::id() as i32).unwrap();
    (alive, Process { start: alive.start + 1, ..alive })
}

/// A card that this machine has not: it has gone from the kernel altogether, so that nothing is to be brought back.
fn gone() -> Lent {
    let own = netns::number(netns::own().unwrap().as_fd()).unwrap();
    Lent { name: "nosuchcard0".into(), node_guid: "0:0:0:1".into(), from: own, to: 1 }
}

#[test]
fn of_two_containers_one_has_the_card() {
    let node = Node::new();
    let (alive, dead) = inits();
    node.record("c1", alive, Some(gone()));
    let refused = free(&node.records, "c2", "nosuchcard0").unwrap_err();
    assert!(refused.starts_with("RDMA device nosuchcard0 is container c1's for itself"), "{refused}");
    free(&node.records, "c2", "nosuchcard1").unwrap();
    free(&node.records, "c1", "nosuchcard0").unwrap();
    // Of one that is gone it is taken, and the record says no longer that there is anything to bring back.
    node.record("c1", dead, Some(gone()));
    free(&node.records, "c2", "nosuchcard0").unwrap();
    assert_eq!(node.records.load("c1").unwrap().unwrap().lent, None);
}

#[test]
fn what_is_brought_back_is_on_record_until_then() {
    let node = Node::new();
    let (_, dead) = inits();
    let record = node.record("c1", dead, Some(gone()));
    take_back(&node.config, &node.records, &record, Duration::ZERO).unwrap();
    assert_eq!(node.records.load("c1").unwrap().unwrap().lent, None);
    // From another namespace than it was lent from there is nothing to be brought to.
    let elsewhere = Lent { from: 1, ..gone() };
    let record = node.record("c1", dead, Some(elsewhere.clone()));
    let error = take_back(&node.config, &node.records, &record, Duration::ZERO).unwrap_err();
    assert!(error.to_string().contains("try again in that of the host"), "{error}");
    assert_eq!(node.records.load("c1").unwrap().unwrap().lent, Some(elsewhere));
}

#[test]
fn who_comes_late_takes_nothing_from_the_next() {
    let node = Node::new();
    let (alive, dead) = inits();
    let late = node.record("c1", dead, Some(Lent { from: 1, ..gone() }));
    // It would fail, were it to do anything.
    node.record("c1", alive, late.lent.clone());
    take_back(&node.config, &node.records, &late, Duration::ZERO).unwrap();
    node.record("c1", dead, None);
    take_back(&node.config, &node.records, &late, Duration::ZERO).unwrap();
    node.records.remove("c1").unwrap();
    take_back(&node.config, &node.records, &late, Duration::ZERO).unwrap();
}

#[test]
fn cards_are_locked_by_one_at_a_time() {
    let node = Node::new();
    let run_dir = session::open_run_dir(&node.config.run_dir).unwrap();
    let lock = lock_cards(&run_dir).unwrap();
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        scope.spawn(|| sender.send(lock_cards(&run_dir).map(drop)));
        assert!(receiver.recv_timeout(Duration::from_millis(100)).is_err(), "it was not waited for");
        drop(lock);
        receiver.recv_timeout(Duration::from_secs(10)).unwrap().unwrap();
    });
}
