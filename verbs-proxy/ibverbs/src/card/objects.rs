//! What is made in a card. Each keeps what it was made in, and is destroyed when the last that has it lets it go.

// UNSAFETY: everything here is a call of libibverbs with pointers that this module got from it, and keeps.
#![allow(unsafe_code)]

use super::mlx5::{self, Functions};
use super::{Card, done, made};
use crate::help::Elements;
use crate::library::Library;
use ringfence_abi::*;
use ringfence_protocol::verbs::{QpAttrMask, QpState};
use ringfence_proxy::memory::{DeviceKey, MemoryRegion};
use ringfence_proxy::plane::qp::Caps;
use rustix::fd::{AsRawFd, BorrowedFd};
use rustix::io::Errno;
use std::ffi::{c_int, c_void};
use std::mem::zeroed;
use std::ptr::{NonNull, null_mut};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

/// `IBV_QPT_RC`.
const RC: u32 = 2;

/// What has been made in a card, so that it can be destroyed though it is named somewhere.
#[derive(Debug, Default)]
pub(super) struct Made {
    qps: Vec<NonNull<ibv_qp>>,
    mrs: Vec<NonNull<ibv_mr>>,
    cqs: Vec<NonNull<ibv_cq>>,
    pds: Vec<NonNull<ibv_pd>>,
    /// On which queue pairs hang.
    pub(super) tree: Elements<mlx5::Node, mlx5::Leaf>,
}

impl Made {
    /// Destroys it, users before what they use.
    ///
    /// # Safety
    /// All of it is there, and in use by nobody.
    pub(super) unsafe fn destroy(&mut self, library: &Library, mlx5: Option<&Functions>) {
        // SAFETY: as the caller promises. What a card that is gone says of it does not matter.
        unsafe {
            self.qps.drain(..).for_each(|qp| _ = (library.destroy_qp)(qp.as_ptr()));
            if let Some(mlx5) = mlx5 {
                mlx5.destroy(&mut self.tree);
            }
            self.mrs.drain(..).for_each(|mr| _ = (library.dereg_mr)(mr.as_ptr()));
            self.cqs.drain(..).for_each(|cq| _ = (library.destroy_cq)(cq.as_ptr()));
            self.pds.drain(..).for_each(|pd| _ = (library.dealloc_pd)(pd.as_ptr()));
        }
    }
}

impl Card {
    /// Makes something, unless the card is closed, and notes it.
    fn make<T>(
        &self,
        list: fn(&mut Made) -> &mut Vec<NonNull<T>>,
        make: impl FnOnce() -> *mut T,
    ) -> Result<NonNull<T>, Errno> {
        let mut all = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        self.check()?;
        let raw = made(make())?;
        list(&mut all).push(raw);
        Ok(raw)
    }

    /// Destroys something that was made, unless that was done when the card was closed.
    fn unmake<T>(
        &self,
        list: fn(&mut Made) -> &mut Vec<NonNull<T>>,
        raw: NonNull<T>,
        destroy: impl FnOnce(*mut T) -> c_int,
    ) {
        let mut all = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.closed.load(Ordering::Relaxed) {
            list(&mut all).retain(|other| *other != raw);
            destroy(raw.as_ptr());
        }
    }
}

/// A protection domain.
#[derive(Debug)]
pub struct Pd {
    card: Arc<Card>,
    raw: NonNull<ibv_pd>,
}

// SAFETY: as for `Card`.
unsafe impl Send for Pd {}
// SAFETY: as above.
unsafe impl Sync for Pd {}

impl Pd {
    /// A new one.
    pub fn new(card: &Arc<Card>) -> Result<Arc<Self>, Errno> {
        // SAFETY: the context is open.
        let raw = card.make(|made| &mut made.pds, || unsafe { (card.library.alloc_pd)(card.context.as_ptr()) })?;
        Ok(Arc::new(Self { card: Arc::clone(card), raw }))
    }
}

impl Drop for Pd {
    fn drop(&mut self) {
        // SAFETY: made by the library, and whatever was made in it is gone.
        self.card.unmake(|made| &mut made.pds, self.raw, |raw| unsafe { (self.card.library.dealloc_pd)(raw) });
    }
}

