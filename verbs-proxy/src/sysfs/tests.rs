use super::tree::write_tree;
use super::*;
use ringfence_protocol::verbs::GidType;
use rustix::fd::OwnedFd;
use rustix::fs::{Mode, OFlags};
use std::fs::{canonicalize, create_dir_all, read_dir, read_link, read_to_string};
use std::path::Path;
use zerocopy::FromZeros;

fn entry(last: u8, kind: GidType, interface: &str) -> Entry {
    let mut gid = [0; 16];
    gid[15] = last;
    let info = GidInfo { gid, gid_type: kind.0, ndev_ifindex: last.into() };
    Entry { info, interface: interface.into() }
}

/// A card with two ports, of InfiniBand's and of Ethernet's kind, that counts.
fn card() -> Device {
    let mut name = [0; 64];
    name[..6].copy_from_slice(b"mlx5_3");
    let port = |link_layer, lid| {
        let info = PortInfo {
            state: 4,
            phys_state: 5,
            active_width: 2,
            active_speed: 128,
            gid_tbl_len: 40,
            lid,
            link_layer,
            port_cap_flags: 0x10,
            ..PortInfo::new_zeroed()
        };
        Port {
            info,
            pkeys: vec![0xffff, 0x8001],
            gids: vec![entry(1, GidType::IB_ROCE_V1, "eth0"), entry(2, GidType::ROCE_V2, "")],
            counters: vec![("port_xmit_data".into(), u64::MAX)],
            hw_counters: vec![("out_of_sequence".into(), 0)],
        }
    };
    Device {
        info: DeviceInfo { name, node_guid: 7_u64.to_be(), node_type: 1, transport: 0, index: 0, reserved: 0 },
        attributes: OpenReply { sys_image_guid: 8_u64.to_be(), hw_ver: 0x1a, ..OpenReply::new_zeroed() },
        description: "a card".into(),
        hca_type: Some("MT4129".into()),
        board_id: None,
        verbs: 3,
        parent: Parent::Card { directory: "pci0000:00/0000:00:03.0/0000:03:00.0".into() },
        ports: vec![port(1, 17), port(2, 0)],
    }
}

