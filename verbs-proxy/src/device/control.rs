//! The control thread's side of a device.

use crate::control::quota::Quota;
use crate::sysfs;
use ringfence_protocol::control::{DeviceInfo, OpenReply, PortInfo};
use std::fmt::Debug;

/// What a device says about itself, and the names that are its to give.
///
/// These verbs are rare, so one function per verb is looked up here, unlike on the data path. What a queue pair's transitions mean
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
}
