//! Structures as the kernel passes them, and as programs know them: what librdmacm asks libibverbs to copy.
//!
//! The kernel names the source of an address vector by its index in the card's GID table. The container has a table of its own, in
//! which the same GID has another: that is what programs get, because they look it up, or tell it to a queue pair.

// UNSAFETY: entry points of a C interface.
#![allow(unsafe_code)]
#![allow(non_camel_case_types)]

use crate::abi::{ibv_ah_attr, ibv_gid, ibv_qp_attr, ibv_qp_cap};
use crate::connection;
use crate::sys::Errno;
use core::ffi::c_int;
use ringfence_protocol::control::{CardIndex, Index, Op};

/// The index of no GID of a container's: a queue pair that is told it is refused, and the proxy's log says so.
const NO_GID: u8 = u8::MAX;
/// An index in no container's table.
const NO_PKEY: u16 = u16::MAX;

/// `struct ib_uverbs_ah_attr` of `rdma/ib_user_verbs.h`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct ib_uverbs_ah_attr {
    pub dgid: [u8; 16],
    pub flow_label: u32,
    pub sgid_index: u8,
    pub hop_limit: u8,
    pub traffic_class: u8,
    pub reserved: u8,
    pub dlid: u16,
    pub sl: u8,
    pub src_path_bits: u8,
    pub static_rate: u8,
    pub is_global: u8,
    pub port_num: u8,
    pub reserved2: u8,
}

/// `struct ib_uverbs_qp_attr` of `rdma/ib_user_verbs.h`.
#[repr(C)]
pub struct ib_uverbs_qp_attr {
    pub qp_attr_mask: u32,
    pub qp_state: u32,
    pub cur_qp_state: u32,
    pub path_mtu: u32,
    pub path_mig_state: u32,
    pub qkey: u32,
    pub rq_psn: u32,
    pub sq_psn: u32,
    pub dest_qp_num: u32,
    pub qp_access_flags: u32,
    pub ah_attr: ib_uverbs_ah_attr,
    pub alt_ah_attr: ib_uverbs_ah_attr,
    pub max_send_wr: u32,
    pub max_recv_wr: u32,
    pub max_send_sge: u32,
    pub max_recv_sge: u32,
    pub max_inline_data: u32,
    pub pkey_index: u16,
    pub alt_pkey_index: u16,
    pub en_sqd_async_notify: u8,
    pub sq_draining: u8,
    pub max_rd_atomic: u8,
    pub max_dest_rd_atomic: u8,
    pub min_rnr_timer: u8,
    pub port_num: u8,
    pub timeout: u8,
    pub retry_cnt: u8,
    pub rnr_retry: u8,
    pub alt_port_num: u8,
    pub alt_timeout: u8,
    pub reserved: [u8; 5],
}

/// `struct ib_user_path_rec` of `rdma/ib_user_sa.h`.
#[repr(C)]
pub struct ib_user_path_rec {
    pub dgid: [u8; 16],
    pub sgid: [u8; 16],
    pub dlid: u16,
    pub slid: u16,
    pub raw_traffic: u32,
    pub flow_label: u32,
    pub reversible: u32,
    pub mtu: u32,
    pub pkey: u16,
    pub hop_limit: u8,
    pub traffic_class: u8,
    pub numb_path: u8,
    pub sl: u8,
    pub mtu_selector: u8,
    pub rate_selector: u8,
    pub rate: u8,
    pub packet_life_time_selector: u8,
    pub packet_life_time: u8,
    pub preference: u8,
}

/// `struct ibv_sa_path_rec` of `infiniband/sa.h`.
#[repr(C)]
pub struct ibv_sa_path_rec {
    pub dgid: ibv_gid,
    pub sgid: ibv_gid,
    pub dlid: u16,
    pub slid: u16,
    pub raw_traffic: c_int,
    pub flow_label: u32,
    pub hop_limit: u8,
    pub traffic_class: u8,
    pub reversible: c_int,
    pub numb_path: u8,
    pub pkey: u16,
    pub sl: u8,
    pub mtu_selector: u8,
    pub mtu: u8,
    pub rate_selector: u8,
    pub rate: u8,
    pub packet_life_time_selector: u8,
    pub packet_life_time: u8,
    pub preference: u8,
}

/// What the container has in place of the card's GID.
///
/// The structure does not say of which device: a container has one.
fn sgid_index(from: &ib_uverbs_ah_attr) -> u8 {
    if from.is_global == 0 {
        return from.sgid_index;
    }
    let found = containers_index(Op::FIND_GID, from.port_num, from.sgid_index.into());
    found.and_then(|found| u8::try_from(found).ok()).unwrap_or(NO_GID)
}

/// What the container has in place of the card's P_Key.
fn pkey_index(from: &ib_uverbs_qp_attr) -> u16 {
    let found = containers_index(Op::FIND_PKEY, from.port_num, from.pkey_index.into());
    found.and_then(|found| u16::try_from(found).ok()).unwrap_or(NO_PKEY)
}

