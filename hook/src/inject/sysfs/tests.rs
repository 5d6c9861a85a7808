//! What hosts with cards have, made of ordinary files: nothing here can make a class in a real sysfs.

// UNSAFETY: moves a thread of the test into a mount namespace of its own.
#![allow(unsafe_code)]

use super::*;
use rustix::mount::MountPropagationFlags;
use rustix::thread::UnshareFlags;
use std::fs::{create_dir_all, read_dir, read_to_string, write};
use std::os::unix::fs::symlink;

/// A root file system with a `/sys` that has the classes `classes` with devices of two cards, and `net`.
fn root(classes: &[(&str, &str)]) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let sys = directory.path().join("sys");
    create_dir_all(sys.join("class")).unwrap();
    for (card, number) in [("0000:00:01.0", 0), ("0000:00:02.0", 1)] {
        for (class, device) in classes {
            let (place, device) = (format!("devices/pci0000:00/{card}/{class}"), format!("{device}{number}"));
            create_dir_all(sys.join(&place).join(&device)).unwrap();
            write(sys.join(&place).join(&device).join("node_guid"), "theirs").unwrap();
            create_dir_all(sys.join("class").join(class)).unwrap();
            symlink(format!("../../{place}/{device}"), sys.join("class").join(class).join(&device)).unwrap();
        }
        let network = format!("devices/pci0000:00/{card}/net/eth{number}");
        create_dir_all(sys.join(&network)).unwrap();
        symlink("../..", sys.join(&network).join("device")).unwrap();
        create_dir_all(sys.join("class/net")).unwrap();
        symlink(format!("../../{network}"), sys.join(format!("class/net/eth{number}"))).unwrap();
    }
    create_dir_all(directory.path().join("dev/ringfence")).unwrap();
    directory
}

/// Hands it to `act`, in a mount namespace of the test's own.
fn within(classes: &[(&str, &str)], act: impl FnOnce(Injection<'_>, &Place, &Path) + Send) {
    if !rustix::process::geteuid().is_root() {
        let _ = std::io::stderr().write_all(b"SKIPPED what /sys shows: it needs root\n");
        return;
    }
    let root = root(classes);
    std::thread::scope(|scope| {
        let run = || {
            // SAFETY: a mount namespace is this thread's own affair; descriptors and memory stay shared.
            unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }.unwrap();
            let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
            rustix::mount::mount_change("/", private).unwrap();
            let place = Place::root(root.path()).unwrap();
            let dev = place.find("dev", Kind::Directory).unwrap().unwrap();
            let mut note = |_| Ok(());
            let injection = Injection {
                root: place,
                host_devices: Vec::new(),
                dev_tmpfs: None,
                shares_mounts: false,
                note: &mut note,
            };
            act(injection, &dev, root.path());
        };
        scope.spawn(run).join().unwrap();
    });
}

fn sys_of(injection: &Injection<'_>) -> Sys {
    let sys = injection.root.find("sys", Kind::Directory).unwrap().unwrap();
    let class = sys.find("class", Kind::Directory).unwrap().unwrap();
    Sys::new(sys, class).unwrap()
}

/// Shows a device in it and hands it to `look`.
fn shown(classes: &[(&str, &str)], look: fn(&Path)) {
    within(classes, |mut injection, dev, root| {
        let sys = sys_of(&injection);
        let scratch = dev.find("ringfence", Kind::Directory).unwrap().unwrap();
        let tree = Tree::new([NODE]).unwrap();
        for class in [DEVICES, VERBS] {
            let classes = tree.classes().unwrap();
            rustix::fs::symlinkat("nowhere", &classes, format!("{class}/ours")).unwrap();
        }
        let shown = Shown::new(tree, true).unwrap();
        if let Err(failure) = injection.show(Some(&sys), dev, &scratch, &shown, None) {
            panic!("{}", failure.message);
        }
        look(root);
    });
}