fn root(directory: &Path) -> OwnedFd {
    for class in [DEVICES, VERBS] {
        create_dir_all(directory.join(CLASSES).join(class)).unwrap();
    }
    rustix::fs::open(directory, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap()
}

#[test]
fn a_card_is_found_in_its_place() {
    let sys = tempfile::tempdir().unwrap();
    let place = sys.path().join("devices/pci0000:00/0000:00:03.0/0000:03:00.0");
    create_dir_all(&place).unwrap();
    write_tree(&card(), &root(sys.path())).unwrap();
    let class = sys.path().join("class");
    for (class, name) in [("infiniband", "mlx5_3"), ("infiniband_verbs", "uverbs3")] {
        let device = sys.path().join("class").join(class).join(name);
        // Who takes the place from the link, and who follows that to the card.
        let link = read_link(&device).unwrap();
        assert!(link.ends_with(format!("pci0000:00/0000:00:03.0/0000:03:00.0/{class}/{name}")), "{link:?}");
        assert_eq!(canonicalize(device.join("device")).unwrap(), canonicalize(&place).unwrap());
    }
    let read = |name: &str| read_to_string(class.join("infiniband/mlx5_3").join(name)).unwrap();
    for (name, expected) in [
        ("node_guid", "0000:0000:0000:0007\n"),
        ("hw_rev", "1a\n"),
        ("hca_type", "MT4129\n"),
        ("ports/1/lid", "0x11\n"),
        ("ports/1/rate", "400 Gb/sec (4X NDR)\n"),
        ("ports/1/link_layer", "InfiniBand\n"),
        ("ports/2/link_layer", "Ethernet\n"),
        ("ports/2/cap_mask", "0x00000010\n"),
        ("ports/2/pkeys/1", "0x8001\n"),
        ("ports/1/counters/port_xmit_data", "18446744073709551615\n"),
        ("ports/1/hw_counters/out_of_sequence", "0\n"),
        ("ports/1/gids/0", "0000:0000:0000:0000:0000:0000:0000:0001\n"),
        ("ports/1/gids/39", "0000:0000:0000:0000:0000:0000:0000:0000\n"),
        ("ports/1/gid_attrs/types/0", "IB/RoCE v1\n"),
        ("ports/1/gid_attrs/types/1", "RoCE v2\n"),
        ("ports/1/gid_attrs/ndevs/0", "eth0\n"),
        ("ports/1/gid_attrs/ndevs/39", ""),
    ] {
        assert_eq!(read(name), expected, "{name}");
    }
    for table in ["gids", "gid_attrs/types", "gid_attrs/ndevs"] {
        assert_eq!(read_dir(class.join("infiniband/mlx5_3/ports/1").join(table)).unwrap().count(), 40, "{table}");
    }
    assert!(!class.join("infiniband/mlx5_3/board_id").exists());
}

#[test]
fn software_is_its_own_place() {
    let sys = tempfile::tempdir().unwrap();
    let device = Device { parent: Parent::Software { numa_node: Some(1) }, ..card() };
    write_tree(&device, &root(sys.path())).unwrap();
    let device = sys.path().join("class/infiniband/mlx5_3/device");
    assert_eq!(read_to_string(device.join("numa_node")).unwrap(), "1\n");
    assert_eq!(read_to_string(device.join("infiniband_verbs/uverbs3/ibdev")).unwrap(), "mlx5_3\n");
}

#[test]
fn gids_come_and_go() {
    let sys = tempfile::tempdir().unwrap();
    let mut shown = Shown::new(&card(), &root(sys.path())).unwrap();
    let port = sys.path().join("class/infiniband/mlx5_3/ports/1");
    let read = |name: &str, index: usize| read_to_string(port.join(name).join(index.to_string())).unwrap();
    let seen = |index| (read("gids", index).split_off(35), read("gid_attrs/ndevs", index));
    let some = |last: &str, interface: &str| (format!("{last}\n"), interface.to_owned());
    assert_eq!((seen(0), seen(1), seen(2)), (some("0001", "eth0\n"), some("0002", ""), some("0000", "")));

    let table = |count: u8| (1..=count).map(|last| entry(last, GidType::ROCE_V2, "a-longer-name"));
    shown.update(table(3));
    assert_eq!(
        (seen(0), seen(2), seen(3)),
        (some("0001", "a-longer-name\n"), some("0003", "a-longer-name\n"), some("0000", ""))
    );
    // More than can change are no harm to the rest.
    shown.update(table(60));
    assert_eq!(seen(CHANGING_GIDS - 1), some("0010", "a-longer-name\n"));
    assert_eq!(seen(CHANGING_GIDS), some("0000", ""));
    shown.update([entry(9, GidType::ROCE_V2, "e")]);
    assert_eq!((seen(0), seen(1), seen(15)), (some("0009", "e\n"), some("0000", ""), some("0000", "")));
}

#[test]
fn a_port_and_the_kinds_of_its_gids_change() {
    let sys = tempfile::tempdir().unwrap();
    let device = card();
    let mut shown = Shown::new(&device, &root(sys.path())).unwrap();
    let ports = sys.path().join("class/infiniband/mlx5_3/ports");
    let read = |port: u32, name: &str| read_to_string(ports.join(port.to_string()).join(name)).unwrap();
    let up = ["4: ACTIVE\n", "5: LinkUp\n", "400 Gb/sec (4X NDR)\n", "0x11\n"];
    let seen = |port| ["state", "phys_state", "rate", "lid"].map(|name| read(port, name));
    assert_eq!(seen(1), up);

    // Each line is shorter than before.
    let info = PortInfo { state: 1, phys_state: 3, active_width: 1, active_speed: 32, lid: 1, ..device.ports[0].info };
    shown.update_port(&info, &[0, 0x8001]);
    assert_eq!(seen(1), ["1: DOWN\n", "3: Disabled\n", "25 Gb/sec (1X EDR)\n", "0x1\n"]);
    assert_eq!(read(1, "pkeys/0"), "0x0000\n");
    assert_eq!((read(1, "link_layer").as_str(), read(2, "state").as_str()), ("InfiniBand\n", "4: ACTIVE\n"));
    shown.update_port(&device.ports[0].info, &device.ports[0].pkeys);
    assert_eq!(seen(1), up);

    let kinds = || [0, 1, 2].map(|index| read(1, &format!("gid_attrs/types/{index}")));
    assert_eq!(kinds(), ["IB/RoCE v1\n", "RoCE v2\n", "RoCE v2\n"]);
    shown.update([entry(1, GidType::ROCE_V2, ""), entry(1, GidType::IB_ROCE_V1, "")]);
    assert_eq!(kinds(), ["RoCE v2\n", "IB/RoCE v1\n", "RoCE v2\n"]);
}
