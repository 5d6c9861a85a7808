//! Attributes between the container's words and the card's.

// UNSAFETY: fills C structures that are zero otherwise.
#![allow(unsafe_code)]

use ringfence_abi::{
    ibv_ah_attr, ibv_device_attr, ibv_gid, ibv_gid_entry, ibv_global_route, ibv_port_attr, ibv_qp_attr,
};
use ringfence_protocol::control::{GidInfo, OpenReply, PortInfo, QpAttr};
use ringfence_protocol::verbs::QpState;
use ringfence_protocol::work;
use ringfence_proxy::control::node::GID_TABLE;
use ringfence_proxy::fabric::addresses::Addresses;
use ringfence_proxy::fabric::ports::Gid;
use ringfence_proxy::launch::addresses::Gids;
use ringfence_proxy::launch::pkeys::Pkey;
use ringfence_proxy::plane::claim::MAX_MESSAGE;
use ringfence_proxy::plane::setup::MAX_RD_ATOMIC;
use std::ffi::c_int;

/// What the proxy does of the card's capabilities: `IBV_DEVICE_CURR_QP_STATE_MOD`, `_SYS_IMAGE_GUID`, `_RC_RNR_NAK_GEN`.
const CAPABILITIES: u32 = 1 << 7 | 1 << 11 | 1 << 12;
/// `IBV_PORT_IP_BASED_GIDS`: no management datagram service is behind any of the others.
const PORT_CAPABILITIES: u32 = 1 << 26;

/// What the policy leaves of a card.
#[derive(Clone, Copy, Debug)]
pub struct Most {
    /// Queue pairs.
    pub qp: u32,
    /// Requests of one queue.
    pub qp_wr: u32,
    /// Completion queues.
    pub cq: u32,
    /// Completions of one queue.
    pub cqe: u32,
    /// Memory regions.
    pub mr: u32,
    /// Bytes of memory regions.
    pub mr_bytes: u64,
    /// Protection domains.
    pub pd: u32,
    /// Entries for P_Keys.
    pub pkeys: u32,
}

/// No more than the card has.
fn at_most(limit: u32, card: c_int) -> u32 {
    limit.min(u32::try_from(card).unwrap_or(0))
}

/// `struct ibv_device_attr` for the container.
#[must_use]
pub fn device(card: &ibv_device_attr, most: &Most) -> OpenReply {
    let mut fw_ver = [0; 32];
    for (to, from) in fw_ver[..31].iter_mut().zip(&card.fw_ver) {
        *to = from.cast_unsigned();
    }
    let rd_atomic = at_most(MAX_RD_ATOMIC, card.max_qp_rd_atom);
    OpenReply {
        context: 0,
        num_comp_vectors: 1,
        node_guid: card.node_guid,
        sys_image_guid: card.sys_image_guid,
        max_mr_size: most.mr_bytes.min(card.max_mr_size),
        page_size_cap: card.page_size_cap,
        vendor_id: card.vendor_id,
        vendor_part_id: card.vendor_part_id,
        hw_ver: card.hw_ver,
        max_qp: at_most(most.qp, card.max_qp),
        max_qp_wr: at_most(most.qp_wr, card.max_qp_wr),
        device_cap_flags: card.device_cap_flags & CAPABILITIES,
        max_sge: at_most(work::MAX_SGE, card.max_sge),
        max_sge_rd: at_most(work::MAX_SGE, card.max_sge_rd),
        // Completions of the container's are the proxy's own; the card's are behind them.
        max_cq: most.cq,
        max_cqe: most.cqe,
        max_mr: at_most(most.mr, card.max_mr),
        max_pd: at_most(most.pd, card.max_pd),
        max_qp_rd_atom: rd_atomic,
        max_res_rd_atom: at_most(rd_atomic.saturating_mul(most.qp), card.max_res_rd_atom),
        max_qp_init_rd_atom: at_most(MAX_RD_ATOMIC, card.max_qp_init_rd_atom),
        atomic_cap: card.atomic_cap,
        max_ah: 0,
        max_srq: 0,
        max_srq_wr: 0,
        max_srq_sge: 0,
        max_pkeys: most.pkeys,
        local_ca_ack_delay: u32::from(card.local_ca_ack_delay),
        phys_port_cnt: 1,
        shows_memory: 0,
        fw_ver,
    }
}

