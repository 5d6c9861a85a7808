//! Control messages: one datagram each on a Unix SEQPACKET socket, one connection per application process.
//!
//! The client sends a [`RequestHeader`] followed by the body that belongs to its [`Op`]; the proxy answers each request,
//! in order, with a [`ReplyHeader`] and, on success, the reply body. File descriptors travel beside the reply, and beside
//! some requests ([`Op::takes_descriptor`]). Bodies are plain little bytes with fixed sizes; a datagram of another size than its op demands is a
//! protocol error and ends the connection, as does a file descriptor sent where none is expected, or none where one is.
//!
//! Handles belong to one connection. A handle is an index and a generation; a stale one gets `EINVAL`.

use crate::verbs::{Access, EventType, QpState, QpType};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// First word of every request: "RFv1" in memory order.
pub const MAGIC: u32 = u32::from_le_bytes(*b"RFv1");

/// The longest datagram in either direction, bytes.
pub const MAX_DATAGRAM: usize = 4096;

/// The most file descriptors beside one datagram.
pub const MAX_FDS: usize = 2;

/// Where the client finds the socket inside the container. `RINGFENCE_SOCKET` in the environment names another.
pub const SOCKET_PATH: &str = "/dev/ringfence/verbs.sock";

/// "No such object" where a handle is optional.
pub const NO_HANDLE: u32 = u32::MAX;

/// A device of whose number the kernel says nothing: `ibv_get_device_index` is -1 then.
pub const NO_INDEX: u32 = u32::MAX;