/// Where the container's table has what the card's own has at `index`.
fn containers_index(op: Op, port: u8, index: u32) -> Option<u32> {
    let asked = CardIndex { device: 0, port: u32::from(port), index, reserved: 0 };
    let found: Result<Index, Errno> =
        connection::connect().and_then(|connection| connection::call(connection.generation, op, &asked));
    found.ok().map(|found| found.index)
}

/// Field by field: the program's structure has padding that is not ours to write.
fn copy_ah_attr(to: &mut ibv_ah_attr, from: &ib_uverbs_ah_attr) {
    to.grh.dgid = ibv_gid(from.dgid);
    to.grh.flow_label = from.flow_label;
    to.grh.sgid_index = sgid_index(from);
    to.grh.hop_limit = from.hop_limit;
    to.grh.traffic_class = from.traffic_class;
    to.dlid = from.dlid;
    to.sl = from.sl;
    to.src_path_bits = from.src_path_bits;
    to.static_rate = from.static_rate;
    to.is_global = from.is_global;
    to.port_num = from.port_num;
}

/// An address handle's attributes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ibv_copy_ah_attr_from_kern(to: *mut ibv_ah_attr, from: *const ib_uverbs_ah_attr) {
    // SAFETY: the caller gave both structures.
    unsafe { copy_ah_attr(&mut *to, &*from) };
}

/// A queue pair's attributes. The target state is left alone, as librdmacm expects: it sets that itself.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ibv_copy_qp_attr_from_kern(to: *mut ibv_qp_attr, from: *const ib_uverbs_qp_attr) {
    // SAFETY: the caller gave both structures.
    let (to, from) = unsafe { (&mut *to, &*from) };
    to.cur_qp_state = from.cur_qp_state;
    to.path_mtu = from.path_mtu;
    to.path_mig_state = from.path_mig_state;
    to.qkey = from.qkey;
    to.rq_psn = from.rq_psn;
    to.sq_psn = from.sq_psn;
    to.dest_qp_num = from.dest_qp_num;
    to.qp_access_flags = from.qp_access_flags;
    to.cap = ibv_qp_cap {
        max_send_wr: from.max_send_wr,
        max_recv_wr: from.max_recv_wr,
        max_send_sge: from.max_send_sge,
        max_recv_sge: from.max_recv_sge,
        max_inline_data: from.max_inline_data,
    };
    copy_ah_attr(&mut to.ah_attr, &from.ah_attr);
    copy_ah_attr(&mut to.alt_ah_attr, &from.alt_ah_attr);
    to.pkey_index = pkey_index(from);
    to.alt_pkey_index = from.alt_pkey_index;
    to.en_sqd_async_notify = from.en_sqd_async_notify;
    to.sq_draining = from.sq_draining;
    to.max_rd_atomic = from.max_rd_atomic;
    to.max_dest_rd_atomic = from.max_dest_rd_atomic;
    to.min_rnr_timer = from.min_rnr_timer;
    to.port_num = from.port_num;
    to.timeout = from.timeout;
    to.retry_cnt = from.retry_cnt;
    to.rnr_retry = from.rnr_retry;
    to.alt_port_num = from.alt_port_num;
    to.alt_timeout = from.alt_timeout;
}

/// A path record, out of the kernel.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ibv_copy_path_rec_from_kern(to: *mut ibv_sa_path_rec, from: *const ib_user_path_rec) {
    // SAFETY: the caller gave both structures.
    let (to, from) = unsafe { (&mut *to, &*from) };
    to.dgid = ibv_gid(from.dgid);
    to.sgid = ibv_gid(from.sgid);
    to.dlid = from.dlid;
    to.slid = from.slid;
    to.raw_traffic = from.raw_traffic as c_int;
    to.flow_label = from.flow_label;
    to.hop_limit = from.hop_limit;
    to.traffic_class = from.traffic_class;
    to.reversible = from.reversible as c_int;
    to.numb_path = from.numb_path;
    to.pkey = from.pkey;
    to.sl = from.sl;
    to.mtu_selector = from.mtu_selector;
    to.mtu = from.mtu as u8;
    to.rate_selector = from.rate_selector;
    to.rate = from.rate;
    to.packet_life_time_selector = from.packet_life_time_selector;
    to.packet_life_time = from.packet_life_time;
    to.preference = from.preference;
}

/// A path record, for the kernel.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ibv_copy_path_rec_to_kern(to: *mut ib_user_path_rec, from: *const ibv_sa_path_rec) {
    // SAFETY: the caller gave both structures.
    let (to, from) = unsafe { (&mut *to, &*from) };
    to.dgid = from.dgid.0;
    to.sgid = from.sgid.0;
    to.dlid = from.dlid;
    to.slid = from.slid;
    to.raw_traffic = from.raw_traffic as u32;
    to.flow_label = from.flow_label;
    to.reversible = from.reversible as u32;
    to.mtu = u32::from(from.mtu);
    to.pkey = from.pkey;
    to.hop_limit = from.hop_limit;
    to.traffic_class = from.traffic_class;
    to.numb_path = from.numb_path;
    to.sl = from.sl;
    to.mtu_selector = from.mtu_selector;
    to.rate_selector = from.rate_selector;
    to.rate = from.rate;
    to.packet_life_time_selector = from.packet_life_time_selector;
    to.packet_life_time = from.packet_life_time;
    to.preference = from.preference;
}
