//! Compares the types of [`crate::abi`] with the installed header, by way of the C compiler.

use crate::abi::*;
use crate::kernel_copies::{ib_user_path_rec, ib_uverbs_ah_attr, ib_uverbs_qp_attr, ibv_sa_path_rec};
use core::mem::offset_of;
use std::fmt::Write as _;
use std::process::{Command, Stdio};

/// One line of comparison: the C expression and our number.
struct Line(String, usize);

/// Sizes and offsets: `type = "C type": field, field = "C field", …;`
macro_rules! lines {
    ($($rust:ident = $c:literal $($size:ident)?: $($field:ident $(= $c_field:literal)?),*;)*) => {{
        let mut lines = Vec::new();
        $(
            $(lines.push(Line(format!("{}({})", stringify!($size), $c), size_of::<$rust>()));)?
            $(lines.push(Line(
                format!("offsetof({}, {})", $c, [stringify!($field) $(, $c_field)?].last().unwrap()),
                offset_of!($rust, $field),
            ));)*
        )*
        lines
    }};
}

fn ours() -> Vec<Line> {
    let mut lines = lines! {
        ibv_gid = "union ibv_gid" sizeof:;
        ibv_gid_entry = "struct ibv_gid_entry" sizeof: gid, gid_index, port_num, gid_type, ndev_ifindex;
        ibv_device = "struct ibv_device" sizeof: ops = "_ops", node_type, transport_type, name, dev_name, dev_path,
            ibdev_path;
        ibv_context_ops = "struct ibv_context_ops" sizeof: compat_query_device = "_compat_query_device",
            compat_query_port = "_compat_query_port", compat_alloc_pd_to_dereg_mr = "_compat_alloc_pd", alloc_mw,
            bind_mw, dealloc_mw, compat_create_cq = "_compat_create_cq", poll_cq, req_notify_cq,
            compat_cq_event_to_destroy_srq = "_compat_cq_event", post_srq_recv,
            compat_create_qp_to_destroy_qp = "_compat_create_qp", post_send, post_recv,
            compat_create_ah_to_async_event = "_compat_create_ah";
        ibv_context = "struct ibv_context" sizeof: device, ops, cmd_fd, async_fd, num_comp_vectors, mutex, abi_compat;
        ibv_pd = "struct ibv_pd" sizeof: context, handle;
        ibv_mr = "struct ibv_mr" sizeof: context, pd, addr, length, handle, lkey, rkey;
        ibv_comp_channel = "struct ibv_comp_channel" sizeof: context, fd, refcnt;
        ibv_cq_ex = "struct ibv_cq" : context, channel, cq_context, handle, cqe, mutex, cond, comp_events_completed,
            async_events_completed;
        ibv_cq_ex = "struct ibv_cq_ex" sizeof: context, channel, cq_context, handle, cqe, mutex, cond,
            comp_events_completed, async_events_completed, comp_mask, status, wr_id, start_poll, next_poll, end_poll,
            read_opcode, read_vendor_err, read_byte_len, read_imm_data, read_qp_num, read_src_qp, read_wc_flags,
            read_slid, read_sl, read_dlid_path_bits, read_completion_ts, read_cvlan, read_flow_tag, read_tm_info,
            read_completion_wallclock_ns;
        ibv_qp = "struct ibv_qp" sizeof: context, qp_context, pd, send_cq, recv_cq, srq, handle, qp_num, state,
            qp_type, mutex, cond, events_completed;
        ibv_device_attr = "struct ibv_device_attr" sizeof: fw_ver, node_guid, sys_image_guid, max_mr_size,
            page_size_cap, vendor_id, vendor_part_id, hw_ver, max_qp, max_qp_wr, device_cap_flags, max_sge, max_sge_rd,
            max_cq, max_cqe, max_mr, max_pd, max_qp_rd_atom, max_ee_rd_atom, max_res_rd_atom, max_qp_init_rd_atom,
            max_ee_init_rd_atom, atomic_cap, max_ee, max_rdd, max_mw, max_raw_ipv6_qp, max_raw_ethy_qp, max_mcast_grp,
            max_mcast_qp_attach, max_total_mcast_qp_attach, max_ah, max_fmr, max_map_per_fmr, max_srq, max_srq_wr,
            max_srq_sge, max_pkeys, local_ca_ack_delay, phys_port_cnt;
        ibv_odp_caps = "struct ibv_odp_caps" sizeof: general_caps, rc_odp_caps = "per_transport_caps.rc_odp_caps",
            uc_odp_caps = "per_transport_caps.uc_odp_caps", ud_odp_caps = "per_transport_caps.ud_odp_caps";
        ibv_device_attr_ex = "struct ibv_device_attr_ex" sizeof: orig_attr, comp_mask, odp_caps,
            completion_timestamp_mask, hca_core_clock, device_cap_flags_ex, tso_caps, rss_caps, max_wq_type_rq,
            packet_pacing_caps, raw_packet_caps, tm_caps, cq_mod_caps, max_dm_size, pci_atomic_caps, xrc_odp_caps,
            phys_port_cnt_ex;
        ibv_tso_caps = "struct ibv_tso_caps" sizeof: max_tso, supported_qpts;
        ibv_rss_caps = "struct ibv_rss_caps" sizeof: supported_qpts, max_rwq_indirection_tables,
            max_rwq_indirection_table_size, rx_hash_fields_mask, rx_hash_function;
        ibv_packet_pacing_caps = "struct ibv_packet_pacing_caps" sizeof: qp_rate_limit_min, qp_rate_limit_max,
            supported_qpts;
        ibv_qp_rate_limit_attr = "struct ibv_qp_rate_limit_attr" sizeof: rate_limit, max_burst_sz, typical_pkt_sz,
            comp_mask;
        ibv_tm_caps = "struct ibv_tm_caps" sizeof: max_rndv_hdr_size, max_num_tags, flags, max_ops, max_sge;
        ibv_cq_moderation_caps = "struct ibv_cq_moderation_caps" sizeof: max_cq_count, max_cq_period;
        ibv_pci_atomic_caps = "struct ibv_pci_atomic_caps" sizeof: fetch_add, swap, compare_swap;
        ibv_port_attr = "struct ibv_port_attr" : state, max_mtu, active_mtu, gid_tbl_len, port_cap_flags, max_msg_sz,
            bad_pkey_cntr, qkey_viol_cntr, pkey_tbl_len, lid, sm_lid, lmc, max_vl_num, sm_sl, subnet_timeout,
            init_type_reply, active_width, active_speed, phys_state, link_layer, flags, port_cap_flags2;
        ibv_global_route = "struct ibv_global_route" sizeof: dgid, flow_label, sgid_index, hop_limit, traffic_class;
        ibv_ah_attr = "struct ibv_ah_attr" sizeof: grh, dlid, sl, src_path_bits, static_rate, is_global, port_num;
        ibv_grh = "struct ibv_grh" sizeof: version_tclass_flow, paylen, next_hdr, hop_limit, sgid, dgid;
        ibv_qp_cap = "struct ibv_qp_cap" sizeof: max_send_wr, max_recv_wr, max_send_sge, max_recv_sge, max_inline_data;
        ibv_qp_init_attr = "struct ibv_qp_init_attr" sizeof: qp_context, send_cq, recv_cq, srq, cap, qp_type,
            sq_sig_all;
        ibv_qp_init_attr_ex = "struct ibv_qp_init_attr_ex" sizeof: qp_context, send_cq, recv_cq, srq, cap, qp_type,
            sq_sig_all, comp_mask, pd, xrcd, create_flags, max_tso_header, rwq_ind_tbl, rx_hash_conf, source_qpn,
            send_ops_flags;
        ibv_rx_hash_conf = "struct ibv_rx_hash_conf" sizeof: rx_hash_function, rx_hash_key_len, rx_hash_key,
            rx_hash_fields_mask;
        ibv_qp_attr = "struct ibv_qp_attr" sizeof: qp_state, cur_qp_state, path_mtu, path_mig_state, qkey, rq_psn,
            sq_psn, dest_qp_num, qp_access_flags, cap, ah_attr, alt_ah_attr, pkey_index, alt_pkey_index,
            en_sqd_async_notify, sq_draining, max_rd_atomic, max_dest_rd_atomic, min_rnr_timer, port_num, timeout,
            retry_cnt, rnr_retry, alt_port_num, alt_timeout, rate_limit;
        ibv_cq_init_attr_ex = "struct ibv_cq_init_attr_ex" sizeof: cqe, cq_context, channel, comp_vector, wc_flags,
            comp_mask, flags, parent_domain;
        ibv_sge = "struct ibv_sge" sizeof: addr, length, lkey;
        ibv_send_wr = "struct ibv_send_wr" sizeof: wr_id, next, sg_list, num_sge, opcode, send_flags, imm_data, wr,
            remote_srqn = "qp_type", rest = "bind_mw";
        ibv_recv_wr = "struct ibv_recv_wr" sizeof: wr_id, next, sg_list, num_sge;
        ibv_wc = "struct ibv_wc" sizeof: wr_id, status, opcode, vendor_err, byte_len, imm_data, qp_num, src_qp,
            wc_flags, pkey_index, slid, sl, dlid_path_bits;
        ibv_async_event = "struct ibv_async_event" sizeof: element, event_type;
        ib_uverbs_ah_attr = "struct ib_uverbs_ah_attr" sizeof: dgid = "grh.dgid", flow_label = "grh.flow_label",
            sgid_index = "grh.sgid_index", hop_limit = "grh.hop_limit", traffic_class = "grh.traffic_class", dlid, sl,
            src_path_bits, static_rate, is_global, port_num;
        ib_uverbs_qp_attr = "struct ib_uverbs_qp_attr" sizeof: qp_attr_mask, qp_state, cur_qp_state, path_mtu,
            path_mig_state, qkey, rq_psn, sq_psn, dest_qp_num, qp_access_flags, ah_attr, alt_ah_attr, max_send_wr,
            max_recv_wr, max_send_sge, max_recv_sge, max_inline_data, pkey_index, alt_pkey_index, en_sqd_async_notify,
            sq_draining, max_rd_atomic, max_dest_rd_atomic, min_rnr_timer, port_num, timeout, retry_cnt, rnr_retry,
            alt_port_num, alt_timeout;
        ib_user_path_rec = "struct ib_user_path_rec" sizeof: dgid, sgid, dlid, slid, raw_traffic, flow_label,
            reversible, mtu, pkey, hop_limit, traffic_class, numb_path, sl, mtu_selector, rate_selector, rate,
            packet_life_time_selector, packet_life_time, preference;
        ibv_sa_path_rec = "struct ibv_sa_path_rec" sizeof: dgid, sgid, dlid, slid, raw_traffic, flow_label, hop_limit,
            traffic_class, reversible, numb_path, pkey, sl, mtu_selector, mtu, rate_selector, rate,
            packet_life_time_selector, packet_life_time, preference;
    };
    // Members of the union in a send request.
    let wr = offset_of!(ibv_send_wr, wr);
    for (field, offset) in [
        ("wr.rdma.remote_addr", offset_of!(rdma, remote_addr)),
        ("wr.rdma.rkey", offset_of!(rdma, rkey)),
        ("wr.atomic.remote_addr", offset_of!(atomic, remote_addr)),
        ("wr.atomic.compare_add", offset_of!(atomic, compare_add)),
        ("wr.atomic.swap", offset_of!(atomic, swap)),
        ("wr.atomic.rkey", offset_of!(atomic, rkey)),
    ] {
        lines.push(Line(format!("offsetof(struct ibv_send_wr, {field})"), wr + offset));
    }
    // `verbs_context` grows downwards, so its fields are counted from the `ibv_context` at its end.
    let end = offset_of!(verbs_context, context);
    macro_rules! before_context {
        ($($field:ident $(= $c_field:literal)?),*) => {$(
            lines.push(Line(
                format!(
                    "offsetof(struct verbs_context, context) - offsetof(struct verbs_context, {})",
                    [stringify!($field) $(, $c_field)?].last().unwrap()
                ),
                end - offset_of!(verbs_context, $field),
            ));
        )*};
    }
    before_context! {
        query_port, advise_mr, alloc_null_mr, read_counters, attach_counters_point_flow, create_counters,
        destroy_counters, reg_dm_mr, alloc_dm, free_dm, modify_flow_action_esp, destroy_flow_action,
        create_flow_action_esp, modify_qp_rate_limit, alloc_parent_domain, dealloc_td, alloc_td, modify_cq,
        post_srq_ops, destroy_rwq_ind_table, create_rwq_ind_table, destroy_wq, modify_wq, create_wq, query_rt_values,
        create_cq_ex, private = "priv", query_device_ex, ibv_destroy_flow, placeholder2 = "ABI_placeholder2",
        ibv_create_flow, placeholder1 = "ABI_placeholder1", open_qp, create_qp_ex, get_srq_num, create_srq_ex,
        open_xrcd, close_xrcd, placeholder3 = "_ABI_placeholder3", sz
    }
    lines
}

