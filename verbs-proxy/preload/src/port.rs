//! Ports, GIDs and partition keys.

// UNSAFETY: entry points of a C interface.
#![allow(unsafe_code)]

use crate::abi::{ibv_context, ibv_gid, ibv_gid_entry, ibv_port_attr};
use crate::connection;
use crate::context::Context;
use crate::sys::{self, Errno};
use core::ffi::{c_int, c_uint};
use core::mem;
use core::ptr;
use ringfence_protocol::control::{GidInfo, Op, PartitionKey, PortInfo, PortQuery};
use ringfence_protocol::verbs::GidType;

/// What `ibv_query_port` without an inline function knows: everything before `port_cap_flags2`.
const COMPAT_PORT_ATTR_BYTES: usize = mem::offset_of!(ibv_port_attr, port_cap_flags2);

const LINK_LAYER_ETHERNET: u32 = 2;

/// `enum ibv_gid_type`.
const GID_TYPE_IB: u32 = 0;
const GID_TYPE_ROCE_V1: u32 = 1;
const GID_TYPE_ROCE_V2: u32 = 2;

fn port_info(context: &Context, port: u32) -> Result<PortInfo, Errno> {
    let request = PortQuery { context: context.handle, port, index: 0, reserved: 0 };
    connection::call(context.connection.generation, Op::QUERY_PORT, &request)
}

fn gid_info(context: &Context, port: u32, index: u32) -> Result<GidInfo, Errno> {
    let request = PortQuery { context: context.handle, port, index, reserved: 0 };
    connection::call(context.connection.generation, Op::QUERY_GID, &request)
}

/// `ibv_query_port(3)` as the inline function calls it, with the size of the attributes that the program knows.
pub unsafe extern "C" fn query_port(
    context: *mut ibv_context,
    port: u8,
    attr: *mut ibv_port_attr,
    size: usize,
) -> c_int {
    // SAFETY: the caller opened the device.
    let info = match port_info(unsafe { Context::from_raw(context) }, u32::from(port)) {
        Ok(info) => info,
        Err(errno) => return sys::zero_or_errno(Err(errno)),
    };
    let all = ibv_port_attr {
        state: info.state,
        max_mtu: info.max_mtu,
        active_mtu: info.active_mtu,
        gid_tbl_len: info.gid_tbl_len as c_int,
        port_cap_flags: info.port_cap_flags,
        max_msg_sz: info.max_msg_sz,
        bad_pkey_cntr: info.bad_pkey_cntr,
        qkey_viol_cntr: info.qkey_viol_cntr,
        pkey_tbl_len: info.pkey_tbl_len as u16,
        lid: info.lid as u16,
        sm_lid: info.sm_lid as u16,
        lmc: info.lmc as u8,
        max_vl_num: info.max_vl_num as u8,
        sm_sl: info.sm_sl as u8,
        subnet_timeout: info.subnet_timeout as u8,
        init_type_reply: 0,
        active_width: info.active_width as u8,
        // An enumeration whose values past a byte only newer programs know.
        active_speed: u8::try_from(info.active_speed).unwrap_or(0),
        phys_state: info.phys_state as u8,
        link_layer: info.link_layer as u8,
        flags: info.flags as u8,
        port_cap_flags2: 0,
        active_speed_ex: info.active_speed,
    };
    // SAFETY: the caller's structure has `size` bytes; beyond ours, fields that we do not know are zero.
    unsafe {
        ptr::write_bytes(attr.cast::<u8>(), 0, size);
        ptr::copy_nonoverlapping((&raw const all).cast::<u8>(), attr.cast::<u8>(), size.min(size_of_val(&all)));
    }
    0
}

/// `ibv_query_port(3)` for programs that do not go through the inline function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ibv_query_port(context: *mut ibv_context, port: u8, attr: *mut ibv_port_attr) -> c_int {
    // SAFETY: the caller's structure has at least the fields of the first version.
    unsafe { query_port(context, port, attr, COMPAT_PORT_ATTR_BYTES) }
}

/// `ibv_query_gid(3)`: -1 on failure; an empty entry is all zero.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ibv_query_gid(context: *mut ibv_context, port: u8, index: c_int, gid: *mut ibv_gid) -> c_int {
    // SAFETY: the caller opened the device.
    let context = unsafe { Context::from_raw(context) };
    let info =
        u32::try_from(index).map_err(|_| libc::EINVAL).and_then(|index| gid_info(context, u32::from(port), index));
    sys::zero_or_minus_one(info.map(|info| {
        // SAFETY: the caller gave a place for a GID, which need not be aligned.
        unsafe { gid.write_unaligned(ibv_gid(info.gid)) };
    }))
}

/// What `ibv_devinfo` asks for beside the public interface: 0 for InfiniBand and RoCE v1, 1 for RoCE v2.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ibv_query_gid_type(
    context: *mut ibv_context,
    port: u8,
    index: c_uint,
    kind: *mut c_uint,
) -> c_int {
    // SAFETY: the caller opened the device.
    let info = gid_info(unsafe { Context::from_raw(context) }, u32::from(port), index);
    // SAFETY: the caller gave a place for the type.
    sys::zero_or_minus_one(info.map(|info| unsafe { *kind = info.gid_type }))
}

