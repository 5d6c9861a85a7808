//! The control thread's side of a real card.

use crate::attributes::{self, Most};
use crate::card::{Card, CardQp, Cq, Mr, Pd};
use crate::description;
use crate::device::Made;
use crate::help::{Pacing, Tree};
use crate::rdma_cm::{ConnectionManager, NODE, Port};
use ringfence_abi::{ibv_device_attr, ibv_gid_entry, ibv_port_attr};
use ringfence_protocol::control::{AddressVector, DeviceInfo, GidInfo, OpenReply, PortInfo};
use ringfence_protocol::work;
use ringfence_proxy::control::quota::{Quota, Resource};
use ringfence_proxy::control::session::random;
use ringfence_proxy::device::control::Control;
use ringfence_proxy::device::soft::control::SoftDevice;
use ringfence_proxy::errors::passes;
use ringfence_proxy::fabric::addresses::Addresses;
use ringfence_proxy::fabric::ports::Gid;
use ringfence_proxy::launch::Limits;
use ringfence_proxy::launch::addresses::Gids;
use ringfence_proxy::launch::marks::Marks;
use ringfence_proxy::launch::pkeys::Pkey;
use ringfence_proxy::memory::{MemoryRegion, PdId};
use ringfence_proxy::pacing::Nanos;
use ringfence_proxy::plane::qp::{Caps, NewQp};
use ringfence_proxy::process::Opening;
use ringfence_proxy::sysfs::{self, Parent};
use ringfence_proxy::worker::now;
use rustix::fd::BorrowedFd;
use rustix::io::Errno;
use std::cell::Cell;
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError};

/// Completions of one of the card's queues, which several queue pairs share.
const CQE: u32 = 8192;
/// Pieces of one queue pair that the card has at once: as many requests as the plane claims.
const SENDS: u32 = 256;

/// A completion queue of the card's, in which each queue pair has as much room as it may have requests: none overruns it.
#[derive(Debug)]
struct Shared {
    cq: Arc<Cq>,
    used: u32,
}

/// The card as one container's control thread has it.
#[derive(Debug)]
pub struct CardControl {
    /// The card.
    pub card: Arc<Card>,
    limits: Limits,
    granted: Gids,
    owners: Owners,
    partitions: Option<Vec<Pkey>>,
    marks: Marks,
    attr: ibv_device_attr,
    gids: Vec<GidInfo>,
    /// The card's index of each.
    indices: Vec<u8>,
    pkeys: Vec<u16>,
    /// The card's index of each that it has.
    pkey_indices: Vec<Option<u16>>,
    pds: HashMap<PdId, Arc<Pd>>,
    made: Made,
    queues: Vec<Shared>,
    /// Names of queues: none is given twice, so that what comes of a card that is gone is nobody's.
    names: usize,
    /// The rates that the card holds queue pairs to.
    pub pacing: Pacing,
    /// The cap that it holds them to together.
    pub tree: Tree<Card>,
    /// Set while there is no card.
    pub absence: Option<Absence>,
    /// How it ended the last time.
    returned: Option<Return>,
    /// Why the card could not be used at the last look, and whether that was said.
    pub complaint: Option<(String, bool)>,
    /// When it was seen last that the kernel is not removing the card.
    pub looked: Nanos,
    /// When the table of P_Keys is read again: it could not be read.
    pub pkeys_due: Option<Nanos>,
}

/// Who says whether an address of the process's network namespace is on an interface of the card's.
#[derive(Debug)]
pub enum Owners {
    /// Nobody need: who gives interfaces addresses there is the host's root.
    Trusted,
    /// The kernel.
    Kernel(ConnectionManager),
    /// The kernel would have to, and cannot be asked.
    Unknown(Errno),
}

impl Owners {
    /// Whether the entry of the card's `table` is of the interface that has the address.
    ///
    /// # Errors
    /// If the kernel cannot say it now.
    fn say_own(
        &self,
        card: &Card,
        table: &[ibv_gid_entry],
        entry: &ibv_gid_entry,
        address: &Gid,
    ) -> Result<bool, Errno> {
        Ok(match self {
            Self::Trusted => true,
            Self::Kernel(manager) => {
                let what = |entry: &ibv_gid_entry| (entry.gid.0, entry.gid_type, entry.port_num, entry.ndev_ifindex);
                // Interfaces of two namespaces may have one number, and one address: which entry is the container's nobody says.
                let is_one = table.iter().filter(|other| what(other) == what(entry)).count() == 1;
                let port = Port { guid: card.about.guid, number: card.port_number() };
                if !is_one || entry.ndev_ifindex != address.ifindex {
                    return Ok(false);
                }
                match manager.port_of(address) {
                    Err(error) if passes(error) => return Err(error),
                    found => found == Ok(port),
                }
            }
            Self::Unknown(_) => false,
        })
    }
}

