//! Queue pairs and the links that they use: how the two come together, and what becomes of the ones without the others.

use super::link::{Link, LinkFault};
use super::links::LinkId;
use super::qp::{OWN_PORT, Peer};
use super::{Destination, Notice, Plane, Qp, Task};
use crate::plane::bell::Ringer;

impl Plane {
    /// A queue pair is told where to send.
    pub(super) fn connect(&mut self, queue: u32, destination: Destination) {
        let Self { qps, device, .. } = self;
        let Some(qp) = &mut qps[queue as usize] else { return };
        (qp.device.port, qp.device.peer) = match destination {
            Destination::Own => (OWN_PORT, Peer::Local),
            Destination::Port(lid) => (lid, device.links.to(lid).map_or(Peer::None, Peer::Link)),
        };
    }

    /// Queue pairs of this proxy that are connected to each other learn each other's bell numbers: this one, and one that was
    /// connected to it before it existed.
    pub(super) fn adopt_peers(&mut self, queue: u32) {
        let Some(qp) = &mut self.qps[queue as usize] else { return };
        let (number, dest) = (qp.number, qp.attr.dest_qp_num);
        if qp.device.peer == Peer::Local
            && let Some(other) = self.by_number.get(&dest).copied()
        {
            qp.device.peer_queue = other;
            if let Some(other) = &mut self.qps[other as usize]
                && other.attr.dest_qp_num == number
            {
                other.device.peer_queue = queue;
            }
        }
    }

    /// A queue pair has other rights or another peer, or begins anew: grants of either direction were for what it was.
    pub(super) fn end_grants(&mut self, queue: u32) {
        self.revoke_queue(queue);
        if let Some(number) = self.qps[queue as usize].as_ref().map(|qp| qp.number) {
            self.forget_grants(number);
        }
    }

    /// Adds a link. If it is open already, queue pairs that were connected to its port while there was none use it.
    pub fn add_link(&mut self, link: Link) -> LinkId {
        let (port, open) = (link.port, link.is_open());
        let id = self.device.links.insert(link);
        self.tally.link_made(self.device.links.count());
        if open {
            self.adopt_link(id, port);
        }
        id
    }

    /// The neighbour has taken our link.
    pub fn open_link(&mut self, id: LinkId, wake: Ringer) {
        let Some(link) = self.device.links.get_mut(id) else { return };
        let port = link.port;
        link.open(wake);
        self.device.links.rank(port);
        self.adopt_link(id, port);
    }

    fn adopt_link(&mut self, id: LinkId, port: u16) {
        self.change_peers(|qp| qp.device.peer == Peer::None && qp.device.port == port, Peer::Link(id));
    }

    /// Whether a queue pair of ours is connected to this port: nothing is accepted from any other.
    #[must_use]
    pub fn is_connected_to(&self, port: u16) -> bool {
        let connected = |qp: &Qp| qp.device.port == port && qp.device.port != OWN_PORT && qp.responds();
        self.qps.iter().flatten().any(|qp| connected(qp))
    }

    /// Takes all rings of the links' bells.
    pub(super) fn silence_links(&mut self) {
        for place in 0..self.device.links.places() {
            let Some(id) = self.device.links.at(place) else { continue };
            if self.device.links.get(id).is_some_and(|link| link.bell.silence().is_err()) {
                self.fail_link(id, LinkFault::Baggage);
            }
        }
    }

    /// Ends a link whose other end broke the protocol; the control thread is told, and takes it out.
    pub(super) fn fail_link(&mut self, id: LinkId, fault: LinkFault) {
        self.notices.push(Notice::Device(Task::Fault { link: id, fault }));
        self.tally.link_failed();
        self.leave_nothing(id);
        if let Some(port) = self.device.links.end(id) {
            self.leave_link(id, port);
            self.tally.links(self.device.links.count());
        }
    }

    /// Nothing that the other end of a link still has of ours holds any more.
    fn leave_nothing(&mut self, id: LinkId) {
        self.revoke_link(id);
        let tickets = self.end_names(|at, link| at == id && link.end_all_names());
        self.keep_tickets(tickets);
    }

    /// Takes a link out. What it holds is given up by the caller, for which this thread has no time.
    #[must_use]
    pub fn remove_link(&mut self, id: LinkId) -> Option<Box<Link>> {
        self.leave_nothing(id);
        let link = self.device.links.remove(id)?;
        self.leave_link(id, link.port);
        self.tally.links(self.device.links.count());
        Some(link)
    }

    /// Queue pairs that used a link go on over another to the same port, or without: then their requests are given up by
    /// their retry timers.
    fn leave_link(&mut self, id: LinkId, port: u16) {
        let peer = self.device.links.to(port).map_or(Peer::None, Peer::Link);
        self.change_peers(|qp| qp.device.peer == Peer::Link(id), peer);
    }

    /// What the former peer has not answered is asked again of the new one.
    fn change_peers(&mut self, which: impl Fn(&Qp) -> bool, peer: Peer) {
        for queue in 0..self.qps.len() {
            if let Some(qp) = self.qps[queue].as_mut().filter(|qp| which(qp)) {
                qp.device.peer = peer;
                qp.restart();
                self.activate(queue as u32);
            }
        }
    }
}
