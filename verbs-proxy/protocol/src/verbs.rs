//! Numbers of the verbs interface, as `infiniband/verbs.h` gives them (InfiniBand Architecture Specification volume 1,
//! chapters 9 to 11, for their meaning). Newtypes with named constants, never enums: the peer may write anything.

macro_rules! numbers {
    ($(#[$meta:meta])* $name:ident: $repr:ty { $($(#[$item:meta])* $constant:ident = $value:expr,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable, zerocopy::KnownLayout)]
        #[repr(transparent)]
        pub struct $name(pub $repr);

        impl $name {
            $($(#[$item])* #[allow(missing_docs)] pub const $constant: Self = Self($value);)*
        }
    };
}

macro_rules! flags {
    ($name:ident) => {
        impl $name {
            /// Whether every bit of `other` is set.
            #[must_use]
            #[inline(always)]
            pub const fn contains(self, other: Self) -> bool {
                self.0 & other.0 == other.0
            }
        }

        impl core::ops::BitOr for $name {
            type Output = Self;
            fn bitor(self, other: Self) -> Self {
                Self(self.0 | other.0)
            }
        }
    };
}

numbers! {
    /// `enum ibv_wr_opcode`.
    Opcode: u8 {
        RDMA_WRITE = 0,
        RDMA_WRITE_WITH_IMM = 1,
        SEND = 2,
        SEND_WITH_IMM = 3,
        RDMA_READ = 4,
        CMP_AND_SWP = 5,
        FETCH_AND_ADD = 6,
        LOCAL_INV = 7,
        BIND_MW = 8,
        SEND_WITH_INV = 9,
    }
}

numbers! {
    /// `enum ibv_send_flags`.
    SendFlags: u8 {
        FENCE = 1,
        SIGNALED = 2,
        SOLICITED = 4,
        INLINE = 8,
    }
}
flags!(SendFlags);

numbers! {
    /// `enum ibv_wc_status`.
    WcStatus: u8 {
        SUCCESS = 0,
        LOC_LEN_ERR = 1,
        LOC_QP_OP_ERR = 2,
        LOC_EEC_OP_ERR = 3,
        LOC_PROT_ERR = 4,
        WR_FLUSH_ERR = 5,
        MW_BIND_ERR = 6,
        BAD_RESP_ERR = 7,
        LOC_ACCESS_ERR = 8,
        REM_INV_REQ_ERR = 9,
        REM_ACCESS_ERR = 10,
        REM_OP_ERR = 11,
        RETRY_EXC_ERR = 12,
        RNR_RETRY_EXC_ERR = 13,
        LOC_RDD_VIOL_ERR = 14,
        REM_INV_RD_REQ_ERR = 15,
        REM_ABORT_ERR = 16,
        INV_EECN_ERR = 17,
        INV_EEC_STATE_ERR = 18,
        FATAL_ERR = 19,
        RESP_TIMEOUT_ERR = 20,
        GENERAL_ERR = 21,
    }
}

numbers! {
    /// `enum ibv_wc_opcode`; the values fit a byte.
    WcOpcode: u8 {
        SEND = 0,
        RDMA_WRITE = 1,
        RDMA_READ = 2,
        COMP_SWAP = 3,
        FETCH_ADD = 4,
        BIND_MW = 5,
        LOCAL_INV = 6,
        RECV = 128,
        RECV_RDMA_WITH_IMM = 129,
    }
}

numbers! {
    /// `enum ibv_wc_flags`.
    WcFlags: u8 {
        GRH = 1,
        WITH_IMM = 2,
        WITH_INV = 8,
    }
}
flags!(WcFlags);

numbers! {
    /// `enum ibv_access_flags`.
    Access: u32 {
        LOCAL_WRITE = 1,
        REMOTE_WRITE = 2,
        REMOTE_READ = 4,
        REMOTE_ATOMIC = 8,
        MW_BIND = 16,
        ZERO_BASED = 32,
        ON_DEMAND = 64,
        HUGETLB = 128,
        RELAXED_ORDERING = 1 << 20,
    }
}
flags!(Access);

numbers! {
    /// `enum ibv_qp_type`.
    QpType: u32 {
        RC = 2,
        UC = 3,
        UD = 4,
        RAW_PACKET = 8,
        XRC_SEND = 9,
        XRC_RECV = 10,
        DRIVER = 0xff,
    }
}

numbers! {
    /// `enum ibv_qp_state`.
    QpState: u32 {
        RESET = 0,
        INIT = 1,
        RTR = 2,
        RTS = 3,
        SQD = 4,
        SQE = 5,
        ERR = 6,
    }
}

numbers! {
    /// `enum ibv_qp_attr_mask`.
    QpAttrMask: u32 {
        STATE = 1 << 0,
        CUR_STATE = 1 << 1,
        EN_SQD_ASYNC_NOTIFY = 1 << 2,
        ACCESS_FLAGS = 1 << 3,
        PKEY_INDEX = 1 << 4,
        PORT = 1 << 5,
        QKEY = 1 << 6,
        AV = 1 << 7,
        PATH_MTU = 1 << 8,
        TIMEOUT = 1 << 9,
        RETRY_CNT = 1 << 10,
        RNR_RETRY = 1 << 11,
        RQ_PSN = 1 << 12,
        MAX_QP_RD_ATOMIC = 1 << 13,
        ALT_PATH = 1 << 14,
        MIN_RNR_TIMER = 1 << 15,
        SQ_PSN = 1 << 16,
        MAX_DEST_RD_ATOMIC = 1 << 17,
        PATH_MIG_STATE = 1 << 18,
        CAP = 1 << 19,
        DEST_QPN = 1 << 20,
        RATE_LIMIT = 1 << 25,
    }
}
flags!(QpAttrMask);

numbers! {
    /// `enum ibv_event_type`.
    EventType: u32 {
        CQ_ERR = 0,
        QP_FATAL = 1,
        QP_REQ_ERR = 2,
        QP_ACCESS_ERR = 3,
        COMM_EST = 4,
        SQ_DRAINED = 5,
        PATH_MIG = 6,
        PATH_MIG_ERR = 7,
        DEVICE_FATAL = 8,
        PORT_ACTIVE = 9,
        PORT_ERR = 10,
        LID_CHANGE = 11,
        PKEY_CHANGE = 12,
        SM_CHANGE = 13,
        SRQ_ERR = 14,
        SRQ_LIMIT_REACHED = 15,
        QP_LAST_WQE_REACHED = 16,
        CLIENT_REREGISTER = 17,
        GID_CHANGE = 18,
        /// Of rdma-core 60.
        DEVICE_SPEED_CHANGE = 20,
    }
}

impl EventType {
    /// Whether it is about a queue pair, which `element.qp` names.
    #[must_use]
    pub fn is_of_qp(self) -> bool {
        matches!(
            self,
            Self::QP_FATAL
                | Self::QP_REQ_ERR
                | Self::QP_ACCESS_ERR
                | Self::COMM_EST
                | Self::SQ_DRAINED
                | Self::PATH_MIG
                | Self::PATH_MIG_ERR
                | Self::QP_LAST_WQE_REACHED
        )
    }

    /// Whether it is about a port, whose number is `element.port_num`.
    #[must_use]
    pub fn is_of_port(self) -> bool {
        matches!(
            self,
            Self::PORT_ACTIVE
                | Self::PORT_ERR
                | Self::LID_CHANGE
                | Self::PKEY_CHANGE
                | Self::SM_CHANGE
                | Self::CLIENT_REREGISTER
                | Self::GID_CHANGE
                | Self::DEVICE_SPEED_CHANGE
        )
    }
}

numbers! {
    /// `enum ibv_gid_type_sysfs` as `ibv_query_gid_type` answers.
    GidType: u32 {
        IB_ROCE_V1 = 0,
        ROCE_V2 = 1,
    }
}