/// `struct ibv_port_attr` for the container, which has so many entries for P_Keys.
#[must_use]
pub fn port(card: &ibv_port_attr, pkeys: usize) -> PortInfo {
    PortInfo {
        state: card.state,
        max_mtu: card.max_mtu,
        active_mtu: card.active_mtu,
        // Dense, and of the same length in every container.
        gid_tbl_len: GID_TABLE as u32,
        port_cap_flags: card.port_cap_flags & PORT_CAPABILITIES,
        max_msg_sz: card.max_msg_sz.min(MAX_MESSAGE),
        bad_pkey_cntr: 0,
        qkey_viol_cntr: 0,
        pkey_tbl_len: pkeys as u32,
        lid: u32::from(card.lid),
        sm_lid: u32::from(card.sm_lid),
        lmc: u32::from(card.lmc),
        max_vl_num: u32::from(card.max_vl_num),
        sm_sl: u32::from(card.sm_sl),
        subnet_timeout: u32::from(card.subnet_timeout),
        active_width: u32::from(card.active_width),
        active_speed: u32::from(card.active_speed),
        phys_state: u32::from(card.phys_state),
        link_layer: u32::from(card.link_layer),
        flags: u32::from(card.flags),
    }
}

/// `IBV_GID_TYPE_IB`.
const INFINIBAND: u32 = 0;

/// The container's GID table: those of the card's entries that are addresses of the network namespace that `gids` says, which has these
/// `addresses`, without gaps. With each its index in the card's table.
///
/// The card's own order tells in which order interfaces got their addresses, and which entries had been given up before. Here it is the same
/// in every container, so that one index, as in `NCCL_IB_GID_INDEX`, serves all: link-local addresses first, then IPv4, then what other IPv6
/// there is, as the kernel lists them; of each address the first version of RoCE before the second. So it is with a card whose interface
/// was given one IPv4 address after it came up, with the second version at 1 and 3.
///
/// `is_own` says of an entry and an address of the container's own namespace that is the same, whether they are of the same interface.
///
/// InfiniBand's are no addresses, but the port's: where the host's are granted, they are. Interfaces of the host's have numbers that
/// mean nothing in the container, or another one: none is named.
#[must_use]
pub fn granted(
    card: &[ibv_gid_entry],
    port: u8,
    addresses: &Addresses,
    gids: &Gids,
    is_own: impl Fn(&ibv_gid_entry, &Gid) -> bool,
) -> Vec<(GidInfo, u8)> {
    let of_port = card.iter().filter(|entry| entry.port_num == u32::from(port));
    let granted = of_port.filter(|entry| gids.contain(&entry.gid.0)).filter_map(|entry| {
        let mut same = addresses.gids.iter().enumerate().filter(|(_, address)| address.raw == entry.gid.0);
        let address = same.find(|(_, address)| gids.are_of_host() || is_own(entry, address));
        let (place, ndev_ifindex) = match address {
            Some((place, address)) if !gids.are_of_host() => (place, address.ifindex),
            Some((place, _)) => (place, 0),
            None if gids.are_of_host() && entry.gid_type == INFINIBAND => (0, 0),
            None => return None,
        };
        let index = u8::try_from(entry.gid_index).ok()?;
        // `ibv_query_gid_type` does not tell InfiniBand from the first version of RoCE; the table does.
        let gid_type = entry.gid_type.saturating_sub(1);
        let key = (Scope::of(&entry.gid.0), place, gid_type, index);
        Some((key, (GidInfo { gid: entry.gid.0, gid_type, ndev_ifindex }, index)))
    });
    let mut granted: Vec<_> = granted.collect();
    granted.sort_unstable_by_key(|(key, _)| *key);
    // Where the table is too short it is for link-local addresses, of which each interface has one that nobody looks for.
    let surplus = granted.len().saturating_sub(GID_TABLE);
    let local = granted.iter().take_while(|((scope, ..), _)| *scope == Scope::LinkLocal).count();
    granted.drain(local - surplus.min(local)..local);
    granted.into_iter().map(|(_, granted)| granted).take(GID_TABLE).collect()
}

/// What kind of address a GID is, in the order in which containers have them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Scope {
    /// `fe80::/10`, which every interface has, and which is an InfiniBand port's default GID.
    LinkLocal,
    /// An IPv4 address, mapped (`::ffff:0:0/96`).
    V4,
    /// Another IPv6 address.
    V6,
}

impl Scope {
    fn of(gid: &[u8; 16]) -> Self {
        let address = std::net::Ipv6Addr::from(*gid);
        match (address.is_unicast_link_local(), address.to_ipv4_mapped()) {
            (true, _) => Self::LinkLocal,
            (_, Some(_)) => Self::V4,
            _ => Self::V6,
        }
    }
}

