//! What the control thread does for the software device: links to other proxies, and what is shared over them.

use super::driver::Driver;
use super::node::Node;
use crate::device::soft::control::SoftDevice;
use crate::device::soft::{Destination, Soft, Task};
use crate::fabric::neighbours::Owed;
use ringfence_protocol::control::{AddressVector, ModifyQp};
use ringfence_protocol::verbs::QpAttrMask;
use rustix::fd::OwnedFd;
use rustix::io::Errno;

impl Driver for Soft {
    type Control = SoftDevice;

    fn begun(node: &Node<Self>) {
        if !node.worker.call(|_| crate::rseq::Thread::current().is_some()) {
            eprintln!(
                "ringfence-proxy: no restartable sequences (rseq(2); Linux 4.18, glibc 2.35): neighbours' memory is reached by messages only"
            );
        }
    }

    fn modify_qp(node: &mut Node<Self>, queue: u32, request: &ModifyQp) -> Result<(), Errno> {
        let has_av = request.attr.mask & QpAttrMask::AV.0 != 0;
        // A drained queue pair is given another path to the peer that it has.
        let peer = match request.attr.mask & QpAttrMask::DEST_QPN.0 != 0 {
            true => request.attr.dest_qp_num,
            false if has_av => node.worker.call(move |plane| plane.query_qp(queue))?.dest_qp_num,
            false => 0,
        };
        let destination = if has_av { node.resolve(&request.attr.av, peer) } else { None };
        let request = *request;
        let tickets = node.worker.call(move |plane| {
            plane.modify_qp(queue, &request, destination)?;
            Ok::<_, Errno>(plane.take_tickets())
        })?;
        // Nothing of the former peer's lands after this.
        node.settle(tickets);
        // Not before: neighbours are listened to only for the queue pairs that are connected to them.
        if let Some(Destination::Port(lid)) = destination {
            node.link_to(lid);
        }
        Ok(())
    }

    fn remove_qp(node: &mut Node<Self>, queue: u32) {
        let (removed, tickets) = node.worker.call(move |plane| (plane.remove_qp(queue), plane.take_tickets()));
        drop(removed);
        node.settle(tickets);
    }

    fn hear(node: &mut Node<Self>, notice: Task) {
        match notice {
            Task::Share { link, share } => node.share(link, Owed::Region(share)),
            Task::Grant { link, wish } => node.grant(link, wish),
            Task::Bounce { link } => node.share(link, Owed::Bounce),
            Task::Fault { link, fault } => node.link_failed(link, fault),
        }
    }

    fn forget_share(node: &mut Node<Self>, share: u32) {
        node.forget_share(share);
    }

    fn let_neighbour_in(node: &mut Node<Self>, socket: OwnedFd) {
        node.let_neighbour_in(socket);
    }

    fn serve_neighbour(node: &mut Node<Self>, position: usize) {
        node.serve_neighbour(position);
    }

    fn tend_neighbours(node: &mut Node<Self>) {
        node.tend_neighbours();
    }
}

impl Node {
    /// The port that an address vector and a QP number name.
    pub fn resolve(&mut self, av: &AddressVector, qp_num: u32) -> Option<Destination> {
        let lid = if av.is_global != 0 {
            self.port.find(&av.dgid, qp_num).or_else(|| {
                self.refresh_gids();
                self.port.find(&av.dgid, qp_num)
            })
        } else {
            Some(av.dlid).filter(|lid| *lid != 0 && self.port.lives(*lid))
        }?;
        Some(if lid == self.port.lid() { Destination::Own } else { Destination::Port(lid) })
    }
}
