//! The control thread's side of a device.

use crate::control::quota::Quota;
use crate::fabric::addresses::Addresses;
use crate::memory::{MemoryRegion, PdId};
use crate::pacing::Nanos;
use crate::plane::qp::NewQp;
use crate::sysfs;
use ringfence_protocol::control::{DeviceInfo, GidInfo, OpenReply, PortInfo};
use rustix::fd::BorrowedFd;
use rustix::io::Errno;
use std::fmt::Debug;

/// The default partition (InfiniBand Architecture Specification, 10.9.1.2), with full membership.
const DEFAULT_PKEY: u16 = 0xffff;

/// What a device says about itself, and the names that are its to give.
///
/// What a queue pair's transitions mean
/// for the device is said between two turns of the worker: [`super::Device::modified`] and its neighbours.
pub trait Control: Debug + Send {
    /// `struct ibv_device`.
    fn info(&self) -> DeviceInfo;

    /// `struct ibv_device_attr`; the limits are the policy's, where they are lower than the device's.
    fn attributes(&self, quota: &Quota) -> OpenReply;

    /// `struct ibv_port_attr` of the port with this LID.
    fn port(&self, lid: u16) -> PortInfo;

    /// As programs read it in `/sys`, on the port `lid` with the GID table `gids`.
    fn shown(&self, quota: &Quota, lid: u16, gids: Vec<sysfs::Entry>) -> sysfs::Device;

    /// The longest completion queue.
    fn max_cqe(&self) -> u32;

    /// The number of a new queue pair on the port with this LID. Asked again if the number is taken.
    fn qp_number(&mut self, lid: u16) -> u32;

    /// The key of a new memory region. Asked again if there is no place for a region with this key.
    fn key(&mut self) -> u32;

    /// Whether a region that the container has withdrawn by its key word is out of everybody's reach. A card knows nothing of key
    /// words: there every deregistration is a message.
    fn knows_key_words(&self) -> bool {
        true
    }

    /// A protection domain is made.
    ///
    /// # Errors
    /// What the card says.
    fn alloc_pd(&mut self, pd: PdId) -> Result<(), Errno> {
        let _ = pd;
        Ok(())
    }

    /// Nothing is left in a protection domain, and it goes.
    fn dealloc_pd(&mut self, pd: PdId) {
        let _ = pd;
    }

    /// Has the device register a region. What it keeps of it goes with the region ([`MemoryRegion::registered`]). The rkey, if the
    /// device gives it: otherwise it is the lkey.
    ///
    /// # Errors
    /// What the card says.
    fn register(&mut self, region: MemoryRegion) -> Result<(MemoryRegion, Option<u32>), Errno> {
        Ok((region, None))
    }

    /// Has the device register a dma-buf from `offset` on as a region that has addresses, and nothing there. As [`Self::register`].
    ///
    /// # Errors
    /// `EOPNOTSUPP` for a device to which it means nothing.
    fn register_dmabuf(
        &mut self,
        region: MemoryRegion,
        fd: BorrowedFd<'_>,
        offset: u64,
    ) -> Result<(MemoryRegion, Option<u32>), Errno> {
        let _ = (region, fd, offset);
        Err(Errno::OPNOTSUPP)
    }

    /// Makes a queue pair and gives it its number: asked again if that is taken. `lid`: as for [`Self::qp_number`].
    ///
    /// # Errors
    /// What the card says.
    fn create_qp(&mut self, lid: u16, new: &NewQp) -> Result<u32, Errno> {
        let _ = new;
        Ok(self.qp_number(lid))
    }

    /// The addresses of the container's network namespace are these.
    ///
    /// # Errors
    /// What the device says if it cannot tell its GIDs; those that it had stay.
    fn set_addresses(&mut self, addresses: &Addresses) -> Result<(), Errno> {
        let _ = addresses;
        Ok(())
    }

    /// The GID table of the container, if it is not that of its port on the fabric.
    fn gids(&self) -> Option<&[GidInfo]> {
        None
    }

    /// Where [`Self::gids`] has what the card's own table has at `index`.
    fn find_gid(&self, index: u32) -> Option<u32> {
        let _ = index;
        None
    }

    /// The container's table of P_Keys, whose length does not change; zero for an entry that is empty at the moment.
    fn pkeys(&self) -> &[u16] {
        &[DEFAULT_PKEY]
    }

    /// Where [`Self::pkeys`] has what the card's own table has at `index`.
    fn find_pkey(&self, index: u32) -> Option<u32> {
        Some(index).filter(|index| *index == 0)
    }

    /// Whether the device is there to be opened.
    ///
    /// # Errors
    /// `EIO` while it is gone.
    fn check(&self) -> Result<(), Errno> {
        Ok(())
    }

    /// When the control thread is to look after the device, though [`Self::waker`] says nothing.
    fn wake_at(&self) -> Option<Nanos> {
        None
    }

    /// What the control thread is to listen to for the device.
    fn waker(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}
