//! `struct ibv_qp_attr` and what of it travels to the proxy.

use crate::abi::{ibv_ah_attr, ibv_gid, ibv_global_route, ibv_qp_attr, ibv_qp_cap};
use crate::sys::Errno;
use ringfence_protocol::control::{AddressVector, QpAttr};
use ringfence_protocol::verbs::{Access, QpAttrMask, QpState};

/// Attributes of the first version of the interface. Those that came later, and what has no meaning yet, a driver that does
/// not have them answers with `EOPNOTSUPP`; wrong ones among these, with `EINVAL`.
const STANDARD: u32 = (1 << 21) - 1;

/// The only port.
const PORT: u8 = 1;

/// Queue pair and packet numbers have 24 bits; drivers take the rest away.
const NUMBER: u32 = (1 << 24) - 1;

/// The most that the three bits of a retry counter hold.
const RETRIES: u8 = 7;

/// For the proxy, which checks the values; what drivers cut to size is cut here.
pub fn to_wire(attr: &ibv_qp_attr, mask: QpAttrMask) -> Result<QpAttr, Errno> {
    if mask.0 & !STANDARD != 0 {
        return Err(libc::EOPNOTSUPP);
    }
    if mask.contains(QpAttrMask::AV) && attr.ah_attr.port_num != PORT {
        return Err(libc::EINVAL);
    }
    Ok(QpAttr {
        mask: mask.0,
        state: QpState(attr.qp_state),
        cur_state: QpState(attr.cur_qp_state),
        path_mtu: attr.path_mtu,
        qkey: attr.qkey,
        rq_psn: attr.rq_psn & NUMBER,
        sq_psn: attr.sq_psn & NUMBER,
        dest_qp_num: attr.dest_qp_num & NUMBER,
        access: Access(attr.qp_access_flags),
        pkey_index: u32::from(attr.pkey_index),
        max_rd_atomic: u32::from(attr.max_rd_atomic),
        max_dest_rd_atomic: u32::from(attr.max_dest_rd_atomic),
        min_rnr_timer: u32::from(attr.min_rnr_timer % 32),
        port: u32::from(attr.port_num),
        timeout: u32::from(attr.timeout),
        retry_cnt: u32::from(attr.retry_cnt.min(RETRIES)),
        rnr_retry: u32::from(attr.rnr_retry.min(RETRIES)),
        en_sqd_async_notify: u32::from(attr.en_sqd_async_notify),
        sq_draining: u32::from(attr.sq_draining),
        path_mig_state: attr.path_mig_state,
        av: AddressVector {
            dgid: attr.ah_attr.grh.dgid.0,
            flow_label: attr.ah_attr.grh.flow_label,
            dlid: attr.ah_attr.dlid,
            sl: attr.ah_attr.sl,
            src_path_bits: attr.ah_attr.src_path_bits,
            static_rate: attr.ah_attr.static_rate,
            is_global: attr.ah_attr.is_global,
            port: attr.ah_attr.port_num,
            sgid_index: attr.ah_attr.grh.sgid_index,
            hop_limit: attr.ah_attr.grh.hop_limit,
            traffic_class: attr.ah_attr.grh.traffic_class,
            reserved: [0; 2],
        },
    })
}