/// That there is no card, and when to look for it.
#[derive(Clone, Copy, Debug)]
pub struct Absence {
    /// The next time.
    pub next: Nanos,
    /// Since the last time; longer each time.
    pub pause: Nanos,
    /// Given up on purpose: not opened again before it has been away, or somebody says so.
    pub drained: bool,
}

/// A card that came back.
#[derive(Clone, Copy, Debug)]
struct Return {
    at: Nanos,
    /// [`Absence::pause`] of then.
    pause: Nanos,
}

/// Between two looks for a card that is gone, at first and at most; and at whether the kernel is removing it.
const FIRST_PAUSE: Nanos = 100_000_000;
/// See [`FIRST_PAUSE`].
pub const LONGEST_PAUSE: Nanos = 2_000_000_000;
/// A card that goes sooner after it came back is looked for less eagerly each time: it may fail as soon as it is used.
const STEADY: Nanos = 10_000_000_000;
/// Until the table of P_Keys is read again that could not be read: a queue pair may be in a partition that is no more the container's.
pub const PKEYS_PAUSE: Nanos = 100_000_000;
/// See [`FIRST_PAUSE`].
pub const LOOK: Nanos = 1_000_000_000;

/// Room that a queue pair had in a completion queue; to be given back when nothing of it is left there.
#[derive(Clone, Copy, Debug)]
pub struct Room {
    /// The queue: [`Cq::name`].
    pub name: usize,
    completions: u32,
}

fn room(qp: &CardQp) -> u32 {
    (qp.sends + qp.receives) as u32
}

impl CardControl {
    /// For the card.
    ///
    /// # Errors
    /// What the card says.
    pub fn new(card: Arc<Card>, opening: &Opening<'_>) -> Result<Self, Errno> {
        let (launch, attr) = (opening.launch, card.attributes()?);
        // A card that is not the kernel's has no node, and nobody to ask.
        let owners = match opening.own_network && card.about.node.is_some() {
            true => ConnectionManager::open().map_or_else(Owners::Unknown, Owners::Kernel),
            false => Owners::Trusted,
        };
        let mut control = Self {
            card,
            limits: launch.limits.clone(),
            granted: launch.device.gids.clone(),
            owners,
            partitions: launch.device.pkeys.clone(),
            marks: launch.device.marks,
            attr,
            gids: Vec::new(),
            indices: Vec::new(),
            pkeys: Vec::new(),
            pkey_indices: Vec::new(),
            pds: HashMap::new(),
            made: Made::default(),
            queues: Vec::new(),
            names: 0,
            pacing: Pacing::new(launch.limits.bandwidth),
            tree: Tree::new(launch.limits.bandwidth),
            absence: None,
            returned: None,
            complaint: None,
            looked: 0,
            pkeys_due: None,
        };
        control.read_pkeys()?;
        Ok(control)
    }

    /// Reads the card's table of P_Keys again: the container's indices of those that are elsewhere in it now, or gone.
    ///
    /// # Errors
    /// What the card says; nothing has changed then.
    pub fn read_pkeys(&mut self) -> Result<Vec<u32>, Errno> {
        let pkeys = self.card.pkeys()?;
        Ok(self.set_pkeys(&pkeys))
    }

    fn set_pkeys(&mut self, card: &[u16]) -> Vec<u32> {
        let table = attributes::partitions(card, self.partitions.as_deref());
        let (pkeys, indices): (Vec<_>, Vec<_>) = table.into_iter().unzip();
        // The container's first may be whatever the card's first is: then its index stays, and it is another partition.
        let had = self.pkeys.iter().zip(&self.pkey_indices);
        let moved = (0..).zip(had.zip(pkeys.iter().zip(&indices))).filter(|(_, (had, has))| had != has);
        let moved = moved.map(|(index, _)| index).collect();
        (self.pkeys, self.pkey_indices) = (pkeys, indices);
        moved
    }

