//! Containers with a card behind their proxy: which program is started, and what is told of a card that cannot be used. The card is
//! one of plain files, where the kernel shows its own.

mod common;

use common::{HOOK, Lab, succeeded, with_lab};
use ringfence_trials::{skip, tests};
use serde_json::json;
use std::path::Path;
use std::process::{ExitCode, Output};

fn main() -> ExitCode {
    ringfence_trials::main(tests![
        a_card_has_a_proxy_of_its_own,
        a_card_is_the_default_where_it_comes_first,
        without_its_proxy_the_package_is_named,
        a_kernel_without_rdma_devices,
        a_card_of_another_name,
        a_card_without_a_character_device,
        a_port_that_is_down_is_a_warning,
        a_card_of_the_hosts_network_namespace_alone,
        passthrough_with_cgroup_version_2,
        passthrough_of_another_cards_node,
        limits_of_objects_need_the_controller,
        limits_of_objects_need_a_card,
        rdma_cm_is_the_administrators_to_give,
        rdma_cm_without_the_device_in_sysfs,
        a_kernel_without_rdma_cm,
        no_rdma_cm_beside_an_iwarp_card,
        no_rdma_cm_where_it_finds_no_address,
    ])
}

const CARD: &str = "[[device]]\nname = \"soft0\"\nkind = \"soft\"\n[[device]]\nname = \"mlx5_0\"\nkind = \"ibverbs\"\n";
/// What a kernel shows of a card, in place of what this one does.
const FILES: &str = "mount -t tmpfs tmpfs /sys/class && cd /sys/class && mkdir -p infiniband/mlx5_0/ports/1/gids infiniband_verbs/uverbs0 \
     && echo mlx5_0 >infiniband_verbs/uverbs0/ibdev && cd infiniband/mlx5_0 && echo 5054:00ff:fe12:3456 >node_guid && cd ports/1 \
     && echo '4: ACTIVE' >state && echo Ethernet >link_layer && echo fe80::1 >gids/0";

/// Runs the container with the configured card, after `prepare`.
fn run(lab: &mut Lab, prepare: &str) -> Output {
    lab.configure("ready", CARD);
    lab.annotate(&[("enable", "true"), ("device", "mlx5_0")]);
    let back = format!("cd {}", lab.path("").display());
    lab.run_after(&format!("{prepare} && {back}"))
}

fn install_card_proxy(lab: &Lab) {
    let example = Path::new(HOOK).with_file_name("examples").join("fake-proxy");
    std::fs::copy(example, lab.path("ringfence-proxy-ibverbs")).unwrap();
}

fn a_card_has_a_proxy_of_its_own() {
    with_lab(|lab| {
        install_card_proxy(lab);
        lab.script("ls /dev/ringfence");
        // It refuses a device that is not of its kind, and so does the other one.
        assert_eq!(succeeded(&run(lab, FILES)), "verbs.sock\n");
    });
}

fn a_card_is_the_default_where_it_comes_first() {
    with_lab(|lab| {
        install_card_proxy(lab);
        lab.configure("ready", "[[device]]\nname = \"mlx5_0\"\nkind = \"ibverbs\"\n");
        lab.script("echo started");
        let prepare = format!("{FILES} && cd {}", lab.path("").display());
        assert_eq!(succeeded(&lab.run_after(&prepare)), "started\n");
    });
}

fn without_its_proxy_the_package_is_named() {
    with_lab(|lab| {
        let output = run(lab, FILES);
        let path = lab.path("ringfence-proxy-ibverbs");
        let message = format!(
            "device mlx5_0 is of kind ibverbs, whose proxy {} is missing: install the package ringfence-ibverbs",
            path.display()
        );
        Lab::assert_refused(&output, 17, &message);
    });
}

fn a_kernel_without_rdma_devices() {
    with_lab(|lab| {
        install_card_proxy(lab);
        let output = run(lab, "mount -t tmpfs tmpfs /sys/class");
        Lab::assert_refused(
            &output,
            14,
            "device mlx5_0: this kernel has no RDMA devices (/sys/class/infiniband is missing): load",
        );
    });
}

fn a_card_of_another_name() {
    with_lab(|lab| {
        install_card_proxy(lab);
        let renamed =
            "cd /sys/class && mv infiniband/mlx5_0 infiniband/mlx5_1 && echo mlx5_1 >infiniband_verbs/uverbs0/ibdev";
        let output = run(lab, &format!("{FILES} && {renamed}"));
        Lab::assert_refused(&output, 14, "no RDMA device has the name mlx5_0: there is mlx5_1; correct the name");
        // The kernel shows the character devices of cards in other namespaces.
        let output = run(lab, &format!("{FILES} && rm -r /sys/class/infiniband/mlx5_0"));
        Lab::assert_refused(&output, 14, "RDMA device mlx5_0 is in another network namespace");
    });
}

