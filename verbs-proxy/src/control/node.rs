//! What all connections of a container have in common.

use super::adopted::AdoptedFiles;
use super::driver::Driver;
use super::grants::Granted;
use super::quota::{Quota, Resource, Taken};
use super::spares::Spares;
use crate::closer::Closer;
use crate::device::control::Control;
use crate::device::soft::Soft;
use crate::fabric::addresses::{self, Addresses};
use crate::fabric::neighbours::{Backing, Neighbours};
use crate::fabric::ports::{Gid, Port};
use crate::launch::Limits;
use crate::memory::Entrance;
use crate::pacing::Nanos;
use crate::shared::Holes;
use crate::sysfs::{Entry, Shown};
use crate::voice::Voice;
use crate::warden::Warden;
use crate::worker::{Worker, now};
use ringfence_protocol::control::GidInfo;
use ringfence_protocol::doorbell::MAX_QUEUES;
use ringfence_protocol::verbs::{EventType, GidType};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

/// Entries of the GID table that a port shows.
pub const GID_TABLE: usize = crate::fabric::ports::MAX_GIDS;

/// Programs query the whole table, entry by entry; it is read once for all of them.
const GIDS_FRESH: Nanos = 5_000_000;
/// Until it is tried again where it could not be read: nobody else may ask, and no event need come.
const GIDS_PAUSE: Nanos = 100_000_000;
/// The same at most.
const GIDS_LONGEST_PAUSE: Nanos = 5_000_000_000;

/// Bell numbers.
#[derive(Debug)]
pub struct Queues {
    free: Vec<u32>,
}

impl Default for Queues {
    fn default() -> Self {
        Self { free: (0..MAX_QUEUES).rev().collect() }
    }
}

impl Queues {
    /// A free number.
    pub fn take(&mut self) -> Option<u32> {
        self.free.pop()
    }

    /// Gives a number back.
    pub fn give(&mut self, queue: u32) {
        self.free.push(queue);
    }
}

/// One container's proxy, as its control thread sees it.
#[derive(Debug)]
pub struct Node<D: Driver = Soft> {
    /// The data plane's thread.
    pub worker: Worker<D>,
    /// Counters against the policy.
    pub quota: Quota,
    /// The policy.
    pub limits: Limits,
    /// Bell numbers.
    pub queues: Queues,
    /// Where memory regions enter the data plane.
    pub entrance: Entrance,
    /// Places of its table, each with a key word.
    pub places: u32,
    /// Doorbells and key words.
    pub doorbell_file: Arc<OwnedFd>,
    /// What the container's processes wake the worker with: the end of a [`crate::plane::bell::Bell`] that is given away.
    pub bell: Arc<OwnedFd>,
    /// Processors that the container may run on.
    pub processors: u32,
    /// The device.
    pub device: D::Control,
    /// The container's port on the fabric.
    pub port: Port,
    /// What opens memory files for neighbours.
    pub warden: Warden,
    /// How long what was read of the GID table is good for.
    pub gids_fresh_until: Nanos,
    /// When it is read again, asked or not: it could not be read, or may say something else by then.
    pub gids_due: Option<Nanos>,
    /// Between two attempts while it cannot be read; longer each time. Zero while it can.
    pub gids_pause: Nanos,
    /// The device's table as contexts know it. None if it is news to nobody.
    pub gids_told: Option<Vec<GidInfo>>,
    /// The files that programs read the table from, if there are some.
    pub shown: Option<Shown>,
    /// Links to other proxies.
    pub neighbours: Neighbours,
    /// Where it is said what is wrong.
    pub voice: Arc<Voice>,
    /// What backs each region, by its name for neighbours.
    pub shares: HashMap<u32, Backing>,
    /// What of them neighbours may reach without asking.
    pub granted: Granted,
    /// The container's own files that regions are made of.
    pub adopted: AdoptedFiles,
    /// What mapping those takes. None where the kernel has no userfaultfd.
    pub holes: Option<Holes>,
    /// The next file that a small buffer is registered with.
    pub spares: Spares,
    /// The last protection domain.
    pub last_pd: u32,
    /// The last name of a region.
    pub last_share: u32,
    /// Where descriptors that others made are closed.
    pub closers: Closers,
    /// Events of the port or the device that every context is to hear of, and has not.
    pub announced: Vec<EventType>,
}

/// Where descriptors that others made are closed: one party's do not hold up the other's.
#[derive(Debug)]
pub struct Closers {
    /// What the container sent, and its connections.
    pub container: Closer,
    /// What neighbours sent, and their connections.
    pub neighbours: Closer,
    /// What neighbours were granted: memory whose lock they can hold.
    pub granted: Closer,
}

fn gid_info(gid: Gid) -> GidInfo {
    GidInfo { gid: gid.raw, gid_type: GidType::ROCE_V2.0, ndev_ifindex: gid.ifindex }
}

/// The GID table that is shown: the device's own, or that of `port`, whose addresses are `addresses`.
pub fn gid_entries(device: &impl Control, port: &Port, addresses: &Addresses) -> Vec<Entry> {
    let entry = |info: GidInfo| Entry {
        info,
        interface: addresses.interface(info.ndev_ifindex).unwrap_or_default().to_owned(),
    };
    match device.gids() {
        Some(gids) => gids.iter().copied().map(entry).collect(),
        None => port.gids().iter().copied().map(gid_info).map(entry).collect(),
    }
}

/// How long a request waits for memory that the container gave back and that is not emptied yet.
const EMPTYING: Duration = Duration::from_secs(1);