/// A region that the card has registered. The card reaches the pages until this is dropped.
#[derive(Debug)]
pub struct Mr {
    pd: Arc<Pd>,
    raw: NonNull<ibv_mr>,
    address: u64,
    lkey: DeviceKey,
    rkey: u32,
}

// SAFETY: as for `Card`.
unsafe impl Send for Mr {}

impl Mr {
    /// Registers a region at the application's address. It must outlive this, with its mapping.
    pub fn new(pd: &Arc<Pd>, region: &MemoryRegion) -> Result<Self, Errno> {
        let (access, iova) = (region.access(), region.iova());
        let length = usize::try_from(region.length()).map_err(|_| Errno::NOMEM)?;
        let register = pd.card.library.reg_mr_iova;
        // SAFETY: the domain is there; the bytes are mapped as long as the region is, which the caller promises to keep.
        let make = || unsafe { register(pd.raw.as_ptr(), region.first().cast(), length, iova, access.0) };
        Self::made(pd, make)
    }

    /// Registers a dma-buf from `offset` on, whatever is behind it, at the application's address: `EOPNOTSUPP` from a libibverbs
    /// before version 34, and from cards that cannot.
    pub fn of_dmabuf(pd: &Arc<Pd>, region: &MemoryRegion, fd: BorrowedFd<'_>, offset: u64) -> Result<Self, Errno> {
        let register = pd.card.library.reg_dmabuf_mr.ok_or(Errno::OPNOTSUPP)?;
        let (access, iova) = (region.access().0.cast_signed(), region.iova());
        let length = usize::try_from(region.length()).map_err(|_| Errno::NOMEM)?;
        // SAFETY: the domain is there; what the descriptor is the kernel finds out, which has the buffer for itself from then on.
        Self::made(pd, || unsafe { register(pd.raw.as_ptr(), offset, length, iova, fd.as_raw_fd(), access) })
    }

    /// A page that no request reaches, in a domain that has no queue pair: what names its key fails on the card as what names a
    /// key that there is not.
    pub fn out_of_reach(card: &Arc<Card>) -> Result<Self, Errno> {
        static PAGE: Page = Page([0; 4096]);
        let pd = Pd::new(card)?;
        let page: *mut c_void = (&raw const PAGE).cast_mut().cast();
        let (register, address) = (card.library.reg_mr_iova, page.addr() as u64);
        // SAFETY: the domain is there, and the page is for good. The card gets no right to write to it.
        Self::made(&pd, || unsafe { register(pd.raw.as_ptr(), page, size_of::<Page>(), address, 0) })
    }

    fn made(pd: &Arc<Pd>, make: impl FnOnce() -> *mut ibv_mr) -> Result<Self, Errno> {
        let raw = pd.card.make(|made| &mut made.mrs, make)?;
        // SAFETY: just made.
        let (address, lkey, rkey) = unsafe {
            let mr = raw.as_ptr();
            ((*mr).addr.addr() as u64, DeviceKey((*mr).lkey), (*mr).rkey)
        };
        Ok(Self { pd: Arc::clone(pd), raw, address, lkey, rkey })
    }

    /// Its first address.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.address
    }

    /// By which the card's own work requests name it.
    #[must_use]
    pub fn lkey(&self) -> DeviceKey {
        self.lkey
    }

    /// By which peers name it. Those cannot reach a region without remote rights, whose key is no secret.
    #[must_use]
    pub fn rkey(&self) -> u32 {
        self.rkey
    }
}

#[repr(C, align(4096))]
struct Page([u8; 4096]);

impl Drop for Mr {
    fn drop(&mut self) {
        // SAFETY: registered above, once.
        self.pd.card.unmake(|made| &mut made.mrs, self.raw, |raw| unsafe { (self.pd.card.library.dereg_mr)(raw) });
    }
}

/// A completion queue.
#[derive(Debug)]
pub struct Cq {
    card: Arc<Card>,
    raw: NonNull<ibv_cq>,
    /// Completions that fit.
    pub capacity: u32,
    /// What [`Card::completion_event`] calls it.
    pub name: usize,
}

