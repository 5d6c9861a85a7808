//! What the control thread does for a device that needs the whole [`Node`] for it: beside [`Control`], which names things, and
//! [`Device`], which moves bytes.

use super::node::Node;
use crate::device::Device;
use crate::device::control::Control;
use ringfence_protocol::control::{ModifyQp, QpAttr};
use rustix::fd::OwnedFd;
use rustix::io::Errno;

/// A device that a proxy can serve its container with.
pub trait Driver: Device + Send {
    /// What it says about itself, and gives names by.
    type Control: Control;

    /// `ioctl(2)` requests, beyond those of every proxy, that it makes once the container can say something.
    const IOCTLS: &'static [u64] = &[];

    /// Whether it looks for its device in files, of those that [`crate::sandbox::View`] leaves it, when the container can say something.
    const OPENS_FILES: bool = false;

    /// The worker has been started.
    fn begun(node: &Node<Self>) {
        let _ = node;
    }

    /// `ibv_modify_qp`. When it returns, what the transition makes void reaches no memory any more.
    fn modify_qp(node: &mut Node<Self>, queue: u32, request: &ModifyQp) -> Result<(), Errno>;

    /// `ibv_query_qp`.
    fn query_qp(node: &mut Node<Self>, queue: u32) -> Result<QpAttr, Errno> {
        node.worker.call(move |plane| plane.query_qp(queue))
    }

    /// Takes a queue pair out, here and on the device.
    fn remove_qp(node: &mut Node<Self>, queue: u32);

    /// The worker has something for the control thread to do.
    fn hear(node: &mut Node<Self>, notice: Self::Notice);

    /// A region is out of the data plane: nobody else reaches it any more when this returns.
    fn forget_share(node: &mut Node<Self>, share: u32) {
        node.shares.remove(&share);
    }

    /// Another proxy of the node has connected. A device that needs none of them shuts the door.
    fn let_neighbour_in(node: &mut Node<Self>, socket: OwnedFd) {
        node.closers.neighbours.close(socket);
    }

    /// One of the neighbours has said something.
    fn serve_neighbour(node: &mut Node<Self>, position: usize) {
        let _ = (node, position);
    }

    /// Something may be due that neighbours were promised.
    fn tend_neighbours(node: &mut Node<Self>) {
        let _ = node;
    }

    /// [`Control::waker`] was readable, or it is the time of [`Control::wake_at`].
    fn hear_device(node: &mut Node<Self>) {
        let _ = node;
    }
}
