//! Work requests, completions, events.

use super::attributes::attributes;
use core::ffi::{c_int, c_uint, c_void};

attributes! {
    struct ibv_sge {
        addr: u64,
        length: u32,
        lkey: u32,
    }

    /// `wr.rdma`.
    struct rdma {
        remote_addr: u64,
        rkey: u32,
    }

    /// `wr.atomic`.
    struct atomic {
        remote_addr: u64,
        compare_add: u64,
        swap: u64,
        rkey: u32,
    }

    struct ibv_send_wr {
        wr_id: u64,
        next: *mut ibv_send_wr,
        sg_list: *mut ibv_sge,
        num_sge: c_int,
        opcode: c_uint,
        send_flags: c_uint,
        imm_data: u32,
        wr: target,
        remote_srqn: u32,
        /// `bind_mw` and `tso`, which we never read.
        rest: [u64; 6],
    }

    struct ibv_recv_wr {
        wr_id: u64,
        next: *mut ibv_recv_wr,
        sg_list: *mut ibv_sge,
        num_sge: c_int,
    }

    #[derive(Debug)]
    struct ibv_wc {
        wr_id: u64,
        status: c_uint,
        opcode: c_uint,
        vendor_err: u32,
        byte_len: u32,
        imm_data: u32,
        qp_num: u32,
        src_qp: u32,
        wc_flags: c_uint,
        pkey_index: u16,
        slid: u16,
        sl: u8,
        dlid_path_bits: u8,
    }

    struct ibv_async_event {
        /// A pointer, or a port number in its first bytes.
        element: *mut c_void,
        event_type: c_uint,
    }
}

/// The union `wr` of a send request; its third member `ud` is smaller than these.
#[derive(Clone, Copy)]
#[repr(C)]
#[allow(non_camel_case_types)]
pub union target {
    pub rdma: rdma,
    pub atomic: atomic,
}