    /// That the card lacks a partition which the container is granted.
    #[must_use]
    pub fn missing_pkey(&self) -> Option<String> {
        let granted = self.partitions.as_ref()?;
        let missing = granted[self.pkey_indices.iter().position(Option::is_none)?];
        let has = self.card.pkeys().unwrap_or_default();
        let has: Vec<_> = has.iter().filter(|key| **key != 0).map(|key| format!("{key:#06x}")).collect();
        Some(format!(
            "RDMA device {} has no P_Key {missing} at port {}, but {}; correct pkeys of the [[device]], or have the subnet manager \
             give it that",
            self.card.about.name,
            self.card.port_number(),
            has.join(", ")
        ))
    }

    /// The card's index of the container's P_Key number `index`.
    #[must_use]
    pub fn partition(&self, index: u32) -> Option<u16> {
        self.pkey_indices.get(index as usize).copied().flatten()
    }

    /// The character devices that it takes.
    #[must_use]
    pub fn nodes(&self) -> Vec<PathBuf> {
        let asked = matches!(self.owners, Owners::Kernel(_)).then(|| NODE.into());
        self.card.about.node.iter().cloned().chain(asked).collect()
    }

    /// Opens what the kernel is asked by as the user who is to ask.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn reopen_connection_manager(&mut self) -> Result<(), Errno> {
        if let Owners::Kernel(manager) = &mut self.owners {
            *manager = ConnectionManager::open()?;
        }
        Ok(())
    }

    /// Goes on with this card, which is the same, opened again. Nothing has been made in it.
    ///
    /// `pkeys`: its table of P_Keys.
    pub fn use_card(&mut self, card: Arc<Card>, pkeys: &[u16]) {
        self.card = card;
        self.set_pkeys(pkeys);
        let returned = |absence: Absence| Return { at: now(), pause: absence.pause };
        self.returned = self.absence.take().map(returned);
        self.pkeys_due = None;
        self.pacing.forget();
        self.tree.forget();
        if let Ok(attr) = self.card.attributes() {
            self.attr = attr;
        }
    }

    /// There is no card from now on.
    pub fn miss(&mut self) {
        self.complaint = None;
        let soon = self.returned.filter(|returned| now() < returned.at + STEADY);
        let pause = soon.map_or(FIRST_PAUSE, |returned| (2 * returned.pause).min(LONGEST_PAUSE));
        self.absence = Some(Absence { next: now() + pause, pause, drained: false });
    }

    /// The card is closed: lets go of all that was made in it.
    pub fn forget(&mut self) {
        self.made.lock().unwrap_or_else(PoisonError::into_inner).clear();
        self.queues.clear();
        self.pds.clear();
        self.gids.clear();
        self.indices.clear();
    }

    /// Where the worker finds queue pairs.
    #[must_use]
    pub fn made(&self) -> Made {
        Arc::clone(&self.made)
    }

    /// The card's index of the container's GID number `index`.
    #[must_use]
    pub fn source(&self, index: u8) -> Option<u8> {
        self.indices.get(usize::from(index)).copied()
    }

    /// An address vector as the card is to have it: marked as the administrator says.
    pub fn mark(&self, av: &mut AddressVector) {
        let Marks { service_level, traffic_class } = self.marks;
        av.sl = service_level.map_or(av.sl, u8::from);
        av.traffic_class = traffic_class.map_or(av.traffic_class, u8::from);
    }

    /// What is to be done where the container has no GID.
    #[must_use]
    pub fn without_gids(&self) -> String {
        let name = &self.card.about.name;
        match &self.granted {
            Gids::Namespace => format!(
                "{name} has no GID yet that is an address of the container's network namespace: {}give the container an interface of \
                 the card's (macvlan, ipvlan, a virtual function), or the host's GIDs (gids = \"host\" of the device)",
                match self.owners {
                    Owners::Unknown(error) => format!(
                        "the kernel cannot be asked whose addresses they are ({NODE}: {error}), load its module rdma_ucm and start the \
                         container again; "
                    ),
                    _ => String::new(),
                }
            ),
            Gids::Host => format!("{name} has no GID that is an address of the host: give its interface one"),
            Gids::List(list) => {
                let list: Vec<_> = list.iter().map(ToString::to_string).collect();
                format!(
                    "{name} has no GID that is one of {}, the device's gids, and an address of the host",
                    list.join(", ")
                )
            }
        }
    }

    /// The queue pair with this number.
    #[must_use]
    pub fn queue_pair(&self, number: u32) -> Option<Arc<CardQp>> {
        self.made.lock().unwrap_or_else(PoisonError::into_inner).get(&number).cloned()
    }

    /// Destroys the queue pair with this number, which the worker has let go.
    pub fn destroy(&mut self, number: u32) -> Option<Room> {
        let qp = self.made.lock().unwrap_or_else(PoisonError::into_inner).remove(&number)?;
        Some(Room { name: qp.cq.name, completions: room(&qp) })
    }

    /// Nothing is left of a queue pair in its completion queue.
    pub fn give_back(&mut self, room: Room) {
        if let Some(shared) = self.queues.iter_mut().find(|shared| shared.cq.name == room.name) {
            shared.used = shared.used.saturating_sub(room.completions);
        }
    }

    /// A completion queue with room for so many more.
    fn queue(&mut self, completions: u32) -> Result<usize, Errno> {
        let has_room = |shared: &Shared| shared.cq.capacity.saturating_sub(shared.used) >= completions;
        if let Some(index) = self.queues.iter().position(has_room) {
            return Ok(index);
        }
        let most = u32::try_from(self.attr.max_cqe).unwrap_or(0);
        if completions > most {
            return Err(Errno::INVAL);
        }
        let cq = Cq::new(&self.card, CQE.max(completions).min(most), self.names)?;
        self.names += 1;
        self.queues.push(Shared { cq, used: 0 });
        Ok(self.queues.len() - 1)
    }

    /// What of the policy's limits the card does not have.
    #[must_use]
    pub fn beyond(&self) -> Option<String> {
        description::beyond(&self.card.about.name, &self.attr, &self.limits)
    }

    fn port_attributes(&self) -> Result<ibv_port_attr, Errno> {
        self.card.port()
    }
}