fn a_card_without_a_character_device() {
    with_lab(|lab| {
        install_card_proxy(lab);
        let output = run(lab, &format!("{FILES} && rm -r /sys/class/infiniband_verbs"));
        Lab::assert_refused(&output, 14, "RDMA device mlx5_0 has no character device for verbs: modprobe ib_uverbs");
    });
}

fn a_port_that_is_down_is_a_warning() {
    with_lab(|lab| {
        install_card_proxy(lab);
        // So that the record stays.
        lab.hooks(&["createRuntime"], false);
        lab.script("true");
        succeeded(&run(lab, &format!("{FILES} && echo '1: DOWN' >state && rm gids/0")));
        let warnings = lab.record(&lab.id)["warnings"].clone();
        let port = "port 1 of RDMA device mlx5_0";
        assert_eq!(
            warnings,
            json!([
                format!("{port} is DOWN: ip link set its network interface up, or check its cable"),
                format!("{port} has no GID: give its network interface an address and set it up"),
            ])
        );
        lab.collect();
    });
}

fn a_card_of_the_hosts_network_namespace_alone() {
    with_lab(|lab| {
        install_card_proxy(lab);
        lab.script("true");
        let exclusive = "mount -t tmpfs tmpfs /sys/module && mkdir -p /sys/module/ib_core/parameters \
             && echo N >/sys/module/ib_core/parameters/netns_mode";
        let output = run(lab, &format!("{exclusive} && {FILES}"));
        Lab::assert_refused(&output, 14, "RDMA device mlx5_0 belongs to the host's network namespace alone");
        // With that of the host it starts.
        lab.edit(|config| {
            let namespaces = config["linux"]["namespaces"].as_array_mut().unwrap();
            namespaces.retain(|namespace| namespace["type"] != "network");
        });
        succeeded(&run(lab, &format!("{exclusive} && {FILES}")));
    });
}

/// A device of mode passthrough, whose node is one that containers may not open otherwise.
fn passthrough(lab: &mut Lab, more: &str) {
    if !Path::new("/dev/fuse").exists() {
        skip("this kernel has no /dev/fuse, which stands for a card's node");
    }
    let device = "[[device]]\nname = \"mlx5_0\"\nkind = \"ibverbs\"\nnodes = [\"/dev/fuse\"]";
    lab.configure("ready", &format!("{device}\n{more}\n[policy.bounds]\nmodes = [\"passthrough\"]"));
    lab.script("exec 3<>/dev/fuse && echo opened");
}

fn passthrough_with_cgroup_version_2() {
    with_lab(|lab| {
        passthrough(lab, "");
        let back = format!("cd {}", lab.path("").display());
        let output =
            lab.run_after(&format!("umount -l /sys/fs/cgroup && mount -t cgroup2 cgroup2 /sys/fs/cgroup && {back}"));
        let _ = std::fs::remove_dir(Path::new("/sys/fs/cgroup/unified").join(&lab.id));
        assert_eq!(succeeded(&output), "opened\n");
    });
}

/// Where the kernel would show the node as that of a card.
const ITS_NODE: &str = "echo $(stat -c '%Hr:%Lr' /dev/fuse) >/sys/class/infiniband_verbs/uverbs0/dev";

fn passthrough_of_another_cards_node() {
    with_lab(|lab| {
        passthrough(lab, "");
        let back = format!("cd {}", lab.path("").display());
        // The kernel has numbered its cards anew; first the device's own is not there, and then it has another node.
        let others = "cd /sys/class/infiniband_verbs && echo mlx5_1 >uverbs0/ibdev";
        let output = lab.run_after(&format!("{FILES} && {ITS_NODE} && {others} && {back}"));
        let message = "/dev/fuse is mlx5_1's, not mlx5_0's, of which this kernel has no node; correct name or nodes of the [[device]]";
        Lab::assert_refused(&output, 14, message);
        let own = "mkdir uverbs1 && echo mlx5_0 >uverbs1/ibdev";
        let output = lab.run_after(&format!("{FILES} && {ITS_NODE} && {others} && {own} && {back}"));
        let message = "/dev/fuse is mlx5_1's, not mlx5_0's, whose node is /dev/infiniband/uverbs1; correct nodes of the [[device]]";
        Lab::assert_refused(&output, 14, message);
    });
}

fn limits_of_objects_need_the_controller() {
    with_lab(|lab| {
        if std::fs::read_to_string("/proc/cgroups").is_ok_and(|controllers| controllers.contains("rdma\t")) {
            skip("this kernel has the rdma controller; integration/vm/tests/passthrough.sh is for those");
        }
        passthrough(lab, "rdma-cgroup = true");
        let back = format!("cd {}", lab.path("").display());
        let output = lab.run_after(&format!("{FILES} && {ITS_NODE} && {back}"));
        let message =
            "rdma-cgroup = true: the kernel's rdma controller does not reach the container's cgroup; write +rdma to";
        Lab::assert_refused(&output, 15, message);
    });
}

fn limits_of_objects_need_a_card() {
    with_lab(|lab| {
        passthrough(lab, "rdma-cgroup = true");
        let message = "device mlx5_0 has rdma-cgroup = true, and none of its nodes is for a card's verbs";
        lab.refused(14, message);
    });
}

