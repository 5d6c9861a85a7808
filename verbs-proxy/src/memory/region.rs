//! Memory regions: whose, what for, and where their bytes are in this process.

// UNSAFETY: computes addresses inside mappings.
#![allow(unsafe_code)]

use super::Piece;
use super::present::Present;
use crate::guarded::Guard;
use crate::shared::Mapping;
use ringfence_protocol::verbs::Access;
use std::cell::{Cell, RefCell};
use std::fmt::Debug;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Arc;

/// A protection domain, unique in the proxy's lifetime.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PdId(pub u32);

/// Why an access is refused; the names of the proxy's vendor error codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum AccessFault {
    /// No memory region has this key.
    Key = 1,
    /// It belongs to another protection domain.
    Domain = 2,
    /// It was registered without this access.
    Rights = 3,
    /// The range reaches outside it.
    Range = 4,
    /// It is memory of the container's own that is gone.
    Lost = 5,
}

/// What a device keeps of a region. When it is dropped, the device reaches the memory no more.
pub type Hold = Box<dyn Debug + Send>;

/// Bytes of a region's mapping.
#[derive(Clone, Copy, Debug, Default)]
struct Shown {
    start: u64,
    bytes: u64,
}

/// The key by which a device's own work requests name a region. To the container it has another one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceKey(pub u32);

/// A memory region.
#[derive(Debug)]
pub struct MemoryRegion {
    /// Goes before the mapping.
    _hold: Option<Hold>,
    device_key: DeviceKey,
    pd: PdId,
    access: Access,
    iova: u64,
    length: u64,
    first: *mut u8,
    /// Where the memory may be gone.
    guard: Option<Guard>,
    /// Keeps `first` valid.
    mapping: Arc<Mapping>,
    /// What peers call it when it is shared with them.
    pub share: u32,
    present: RefCell<Present>,
    /// Bytes of the mapping.
    shown: Cell<Shown>,
}

// SAFETY: `first` points into `mapping`, which is an address range of the process, not of a thread.
unsafe impl Send for MemoryRegion {}

impl MemoryRegion {
    /// The region whose first byte is at `offset` of `mapping`; `None` if it does not fit there.
    #[must_use]
    pub fn new(
        mapping: Arc<Mapping>,
        offset: usize,
        length: u64,
        iova: u64,
        pd: PdId,
        access: Access,
        share: u32,
    ) -> Option<Self> {
        let first = Piece::of(&mapping, offset, usize::try_from(length).ok()?)?;
        iova.checked_add(length)?;
        Some(Self {
            _hold: None,
            device_key: DeviceKey::default(),
            pd,
            access,
            iova,
            length,
            first: first.address,
            guard: first.guard,
            mapping,
            share,
            present: RefCell::default(),
            shown: Cell::default(),
        })
    }

    /// Neighbours may see these bytes of its mapping, which begin and end with a page and are all its own; none, if nothing is said.
    #[must_use]
    pub fn shown(self, bytes: Range<u64>) -> Self {
        // What its container can take pages away from is nothing that a neighbour could rely on.
        let bytes = if self.guard.is_some() { 0..0 } else { bytes };
        Self { shown: Cell::new(Shown { start: bytes.start, bytes: bytes.end.saturating_sub(bytes.start) }), ..self }
    }

    /// The region as a device has registered it, with the key by which its work requests name it there.
    #[must_use]
    pub fn registered(self, device_key: DeviceKey, hold: Hold) -> Self {
        Self { _hold: Some(hold), device_key, ..self }
    }

    /// Its first byte in this process, for a device that registers it.
    #[must_use]
    pub fn first(&self) -> *mut u8 {
        self.first
    }

    /// Whether its container can take pages away.
    #[must_use]
    pub fn may_fault(&self) -> bool {
        self.guard.is_some()
    }

    /// Offset in the region's mapping of `address`, which must have been admitted.
    #[must_use]
    fn mapping_offset(&self, piece: &Piece<'_>) -> u64 {
        (piece.address.addr() - self.mapping.base().as_ptr().addr()) as u64
    }

    /// Its protection domain.
    #[must_use]
    pub fn pd(&self) -> PdId {
        self.pd
    }

    /// What it was registered for.
    #[must_use]
    pub fn access(&self) -> Access {
        self.access
    }

    /// The application's address of its first byte.
    #[must_use]
    pub fn iova(&self) -> u64 {
        self.iova
    }

    /// Bytes.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.length
    }

    /// The application's address of the first byte that neighbours may see, and how many they may; `None` if there are none.
    #[must_use]
    pub fn shown_extent(&self) -> Option<(u64, u64)> {
        let Shown { start, bytes } = self.shown.get();
        let first = (self.first.addr() - self.mapping.base().as_ptr().addr()) as u64;
        (bytes > 0).then(|| (self.iova + start.saturating_sub(first), bytes))
    }

    /// What neighbours may see of `piece`, an admitted part: which bytes of it, and where those begin in what they see of the region.
    /// What they get of the others is copied for them.
    #[inline]
    #[must_use]
    pub fn shown_part(&self, piece: &Piece<'_>) -> (Range<usize>, u64) {
        let Shown { start, bytes } = self.shown.get();
        let at = self.mapping_offset(piece);
        let within = |position: u64| position.saturating_sub(at).min(piece.bytes as u64) as usize;
        let part = within(start)..within(start + bytes);
        (part, at.saturating_sub(start))
    }

    /// The mapping, and what of it neighbours may see.
    #[must_use]
    pub fn shown_bytes(&self) -> (Arc<Mapping>, Range<u64>) {
        let Shown { start, bytes } = self.shown.get();
        (Arc::clone(&self.mapping), start..start + bytes)
    }

    /// No neighbour is to see it.
    pub fn withhold(&self) {
        self.shown.set(Shown::default());
    }

    /// Sees that a neighbour which copies from `piece`, an admitted part, finds all pages there. The neighbour must be able to see
    /// the region already: until then the container can take pages away.
    #[inline]
    pub fn make_present(&self, piece: &Piece<'_>) {
        let offset = self.mapping_offset(piece) as usize;
        self.present.borrow_mut().cover(*piece, offset);
    }

    /// What the device calls it: [`Self::registered`].
    #[must_use]
    pub(super) fn device_key(&self) -> DeviceKey {
        self.device_key
    }

    /// Whether the region admits this access.
    #[inline(always)]
    pub(super) fn admit(&self, pd: PdId, addr: u64, bytes: u64, access: Access) -> Result<Piece<'_>, AccessFault> {
        if self.pd != pd {
            return Err(AccessFault::Domain);
        }
        if !self.access.contains(access) {
            return Err(AccessFault::Rights);
        }
        let offset = addr.wrapping_sub(self.iova);
        if offset > self.length || bytes > self.length - offset {
            return Err(AccessFault::Range);
        }
        // SAFETY: `offset + bytes <= length`, which `new` checked to lie in the mapping.
        let address = unsafe { self.first.add(offset as usize) };
        Ok(Piece { address, bytes: bytes as usize, guard: self.guard, borrowed: PhantomData })
    }
}