fn entry(context: &Context, port: u32, index: u32, link_layer: u32) -> Result<ibv_gid_entry, Errno> {
    let info = gid_info(context, port, index)?;
    if info.gid == [0; 16] {
        return Err(libc::ENODATA);
    }
    let gid_type = match GidType(info.gid_type) {
        GidType::ROCE_V2 => GID_TYPE_ROCE_V2,
        _ if link_layer == LINK_LAYER_ETHERNET => GID_TYPE_ROCE_V1,
        _ => GID_TYPE_IB,
    };
    let gid = ibv_gid(info.gid);
    Ok(ibv_gid_entry { gid, gid_index: index, port_num: port, gid_type, ndev_ifindex: info.ndev_ifindex })
}

/// Writes as much of an entry as the program knows.
///
/// # Safety
/// `to` has `size` writable bytes.
unsafe fn write_entry(to: *mut u8, size: usize, entry: &ibv_gid_entry) {
    // SAFETY: by the caller's promise; the source is as long as the smaller of the two.
    unsafe {
        ptr::write_bytes(to, 0, size);
        ptr::copy_nonoverlapping(ptr::from_ref(entry).cast::<u8>(), to, size.min(size_of::<ibv_gid_entry>()));
    }
}

/// `ibv_query_gid_ex(3)`: an errno; `ENODATA` for an empty entry.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn _ibv_query_gid_ex(
    context: *mut ibv_context,
    port: u32,
    index: u32,
    to: *mut ibv_gid_entry,
    flags: u32,
    size: usize,
) -> c_int {
    if flags != 0 || size == 0 {
        return sys::zero_or_errno(Err(libc::EINVAL));
    }
    // SAFETY: the caller opened the device.
    let context = unsafe { Context::from_raw(context) };
    let found = port_info(context, port).and_then(|info| entry(context, port, index, info.link_layer));
    // SAFETY: the caller gave a place of `size` bytes.
    sys::zero_or_errno(found.map(|entry| unsafe { write_entry(to.cast(), size, &entry) }))
}

/// `ibv_query_gid_table(3)`: the number of entries, or a negative errno.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn _ibv_query_gid_table(
    context: *mut ibv_context,
    entries: *mut ibv_gid_entry,
    max_entries: usize,
    flags: u32,
    size: usize,
) -> isize {
    if flags != 0 || size == 0 {
        return -(libc::EINVAL as isize);
    }
    // SAFETY: the caller opened the device.
    let context = unsafe { Context::from_raw(context) };
    let mut count = 0;
    for port in 1..=context.open.phys_port_cnt {
        let info = match port_info(context, port) {
            Ok(info) => info,
            Err(errno) => return -(errno as isize),
        };
        for index in 0..info.gid_tbl_len {
            match entry(context, port, index, info.link_layer) {
                Ok(_) if count == max_entries => return -(libc::EINVAL as isize),
                Ok(entry) => {
                    // SAFETY: the caller's array has `max_entries` entries of `size` bytes.
                    unsafe { write_entry(entries.cast::<u8>().add(count * size), size, &entry) };
                    count += 1;
                }
                Err(libc::ENODATA) => {}
                Err(errno) => return -(errno as isize),
            }
        }
    }
    count as isize
}

/// In network order. `ENOENT` for what there is not: elsewhere it is a file in `/sys`.
fn pkey(context: &Context, port: u8, index: c_int) -> Result<u16, Errno> {
    let index = u32::try_from(index).map_err(|_| libc::ENOENT)?;
    let request = PortQuery { context: context.handle, port: u32::from(port), index, reserved: 0 };
    let found: Result<PartitionKey, Errno> = connection::call(context.connection.generation, Op::QUERY_PKEY, &request);
    match found {
        Ok(found) => Ok((found.pkey as u16).to_be()),
        Err(libc::EINVAL) => Err(libc::ENOENT),
        Err(errno) => Err(errno),
    }
}

/// `ibv_query_pkey(3)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ibv_query_pkey(context: *mut ibv_context, port: u8, index: c_int, to: *mut u16) -> c_int {
    // SAFETY: the caller opened the device.
    let found = pkey(unsafe { Context::from_raw(context) }, port, index);
    // SAFETY: the caller gave a place for the key.
    sys::zero_or_minus_one(found.map(|key| unsafe { *to = key }))
}

/// `ibv_get_pkey_index(3)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ibv_get_pkey_index(context: *mut ibv_context, port: u8, key: u16) -> c_int {
    // SAFETY: the caller opened the device.
    let context = unsafe { Context::from_raw(context) };
    for index in 0.. {
        match pkey(context, port, index) {
            Ok(found) if found == key => return index,
            Ok(_) => {}
            Err(errno) => {
                sys::set_errno(errno);
                break;
            }
        }
    }
    -1
}
