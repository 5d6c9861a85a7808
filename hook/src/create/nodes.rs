//! Containers that have device nodes and no proxy: modes passthrough and exclusive.

use super::Making;
use crate::card;
use crate::cgroup;
use crate::config;
use crate::device_filter;
use crate::exclusive;
use crate::failure::{Code, During, Failure};
use crate::init::Init;
use crate::inject::{self, Sources};
use crate::journal;
use crate::session::Session;
use crate::state::{Bundle, Rdma};
use crate::sysfs::Tree;
use ringfence_proxy::sysfs::{DEVICES, VERBS};
use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// Why limits of objects cannot be had.
const NO_RDMA_CONTROLLER: &str = "rdma-cgroup = true: the kernel's rdma controller does not reach the container's cgroup; write +rdma to \
     cgroup.subtree_control of all cgroups above it, or set rdma-cgroup = false";

/// Why nodes cannot be had by a hook alone.
const NO_CGROUP: &str = "the container's cgroup cannot be seen from the hook; name the device nodes in the container's linux.devices and \
     linux.resources.devices, as ringfence-runtime does";

/// A node that a container is given.
struct Node {
    /// In the container.
    path: PathBuf,
    node: OwnedFd,
    major: u32,
    minor: u32,
}

/// What a container is given.
struct Given {
    mode: &'static str,
    nodes: Vec<Node>,
    /// The cards whose nodes these are.
    cards: BTreeSet<String>,
    /// What is seen of cards in `/sys/class`, each with its class.
    seen: Vec<(String, String)>,
}

impl Making<'_> {
    /// Gives the container the nodes of `device`.
    pub(super) fn passthrough(
        &mut self,
        init: Init,
        bundle: &Bundle,
        device: &config::Device,
        objects: Option<Rdma>,
    ) -> Result<(), Failure> {
        let nodes = device.nodes.iter().map(PathBuf::as_path).map(hosts).collect::<Result<Vec<_>, _>>()?;
        let numbers: Vec<_> = nodes.iter().map(|node| (node.major, node.minor)).collect();
        let sys = Path::new(card::SYS);
        let named = nodes.iter().map(|node| (node.path.as_path(), node.major, node.minor));
        card::check_nodes(sys, &device.name, named)
            .map_err(|missing| Failure::new(Code::Device, missing.to_string()))?;
        let cards: BTreeSet<_> =
            numbers.iter().filter_map(|(major, minor)| card::of_node(sys, *major, *minor)).collect();
        if objects.is_some() && cards.is_empty() {
            let message = format!(
                "device {} has rdma-cgroup = true, and none of its nodes is for a card's verbs, such as /dev/infiniband/uverbs0",
                device.name
            );
            return Err(Failure::new(Code::Device, message));
        }
        let seen = card::entries(sys, &numbers);
        self.give(&init, bundle, Given { mode: "passthrough", nodes, cards, seen }, objects)
    }

    /// Gives the container the card `device` for itself, with its node for verbs and what else the configuration names.
    pub(super) fn exclusive(
        &mut self,
        init: Init,
        bundle: &Bundle,
        device: &config::Device,
        objects: Option<Rdma>,
    ) -> Result<(), Failure> {
        let mut nodes = device.nodes_beside_verbs().map(hosts).collect::<Result<Vec<_>, _>>()?;
        let others: Vec<_> = nodes.iter().map(|node| (node.major, node.minor)).collect();
        let verbs = exclusive::lend(self.config, self.records, &mut self.record, &device.name, &init)?;
        // The host's own has another mode until udev has seen it, and may have another name.
        let what = || format!("a node for RDMA device {}", device.name);
        let session = Session::make(&self.config.run_dir, &self.record.container).during(Code::Internal, what)?;
        let node = session.make_node(&verbs.name, verbs.major, verbs.minor).during(Code::Injection, what)?;
        let path = Path::new("/dev/infiniband").join(&verbs.name);
        nodes.push(Node { path, node, major: verbs.major, minor: verbs.minor });
        // The host's /sys does not show the card any more.
        let mut seen = card::entries(Path::new(card::SYS), &others);
        seen.push((DEVICES.to_owned(), device.name.clone()));
        seen.push((VERBS.to_owned(), verbs.name));
        let cards = BTreeSet::from([device.name.clone()]);
        self.give(&init, bundle, Given { mode: "exclusive", nodes, cards, seen }, objects)
    }

    fn give(&mut self, init: &Init, bundle: &Bundle, given: Given, objects: Option<Rdma>) -> Result<(), Failure> {
        let Given { mode, mut nodes, cards, seen } = given;
        let forbidden = nodes.iter().filter(|node| !bundle.allows_device(node.major, node.minor));
        let forbidden: Vec<_> = forbidden.map(|node| (node.major, node.minor)).collect();
        // What is in linux.devices the runtime has made already, as ringfence-runtime and CDI have it do.
        nodes.retain(|node| !bundle.has_device(&node.path, node.major, node.minor));
        let nodes: Vec<_> = nodes.into_iter().map(|node| (node.path, node.node)).collect();
        let only = self.config.inject.sysfs.then(|| Tree::new([]));
        let only = only.transpose().during(Code::Injection, || "cannot make a tmpfs for what /sys shows".into())?;
        let only = only.map(|tree| (tree, seen));
        let injected = self.inject(&init.container(&self.record, bundle)?, Sources::passthrough(&nodes, only)?)?;
        if !injected.is_empty() {
            injected.iter().for_each(|warning| journal::warn(&self.record.container, warning));
            self.record.warnings = injected;
            self.save()?;
        }
        forbidden.into_iter().try_for_each(|(major, minor)| {
            let allowed = device_filter::grant_for_good(init.process.pid, major, minor);
            match allowed.during(Code::Injection, || format!("device {major}:{minor} in the container's cgroup"))? {
                true => Ok(()),
                false => Err(Failure::new(Code::Injection, format!("mode={mode}: {NO_CGROUP}"))),
            }
        })?;
        // Last: kernels are known that look at limits of a cgroup that is gone, as that of a container is which fails.
        cards.iter().try_for_each(|card| {
            let Some(limits) = objects else { return Ok(()) };
            let limited = cgroup::limit_rdma(init.process.pid, card, limits);
            match limited.during(Code::Injection, || format!("{:?} in rdma.max", limits.line(card)))? {
                true => Ok(()),
                false => Err(Failure::new(Code::Injection, NO_RDMA_CONTROLLER)),
            }
        })
    }
}

/// The host's node at `path`, for the same path in the container.
fn hosts(path: &Path) -> Result<Node, Failure> {
    let node = inject::open_node(path)?;
    let found = rustix::fs::fstat(&node).during(Code::Device, || path.display().to_string())?.st_rdev;
    Ok(Node { path: path.to_owned(), node, major: rustix::fs::major(found), minor: rustix::fs::minor(found) })
}
