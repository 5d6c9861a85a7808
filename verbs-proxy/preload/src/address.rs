//! Address handle attributes out of a received datagram.

// UNSAFETY: entry points of a C interface.
#![allow(unsafe_code)]

use crate::abi::{ibv_ah_attr, ibv_context, ibv_gid, ibv_grh, ibv_wc};
use crate::port::{ibv_query_gid, ibv_query_gid_type};
use crate::sys::{self, Errno};
use core::ffi::c_int;
use core::mem;
use core::ptr;
use ringfence_protocol::verbs::{GidType, WcFlags};

const NEXT_HEADER_UDP: u8 = 17;
const NEXT_HEADER_IB: u8 = 0x1b;
const IPV4_BYTES: usize = 20;

/// What a global route header turns out to be.
#[derive(Debug, PartialEq, Eq)]
struct Source {
    destination: [u8; 16],
    source: [u8; 16],
    kind: GidType,
    hop_limit: u8,
    traffic_class: u8,
}

/// RoCE v2 over IPv4 puts an IPv4 header into the last 20 of the 40 bytes.
fn parse(grh: &[u8; 40]) -> Result<Source, Errno> {
    let ip: &[u8; IPV4_BYTES] = grh[IPV4_BYTES..].first_chunk().ok_or(libc::EPROTONOSUPPORT)?;
    let is_ipv6 = grh[0] >> 4 == 6;
    let is_ipv4 = if is_ipv6 { ip[0] == 0x45 && checksum_holds(ip) } else { ip[0] >> 4 == 4 };
    if is_ipv4 {
        let mapped = |address: &[u8]| {
            let mut gid = [0; 16];
            gid[10..12].fill(0xff);
            gid[12..].copy_from_slice(address);
            gid
        };
        if ip[16] >> 4 == 0xe {
            return Err(libc::EINVAL);
        }
        return Ok(Source {
            destination: mapped(&ip[16..20]),
            source: mapped(&ip[12..16]),
            kind: GidType::ROCE_V2,
            hop_limit: ip[8],
            traffic_class: ip[1],
        });
    }
    if !is_ipv6 {
        return Err(libc::EPROTONOSUPPORT);
    }
    let mut source = [0; 16];
    source.copy_from_slice(&grh[8..24]);
    let mut destination = [0; 16];
    destination.copy_from_slice(&grh[24..40]);
    if destination[0] == 0xff {
        return Err(libc::EINVAL);
    }
    let kind = match grh[6] {
        NEXT_HEADER_UDP => GidType::ROCE_V2,
        NEXT_HEADER_IB => GidType::IB_ROCE_V1,
        _ => return Err(libc::EPROTONOSUPPORT),
    };
    let traffic_class = grh[0] << 4 | grh[1] >> 4;
    Ok(Source { destination, source, kind, hop_limit: grh[7], traffic_class })
}

fn checksum_holds(ip: &[u8; IPV4_BYTES]) -> bool {
    let sum: u32 = ip.chunks_exact(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum();
    (sum & 0xffff) + (sum >> 16) == 0xffff
}

/// # Safety
/// The context is open.
unsafe fn gid_index(context: *mut ibv_context, port: u8, gid: &[u8; 16], kind: GidType) -> Result<u8, Errno> {
    for index in 0.. {
        let (mut found, mut found_kind) = (ibv_gid::default(), 0);
        // SAFETY: by the caller's promise; both places are writable.
        let failed = unsafe {
            ibv_query_gid(context, port, index, &raw mut found) != 0
                || ibv_query_gid_type(context, port, index as u32, &raw mut found_kind) != 0
        };
        if failed {
            return Err(sys::errno());
        }
        if found.0 == *gid && found_kind == kind.0 {
            return Ok(index as u8);
        }
    }
    Err(libc::ENOENT)
}

/// `ibv_init_ah_from_wc(3)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ibv_init_ah_from_wc(
    context: *mut ibv_context,
    port: u8,
    wc: *const ibv_wc,
    grh: *const ibv_grh,
    to: *mut ibv_ah_attr,
) -> c_int {
    // SAFETY: the caller gave a completion, and a place for the attributes, of which all fields are numbers.
    let (wc, attr) = unsafe {
        ptr::write_bytes(to, 0, 1);
        (&*wc, &mut *to)
    };
    attr.dlid = wc.slid;
    attr.sl = wc.sl;
    attr.src_path_bits = wc.dlid_path_bits;
    attr.port_num = port;
    if wc.wc_flags & u32::from(WcFlags::GRH.0) == 0 {
        return 0;
    }
    const { assert!(mem::size_of::<ibv_grh>() == 40) };
    // SAFETY: the completion says that there is a header, which is 40 bytes.
    let bytes = unsafe { grh.cast::<[u8; 40]>().read() };
    attr.is_global = 1;
    attr.grh.flow_label = u32::from_be_bytes([0, bytes[1] & 0xf, bytes[2], bytes[3]]);
    sys::zero_or_minus_one(parse(&bytes).and_then(|from| {
        // SAFETY: the caller opened the device.
        attr.grh.sgid_index = unsafe { gid_index(context, port, &from.destination, from.kind) }?;
        attr.grh.dgid = ibv_gid(from.source);
        attr.grh.hop_limit = from.hop_limit;
        attr.grh.traffic_class = from.traffic_class;
        Ok(())
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ipv4_headers_are_told_by_version_and_checksum() {
        let mut grh = [0; 40];
        // An example header of RFC 1071 fame: 172.16.10.99 to 172.16.10.12, checksum 0xb1e6.
        grh[20..].copy_from_slice(&[
            0x45, 0, 0, 0x3c, 0x1c, 0x46, 0x40, 0, 0x40, 6, 0xb1, 0xe6, 0xac, 0x10, 0x0a, 0x63, 0xac, 0x10, 0x0a, 0x0c,
        ]);
        let from = parse(&grh).unwrap();
        assert_eq!(from.source[10..], [0xff, 0xff, 172, 16, 10, 99]);
        assert_eq!(from.destination[10..], [0xff, 0xff, 172, 16, 10, 12]);
        assert_eq!((from.kind, from.hop_limit), (GidType::ROCE_V2, 64));
        // Bytes before it that look like IPv6 change nothing while the checksum holds.
        grh[0] = 0x60;
        assert_eq!(parse(&grh).unwrap(), from);
        grh[30] ^= 1;
        assert_eq!(parse(&grh), Err(libc::EPROTONOSUPPORT));
    }

    #[test]
    fn ipv6_headers_name_both_gids() {
        let mut grh = [0; 40];
        grh[0] = 0x6a;
        grh[1] = 0xb0;
        grh[6] = NEXT_HEADER_UDP;
        grh[7] = 9;
        grh[8] = 0xfe;
        grh[24] = 0xfd;
        let from = parse(&grh).unwrap();
        assert_eq!((from.source[0], from.destination[0], from.traffic_class, from.hop_limit), (0xfe, 0xfd, 0xab, 9));
        grh[24] = 0xff;
        assert_eq!(parse(&grh), Err(libc::EINVAL), "multicast");
    }
}
