//! Numbers as people read them; the words are rdma-core's, because programs and scripts look for them.

// UNSAFETY: exported under names of the C interface.
#![allow(unsafe_code)]

use core::ffi::{CStr, c_char, c_int, c_uint};

const UNKNOWN: &CStr = c"unknown";

/// From zero.
const NODE_TYPES: [&CStr; 8] = [
    UNKNOWN,
    c"InfiniBand channel adapter",
    c"InfiniBand switch",
    c"InfiniBand router",
    c"iWARP NIC",
    c"usNIC",
    c"usNIC UDP",
    c"unspecified",
];

const PORT_STATES: [&CStr; 6] = [c"no state change (NOP)", c"down", c"init", c"armed", c"active", c"active defer"];

const EVENT_TYPES: [&CStr; 21] = [
    c"CQ error",
    c"local work queue catastrophic error",
    c"invalid request local work queue error",
    c"local access violation work queue error",
    c"communication established",
    c"send queue drained",
    c"path migrated",
    c"path migration request error",
    c"local catastrophic error",
    c"port active",
    c"port error",
    c"LID change",
    c"P_Key change",
    c"SM change",
    c"SRQ catastrophic error",
    c"SRQ limit reached",
    c"last WQE reached",
    c"client reregistration",
    c"GID table change",
    c"WQ fatal",
    c"device speed change",
];

const WC_STATUSES: [&CStr; 24] = [
    c"success",
    c"local length error",
    c"local QP operation error",
    c"local EE context operation error",
    c"local protection error",
    c"Work Request Flushed Error",
    c"memory management operation error",
    c"bad response error",
    c"local access error",
    c"remote invalid request error",
    c"remote access error",
    c"remote operation error",
    c"transport retry counter exceeded",
    c"RNR retry counter exceeded",
    c"local RDD violation error",
    c"remote invalid RD request",
    c"aborted error",
    c"invalid EE context number",
    c"invalid EE context state",
    c"fatal error",
    c"response timeout error",
    c"general error",
    c"TM error",
    c"TM software rendezvous",
];

const WR_OPCODES: [&CStr; 16] = [
    c"rdma-write",
    c"rdma-write-with-imm",
    c"send",
    c"send-with-imm",
    c"rdma-read",
    c"atomic-cmp-and-swp",
    c"atomic-fetch-and-add",
    c"local-inv",
    c"bind-mw",
    c"send-with-inv",
    c"tso",
    c"driver1",
    UNKNOWN,
    UNKNOWN,
    c"flush",
    c"atomic-write",
];

fn name(names: &[&'static CStr], number: c_uint) -> *const c_char {
    names.get(number as usize).unwrap_or(&UNKNOWN).as_ptr()
}

/// `ibv_node_type_str(3)`.
#[unsafe(no_mangle)]
pub extern "C" fn ibv_node_type_str(node_type: c_int) -> *const c_char {
    name(&NODE_TYPES, node_type as c_uint)
}

/// `ibv_port_state_str(3)`.
#[unsafe(no_mangle)]
pub extern "C" fn ibv_port_state_str(state: c_uint) -> *const c_char {
    name(&PORT_STATES, state)
}

/// `ibv_event_type_str(3)`.
#[unsafe(no_mangle)]
pub extern "C" fn ibv_event_type_str(event: c_uint) -> *const c_char {
    name(&EVENT_TYPES, event)
}

/// `ibv_wc_status_str(3)`.
#[unsafe(no_mangle)]
pub extern "C" fn ibv_wc_status_str(status: c_uint) -> *const c_char {
    name(&WC_STATUSES, status)
}

/// Private, for provider libraries since rdma-core 49.
#[unsafe(no_mangle)]
pub extern "C" fn ibv_wr_opcode_str(opcode: c_uint) -> *const c_char {
    name(&WR_OPCODES, opcode)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn case(text: *const c_char, expected: &CStr) {
        // SAFETY: the functions return terminated strings that live forever.
        assert_eq!(unsafe { CStr::from_ptr(text) }, expected);
    }

    #[test]
    fn first_last_and_past_the_last() {
        case(ibv_node_type_str(-1), UNKNOWN);
        case(ibv_node_type_str(0), UNKNOWN);
        case(ibv_node_type_str(7), c"unspecified");
        case(ibv_port_state_str(4), c"active");
        case(ibv_port_state_str(6), UNKNOWN);
        case(ibv_event_type_str(19), c"WQ fatal");
        case(ibv_event_type_str(21), UNKNOWN);
        case(ibv_wc_status_str(12), c"transport retry counter exceeded");
        case(ibv_wc_status_str(24), UNKNOWN);
    }
}