/// The host's node of the connection manager, with the numbers of another that containers may not open otherwise.
fn manager() -> String {
    let Ok(found) = rustix::fs::stat("/dev/fuse") else {
        skip("this kernel has no /dev/fuse, which stands for rdma_cm")
    };
    let (major, minor) = (rustix::fs::major(found.st_rdev), rustix::fs::minor(found.st_rdev));
    format!(
        "mkdir manager && mount -t tmpfs tmpfs manager && mkdir -p manager/upper/infiniband manager/work \
             && mknod -m 600 manager/upper/infiniband/rdma_cm c {major} {minor} \
             && mount -t overlay overlay -o lowerdir=/dev,upperdir=manager/upper,workdir=manager/work /dev"
    )
}

const NODES: &str = "ls /dev/infiniband && { (exec 3<>/dev/infiniband/rdma_cm) 2>/dev/null && echo opened; true; }";

/// Runs the container with a card of which the configuration says `more`, after `prepare`.
fn run_with(lab: &mut Lab, more: &str, prepare: &str) -> Output {
    run_with_inject(lab, "", more, prepare)
}

fn run_with_inject(lab: &mut Lab, inject: &str, more: &str, prepare: &str) -> Output {
    install_card_proxy(lab);
    lab.configure("ready", &format!("{inject}\n[[device]]\nname = \"mlx5_0\"\nkind = \"ibverbs\"\n{more}\n"));
    let back = format!("cd {}", lab.path("").display());
    let output = lab.run_after(&format!("{prepare} && {FILES} && {back}"));
    let _ = std::fs::remove_dir(lab.path("manager"));
    output
}

fn rdma_cm_is_the_administrators_to_give() {
    let manager = manager();
    with_lab(|lab| {
        lab.edit(|config| {
            config["process"]["user"] = json!({"uid": 1000, "gid": 1000});
            config["process"]["capabilities"] = json!({});
        });
        lab.script(NODES);
        assert_eq!(succeeded(&run_with(lab, "rdma-cm = true", &manager)), "rdma_cm\nopened\n");
        assert_eq!(succeeded(&run_with(lab, "rdma-cm = false", &manager)), "");
        assert_eq!(succeeded(&run_with(lab, "", &manager)), "");
    });
}

fn rdma_cm_without_the_device_in_sysfs() {
    let manager = manager();
    with_lab(|lab| {
        lab.script(NODES);
        let output = run_with_inject(lab, "sysfs = false", "rdma-cm = true", &manager);
        assert_eq!(succeeded(&output), "rdma_cm\nopened\n");
    });
}

fn a_kernel_without_rdma_cm() {
    with_lab(|lab| {
        let output = run_with(lab, "rdma-cm = true", "true");
        let message =
            "device mlx5_0 has rdma-cm = true, and this kernel has no /dev/infiniband/rdma_cm: modprobe rdma_ucm";
        Lab::assert_refused(&output, 14, message);
    });
}

fn no_rdma_cm_beside_an_iwarp_card() {
    let manager = manager();
    with_lab(|lab| {
        let iwarp = "mkdir -p /sys/class/infiniband/siw0 && echo '4: RNIC' >/sys/class/infiniband/siw0/node_type";
        let back = format!("cd {}", lab.path("").display());
        install_card_proxy(lab);
        lab.configure("ready", "[[device]]\nname = \"mlx5_0\"\nkind = \"ibverbs\"\nrdma-cm = true\n");
        let output = lab.run_after(&format!("{manager} && {FILES} && {iwarp} && {back}"));
        let message =
            "device mlx5_0 has rdma-cm = true, and this host has the iWARP card siw0: by rdma_cm a container could";
        Lab::assert_refused(&output, 14, message);
        std::fs::remove_dir(lab.path("manager")).unwrap();
    });
}

fn no_rdma_cm_where_it_finds_no_address() {
    let manager = manager();
    with_lab(|lab| {
        // So that the record stays.
        lab.hooks(&["createRuntime"], false);
        lab.script(NODES);
        assert_eq!(succeeded(&run_with(lab, "rdma-cm = true\ngids = \"host\"", &manager)), "");
        let warnings = lab.record(&lab.id)["warnings"].clone();
        assert_eq!(
            warnings,
            json!([
                "no /dev/infiniband/rdma_cm: it knows the addresses of the container's own network, and those of mlx5_0 are the \
                host's; give the container the host's network, or an interface of the card's and gids = \"namespace\""
            ])
        );
        lab.collect();
        // With the host's network they are its own.
        lab.edit(|config| {
            let namespaces = config["linux"]["namespaces"].as_array_mut().unwrap();
            namespaces.retain(|namespace| namespace["type"] != "network");
        });
        assert_eq!(succeeded(&run_with(lab, "rdma-cm = true\ngids = \"host\"", &manager)), "rdma_cm\nopened\n");
        lab.collect();
    });
}