macro_rules! wire {
    ($($(#[$meta:meta])* struct $name:ident($bytes:literal) { $($(#[$field_meta:meta])* $field:ident: $type:ty,)* })*) => {$(
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
        #[repr(C)]
        #[allow(missing_docs)] // Fields without a doc are the fields of that name in verbs.h.
        pub struct $name { $($(#[$field_meta])* pub $field: $type,)* }
        const _: () = assert!(size_of::<$name>() == $bytes);
        impl Default for $name {
            fn default() -> Self { zerocopy::FromZeros::new_zeroed() }
        }
    )*};
}

/// What a request asks for. Each constant names its request body, its reply body and the descriptors of the reply.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(transparent)]
pub struct Op(pub u32);

impl Op {
    /// [`Hello`] → [`HelloReply`]; doorbells and key words ([`crate::layout::bells_bytes`]), the socket on which a datagram wakes
    /// the worker. Must come first, once.
    pub const HELLO: Self = Self(1);
    /// [`Index`] (n-th device) → [`DeviceInfo`]; `ENODEV` past the last.
    pub const DEVICE: Self = Self(2);
    /// [`Index`] (n-th device) → [`OpenReply`]; socket of asynchronous events ([`AsyncEvent`] datagrams).
    pub const OPEN: Self = Self(3);
    /// [`Handle`] (context) → nothing. What the context still owns is destroyed.
    pub const CLOSE: Self = Self(4);
    /// [`PortQuery`] → [`PortInfo`].
    pub const QUERY_PORT: Self = Self(5);
    /// [`PortQuery`] (`index`: GID index) → [`GidInfo`]; `EINVAL` past the table, all zero for an empty entry.
    pub const QUERY_GID: Self = Self(6);
    /// [`CardIndex`] → [`Index`]: where the container's GID table has what the card's own has at an index, as the kernel names it to
    /// programs of rdma_cm. `ENODATA` for what is none of the container's.
    pub const FIND_GID: Self = Self(7);
    /// [`PortQuery`] (`index`: P_Key index) → [`PartitionKey`]; `EINVAL` past the table.
    pub const QUERY_PKEY: Self = Self(8);
    /// As [`Op::FIND_GID`], of the table of P_Keys.
    pub const FIND_PKEY: Self = Self(9);
    /// [`Handle`] (context) → [`Handle`].
    pub const ALLOC_PD: Self = Self(10);
    /// [`Handle`] → nothing; `EBUSY` while regions or queue pairs use it.
    pub const DEALLOC_PD: Self = Self(11);
    /// [`AllocRegion`] → [`Handle`]; a memory file of that many bytes, sealed against resizing.
    /// The connection owns it until [`Op::FREE_REGION`]. `ENOMEM` past `max-mr-bytes`.
    pub const ALLOC_REGION: Self = Self(12);
    /// [`Handle`] → nothing. Memory regions made from it keep their pages.
    pub const FREE_REGION: Self = Self(13);
    /// [`RegMr`], then `segments` times [`Segment`] → [`MrReply`].
    pub const REG_MR: Self = Self(14);
    /// [`Handle`] → nothing. After the reply no one touches the memory through this region. Also for one that was revoked
    /// ([`crate::keys`]).
    pub const DEREG_MR: Self = Self(15);
    /// [`Handle`] (context), and one descriptor from the client → [`Handle`]: a memory file of the container's own, open for
    /// reading and writing, whose pages [`Op::REG_MR`] may name. The connection owns the handle until [`Op::FREE_REGION`]. `EINVAL`
    /// for what is no memory file, `EOPNOTSUPP` where the proxy's kernel cannot map one safely.
    pub const ADOPT_REGION: Self = Self(16);
    /// [`RegFresh`] → [`FreshReply`]; a memory file, unless the request names one, and one for another request of the kind, if the
    /// reply names one. [`Op::ALLOC_REGION`] and [`Op::REG_MR`] of its first pages in one, for a file that the client fills
    /// afterwards, or meanwhile. If it is refused, a file that the request names is to be freed by [`Op::FREE_REGION`], when nothing
    /// that is needed is in it any more.
    pub const REG_FRESH: Self = Self(17);
    /// [`RegDmabuf`], and one descriptor from the client → [`MrReply`]: a dma-buf, which the card reaches and nobody else.
    /// `EOPNOTSUPP` without a card, or where it has no way to.
    pub const REG_DMABUF: Self = Self(18);
    /// [`Handle`] (context) → [`Handle`]; the socket that carries the event's queue cookies, a message of 8 bytes each.
    pub const CREATE_COMP_CHANNEL: Self = Self(20);
    /// [`Handle`] → nothing; `EBUSY` while a CQ uses it.
    pub const DESTROY_COMP_CHANNEL: Self = Self(21);
    /// [`CreateCq`] → [`CqReply`]; the queue's memory ([`crate::layout::CqHeader`]).
    pub const CREATE_CQ: Self = Self(22);
    /// [`Handle`] → nothing; `EBUSY` while a queue pair uses it. No event of it is written after the reply.
    pub const DESTROY_CQ: Self = Self(23);
    /// [`ResizeCq`] → [`CqReply`]; the new memory. Completions up to `switch` are in the old ring, later ones in the new,
    /// which starts at position zero.
    pub const RESIZE_CQ: Self = Self(24);
    /// [`CreateQp`] → [`QpReply`]; the queue pair's memory ([`crate::layout::QpHeader`]).
    pub const CREATE_QP: Self = Self(30);
    /// [`ModifyQp`] → nothing.
    pub const MODIFY_QP: Self = Self(31);
    /// [`Handle`] → [`QpAttr`].
    pub const QUERY_QP: Self = Self(32);
    /// [`Handle`] → nothing. No completion of it is written after the reply; unpolled ones stay in the rings.
    pub const DESTROY_QP: Self = Self(33);

    /// Whether one descriptor comes with the request; none does with any other.
    #[must_use]
    pub fn takes_descriptor(self) -> bool {
        matches!(self, Self::ADOPT_REGION | Self::REG_DMABUF)
    }
}

wire! {
    /// Before every request's body.
    struct RequestHeader(16) {
        /// [`MAGIC`].
        magic: u32,
        /// What is asked.
        op: Op,
        /// The client's choice; comes back in the reply.
        sequence: u32,
        /// Zero.
        reserved: u32,
    }

    /// Before every reply's body.
    struct ReplyHeader(16) {
        /// [`MAGIC`].
        magic: u32,
        /// Of the request.
        sequence: u32,
        /// Zero, or a positive errno; then no body follows.
        errno: u32,
        /// Zero.
        reserved: u32,
    }

    /// Body of [`Op::HELLO`].
    struct Hello(8) {
        /// [`crate::VERSION`]; the proxy answers another with `EPROTO`.
        version: u32,
        /// Zero.
        reserved: u32,
    }

    /// Reply to [`Op::HELLO`].
    struct HelloReply(40) {
        /// [`crate::VERSION`].
        version: u32,
        /// Devices that the policy allows.
        devices: u32,
        /// Processors that container and proxy have between them; with one, nobody should spin.
        processors: u32,
        /// Key words, a power of two.
        places: u32,
        /// What the client orders its keys by ([`crate::keys::Keys`]).
        secret: u64,
        /// Bytes of deregistered regions that the client may keep, withdrawn, for another registration.
        keep_bytes: u64,
        /// How many such regions.
        keep_regions: u32,
        /// Zero.
        reserved: u32,
    }

    /// A number of something.
    struct Index(8) {
        /// From zero.
        index: u32,
        /// Zero.
        reserved: u32,
    }

    /// An object of this connection.
    struct Handle(8) {
        /// Index and generation.
        handle: u32,
        /// Zero.
        reserved: u32,
    }

    /// Reply to [`Op::DEVICE`].
    struct DeviceInfo(88) {
        /// Zero-terminated, as `ibv_get_device_name` shows it.
        name: [u8; 64],
        /// Network order.
        node_guid: u64,
        /// `enum ibv_node_type`.
        node_type: u32,
        /// `enum ibv_transport_type`.
        transport: u32,
        /// The kernel's number of the device; [`NO_INDEX`] if nobody knows it.
        index: u32,
        /// Zero.
        reserved: u32,
    }

    /// Reply to [`Op::OPEN`]: the context and its device's `struct ibv_device_attr`.
    struct OpenReply(168) {
        /// The context.
        context: u32,
        /// Completion vectors.
        num_comp_vectors: u32,
        /// Like `DeviceInfo::node_guid`.
        node_guid: u64,
        /// Network order.
        sys_image_guid: u64,
        max_mr_size: u64,
        page_size_cap: u64,
        vendor_id: u32,
        vendor_part_id: u32,
        hw_ver: u32,
        max_qp: u32,
        max_qp_wr: u32,
        device_cap_flags: u32,
        max_sge: u32,
        max_sge_rd: u32,
        max_cq: u32,
        max_cqe: u32,
        max_mr: u32,
        max_pd: u32,
        max_qp_rd_atom: u32,
        max_res_rd_atom: u32,
        max_qp_init_rd_atom: u32,
        /// `enum ibv_atomic_cap`.
        atomic_cap: u32,
        max_ah: u32,
        max_srq: u32,
        max_srq_wr: u32,
        max_srq_sge: u32,
        max_pkeys: u32,
        local_ca_ack_delay: u32,
        phys_port_cnt: u32,
        /// 1 if proxies of other containers may be shown registered memory, which can be no more than whole files; else 0.
        shows_memory: u32,
        /// Zero-terminated.
        fw_ver: [u8; 32],
    }

    /// Body of [`Op::QUERY_PORT`], [`Op::QUERY_GID`] and [`Op::QUERY_PKEY`].
    struct PortQuery(16) {
        /// Of [`Op::OPEN`].
        context: u32,
        /// From one.
        port: u32,
        /// Index in the table that is asked for.
        index: u32,
        /// Zero.
        reserved: u32,
    }

    /// Body of [`Op::FIND_GID`] and [`Op::FIND_PKEY`].
    struct CardIndex(16) {
        /// Of [`Op::DEVICE`]: programs that hear of the kernel's index need not have opened the device.
        device: u32,
        /// From one.
        port: u32,
        /// Of the card's own table.
        index: u32,
        /// Zero.
        reserved: u32,
    }

    /// Reply to [`Op::QUERY_PORT`]: `struct ibv_port_attr`.
    struct PortInfo(80) {
        state: u32,
        max_mtu: u32,
        active_mtu: u32,
        gid_tbl_len: u32,
        port_cap_flags: u32,
        max_msg_sz: u32,
        bad_pkey_cntr: u32,
        qkey_viol_cntr: u32,
        pkey_tbl_len: u32,
        lid: u32,
        sm_lid: u32,
        lmc: u32,
        max_vl_num: u32,
        sm_sl: u32,
        subnet_timeout: u32,
        active_width: u32,
        active_speed: u32,
        phys_state: u32,
        /// `IBV_LINK_LAYER_*`.
        link_layer: u32,
        flags: u32,
    }

    /// Reply to [`Op::QUERY_PKEY`].
    struct PartitionKey(8) {
        /// Zero for an entry that is empty at the moment.
        pkey: u32,
        /// Zero.
        reserved: u32,
    }

    /// Reply to [`Op::QUERY_GID`].
    struct GidInfo(24) {
        /// As `union ibv_gid`.
        gid: [u8; 16],
        /// [`crate::verbs::GidType`].
        gid_type: u32,
        /// Interface index in the container's network namespace, or zero.
        ndev_ifindex: u32,
    }

    /// Body of [`Op::ALLOC_REGION`].
    struct AllocRegion(16) {
        /// Of [`Op::OPEN`].
        context: u32,
        /// Zero.
        reserved: u32,
        /// A multiple of the page size, not zero.
        bytes: u64,
    }

    /// Body of [`Op::REG_MR`]; segments follow.
    struct RegMr(40) {
        /// Of [`Op::ALLOC_PD`].
        pd: u32,
        /// `enum ibv_access_flags`.
        access: Access,
        /// What work requests call the first byte: the application's address, or the `iova` of `ibv_reg_mr_iova`.
        iova: u64,
        /// Bytes that work requests may touch.
        length: u64,
        /// Offset of the first byte in the first segment; below the page size.
        first_offset: u64,
        /// How many follow, at most [`MAX_SEGMENTS`].
        segments: u32,
        /// Zero.
        reserved: u32,
    }

    /// A run of pages of one region. All together are the pages of a [`RegMr`]'s bytes, and no more.
    struct Segment(24) {
        /// Of [`Op::ALLOC_REGION`] or [`Op::ADOPT_REGION`].
        region: u32,
        /// Zero.
        reserved: u32,
        /// Byte offset in the region; a multiple of the page size.
        offset: u64,
        /// Bytes; a multiple of the page size, not zero.
        length: u64,
    }

    /// Body of [`Op::REG_DMABUF`].
    struct RegDmabuf(32) {
        /// As [`RegMr::pd`].
        pd: u32,
        /// As [`RegMr::access`].
        access: Access,
        /// As [`RegMr::iova`].
        iova: u64,
        /// As [`RegMr::length`].
        length: u64,
        /// Of the first byte in the buffer.
        offset: u64,
    }

    /// Reply to [`Op::REG_MR`] and [`Op::REG_DMABUF`].
    struct MrReply(16) {
        /// For [`Op::DEREG_MR`].
        handle: u32,
        /// Of a place among the key words.
        lkey: u32,
        /// The same, but where a card gives it.
        rkey: u32,
        /// [`crate::keys::Incarnation`] of the lkey's word.
        incarnation: u32,
    }

    /// Body of [`Op::REG_FRESH`].
    struct RegFresh(48) {
        /// As [`AllocRegion::context`].
        context: u32,
        /// As [`RegMr::pd`].
        pd: u32,
        /// As [`AllocRegion::bytes`].
        bytes: u64,
        /// As [`RegMr::iova`].
        iova: u64,
        /// As [`RegMr::length`].
        length: u64,
        /// As [`RegMr::first_offset`].
        first_offset: u64,
        /// As [`RegMr::access`].
        access: Access,
        /// The [`FreshReply::ahead`] of an earlier reply, of as many bytes and as writable, or [`NO_HANDLE`].
        file: u32,
    }

    /// Reply to [`Op::REG_FRESH`].
    struct FreshReply(24) {
        /// The file, for [`Op::FREE_REGION`].
        region: u32,
        /// As [`MrReply::handle`].
        handle: u32,
        /// As [`MrReply::lkey`].
        lkey: u32,
        /// As [`MrReply::rkey`].
        rkey: u32,
        /// As [`MrReply::incarnation`].
        incarnation: u32,
        /// The file for another such request, which is good for nothing else but [`Op::FREE_REGION`] before; or [`NO_HANDLE`]. A
        /// connection has one at most.
        ahead: u32,
    }

    /// Body of [`Op::CREATE_CQ`].
    struct CreateCq(32) {
        /// Of [`Op::OPEN`].
        context: u32,
        /// At least so many completions.
        cqe: u32,
        /// Of [`Op::CREATE_COMP_CHANNEL`], or [`NO_HANDLE`].
        channel: u32,
        /// Completion vector.
        vector: u32,
        /// What the channel and asynchronous events call this queue.
        cookie: u64,
        /// Zero.
        reserved: u64,
    }

    /// Body of [`Op::RESIZE_CQ`].
    struct ResizeCq(8) {
        /// Of [`Op::CREATE_CQ`].
        handle: u32,
        /// At least so many completions.
        cqe: u32,
    }

    /// Reply to [`Op::CREATE_CQ`] and [`Op::RESIZE_CQ`].
    struct CqReply(16) {
        /// For later requests.
        handle: u32,
        /// Completions that fit.
        cqe: u32,
        /// Slots in the ring.
        slots: u32,
        /// Resize only: the old ring's last position.
        switch: u32,
    }

    /// Body of [`Op::CREATE_QP`].
    struct CreateQp(56) {
        /// Of [`Op::ALLOC_PD`].
        pd: u32,
        /// Of [`Op::CREATE_CQ`].
        send_cq: u32,
        /// Of [`Op::CREATE_CQ`].
        recv_cq: u32,
        qp_type: QpType,
        max_send_wr: u32,
        max_recv_wr: u32,
        max_send_sge: u32,
        max_recv_sge: u32,
        max_inline: u32,
        /// Not zero: every send request is signaled.
        sq_sig_all: u32,
        /// What completions call this queue pair.
        cookie: u32,
        /// Zero.
        reserved: u32,
        /// What asynchronous events call this queue pair.
        event_cookie: u64,
    }

    /// Reply to [`Op::CREATE_QP`].
    struct QpReply(48) {
        /// For later requests.
        handle: u32,
        qp_num: u32,
        /// What to ring in [`crate::doorbell::Doorbells`].
        queue: u32,
        /// Slots of the send ring.
        send_slots: u32,
        /// Slots of the receive ring.
        receive_slots: u32,
        max_send_wr: u32,
        max_recv_wr: u32,
        max_send_sge: u32,
        max_recv_sge: u32,
        max_inline: u32,
        /// Zero.
        reserved: [u32; 2],
    }

    /// Body of [`Op::MODIFY_QP`].
    struct ModifyQp(128) {
        /// Of [`Op::CREATE_QP`].
        handle: u32,
        /// Zero.
        reserved: u32,
        /// Where the client will write next in the send ring; for a transition to RESET.
        send_position: u32,
        /// Where the client will write next in the receive ring; for a transition to RESET.
        receive_position: u32,
        /// With `mask` saying which fields count.
        attr: QpAttr,
    }

    /// `struct ibv_qp_attr`, without the alternate path.
    struct QpAttr(112) {
        /// `enum ibv_qp_attr_mask`.
        mask: u32,
        state: QpState,
        cur_state: QpState,
        path_mtu: u32,
        qkey: u32,
        rq_psn: u32,
        sq_psn: u32,
        dest_qp_num: u32,
        access: Access,
        pkey_index: u32,
        max_rd_atomic: u32,
        max_dest_rd_atomic: u32,
        min_rnr_timer: u32,
        port: u32,
        timeout: u32,
        retry_cnt: u32,
        rnr_retry: u32,
        en_sqd_async_notify: u32,
        sq_draining: u32,
        path_mig_state: u32,
        av: AddressVector,
    }

    /// `struct ibv_ah_attr`.
    struct AddressVector(32) {
        dgid: [u8; 16],
        flow_label: u32,
        dlid: u16,
        sl: u8,
        src_path_bits: u8,
        static_rate: u8,
        is_global: u8,
        port: u8,
        sgid_index: u8,
        hop_limit: u8,
        traffic_class: u8,
        reserved: [u8; 2],
    }

    /// A datagram on a context's event socket.
    struct AsyncEvent(16) {
        /// `enum ibv_event_type`.
        event: EventType,
        /// Of port events.
        port: u32,
        /// Of queue events: `CreateQp::event_cookie` or `CreateCq::cookie`.
        cookie: u64,
    }
}

/// The most segments of one registration.
pub const MAX_SEGMENTS: u32 =
    ((MAX_DATAGRAM - size_of::<RequestHeader>() - size_of::<RegMr>()) / size_of::<Segment>()) as u32;