// SAFETY: as for `Card`.
unsafe impl Send for Cq {}
// SAFETY: as above.
unsafe impl Sync for Cq {}

impl Cq {
    /// A new one for this many completions at least.
    pub fn new(card: &Arc<Card>, cqe: u32, name: usize) -> Result<Arc<Self>, Errno> {
        let cqe = c_int::try_from(cqe).map_err(|_| Errno::INVAL)?;
        let context = std::ptr::without_provenance_mut(name);
        let (create, channel) = (card.library.create_cq, card.channel.as_ptr());
        // SAFETY: context and channel are there; the queue's own context is no pointer, and nobody follows it.
        let make = || unsafe { create(card.context.as_ptr(), cqe, context, channel, 0) };
        let raw = card.make(|made| &mut made.cqs, make)?;
        // SAFETY: just made.
        let capacity = unsafe { (*raw.as_ptr()).cqe }.max(cqe) as u32;
        Ok(Arc::new(Self { card: Arc::clone(card), raw, capacity, name }))
    }

    /// Takes completions, as many as there are and fit.
    pub fn poll<'a>(&self, into: &'a mut [ibv_wc]) -> &'a [ibv_wc] {
        let Some(poll) = self.card.ops().and_then(|ops| ops.poll_cq) else { return &[] };
        let most = c_int::try_from(into.len()).unwrap_or(c_int::MAX);
        // SAFETY: there is room for as many; one thread polls.
        let count = unsafe { poll(self.raw.as_ptr(), most, into.as_mut_ptr()) };
        // A negative count is a queue that the card has given up; its queue pairs have an event.
        &into[..usize::try_from(count).unwrap_or(0).min(into.len())]
    }

    /// Has the next completion make the channel readable.
    pub fn arm(&self) {
        if let Some(arm) = self.card.ops().and_then(|ops| ops.req_notify_cq) {
            // SAFETY: the queue is there.
            unsafe { arm(self.raw.as_ptr(), 0) };
        }
    }
}

impl Drop for Cq {
    fn drop(&mut self) {
        // SAFETY: made above, once; queue pairs have their queue, so none is left; its events have been acknowledged.
        self.card.unmake(|made| &mut made.cqs, self.raw, |raw| unsafe { (self.card.library.destroy_cq)(raw) });
    }
}

/// A queue pair.
#[derive(Debug)]
pub struct CardQp {
    pd: Arc<Pd>,
    raw: NonNull<ibv_qp>,
    /// Where its completions go, of requests of both kinds.
    pub cq: Arc<Cq>,
    /// The card's number of it.
    pub number: u32,
    /// Requests that its send queue holds.
    pub sends: usize,
    /// Requests that its receive queue holds.
    pub receives: usize,
}

// SAFETY: as for `Card`.
unsafe impl Send for CardQp {}
// SAFETY: as above.
unsafe impl Sync for CardQp {}

impl CardQp {
    /// A new one in state RESET.
    pub fn new(pd: &Arc<Pd>, cq: &Arc<Cq>, caps: &Caps) -> Result<Arc<Self>, Errno> {
        let cq_raw = cq.raw.as_ptr();
        let mut init = ibv_qp_init_attr {
            qp_context: null_mut(),
            send_cq: cq_raw,
            recv_cq: cq_raw,
            srq: null_mut(),
            cap: ibv_qp_cap {
                max_send_wr: caps.max_send_wr,
                max_recv_wr: caps.max_recv_wr,
                max_send_sge: caps.max_send_sge,
                max_recv_sge: caps.max_recv_sge,
                max_inline_data: caps.max_inline,
            },
            qp_type: RC,
            sq_sig_all: 0,
        };
        let create = pd.card.library.create_qp;
        // SAFETY: domain and queue are there; `init` lives across the call.
        let raw = pd.card.make(|made| &mut made.qps, || unsafe { create(pd.raw.as_ptr(), &raw mut init) })?;
        // SAFETY: just made.
        let number = unsafe { (*raw.as_ptr()).qp_num };
        // No more than was asked for is used, whatever the card has: so much room is kept in the completion queue.
        let (sends, receives) = (caps.max_send_wr as usize, caps.max_recv_wr as usize);
        Ok(Arc::new(Self { pd: Arc::clone(pd), raw, cq: Arc::clone(cq), number, sends, receives }))
    }

