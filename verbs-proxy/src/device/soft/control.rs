//! What the soft device says about itself.

use crate::control::node::GID_TABLE;
use crate::control::quota::{Quota, Resource};
use crate::control::session::random;
use crate::device::control::Control;
use crate::fabric::ports::QPN_SHIFT;
use crate::launch::{BitRate, Device, Limits};
use crate::plane::claim::MAX_MESSAGE;
use crate::plane::setup::MAX_RD_ATOMIC;
use crate::sysfs;
use ringfence_protocol::control::{DeviceInfo, OpenReply, PortInfo};
use ringfence_protocol::work;

/// The soft device as one container sees it.
#[derive(Clone, Debug)]
pub struct SoftDevice {
    name: String,
    link: Option<BitRate>,
    guid: u64,
    limits: Limits,
}

impl SoftDevice {
    /// The longest completion queue.
    pub const MAX_CQE: u32 = 1 << 17;

    /// Whether it has all that those need who take a node in `/dev/infiniband` for the promise of a card's verbs. UCX above all:
    /// of a device with a node it opens every transport that it has, and ends where it fails, while without the node it does
    /// without the device. That takes shared receive queues, UD queue pairs, and registering System V segments and anonymous
    /// shared memory.
    pub const SUITS_A_NODE: bool = false;

    /// The device with the port's GUID.
    #[must_use]
    pub fn new(device: &Device, guid: u64, limits: &Limits) -> Self {
        Self { name: device.name.clone(), link: device.link, guid, limits: limits.clone() }
    }
}

impl Control for SoftDevice {
    fn info(&self) -> DeviceInfo {
        let mut name = [0; 64];
        let bytes = self.name.as_bytes();
        let length = bytes.len().min(name.len() - 1);
        name[..length].copy_from_slice(&bytes[..length]);
        // IBV_NODE_CA, IBV_TRANSPORT_IB.
        // The only device of its container.
        DeviceInfo { name, node_guid: self.guid.to_be(), node_type: 1, transport: 0, index: 0, reserved: 0 }
    }

    fn attributes(&self, quota: &Quota) -> OpenReply {
        let limit = |resource| u32::try_from(quota.limit(resource)).unwrap_or(u32::MAX).min(i32::MAX as u32);
        let mut fw_ver = [0; 32];
        let version = env!("CARGO_PKG_VERSION").as_bytes();
        fw_ver[..version.len()].copy_from_slice(version);
        OpenReply {
            context: 0,
            num_comp_vectors: 1,
            node_guid: self.guid.to_be(),
            sys_image_guid: self.guid.to_be(),
            max_mr_size: quota.limit(Resource::MrBytes),
            page_size_cap: 0xffff_f000,
            // No vendor's, said as the kernel's own software devices say it: programs take zero for a failed query.
            vendor_id: 0x00ff_ffff,
            vendor_part_id: 0,
            hw_ver: 0,
            max_qp: limit(Resource::Qp),
            max_qp_wr: self.limits.max_qp_depth,
            // IBV_DEVICE_RC_RNR_NAK_GEN, IBV_DEVICE_SYS_IMAGE_GUID, IBV_DEVICE_CURR_QP_STATE_MOD.
            device_cap_flags: 1 << 12 | 1 << 11 | 1 << 7,
            max_sge: work::MAX_SGE,
            max_sge_rd: work::MAX_SGE,
            max_cq: limit(Resource::Cq),
            max_cqe: Self::MAX_CQE,
            max_mr: limit(Resource::Mr),
            max_pd: limit(Resource::Other),
            max_qp_rd_atom: MAX_RD_ATOMIC,
            max_res_rd_atom: MAX_RD_ATOMIC.saturating_mul(limit(Resource::Qp)),
            max_qp_init_rd_atom: MAX_RD_ATOMIC,
            // IBV_ATOMIC_HCA: atomic among all requests to this container's memory.
            atomic_cap: 1,
            max_ah: 0,
            max_srq: 0,
            max_srq_wr: 0,
            max_srq_sge: 0,
            max_pkeys: 1,
            local_ca_ack_delay: 15,
            phys_port_cnt: 1,
            shows_memory: 1,
            fw_ver,
        }
    }

    fn shown(&self, quota: &Quota, lid: u16, gids: Vec<sysfs::Entry>) -> sysfs::Device {
        sysfs::Device {
            info: self.info(),
            attributes: self.attributes(quota),
            description: format!("Ringfence's software device {}", self.name),
            hca_type: Some("ringfence-soft".into()),
            board_id: Some("ringfence-soft".into()),
            verbs: 0,
            // Its data move by the processors that its containers run on.
            parent: sysfs::Parent::Software { numa_node: None },
            // Of what counters are for, lost and broken packets above all, there is nothing where memory is copied.
            ports: vec![sysfs::Port {
                info: self.port(lid),
                pkeys: self.pkeys().to_vec(),
                gids,
                counters: Vec::new(),
                hw_counters: Vec::new(),
            }],
        }
    }

    fn port(&self, lid: u16) -> PortInfo {
        let (active_width, active_speed) = width_and_speed(self.link);
        PortInfo {
            state: 4,
            max_mtu: 5,
            active_mtu: 5,
            gid_tbl_len: GID_TABLE as u32,
            // IBV_PORT_CM_SUP is left out: there is no management datagram service behind it.
            port_cap_flags: 0,
            max_msg_sz: MAX_MESSAGE,
            bad_pkey_cntr: 0,
            qkey_viol_cntr: 0,
            pkey_tbl_len: 1,
            lid: u32::from(lid),
            sm_lid: 0,
            lmc: 0,
            max_vl_num: 1,
            sm_sl: 0,
            subnet_timeout: 0,
            active_width,
            active_speed,
            phys_state: 5,
            // IBV_LINK_LAYER_ETHERNET: GIDs are addresses.
            link_layer: 2,
            flags: 0,
        }
    }

    fn max_cqe(&self) -> u32 {
        Self::MAX_CQE
    }

    fn qp_number(&mut self, lid: u16) -> u32 {
        // By chance, so that a queue pair cannot be guessed from another. The port is part of it: neighbours find it by that.
        u32::from(lid) << QPN_SHIFT | (random() & ((1 << QPN_SHIFT) - 1))
    }

    fn key(&mut self) -> u32 {
        random()
    }
}

/// The nearest pair of `active_width` and `active_speed` that a port can have at this rate or below; without a
/// modelled link, the fastest that programs of every age understand (4x EDR, 100 Gbit/s).
fn width_and_speed(link: Option<BitRate>) -> (u32, u32) {
    const GIGABIT: u64 = 1_000_000_000;
    match link.map_or(100 * GIGABIT, BitRate::bits) / GIGABIT {
        0..5 => (1, 1),
        5..10 => (1, 2),
        10..14 => (1, 4),
        14..25 => (1, 16),
        25..40 => (1, 32),
        40..56 => (2, 8),
        56..100 => (2, 16),
        100..200 => (2, 32),
        _ => (2, 64),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_shown_at_or_below_the_link() {
        assert_eq!(width_and_speed(None), (2, 32));
        assert_eq!(width_and_speed(BitRate::new(25_000_000_000)), (1, 32));
        assert_eq!(width_and_speed(BitRate::new(1_000_000_000)), (1, 1));
    }
}