/// The container's table of P_Keys: those that it is `granted`, else the card's first; with each its index in the `card`'s table, if it
/// is there. Zero stands for one that is not.
#[must_use]
pub fn partitions(card: &[u16], granted: Option<&[Pkey]>) -> Vec<(u16, Option<u16>)> {
    let Some(granted) = granted else { return vec![(card.first().copied().unwrap_or(0), Some(0))] };
    let entry = |key: &Pkey| {
        let key = u16::from(*key);
        let index = card.iter().position(|entry| *entry == key).and_then(|index| u16::try_from(index).ok());
        (if index.is_some() { key } else { 0 }, index)
    };
    granted.iter().map(entry).collect()
}

/// The card's own words for what a queue pair is told in the container's.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// The port.
    pub port: u8,
    /// The index of the source GID.
    pub source: u8,
    /// That of the P_Key.
    pub pkey: u16,
}

/// What the card is told of a transition to `state`.
#[must_use]
pub fn queue_pair(attr: &QpAttr, state: QpState, place: Place) -> ibv_qp_attr {
    // SAFETY: plain data, for which zeros are nothing said.
    let nothing: ibv_qp_attr = unsafe { std::mem::zeroed() };
    let av = &attr.av;
    ibv_qp_attr {
        qp_state: state.0,
        cur_qp_state: attr.cur_state.0,
        path_mtu: attr.path_mtu,
        path_mig_state: attr.path_mig_state,
        rq_psn: attr.rq_psn,
        sq_psn: attr.sq_psn,
        dest_qp_num: attr.dest_qp_num,
        qp_access_flags: attr.access.0,
        ah_attr: ibv_ah_attr {
            grh: ibv_global_route {
                dgid: ibv_gid(av.dgid),
                flow_label: av.flow_label,
                sgid_index: place.source,
                hop_limit: av.hop_limit,
                traffic_class: av.traffic_class,
            },
            dlid: av.dlid,
            sl: av.sl,
            src_path_bits: av.src_path_bits,
            static_rate: av.static_rate,
            is_global: av.is_global,
            port_num: place.port,
        },
        pkey_index: place.pkey,
        max_rd_atomic: attr.max_rd_atomic as u8,
        max_dest_rd_atomic: attr.max_dest_rd_atomic as u8,
        min_rnr_timer: attr.min_rnr_timer as u8,
        port_num: place.port,
        timeout: attr.timeout as u8,
        retry_cnt: attr.retry_cnt as u8,
        rnr_retry: attr.rnr_retry as u8,
        ..nothing
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::net::{Ipv4Addr, Ipv6Addr};

    fn entry(last: u8, index: u32, port: u32) -> ibv_gid_entry {
        let mut gid = [0; 16];
        gid[15] = last;
        ibv_gid_entry { gid: ibv_gid(gid), gid_index: index, port_num: port, gid_type: 2, ndev_ifindex: 99 }
    }

    #[test]
    fn a_container_sees_its_own_addresses_only_and_without_gaps() {
        let card = [entry(1, 0, 1), entry(2, 3, 1), entry(3, 7, 1), entry(4, 8, 2), entry(2, 300, 1)];
        let mut addresses = Addresses::default();
        for (last, ifindex) in [(4, 5), (3, 5), (2, 6)] {
            addresses.gids.push(Gid { raw: entry(last, 0, 0).gid.0, ifindex });
        }
        let granted = granted(&card, 1, &addresses, &Gids::Namespace, |_, _| true);
        let seen: Vec<_> = granted.iter().map(|(info, index)| (info.gid[15], info.ndev_ifindex, *index)).collect();
        // As the kernel lists the addresses.
        assert_eq!(seen, [(3, 5, 7), (2, 6, 3)]);
        // IBV_GID_TYPE_SYSFS_ROCE_V2
        assert!(granted.iter().all(|(info, _)| info.gid_type == 1));
        // An address that is another's as well.
        let of_its_interface = |entry: &ibv_gid_entry, address: &Gid| entry.gid_index == 7 && address.ifindex == 5;
        let granted = super::granted(&card, 1, &addresses, &Gids::Namespace, of_its_interface);
        assert_eq!(granted.iter().map(|(_, index)| *index).collect::<Vec<_>>(), [7]);
    }

    #[test]
    fn entries_have_the_same_order_in_every_container() {
        let raw = |text: &str| text.parse::<std::net::Ipv6Addr>().unwrap().octets();
        let listed = ["::ffff:10.0.0.9", "::ffff:10.0.0.2", "2001:db8::1", "fe80::2"].map(raw);
        let mut addresses = Addresses::default();
        addresses.gids.extend(listed.map(|raw| Gid { raw, ifindex: 5 }));
        let wanted = [3, 0, 1, 2].map(|place| [(listed[place], 0), (listed[place], 1)]).concat();
        let wanted: [_; 8] = wanted.try_into().unwrap();
        proptest!(|(order in Just(wanted.to_vec()).prop_shuffle(), gap in 0..9_u32)| {
            // Both versions of each, in the order in which that card came to know of them.
            let card: Vec<_> = order.iter().zip((gap..).step_by(2)).map(|(&(gid, kind), index)| {
                ibv_gid_entry { gid: ibv_gid(gid), gid_type: kind + 1, ..entry(0, index, 1) }
            }).collect();
            for gids in [Gids::Namespace, Gids::Host] {
                let granted = granted(&card, 1, &addresses, &gids, |_, _| true);
                let seen: Vec<_> = granted.iter().map(|(info, _)| (info.gid, info.gid_type)).collect();
                prop_assert_eq!(&seen[..], &wanted[..]);
                for (info, index) in granted {
                    let at = card.iter().find(|entry| entry.gid_index == u32::from(index)).unwrap();
                    prop_assert_eq!((at.gid.0, at.gid_type), (info.gid, info.gid_type + 1));
                }
            }
        });
    }

    #[test]
    fn link_local_addresses_leave_room_for_others() {
        let mut addresses = Addresses::default();
        let mut card = Vec::new();
        for number in 0..GID_TABLE as u32 {
            let local = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, number as u16).octets();
            let v4 = Ipv4Addr::new(10, 9, 0, number as u8).to_ipv6_mapped().octets();
            // Of the others there are three.
            for raw in [Some(local), (number < 3).then_some(v4)].into_iter().flatten() {
                addresses.gids.push(Gid { raw, ifindex: 5 });
                card.push(ibv_gid_entry { gid: ibv_gid(raw), ..entry(0, card.len() as u32, 1) });
            }
        }
        let granted = granted(&card, 1, &addresses, &Gids::Host, |_, _| true);
        let scopes: Vec<_> = granted.iter().map(|(info, _)| Scope::of(&info.gid)).collect();
        assert_eq!(scopes.len(), GID_TABLE);
        assert_eq!(scopes.iter().filter(|scope| **scope == Scope::V4).count(), 3);
        assert_eq!(granted[0].0.gid[15], 0);
    }

    #[test]
    fn a_container_with_the_hosts_gids_sees_no_interface_of_the_hosts() {
        let infiniband = ibv_gid_entry { gid_type: INFINIBAND, ..entry(9, 1, 1) };
        let card = [entry(1, 0, 1), infiniband, entry(2, 3, 1), entry(3, 7, 1)];
        let mut addresses = Addresses::default();
        for last in [2, 3] {
            addresses.gids.push(Gid { raw: entry(last, 0, 0).gid.0, ifindex: 6 });
        }
        let seen = |gids: &Gids| -> Vec<_> {
            let granted = granted(&card, 1, &addresses, gids, |_, _| true);
            granted.iter().map(|(info, index)| (info.gid[15], info.ndev_ifindex, *index)).collect()
        };
        assert_eq!(seen(&Gids::Host), [(9, 0, 1), (2, 0, 3), (3, 0, 7)]);
        let third = Gids::List(vec![std::net::Ipv6Addr::from(entry(3, 0, 0).gid.0).into()]);
        assert_eq!(seen(&third), [(3, 0, 7)]);
        assert_eq!(seen(&Gids::Namespace), [(2, 6, 3), (3, 6, 7)]);
    }

    #[test]
    fn a_container_is_in_the_partitions_that_it_is_granted() {
        let card = [0xffff, 0, 0x8001, 0x0002];
        assert_eq!(partitions(&card, None), [(0xffff, Some(0))]);
        let keys: Vec<Pkey> = [0x0002, 0x8003, 0x8001].into_iter().map(|key| Pkey::try_from(key).unwrap()).collect();
        assert_eq!(partitions(&card, Some(&keys)), [(2, Some(3)), (0, None), (0x8001, Some(2))]);
        assert_eq!(partitions(&[], None), [(0, Some(0))]);
    }

    #[test]
    fn the_card_or_the_policy_limits_whichever_is_lower() {
        // SAFETY: plain data.
        let card: ibv_device_attr = unsafe { std::mem::zeroed() };
        let card = ibv_device_attr { max_qp: 100, max_mr: -1, max_qp_wr: 4096, max_mr_size: 1 << 20, ..card };
        let most = Most { qp: 256, qp_wr: 128, cq: 7, cqe: 9, mr: 5, mr_bytes: 1 << 30, pd: 1, pkeys: 1 };
        let shown = device(&card, &most);
        assert_eq!((shown.max_qp, shown.max_qp_wr, shown.max_mr, shown.max_mr_size), (100, 128, 0, 1 << 20));
    }
}
