//! Mode exclusive, as far as it goes without a card: what is refused, and that nothing stays of it. The card is one of plain files, where the
//! kernel shows its own; integration/vm/tests/exclusive.sh has one that is moved.

mod common;

use common::{Lab, with_lab};
use ringfence_trials::{skip, tests};
use serde_json::json;
use std::process::{ExitCode, Output};

fn main() -> ExitCode {
    ringfence_trials::main(tests![
        a_kernel_that_shows_cards_in_all_namespaces,
        a_container_with_the_hosts_network,
        a_card_that_is_not_there,
        a_card_in_another_namespace,
        a_card_that_carries_an_interface_of_the_hosts,
        a_card_of_another_container,
        a_card_of_a_container_that_is_gone,
        a_kernel_without_rdma,
        keys_that_nobody_could_enforce,
    ])
}

const CARD: &str = "[[device]]\nname = \"mlx5_0\"\nkind = \"ibverbs\"\n[policy.bounds]\nmodes = [\"exclusive\"]\n";
/// What a kernel shows of a card, in place of what this one does.
const FILES: &str = "mount -t tmpfs tmpfs /sys/class && cd /sys/class && mkdir -p infiniband/mlx5_0/ports/1/gids infiniband_verbs/uverbs0 \
     && echo mlx5_0 >infiniband_verbs/uverbs0/ibdev && cd infiniband/mlx5_0 && echo 5054:00ff:fe12:3456 >node_guid && cd ports/1 \
     && echo '4: ACTIVE' >state && echo Ethernet >link_layer && echo fe80::1 >gids/0";
/// That it does so in one network namespace only.
const OF_ONE: &str = "mount -t tmpfs tmpfs /sys/module && mkdir -p /sys/module/ib_core/parameters \
     && echo N >/sys/module/ib_core/parameters/netns_mode";

/// Runs the container, after `prepare`.
fn run(lab: &mut Lab, prepare: &str) -> Output {
    lab.configure("ready", CARD);
    let back = format!("cd {}", lab.path("").display());
    lab.run_after(&format!("{prepare} && {back}"))
}

fn a_kernel_that_shows_cards_in_all_namespaces() {
    with_lab(|lab| {
        let shared = OF_ONE.replace("echo N", "echo Y");
        let output = run(lab, &format!("{shared} && {FILES}"));
        Lab::assert_refused(&output, 14, "mode=exclusive needs the kernel to show each RDMA device in one network");
        let output = run(lab, "mount -t tmpfs tmpfs /sys/class");
        Lab::assert_refused(&output, 14, "device mlx5_0: this kernel has no RDMA devices");
    });
}

fn a_container_with_the_hosts_network() {
    with_lab(|lab| {
        lab.edit(|config| {
            let namespaces = config["linux"]["namespaces"].as_array_mut().unwrap();
            namespaces.retain(|namespace| namespace["type"] != "network");
        });
        let output = run(lab, &format!("{OF_ONE} && {FILES}"));
        Lab::assert_refused(
            &output,
            14,
            "mode=exclusive moves RDMA device mlx5_0 to the container's network namespace",
        );
    });
}

fn a_card_that_is_not_there() {
    with_lab(|lab| {
        let output = run(lab, &format!("{OF_ONE} && {FILES} && rm -r /sys/class/infiniband_verbs"));
        Lab::assert_refused(&output, 14, "RDMA device mlx5_0 has no character device for verbs: modprobe ib_uverbs");
        let none = "cd /sys/class && rm -r infiniband_verbs infiniband/mlx5_0";
        let output = run(lab, &format!("{OF_ONE} && {FILES} && {none}"));
        Lab::assert_refused(&output, 14, "no RDMA device has the name mlx5_0: there is none");
    });
}

fn a_card_in_another_namespace() {
    with_lab(|lab| {
        let output = run(lab, &format!("{OF_ONE} && {FILES} && rm -r /sys/class/infiniband/mlx5_0"));
        Lab::assert_refused(&output, 14, "RDMA device mlx5_0 is in another network namespace");
    });
}

fn a_card_that_carries_an_interface_of_the_hosts() {
    with_lab(|lab| {
        let ipoib = "mkdir -p /sys/class/infiniband/mlx5_0/device/net/ib0 && cd /sys/class/infiniband/mlx5_0/device/net/ib0 \
             && echo 32 >type && echo 0x1043 >flags";
        let output = run(lab, &format!("{OF_ONE} && {FILES} && {ipoib}"));
        Lab::assert_refused(&output, 14, "RDMA device mlx5_0 carries IPoIB of the host's by ib0, which the kernel");
    });
}

/// A record of a container `c9` that has the card; its init is this process, or one that has ended.
fn holder(lab: &Lab, is_alive: bool) {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let start: u64 = stat.rsplit_once(')').unwrap().1.split_whitespace().nth(19).unwrap().parse().unwrap();
    let start = if is_alive { start } else { start + 1 };
    let own = std::os::unix::fs::MetadataExt::ino(&std::fs::metadata("/proc/self/ns/net").unwrap());
    let record = json!({
        "container": "c9", "init": {"pid": std::process::id(), "start": start}, "proxy": null, "root": "/rootfs",
        "mount-points": [], "cgroups": [],
        "lent": {"name": "mlx5_0", "node-guid": "5054:00ff:fe12:3456", "from": own, "to": 1},
    });
    let state = lab.path("run/state");
    std::fs::create_dir_all(&state).unwrap();
    std::fs::set_permissions(lab.path("run"), std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
    std::fs::write(state.join("c9.json"), record.to_string()).unwrap();
}

fn a_card_of_another_container() {
    with_lab(|lab| {
        holder(lab, true);
        let output = run(lab, &format!("{OF_ONE} && {FILES} && rm -r /sys/class/infiniband/mlx5_0"));
        Lab::assert_refused(&output, 14, "RDMA device mlx5_0 is container c9's for itself (mode=exclusive)");
        assert_eq!(lab.record("c9")["lent"]["name"], "mlx5_0");
        std::fs::remove_file(lab.path("run/state/c9.json")).unwrap();
    });
}

/// With it the card is gone from the kernel: its record says no longer that there is anything to bring back, and the next is not refused for it.
fn a_card_of_a_container_that_is_gone() {
    with_lab(|lab| {
        holder(lab, false);
        let none = "cd /sys/class && rm -r infiniband_verbs infiniband/mlx5_0";
        lab.hooks(&["createRuntime"], false);
        let output = run(lab, &format!("{OF_ONE} && {FILES} && {none}"));
        Lab::assert_refused(&output, 14, "no RDMA device has the name mlx5_0: there is none");
        assert_eq!(lab.record("c9").get("lent"), None);
        assert_eq!(lab.collect().len(), 1);
    });
}

fn a_kernel_without_rdma() {
    with_lab(|lab| {
        if std::path::Path::new("/sys/class/infiniband").exists() {
            skip("this kernel has RDMA devices; integration/vm/tests/exclusive.sh is for those");
        }
        let output = run(lab, &format!("{OF_ONE} && {FILES}"));
        Lab::assert_refused(&output, 14, "RDMA devices by netlink (modprobe ib_core): Protocol not supported");
    });
}

fn keys_that_nobody_could_enforce() {
    with_lab(|lab| {
        lab.annotate(&[("enable", "true"), ("bandwidth", "1Gbit")]);
        let output = run(lab, &format!("{OF_ONE} && {FILES}"));
        let message = "ringfence.dev/bandwidth cannot be enforced with ringfence.dev/mode=exclusive; remove it or use";
        Lab::assert_refused(&output, 12, message);
    });
}