/// For the program.
pub fn from_wire(attr: &QpAttr, cap: ibv_qp_cap) -> ibv_qp_attr {
    let path = ibv_ah_attr {
        grh: ibv_global_route {
            dgid: ibv_gid(attr.av.dgid),
            flow_label: attr.av.flow_label,
            sgid_index: attr.av.sgid_index,
            hop_limit: attr.av.hop_limit,
            traffic_class: attr.av.traffic_class,
        },
        dlid: attr.av.dlid,
        sl: attr.av.sl,
        src_path_bits: attr.av.src_path_bits,
        static_rate: attr.av.static_rate,
        is_global: attr.av.is_global,
        port_num: attr.av.port,
    };
    let no_path = ibv_ah_attr {
        grh: ibv_global_route { dgid: ibv_gid([0; 16]), flow_label: 0, sgid_index: 0, hop_limit: 0, traffic_class: 0 },
        dlid: 0,
        sl: 0,
        src_path_bits: 0,
        static_rate: 0,
        is_global: 0,
        port_num: 0,
    };
    ibv_qp_attr {
        qp_state: attr.state.0,
        // The kernel answers both with the present state.
        cur_qp_state: attr.state.0,
        path_mtu: attr.path_mtu,
        path_mig_state: attr.path_mig_state,
        qkey: attr.qkey,
        rq_psn: attr.rq_psn,
        sq_psn: attr.sq_psn,
        dest_qp_num: attr.dest_qp_num,
        qp_access_flags: attr.access.0,
        cap,
        ah_attr: path,
        alt_ah_attr: no_path,
        pkey_index: attr.pkey_index as u16,
        alt_pkey_index: 0,
        en_sqd_async_notify: attr.en_sqd_async_notify as u8,
        sq_draining: attr.sq_draining as u8,
        max_rd_atomic: attr.max_rd_atomic as u8,
        max_dest_rd_atomic: attr.max_dest_rd_atomic as u8,
        min_rnr_timer: attr.min_rnr_timer as u8,
        port_num: attr.port as u8,
        timeout: attr.timeout as u8,
        retry_cnt: attr.retry_cnt as u8,
        rnr_retry: attr.rnr_retry as u8,
        alt_port_num: 0,
        alt_timeout: 0,
        rate_limit: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ringfence_protocol::verbs::QpState;

    #[test]
    fn attributes_survive_the_way_to_the_proxy_and_back() {
        let cap = ibv_qp_cap { max_send_wr: 1, max_recv_wr: 2, max_send_sge: 3, max_recv_sge: 4, max_inline_data: 5 };
        let wire = QpAttr {
            mask: QpAttrMask::STATE.0,
            state: QpState::RTS,
            cur_state: QpState::RTS,
            path_mtu: 3,
            qkey: 4,
            rq_psn: 5,
            sq_psn: 6,
            dest_qp_num: 7,
            access: Access::REMOTE_READ,
            pkey_index: 8,
            max_rd_atomic: 9,
            max_dest_rd_atomic: 10,
            min_rnr_timer: 11,
            port: 12,
            timeout: 13,
            retry_cnt: 6,
            rnr_retry: 7,
            en_sqd_async_notify: 16,
            sq_draining: 17,
            path_mig_state: 2,
            av: AddressVector {
                dgid: [18; 16],
                flow_label: 19,
                dlid: 20,
                sl: 21,
                src_path_bits: 22,
                static_rate: 23,
                is_global: 24,
                port: 25,
                sgid_index: 26,
                hop_limit: 27,
                traffic_class: 28,
                reserved: [0; 2],
            },
        };
        assert_eq!(to_wire(&from_wire(&wire, cap), QpAttrMask::STATE), Ok(wire));
    }

    #[test]
    fn what_is_not_offered_is_said_to_be() {
        let attr = from_wire(
            &QpAttr::default(),
            ibv_qp_cap { max_send_wr: 0, max_recv_wr: 0, max_send_sge: 0, max_recv_sge: 0, max_inline_data: 0 },
        );
        assert_eq!(to_wire(&attr, QpAttrMask::RATE_LIMIT), Err(libc::EOPNOTSUPP));
        assert_eq!(to_wire(&attr, QpAttrMask(1 << 21)), Err(libc::EOPNOTSUPP));
        assert!(to_wire(&attr, QpAttrMask::DEST_QPN).is_ok());
    }

    #[test]
    fn values_are_cut_as_drivers_cut_them() {
        let cap = ibv_qp_cap { max_send_wr: 0, max_recv_wr: 0, max_send_sge: 0, max_recv_sge: 0, max_inline_data: 0 };
        let mut attr = from_wire(&QpAttr::default(), cap);
        (attr.dest_qp_num, attr.sq_psn, attr.rq_psn) = (u32::MAX, 1 << 24, 0x0100_0001);
        (attr.retry_cnt, attr.rnr_retry, attr.min_rnr_timer) = (8, 255, 33);
        let wire = to_wire(&attr, QpAttrMask::STATE).unwrap();
        assert_eq!((wire.dest_qp_num, wire.sq_psn, wire.rq_psn), (0x00ff_ffff, 0, 1));
        assert_eq!((wire.retry_cnt, wire.rnr_retry, wire.min_rnr_timer), (7, 7, 1));
        assert_eq!(to_wire(&attr, QpAttrMask::AV), Err(libc::EINVAL), "port 0");
    }
}
