//! What verbs make: devices, contexts, queues. Programs see these fields and call these pointers.

use super::attributes::{
    attributes, ibv_cq_init_attr_ex, ibv_device_attr, ibv_device_attr_ex, ibv_port_attr, ibv_qp_init_attr_ex,
    ibv_qp_rate_limit_attr,
};
use super::requests::{ibv_recv_wr, ibv_send_wr, ibv_wc};
use core::ffi::{c_char, c_int, c_uint, c_void};
use libc::{pthread_cond_t, pthread_mutex_t, size_t};

/// A pointer that programs do not call, or must find to be null.
pub type Unused = Option<unsafe extern "C" fn()>;

/// `IBV_SYSFS_NAME_MAX`.
pub const NAME_MAX: usize = 64;
/// `IBV_SYSFS_PATH_MAX`.
pub const PATH_MAX: usize = 256;
/// `__VERBS_ABI_IS_EXTENDED`: a `verbs_context` stands before the `ibv_context`.
pub const ABI_IS_EXTENDED: *mut c_void = usize::MAX as *mut c_void;

attributes! {
    struct ibv_device {
        ops: [Unused; 2],
        node_type: c_int,
        transport_type: c_int,
        name: [c_char; NAME_MAX],
        dev_name: [c_char; NAME_MAX],
        dev_path: [c_char; PATH_MAX],
        ibdev_path: [c_char; PATH_MAX],
    }

    struct ibv_context_ops {
        compat_query_device: Option<unsafe extern "C" fn(*mut ibv_context, *mut ibv_device_attr) -> c_int>,
        compat_query_port: Option<unsafe extern "C" fn(*mut ibv_context, u8, *mut ibv_port_attr) -> c_int>,
        compat_alloc_pd_to_dereg_mr: [Unused; 5],
        alloc_mw: Unused,
        bind_mw: Option<unsafe extern "C" fn() -> c_int>,
        dealloc_mw: Option<unsafe extern "C" fn() -> c_int>,
        compat_create_cq: Unused,
        poll_cq: Option<unsafe extern "C" fn(*mut ibv_cq, c_int, *mut ibv_wc) -> c_int>,
        req_notify_cq: Option<unsafe extern "C" fn(*mut ibv_cq, c_int) -> c_int>,
        compat_cq_event_to_destroy_srq: [Unused; 7],
        post_srq_recv:
            Option<unsafe extern "C" fn(*mut c_void, *mut ibv_recv_wr, *mut *mut ibv_recv_wr) -> c_int>,
        compat_create_qp_to_destroy_qp: [Unused; 4],
        post_send: Option<unsafe extern "C" fn(*mut ibv_qp, *mut ibv_send_wr, *mut *mut ibv_send_wr) -> c_int>,
        post_recv: Option<unsafe extern "C" fn(*mut ibv_qp, *mut ibv_recv_wr, *mut *mut ibv_recv_wr) -> c_int>,
        compat_create_ah_to_async_event: [Unused; 5],
    }

    struct ibv_context {
        device: *mut ibv_device,
        ops: ibv_context_ops,
        cmd_fd: c_int,
        async_fd: c_int,
        num_comp_vectors: c_int,
        mutex: pthread_mutex_t,
        abi_compat: *mut c_void,
    }

    /// New fields come first, so that `context` is where every program expects it. Programs built against an older
    /// header see a shorter structure; one built against a newer header learns from `sz` that ours is shorter.
    struct verbs_context {
        free_buf: Unused,
        alloc_buf: Unused,
        dm_export_dmabuf_fd: Unused,
        reg_mr_ex: Unused,
        dealloc_dmah: Unused,
        alloc_dmah: Unused,
        query_port: Option<unsafe extern "C" fn(*mut ibv_context, u8, *mut ibv_port_attr, size_t) -> c_int>,
        advise_mr: Unused,
        alloc_null_mr: Unused,
        read_counters: Unused,
        attach_counters_point_flow: Unused,
        create_counters: Unused,
        destroy_counters: Unused,
        reg_dm_mr: Unused,
        alloc_dm: Unused,
        free_dm: Unused,
        modify_flow_action_esp: Unused,
        destroy_flow_action: Unused,
        create_flow_action_esp: Unused,
        modify_qp_rate_limit: Option<unsafe extern "C" fn(*mut ibv_qp, *mut ibv_qp_rate_limit_attr) -> c_int>,
        alloc_parent_domain: Unused,
        dealloc_td: Unused,
        alloc_td: Unused,
        modify_cq: Unused,
        post_srq_ops: Unused,
        destroy_rwq_ind_table: Unused,
        create_rwq_ind_table: Unused,
        destroy_wq: Unused,
        modify_wq: Unused,
        create_wq: Unused,
        query_rt_values: Unused,
        create_cq_ex: Option<unsafe extern "C" fn(*mut ibv_context, *mut ibv_cq_init_attr_ex) -> *mut ibv_cq_ex>,
        private: *mut c_void,
        query_device_ex:
            Option<unsafe extern "C" fn(*mut ibv_context, *const u32, *mut ibv_device_attr_ex, size_t) -> c_int>,
        ibv_destroy_flow: Unused,
        placeholder2: Unused,
        ibv_create_flow: Unused,
        placeholder1: Unused,
        open_qp: Unused,
        create_qp_ex: Option<unsafe extern "C" fn(*mut ibv_context, *mut ibv_qp_init_attr_ex) -> *mut ibv_qp>,
        get_srq_num: Unused,
        create_srq_ex: Unused,
        open_xrcd: Unused,
        /// Called without asking whether it is there, but only for a domain that cannot have been opened.
        close_xrcd: Option<unsafe extern "C" fn() -> c_int>,
        placeholder3: u64,
        sz: size_t,
        context: ibv_context,
    }

    struct ibv_pd {
        context: *mut ibv_context,
        handle: u32,
    }

    struct ibv_mr {
        context: *mut ibv_context,
        pd: *mut ibv_pd,
        addr: *mut c_void,
        length: size_t,
        handle: u32,
        lkey: u32,
        rkey: u32,
    }

    struct ibv_comp_channel {
        context: *mut ibv_context,
        fd: c_int,
        refcnt: c_int,
    }

    /// `struct ibv_cq` is its beginning, up to `async_events_completed`.
    struct ibv_cq_ex {
        context: *mut ibv_context,
        channel: *mut ibv_comp_channel,
        cq_context: *mut c_void,
        handle: u32,
        cqe: c_int,
        mutex: pthread_mutex_t,
        cond: pthread_cond_t,
        comp_events_completed: u32,
        async_events_completed: u32,
        comp_mask: u32,
        status: c_uint,
        wr_id: u64,
        start_poll: Option<unsafe extern "C" fn(*mut ibv_cq_ex, *mut u32) -> c_int>,
        next_poll: Option<unsafe extern "C" fn(*mut ibv_cq_ex) -> c_int>,
        end_poll: Option<unsafe extern "C" fn(*mut ibv_cq_ex)>,
        read_opcode: Option<unsafe extern "C" fn(*mut ibv_cq_ex) -> c_uint>,
        read_vendor_err: Option<unsafe extern "C" fn(*mut ibv_cq_ex) -> u32>,
        read_byte_len: Option<unsafe extern "C" fn(*mut ibv_cq_ex) -> u32>,
        read_imm_data: Option<unsafe extern "C" fn(*mut ibv_cq_ex) -> u32>,
        read_qp_num: Option<unsafe extern "C" fn(*mut ibv_cq_ex) -> u32>,
        read_src_qp: Option<unsafe extern "C" fn(*mut ibv_cq_ex) -> u32>,
        read_wc_flags: Option<unsafe extern "C" fn(*mut ibv_cq_ex) -> c_uint>,
        read_slid: Option<unsafe extern "C" fn(*mut ibv_cq_ex) -> u32>,
        read_sl: Option<unsafe extern "C" fn(*mut ibv_cq_ex) -> u8>,
        read_dlid_path_bits: Option<unsafe extern "C" fn(*mut ibv_cq_ex) -> u8>,
        read_completion_ts: Unused,
        read_cvlan: Unused,
        read_flow_tag: Unused,
        read_tm_info: Unused,
        read_completion_wallclock_ns: Unused,
    }

    struct ibv_qp {
        context: *mut ibv_context,
        qp_context: *mut c_void,
        pd: *mut ibv_pd,
        send_cq: *mut ibv_cq,
        recv_cq: *mut ibv_cq,
        srq: *mut c_void,
        handle: u32,
        qp_num: u32,
        state: c_uint,
        qp_type: c_uint,
        mutex: pthread_mutex_t,
        cond: pthread_cond_t,
        events_completed: u32,
    }
}

/// The part of a completion queue that programs of every age see.
#[allow(non_camel_case_types)]
pub type ibv_cq = ibv_cq_ex;