fn names(path: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        read_dir(path).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Nothing of the cards is found by any way, and all else of them is.
fn only_ours_is_found(root: &Path) {
    let classes = root.join("sys/class");
    assert_eq!(names(&classes.join(DEVICES)), ["ours"]);
    assert_eq!(names(&classes.join(VERBS)), ["ours"]);
    assert_eq!(names(&classes.join("net")), ["eth0", "eth1"]);
    assert_eq!(read_to_string(classes.join("net/eth0/device/infiniband/mlx5_0/node_guid")).ok(), None);
    for class in names(&classes) {
        for card in ["0000:00:01.0", "0000:00:02.0"] {
            let holder = root.join("sys/devices/pci0000:00").join(card).join(&class);
            assert!(class == "net" || !holder.exists() || names(&holder).is_empty(), "{}", holder.display());
        }
    }
    assert_eq!(names(&root.join("sys/class/net/eth0/")), ["device"]);
    assert_eq!(names(&root.join("dev/infiniband")), ["uverbs0"]);
    let opened = std::fs::File::open(root.join("dev/infiniband/uverbs0"));
    assert_eq!(opened.unwrap_err().kind(), io::ErrorKind::PermissionDenied);
    // Not even where it was mounted to be cloned.
    assert_eq!(names(&root.join("dev/ringfence")), [""; 0]);
}

#[test]
fn cards_are_hidden_where_the_host_has_both_classes() {
    shown(&[(DEVICES, "mlx5_"), (VERBS, "uverbs"), ("infiniband_mad", "umad")], |root| {
        only_ours_is_found(root);
        assert_eq!(names(&root.join("sys/class")), ["infiniband", "infiniband_mad", "infiniband_verbs", "net"]);
        assert_eq!(names(&root.join("sys/class/infiniband_mad")), [""; 0]);
    });
}

#[test]
fn only_the_card_whose_node_is_given_is_seen() {
    let classes = [(DEVICES, "mlx5_"), (VERBS, "uverbs"), ("infiniband_mad", "umad")];
    within(&classes, |mut injection, dev, root| {
        write(root.join("sys/class").join(VERBS).join("abi_version"), "6\n").unwrap();
        let tree = Tree::new([]).unwrap();
        let seen = [(DEVICES, "mlx5_1"), (VERBS, "uverbs1")].map(|(class, name)| (class.to_owned(), name.to_owned()));
        let sys = sys_of(&injection);
        if let Err(failure) = injection.only_of(&sys, dev, &tree, &seen) {
            panic!("{}", failure.message);
        }
        let classes = root.join("sys/class");
        assert_eq!(names(&classes.join(DEVICES)), ["mlx5_1"]);
        assert_eq!(names(&classes.join(VERBS)), ["abi_version", "uverbs1"]);
        assert_eq!(read_to_string(classes.join(VERBS).join("abi_version")).unwrap(), "6\n");
        assert_eq!(names(&classes.join("infiniband_mad")), [""; 0]);
        assert!(classes.join(DEVICES).join("mlx5_1").is_dir());
        let holder = |card: &str, class: &str| root.join("sys/devices/pci0000:00").join(card).join(class);
        assert_eq!(names(&holder("0000:00:01.0", DEVICES)), [""; 0]);
        assert_eq!(names(&holder("0000:00:02.0", DEVICES)), ["mlx5_1"]);
        assert_eq!(names(&holder("0000:00:02.0", "infiniband_mad")), [""; 0]);
        assert_eq!(names(&root.join("dev/infiniband")), [""; 0]);
    });
}

#[test]
fn cards_are_hidden_where_the_host_has_one_class() {
    shown(&[(DEVICES, "mlx5_"), ("infiniband_mad", "umad")], |root| {
        only_ours_is_found(root);
        assert_eq!(names(&root.join("sys/class")), ["infiniband", "infiniband_verbs", "net"]);
    });
}

#[test]
fn a_host_without_cards_has_the_classes_too() {
    shown(&[], |root| {
        only_ours_is_found(root);
        assert_eq!(names(&root.join("sys/class")), ["infiniband", "infiniband_verbs", "net"]);
        assert!(write(root.join("sys/class/infiniband/x"), "").is_err());
    });
}
