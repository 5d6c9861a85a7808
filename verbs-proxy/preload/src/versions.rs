//! Every name and version under which programs and libraries ask for what [`crate::unsupported`] answers.
//!
//! What has one version stands in `libibverbs.map` under its own name. Here are the names that share an answer, and the
//! names with several versions: the interface of 2005 (`@IBVERBS_1.0`), and the private interface between libibverbs
//! and provider libraries, whose version node changes with rdma-core's releases. Provider libraries are dependencies of
//! programs (perftest, UCX and libfabric link libmlx5 or libefa), are bound at once when they are loaded, and call
//! `verbs_register_driver_NN` when they are; none finds a device of its own here.
//!
//! The directives need their functions in the same object file, which `link.sh` sees to by building with one unit.

// UNSAFETY: assembler directives. They name symbols and produce no code.
#![allow(unsafe_code)]

use core::arch::global_asm;

/// `function` is also `name`, in version node `node`, where a program built today finds it.
macro_rules! default_names {
    ($($node:literal: $($function:ident = [$($name:ident)*])*;)*) => {
        $($($(global_asm!(concat!(".symver ", stringify!($function), ", ", stringify!($name), "@@", $node));)*)*)*
    };
}

/// The same, for programs built long ago.
macro_rules! old_names {
    ($($node:literal: $($function:ident = [$($name:ident)*])*;)*) => {
        $($($(global_asm!(concat!(".symver ", stringify!($function), ", ", stringify!($name), "@", $node));)*)*)*
    };
}

/// The same, in the private nodes of all releases.
macro_rules! private_names {
    ($nodes:tt $($function:ident = [$($name:ident)*])*) => {
        $($(private_name! { $nodes $function $name })*)*
    };
}

macro_rules! private_name {
    ([$($node:literal)*] $function:ident $name:ident) => {
        global_asm!($(concat!(
            ".symver ", stringify!($function), ", ", stringify!($name), "@IBVERBS_PRIVATE_", $node
        )),*);
    };
}

/// The same, in the private node of Debian 12, where `dlsym` without a version finds it.
macro_rules! private_default_names {
    ([] $($function:ident = [$($name:ident)*])*) => {
        default_names! { "IBVERBS_PRIVATE_34": $($function = [$($name)*])*; }
    };
}

default_names! {
    "IBVERBS_1.1":
        ringfence_errno = [
            ibv_modify_srq ibv_query_srq ibv_destroy_srq ibv_destroy_ah ibv_attach_mcast ibv_detach_mcast
        ]
        ringfence_negative_errno = [ibv_resolve_eth_l2_from_gid]
        ringfence_null = [ibv_create_srq ibv_create_ah ibv_create_ah_from_wc]
        ringfence_zero = [ibv_dofork_range ibv_dontfork_range];
    "IBVERBS_1.6":
        ringfence_null = [ibv_qp_to_qp_ex];
    "IBVERBS_1.10":
        ringfence_errno = [ibv_query_ece ibv_set_ece]
        ringfence_null = [ibv_import_device ibv_import_mr ibv_import_pd]
        ringfence_zero = [ibv_unimport_mr ibv_unimport_pd];
    "IBVERBS_1.13":
        ringfence_null = [ibv_import_dm]
        ringfence_zero = [ibv_unimport_dm];
    "IBVERBS_1.14":
        ringfence_zero = [ibv_query_qp_data_in_order];
    "IBVERBS_1.15":
        ringfence_errno = [ibv_dealloc_dmah]
        ringfence_null = [ibv_alloc_dmah ibv_reg_mr_ex];
    "IBVERBS_1.16":
        ringfence_errno = [ibv_query_port_speed]
        ringfence_minus_one = [ibv_dm_export_dmabuf_fd];
    "IBVERBS_1.17":
        ringfence_null = [ibv_alloc_buf ibv_reg_buf_mr]
        ringfence_zero = [ibv_free_buf];
    "IBVERBS_1.18":
        ringfence_errno = [
            _ibv_query_comp_cntr_caps ibv_destroy_comp_cntr ibv_inc_comp_cntr ibv_inc_err_comp_cntr
            ibv_qp_attach_comp_cntr ibv_read_comp_cntr ibv_read_err_comp_cntr ibv_set_comp_cntr ibv_set_err_comp_cntr
        ]
        ringfence_minus_one = [ibv_export_buf_dmabuf_fd]
        ringfence_null = [ibv_create_comp_cntr];
    "IBVERBS_PRIVATE_34":
        ringfence_zero = [verbs_register_driver_34]
        ibv_query_gid_type = [ibv_query_gid_type]
        ibv_wr_opcode_str = [ibv_wr_opcode_str]
        verbs_allow_disassociate_destroy = [verbs_allow_disassociate_destroy];
}