#[test]
fn every_size_and_offset_is_the_headers() {
    let directory = std::env::temp_dir().join(format!("ringfence-layout-{}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    let (source, program) = (directory.join("layout.c"), directory.join("layout"));
    let lines = ours();
    let mut text = String::from(
        "#include <infiniband/sa.h>\n#include <infiniband/verbs.h>\n#include <rdma/ib_user_sa.h>\n\
         #include <rdma/ib_user_verbs.h>\n#include <stddef.h>\n#include <stdio.h>\nint main(void) {\n",
    );
    for line in &lines {
        writeln!(text, "printf(\"%zu\\n\", (size_t)({}));", line.0).unwrap();
    }
    text.push_str("return 0; }\n");
    std::fs::write(&source, text).unwrap();
    let compiled = Command::new("cc").arg("-o").arg(&program).arg(&source).stderr(Stdio::inherit()).status().unwrap();
    assert!(compiled.success(), "cc could not compile {}: is libibverbs-dev installed?", source.display());
    let output = Command::new(&program).output().unwrap();
    std::fs::remove_dir_all(&directory).unwrap();
    let theirs: Vec<usize> =
        String::from_utf8(output.stdout).unwrap().lines().map(|line| line.parse().unwrap()).collect();
    assert_eq!(theirs.len(), lines.len());
    let wrong: Vec<String> = lines
        .iter()
        .zip(theirs)
        .filter(|(line, theirs)| line.1 != *theirs)
        .map(|(line, theirs)| format!("{}: ours {}, the header's {theirs}", line.0, line.1))
        .collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
}