impl Control for CardControl {
    fn info(&self) -> DeviceInfo {
        let about = &self.card.about;
        let mut name = [0; 64];
        let length = about.name.len().min(name.len() - 1);
        name[..length].copy_from_slice(&about.name.as_bytes()[..length]);
        DeviceInfo {
            name,
            node_guid: about.guid,
            node_type: about.node_type,
            transport: about.transport,
            index: about.index,
            reserved: 0,
        }
    }

    fn attributes(&self, quota: &Quota) -> OpenReply {
        let limit = |resource| u32::try_from(quota.limit(resource)).unwrap_or(u32::MAX).min(i32::MAX as u32);
        let most = Most {
            qp: limit(Resource::Qp),
            qp_wr: self.limits.max_qp_depth,
            cq: limit(Resource::Cq),
            cqe: self.max_cqe(),
            mr: limit(Resource::Mr),
            mr_bytes: quota.limit(Resource::MrBytes),
            pd: limit(Resource::Other),
            pkeys: self.pkeys.len() as u32,
        };
        attributes::device(&self.attr, &most)
    }

    fn port(&self, _: u16) -> PortInfo {
        // A card that does not answer has no port that could be used: all zero is IBV_PORT_NOP.
        self.port_attributes().map(|attr| attributes::port(&attr, self.pkeys.len())).unwrap_or_default()
    }

    fn shown(&self, quota: &Quota, lid: u16, gids: Vec<sysfs::Entry>) -> sysfs::Device {
        let about = &self.card.about;
        // Of a card `device` leads to its directory; a software device of the kernel's has none.
        let device = std::fs::canonicalize(about.sysfs.join("device")).unwrap_or_default();
        let parent = match device.strip_prefix("/sys/devices") {
            Ok(directory) => Parent::Card { directory: directory.to_string_lossy().into_owned() },
            Err(_) => Parent::Software { numa_node: None },
        };
        let read = |file: &str| {
            let text = std::fs::read_to_string(about.sysfs.join(file)).ok()?;
            Some(text.trim_end().to_owned()).filter(|text| !text.is_empty())
        };
        sysfs::Device {
            info: self.info(),
            attributes: self.attributes(quota),
            description: read("node_desc").unwrap_or_else(|| about.name.clone()),
            hca_type: read("hca_type"),
            board_id: read("board_id"),
            verbs: 0,
            parent,
            ports: vec![sysfs::Port {
                info: self.port(lid),
                pkeys: self.pkeys.clone(),
                gids,
                counters: Vec::new(),
                hw_counters: Vec::new(),
            }],
        }
    }

    fn max_cqe(&self) -> u32 {
        // The container's completion queues are the plane's.
        SoftDevice::MAX_CQE
    }

    fn qp_number(&mut self, _: u16) -> u32 {
        // Numbers are the card's: `create_qp` does not ask.
        0
    }

    fn key(&mut self) -> u32 {
        // The container's lkeys are the plane's, which has the card's by them.
        random()
    }