old_names! {
    "IBVERBS_1.0":
        ringfence_errno = [
            ibv_attach_mcast ibv_close_device ibv_dealloc_pd ibv_dereg_mr ibv_destroy_ah ibv_destroy_cq ibv_destroy_qp
            ibv_destroy_srq ibv_detach_mcast ibv_modify_qp ibv_modify_srq ibv_query_device ibv_query_port ibv_query_qp
            ibv_query_srq ibv_resize_cq
        ]
        ringfence_minus_one = [ibv_get_async_event ibv_get_cq_event ibv_query_gid ibv_query_pkey]
        ringfence_no_devices = [ibv_get_device_list]
        ringfence_null = [
            ibv_alloc_pd ibv_create_ah ibv_create_cq ibv_create_qp ibv_create_srq ibv_get_device_name ibv_open_device
            ibv_reg_mr
        ]
        ringfence_zero = [ibv_ack_async_event ibv_ack_cq_events ibv_free_device_list ibv_get_device_guid];
    "IBVERBS_1.1":
        ringfence_zero = [ibv_register_driver];
    "IBVERBS_PRIVATE_15":
        ringfence_zero = [verbs_register_driver_15];
    "IBVERBS_PRIVATE_16":
        ringfence_zero = [verbs_register_driver_16];
    "IBVERBS_PRIVATE_17":
        ringfence_zero = [verbs_register_driver_17];
    "IBVERBS_PRIVATE_18":
        ringfence_zero = [verbs_register_driver_18];
    "IBVERBS_PRIVATE_19":
        ringfence_zero = [verbs_register_driver_19];
    "IBVERBS_PRIVATE_20":
        ringfence_zero = [verbs_register_driver_20];
    "IBVERBS_PRIVATE_21":
        ringfence_zero = [verbs_register_driver_21];
    "IBVERBS_PRIVATE_22":
        ringfence_zero = [verbs_register_driver_22];
    "IBVERBS_PRIVATE_25":
        ringfence_zero = [verbs_register_driver_25];
    "IBVERBS_PRIVATE_33":
        ringfence_zero = [verbs_register_driver_33];
    "IBVERBS_PRIVATE_57":
        ringfence_zero = [verbs_register_driver_57];
    "IBVERBS_PRIVATE_59":
        ringfence_zero = [verbs_register_driver_59];
    "IBVERBS_PRIVATE_64":
        ringfence_zero = [verbs_register_driver_64];
    "IBVERBS_PRIVATE_65":
        ringfence_zero = [verbs_register_driver_65];
}

private_names! {
    ["15" "16" "17" "18" "19" "20" "21" "22" "25" "33" "57" "59" "64" "65"]
    ibv_query_gid_type = [ibv_query_gid_type]
    ibv_wr_opcode_str = [ibv_wr_opcode_str]
    verbs_allow_disassociate_destroy = [verbs_allow_disassociate_destroy]
}

macro_rules! every_private_name {
    ($macro:ident! { $nodes:tt }) => {
        $macro! {
            $nodes
            ringfence_errno = [
                execute_ioctl ibv_cmd_advise_mr ibv_cmd_alloc_dm ibv_cmd_alloc_dmah ibv_cmd_alloc_mw
                ibv_cmd_alloc_pd ibv_cmd_attach_mcast ibv_cmd_close_xrcd ibv_cmd_create_ah ibv_cmd_create_comp_cntr
                ibv_cmd_create_counters ibv_cmd_create_cq ibv_cmd_create_cq_ex ibv_cmd_create_cq_ex2
                ibv_cmd_create_flow ibv_cmd_create_flow_action_esp ibv_cmd_create_qp ibv_cmd_create_qp_ex
                ibv_cmd_create_qp_ex2 ibv_cmd_create_rwq_ind_table ibv_cmd_create_srq ibv_cmd_create_srq_ex
                ibv_cmd_create_wq ibv_cmd_dealloc_mw ibv_cmd_dealloc_pd ibv_cmd_dereg_mr ibv_cmd_destroy_ah
                ibv_cmd_destroy_comp_cntr ibv_cmd_destroy_counters ibv_cmd_destroy_cq ibv_cmd_destroy_flow
                ibv_cmd_destroy_flow_action ibv_cmd_destroy_qp ibv_cmd_destroy_rwq_ind_table ibv_cmd_destroy_srq
                ibv_cmd_destroy_wq ibv_cmd_detach_mcast ibv_cmd_export_dmabuf_fd ibv_cmd_free_dm ibv_cmd_free_dmah
                ibv_cmd_get_context ibv_cmd_inc_comp_cntr ibv_cmd_inc_err_comp_cntr ibv_cmd_modify_cq
                ibv_cmd_modify_flow_action_esp ibv_cmd_modify_qp ibv_cmd_modify_qp_ex ibv_cmd_modify_srq
                ibv_cmd_modify_wq ibv_cmd_open_qp ibv_cmd_open_xrcd ibv_cmd_poll_cq ibv_cmd_post_recv
                ibv_cmd_post_send ibv_cmd_post_srq_recv ibv_cmd_qp_attach_comp_cntr ibv_cmd_query_comp_cntr_caps
                ibv_cmd_query_context ibv_cmd_query_device ibv_cmd_query_device_any ibv_cmd_query_device_ex
                ibv_cmd_query_mr ibv_cmd_query_port ibv_cmd_query_port_speed ibv_cmd_query_qp ibv_cmd_query_srq
                ibv_cmd_read_comp_cntr ibv_cmd_read_counters ibv_cmd_read_err_comp_cntr ibv_cmd_reg_dm_mr
                ibv_cmd_reg_dmabuf_mr ibv_cmd_reg_mr ibv_cmd_reg_mr_ex ibv_cmd_req_notify_cq ibv_cmd_rereg_mr
                ibv_cmd_resize_cq ibv_cmd_set_comp_cntr ibv_cmd_set_err_comp_cntr ibv_get_fw_ver
            ]
            ringfence_minus_one = [
                ibv_read_ibdev_sysfs_file
            ]
            ringfence_null = [
                _verbs_init_and_alloc_context ibv_dmabuf_heap_alloc ibv_dmabuf_heap_cc_shared_init verbs_open_device
            ]
            ringfence_zero = [
                __ioctl_final_num_attrs __verbs_log ibv_dmabuf_heap_destroy ibv_dmabuf_heap_free ibv_register_driver
                verbs_init_cq verbs_set_ops verbs_uninit_context
            ]
        }
    };
}

every_private_name! {
    private_names! { ["15" "16" "17" "18" "19" "20" "21" "22" "25" "33" "57" "59" "64" "65"] }
}
every_private_name! {
    private_default_names! { [] }
}