    pub(crate) fn raw(&self) -> *mut ibv_qp {
        self.raw.as_ptr()
    }

    /// `ibv_modify_qp`.
    pub fn modify(&self, attr: &mut ibv_qp_attr, mask: u32) -> Result<(), Errno> {
        self.pd.card.check()?;
        // SAFETY: the queue pair is there; `attr` lives across the call.
        done(unsafe { (self.pd.card.library.modify_qp)(self.raw.as_ptr(), attr, mask.cast_signed()) })
    }

    /// `ibv_modify_qp` to a state that needs no attributes.
    pub fn take_to(&self, state: QpState) -> Result<(), Errno> {
        // SAFETY: plain data.
        let mut attr = ibv_qp_attr { qp_state: state.0, ..unsafe { zeroed() } };
        self.modify(&mut attr, QpAttrMask::STATE.0)
    }

    /// To RTS, with the caller's word that it is there.
    pub fn take_back(&self) -> Result<(), Errno> {
        let rts = QpState::RTS.0;
        // SAFETY: plain data.
        let mut attr = ibv_qp_attr { qp_state: rts, cur_qp_state: rts, ..unsafe { zeroed() } };
        self.modify(&mut attr, QpAttrMask::STATE.0 | QpAttrMask::CUR_STATE.0)
    }

    /// The state that the card has it in, `enum ibv_qp_state`.
    pub fn state(&self) -> Result<u32, Errno> {
        self.query().map(|attr| attr.qp_state)
    }

    /// Whether the card has it in SQD, and has not finished what was begun.
    pub fn is_draining(&self) -> Result<bool, Errno> {
        self.query().map(|attr| attr.qp_state == QpState::SQD.0 && attr.sq_draining != 0)
    }

    fn query(&self) -> Result<ibv_qp_attr, Errno> {
        self.pd.card.check()?;
        // SAFETY: plain data; the call fills it.
        let (mut attr, mut init): (ibv_qp_attr, ibv_qp_init_attr) = unsafe { (zeroed(), zeroed()) };
        let (query, what) = (self.pd.card.library.query_qp, QpAttrMask::STATE.0.cast_signed());
        // SAFETY: the queue pair is there; both live across the call.
        done(unsafe { query(self.raw.as_ptr(), &raw mut attr, what, &raw mut init) })?;
        Ok(attr)
    }

    /// Posts a list of send requests. If it is not taken whole: the first that is not, and why.
    ///
    /// # Safety
    /// The list ends, and its requests' lists are as long as they say; with inline data their addresses are of this process, and readable.
    pub unsafe fn post_send(&self, first: *mut ibv_send_wr) -> Result<(), (*mut ibv_send_wr, Errno)> {
        let Some(post) = self.pd.card.ops().and_then(|ops| ops.post_send) else { return Err((first, Errno::IO)) };
        let mut bad = null_mut();
        // SAFETY: the queue pair is there; the rest is promised by the caller. One thread posts.
        done(unsafe { post(self.raw.as_ptr(), first, &raw mut bad) }).map_err(|error| (bad, error))
    }

    /// Posts a list of receive requests. As for [`Self::post_send`].
    ///
    /// # Safety
    /// The list ends, and its requests' lists are as long as they say.
    pub unsafe fn post_receive(&self, first: *mut ibv_recv_wr) -> Result<(), (*mut ibv_recv_wr, Errno)> {
        let Some(post) = self.pd.card.ops().and_then(|ops| ops.post_recv) else { return Err((first, Errno::IO)) };
        let mut bad = null_mut();
        // SAFETY: as above.
        done(unsafe { post(self.raw.as_ptr(), first, &raw mut bad) }).map_err(|error| (bad, error))
    }
}

impl Drop for CardQp {
    fn drop(&mut self) {
        // SAFETY: made above, once. Nobody posts to it: whoever does has it.
        self.pd.card.unmake(|made| &mut made.qps, self.raw, |raw| unsafe { (self.pd.card.library.destroy_qp)(raw) });
    }
}