    fn knows_key_words(&self) -> bool {
        false
    }

    fn alloc_pd(&mut self, pd: PdId) -> Result<(), Errno> {
        self.pds.insert(pd, Pd::new(&self.card)?);
        Ok(())
    }

    fn dealloc_pd(&mut self, pd: PdId) {
        self.pds.remove(&pd);
    }

    fn register(&mut self, region: MemoryRegion) -> Result<(MemoryRegion, Option<u32>), Errno> {
        // The container may take pages away from a file of its own at any time. Those that are there are pinned, and stay the card's
        // until the region ends, as with any driver; where one is missing, the card says `EFAULT`.
        // A domain that is not there is one of a card that is gone.
        let mr = Mr::new(self.pds.get(&region.pd()).ok_or(Errno::IO)?, &region)?;
        let (lkey, rkey) = (mr.lkey(), mr.rkey());
        Ok((region.registered(lkey, Box::new(mr)), Some(rkey)))
    }

    fn register_dmabuf(
        &mut self,
        region: MemoryRegion,
        fd: BorrowedFd<'_>,
        offset: u64,
    ) -> Result<(MemoryRegion, Option<u32>), Errno> {
        let mr = Mr::of_dmabuf(self.pds.get(&region.pd()).ok_or(Errno::IO)?, &region, fd, offset)?;
        let (lkey, rkey) = (mr.lkey(), mr.rkey());
        Ok((region.registered(lkey, Box::new(mr)), Some(rkey)))
    }

    fn create_qp(&mut self, _: u16, new: &NewQp) -> Result<u32, Errno> {
        let most = |limit: i32| u32::try_from(limit).unwrap_or(0);
        let (requests, sges) = (most(self.attr.max_qp_wr), most(self.attr.max_sge).min(work::MAX_SGE));
        let Caps { max_send_wr, max_recv_wr, max_send_sge, max_recv_sge, .. } = new.caps;
        if max_send_wr.max(max_recv_wr) > requests || max_send_sge.max(max_recv_sge) > sges {
            return Err(Errno::INVAL);
        }
        let caps = Caps { max_send_wr: max_send_wr.min(SENDS), ..new.caps };
        let pd = Arc::clone(self.pds.get(&new.pd).ok_or(Errno::IO)?);
        let index = self.queue(caps.max_send_wr + caps.max_recv_wr)?;
        let shared = &mut self.queues[index];
        let qp = CardQp::new(&pd, &shared.cq, &caps)?;
        shared.used += room(&qp);
        let number = qp.number;
        self.made.lock().unwrap_or_else(PoisonError::into_inner).insert(number, qp);
        Ok(number)
    }

    fn set_addresses(&mut self, addresses: &Addresses) -> Result<(), Errno> {
        let (card, owners) = (&self.card, &self.owners);
        // One that is not there has none.
        let table = if self.absence.is_some() { Vec::new() } else { card.gids()? };
        let unsaid = Cell::new(None);
        let is_own = |entry: &ibv_gid_entry, address: &Gid| {
            let own = owners.say_own(card, &table, entry, address);
            own.inspect_err(|error| unsaid.set(Some(*error))).unwrap_or(false)
        };
        let granted = attributes::granted(&table, card.port_number(), addresses, &self.granted, is_own);
        if let Some(error) = unsaid.get() {
            return Err(error);
        }
        (self.gids, self.indices) = granted.into_iter().unzip();
        Ok(())
    }

    fn gids(&self) -> Option<&[GidInfo]> {
        Some(&self.gids)
    }

    fn find_gid(&self, index: u32) -> Option<u32> {
        let found = self.indices.iter().position(|known| u32::from(*known) == index);
        found.and_then(|found| u32::try_from(found).ok())
    }

    fn pkeys(&self) -> &[u16] {
        &self.pkeys
    }

    fn find_pkey(&self, index: u32) -> Option<u32> {
        let found = self.pkey_indices.iter().position(|known| known.map(u32::from) == Some(index));
        found.and_then(|found| u32::try_from(found).ok())
    }

    fn check(&self) -> Result<(), Errno> {
        self.card.check()
    }

    fn waker(&self) -> Option<BorrowedFd<'_>> {
        self.card.events()
    }

    fn wake_at(&self) -> Option<Nanos> {
        let present = || self.pkeys_due.map_or(self.looked + LOOK, |due| due.min(self.looked + LOOK));
        Some(self.absence.map_or_else(present, |absence| absence.next))
    }
}