impl<D: Driver> Node<D> {
    /// Takes `amount` of the quota.
    pub fn take(&self, resource: Resource, amount: u64) -> Result<Taken, Errno> {
        self.quota.take(resource, amount).or_else(|error| {
            let Closers { container, granted, .. } = &self.closers;
            let settled = [container, granted].map(|closer| closer.settle(EMPTYING));
            if settled.contains(&true) { self.quota.take(resource, amount) } else { Err(error) }
        })
    }

    /// A protection domain that never was.
    pub fn next_pd(&mut self) -> crate::memory::PdId {
        self.last_pd = self.last_pd.wrapping_add(1);
        crate::memory::PdId(self.last_pd)
    }

    /// A name that no living region has.
    pub fn next_share(&mut self) -> u32 {
        self.last_share = self.last_share.wrapping_add(1);
        self.last_share
    }

    pub(super) fn refresh_gids(&mut self) {
        let now = now();
        if now < self.gids_fresh_until {
            return;
        }
        self.gids_fresh_until = now + GIDS_FRESH;
        match self.read_gids() {
            Ok(()) => {
                self.gids_pause = 0;
                // What is to come is for who knows why.
                self.gids_due = self.gids_due.filter(|due| *due > now);
            }
            Err(error) => {
                // Once: it may last, and the container may have to do with it.
                if self.gids_pause == 0 {
                    self.voice
                        .say(&format!("cannot read the GID table ({error}): it stays as it was until it can be read"));
                }
                // Those that ask meanwhile do not put it off.
                if self.gids_pause == 0 || self.gids_due.is_none_or(|due| due <= now) {
                    self.gids_pause = (2 * self.gids_pause).clamp(GIDS_PAUSE, GIDS_LONGEST_PAUSE);
                    self.gids_due = Some(now + self.gids_pause);
                }
                // Contexts know what there is.
                if self.gids_told.is_none() {
                    self.gids_told = self.device.gids().map(<[_]>::to_vec);
                }
            }
        }
    }

    fn read_gids(&mut self) -> Result<(), Errno> {
        let addresses = addresses::list()?;
        self.port.set_addresses(&addresses.gids);
        self.device.set_addresses(&addresses)?;
        if let Some(shown) = &mut self.shown {
            shown.update(gid_entries(&self.device, &self.port, &addresses));
        }
        if let Some(gids) = self.device.gids()
            && self.gids_told.as_deref() != Some(gids)
            && self.gids_told.replace(gids.to_vec()).is_some()
        {
            self.announced.push(EventType::GID_CHANGE);
        }
        Ok(())
    }

    /// Reads the GID table again if that is due.
    pub(super) fn tend_gids(&mut self) {
        if self.gids_due.is_some_and(|due| due <= now()) {
            self.refresh_port();
        }
    }

    /// The device's port may have changed: brings what programs read of it up to date, its GID table included.
    pub fn refresh_port(&mut self) {
        self.gids_fresh_until = 0;
        self.refresh_gids();
        let info = self.device.port(self.port.lid());
        if let Some(shown) = &mut self.shown {
            shown.update_port(&info, self.device.pkeys());
        }
    }

    /// Addresses may have changed.
    pub fn hear_addresses(&mut self) {
        if let Some(shown) = &mut self.shown {
            shown.hear(now());
            self.gids_fresh_until = 0;
            self.refresh_gids();
        }
    }

    /// Whether there is a GID with this index for a queue pair to send from.
    pub fn check_source(&mut self, index: u32) -> Result<(), Errno> {
        let error = match self.gid(index) {
            // What it was may be another container's by now.
            Ok(_) if self.gids_pause > 0 => return Err(Errno::AGAIN),
            Ok(found) if found.gid != [0; 16] => return Ok(()),
            // It would speak under no address.
            Ok(_) => Errno::NODATA,
            Err(error) => error,
        };
        self.voice.say(&format!(
            "a queue pair was to send from GID index {index}, where the container's table has none: `ibv_devinfo -v` in the \
             container lists them (NCCL_IB_GID_INDEX, ib_write_bw -x)"
        ));
        Err(error)
    }

    /// Where the container's GID table has what the device's own has at `index`.
    pub fn find_gid(&mut self, index: u32) -> Result<u32, Errno> {
        self.refresh_gids();
        let found = match self.device.gids() {
            Some(_) => self.device.find_gid(index),
            // It has no other than that of the container's port.
            None => Some(index).filter(|index| self.port.gids().len() > *index as usize),
        };
        found.ok_or(Errno::NODATA)
    }

    /// Whether there is a partition with this index for a queue pair to be in.
    pub fn check_pkey(&self, index: u32) -> Result<(), Errno> {
        if self.pkey(index)? == 0 {
            self.voice.say(&format!(
                "a queue pair was to be in the partition with P_Key index {index}, which the card has not at the moment: the subnet \
                 manager says which it has (/sys/class/infiniband/*/ports/*/pkeys)"
            ));
            return Err(Errno::INVAL);
        }
        Ok(())
    }

    /// `ibv_query_pkey`.
    pub fn pkey(&self, index: u32) -> Result<u16, Errno> {
        self.device.pkeys().get(index as usize).copied().ok_or(Errno::INVAL)
    }

    /// `ibv_query_gid`.
    pub fn gid(&mut self, index: u32) -> Result<GidInfo, Errno> {
        if index as usize >= GID_TABLE {
            return Err(Errno::INVAL);
        }
        // Addresses come and go while the container runs; a query is when it matters.
        self.refresh_gids();
        Ok(match self.device.gids() {
            Some(gids) => gids.get(index as usize).copied().unwrap_or_default(),
            None => gid_info(self.port.gids().get(index as usize).copied().unwrap_or(Gid { raw: [0; 16], ifindex: 0 })),
        })
    }
}
