//! Containers with a card behind their proxy: which program is started, and what is told of a card that cannot be used. The card is
//! one of plain files, where the kernel shows its own.

mod common;

use common::{HOOK, Lab, succeeded, with_lab};
use ringfence_trials::tests;
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
        let output = run(lab, &format!("{FILES} && mv /sys/class/infiniband/mlx5_0 /sys/class/infiniband/mlx5_1"));
        Lab::assert_refused(&output, 14, "no RDMA device has the name mlx5_0: there is mlx5_1; correct the name");
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
