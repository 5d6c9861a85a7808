//! Completions as they stand in a completion queue's ring: `struct ibv_wc` and what the preload library needs besides.

use crate::ring::{Position, STAMP_WORD, Words};
use crate::verbs::{WcFlags, WcOpcode, WcStatus};

/// One completion.
///
/// Words: 0 `wr_id`; 1 stamp, status (16..24), opcode (24..32), flags (32..40), vendor error (40..56); 2 byte count,
/// immediate data (32..64); 3 QP number, source QP number (32..64); 4 queue cookie, freed position (32..64); 5 timestamp.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Completion {
    /// Of the work request.
    pub wr_id: u64,
    /// `IBV_WC_SUCCESS` or why not.
    pub status: WcStatus,
    /// Meaningful on success only.
    pub opcode: WcOpcode,
    /// `IBV_WC_WITH_IMM`, `IBV_WC_GRH`.
    pub flags: WcFlags,
    /// The proxy's own reason, for its logs and tests; zero on success.
    pub vendor_err: u16,
    /// Bytes received, or read.
    pub byte_len: u32,
    /// Immediate data as it was sent (network order) or the invalidated rkey.
    pub imm: u32,
    /// The QP that this completion belongs to.
    pub qp_num: u32,
    /// The sender's QP, for receives.
    pub src_qp: u32,
    /// What the client called the queue pair when it made it.
    pub cookie: u32,
    /// In the queue (send or receive) of this request, slots before this position are free again.
    pub freed: Position,
    /// Nanoseconds of the proxy's monotonic clock; zero where no one asked.
    pub timestamp: u64,
}

impl Completion {
    /// As ring words.
    #[must_use]
    #[inline(always)]
    pub fn pack(&self) -> Words {
        [
            self.wr_id,
            u64::from(self.status.0) << 16
                | u64::from(self.opcode.0) << 24
                | u64::from(self.flags.0) << 32
                | u64::from(self.vendor_err) << 40,
            u64::from(self.byte_len) | u64::from(self.imm) << 32,
            u64::from(self.qp_num) | u64::from(self.src_qp) << 32,
            u64::from(self.cookie) | u64::from(self.freed) << 32,
            self.timestamp,
            0,
            0,
        ]
    }

    /// From ring words.
    #[must_use]
    #[inline(always)]
    pub fn unpack(w: &Words) -> Self {
        Self {
            wr_id: w[0],
            status: WcStatus((w[STAMP_WORD] >> 16) as u8),
            opcode: WcOpcode((w[STAMP_WORD] >> 24) as u8),
            flags: WcFlags((w[STAMP_WORD] >> 32) as u8),
            vendor_err: (w[STAMP_WORD] >> 40) as u16,
            byte_len: w[2] as u32,
            imm: (w[2] >> 32) as u32,
            qp_num: w[3] as u32,
            src_qp: (w[3] >> 32) as u32,
            cookie: w[4] as u32,
            freed: (w[4] >> 32) as u32,
            timestamp: w[5],
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn completions_survive_packing() {
        let completion = Completion {
            wr_id: 1 << 63,
            status: WcStatus::RNR_RETRY_EXC_ERR,
            opcode: WcOpcode::RECV_RDMA_WITH_IMM,
            flags: WcFlags::WITH_IMM,
            vendor_err: 0xabcd,
            byte_len: 1 << 31,
            imm: 0x0403_0201,
            qp_num: 0x00ff_ffff,
            src_qp: 17,
            cookie: 0x8000_0001,
            freed: u32::MAX,
            timestamp: 123,
        };
        assert_eq!(Completion::unpack(&completion.pack()), completion);
    }
}
