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

/// A memory region.
#[derive(Debug)]
pub struct MemoryRegion {
    /// Goes before the mapping.
    _hold: Option<Hold>,
    device_key: u32,
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
    withheld: Cell<bool>,
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
            device_key: 0,
            pd,
            access,
            iova,
            length,
            first: first.address,
            guard: first.guard,
            mapping,
            share,
            present: RefCell::default(),
            withheld: Cell::new(false),
        })
    }

    /// The region as a device has registered it, with the key by which its work requests name it there.
    #[must_use]
    pub fn registered(self, device_key: u32, hold: Hold) -> Self {
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
    pub fn mapping_offset(&self, piece: &Piece<'_>) -> u64 {
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

    /// Where in its mapping it begins.
    #[must_use]
    pub fn first_offset(&self) -> u64 {
        (self.first.addr() - self.mapping.base().as_ptr().addr()) as u64
    }

    /// Whether no neighbour gets to see it, because its container can take pages away: what neighbours get of it is copied for them.
    #[must_use]
    pub fn is_copied(&self) -> bool {
        self.guard.is_some() || self.withheld.get()
    }

    /// No neighbour is to see it.
    pub fn withhold(&self) {
        self.withheld.set(true);
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
    pub(super) fn device_key(&self) -> u32 {
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
