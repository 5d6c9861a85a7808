//! All memory regions of a container, by key.

// UNSAFETY: regions are reached through pointers that one thread stores and another takes out.
#![allow(unsafe_code)]

use super::{AccessFault, DeviceKey, MemoryRegion, PdId, Piece};
use crate::shared::HeldSlice;
use ringfence_protocol::keys::{Incarnation, KeyWord};
use ringfence_protocol::verbs::Access;
use std::ptr::null_mut;
use std::sync::Arc;
use std::sync::atomic::{AtomicPtr, AtomicU32, Ordering};

/// The most regions of a table.
const MOST: u32 = 1 << 20;

/// How many places, and key words, a table for so many regions has: a power of two, and twice as many at least, so that a free
/// one is found in two tries on average.
#[must_use]
pub fn places(regions: u32) -> u32 {
    (regions.clamp(8, MOST) * 2).next_power_of_two()
}

/// All memory regions of a container, by key: the worker's view.
///
/// A key is a place in the table in its low bits and chance in its high ones, and the place is chosen by chance, so
/// that keys cannot be guessed from one another (ReDMArk, USENIX Security 2021). lkey and rkey are the same number, as
/// on many RNICs; what it may be used for are the region's rights.
///
/// A region answers to the key in the word of its place, which the container can write
/// ([`ringfence_protocol::keys`]): what it can bring about by that is what it may by messages.
#[derive(Debug)]
pub struct RegionTable {
    shared: Arc<Shared>,
}

/// Where regions enter the table, which the worker need not be asked for: it learns of a key after the region is there.
#[derive(Debug)]
pub struct Entrance {
    shared: Arc<Shared>,
    last: Incarnation,
}

/// What a region is reached by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Granted {
    /// Both its lkey and its rkey, until the container gives it another. The place in its low bits stays.
    pub key: u32,
    /// Which of those that its place has had over time.
    pub incarnation: Incarnation,
}

#[derive(Debug)]
struct Shared {
    /// Null or from `Box::into_raw`. [`Entrance::insert`] alone fills a place, [`RegionTable::remove`] alone empties it.
    slots: Box<[AtomicPtr<MemoryRegion>]>,
    words: HeldSlice<KeyWord>,
    used: AtomicU32,
}

// SAFETY: the regions may go from thread to thread; they are shared as `RegionTable` says.
unsafe impl Sync for Shared {}
// SAFETY: as above.
unsafe impl Send for Shared {}

impl Drop for Shared {
    fn drop(&mut self) {
        for slot in &mut self.slots {
            let region = *slot.get_mut();
            if !region.is_null() {
                // SAFETY: from `Box::into_raw`, and nobody else has it: both views are gone.
                drop(unsafe { Box::from_raw(region) });
            }
        }
    }
}

impl Shared {
    fn place(&self, key: u32) -> usize {
        key as usize & (self.slots.len() - 1)
    }
}

impl RegionTable {
    /// An empty table with these key words, [`places`] of them.
    ///
    /// # Panics
    /// If they are no power of two.
    #[must_use]
    pub fn new(words: HeldSlice<KeyWord>) -> (Self, Entrance) {
        assert!(words.len().is_power_of_two(), "{} key words", words.len());
        let slots = std::iter::repeat_with(|| AtomicPtr::new(null_mut())).take(words.len()).collect();
        let shared = Arc::new(Shared { slots, words, used: AtomicU32::new(0) });
        (Self { shared: Arc::clone(&shared) }, Entrance { shared, last: Incarnation::new(0) })
    }

    /// Takes the region of this place out, whatever its key is by now.
    pub fn remove(&mut self, granted: Granted) -> Option<Box<MemoryRegion>> {
        let place = self.shared.place(granted.key);
        self.shared.words[place].clear();
        let region = self.shared.slots[place].swap(null_mut(), Ordering::AcqRel);
        if region.is_null() {
            return None;
        }
        self.shared.used.fetch_sub(1, Ordering::Relaxed);
        // SAFETY: from `Box::into_raw` by `insert`, and taken out once. References to it borrow `self`, of which there is one,
        // so none is left.
        Some(unsafe { Box::from_raw(region) })
    }

    /// The region with this key.
    #[must_use]
    #[inline(always)]
    pub fn get(&self, key: u32) -> Option<&MemoryRegion> {
        let place = self.shared.place(key);
        if !self.shared.words[place].answers_to(key) {
            return None;
        }
        // SAFETY: null, or a region that is there until `remove` has `self` for itself.
        unsafe { self.shared.slots[place].load(Ordering::Acquire).as_ref() }
    }

    /// Checks an access against the region that it names.
    ///
    /// No region goes while such a piece is there:
    ///
    /// ```compile_fail,E0502
    /// use ringfence_protocol::verbs::Access;
    /// use ringfence_proxy::memory::{Granted, PdId, Piece, RegionTable, copy};
    ///
    /// fn last(table: &mut RegionTable, region: Granted, bytes: &mut [u8]) {
    ///     let piece = table.admit(region.key, PdId(1), 0x1000, 8, Access(0)).unwrap();
    ///     table.remove(region);
    ///     copy(Piece::of_own_mut(bytes), piece).unwrap();
    /// }
    /// ```
    ///
    /// It can go afterwards:
    ///
    /// ```
    /// use ringfence_protocol::verbs::Access;
    /// use ringfence_proxy::memory::{Granted, PdId, Piece, RegionTable, copy};
    ///
    /// fn last(table: &mut RegionTable, region: Granted, bytes: &mut [u8]) {
    ///     let piece = table.admit(region.key, PdId(1), 0x1000, 8, Access(0)).unwrap();
    ///     copy(Piece::of_own_mut(bytes), piece).unwrap();
    ///     table.remove(region);
    /// }
    /// ```
    #[inline(always)]
    pub fn admit(&self, key: u32, pd: PdId, addr: u64, bytes: u64, access: Access) -> Result<Piece<'_>, AccessFault> {
        self.get(key).ok_or(AccessFault::Key)?.admit(pd, addr, bytes, access)
    }

    /// As [`Self::admit`], for a device that reaches memory by itself: what that calls the region.
    #[inline]
    pub fn device_key(
        &self,
        key: u32,
        pd: PdId,
        addr: u64,
        bytes: u64,
        access: Access,
    ) -> Result<DeviceKey, AccessFault> {
        let region = self.get(key).ok_or(AccessFault::Key)?;
        region.admit(pd, addr, bytes, access).map(|_| region.device_key())
    }

    /// A neighbour may come to read the region with this key.
    pub fn lend(&self, key: u32) {
        self.shared.words[self.shared.place(key)].lend();
    }
}

impl Entrance {
    /// Adds a region; `None` if the table is full.
    pub fn insert(&mut self, region: MemoryRegion, mut random: impl FnMut() -> u32) -> Option<Granted> {
        let shared = &*self.shared;
        if shared.used.load(Ordering::Relaxed) as usize * 2 >= shared.slots.len() {
            return None;
        }
        let region = Box::into_raw(Box::new(region));
        loop {
            let key = random();
            let place = shared.place(key);
            // Zero is what careless programs pass for "no key". Release: who finds the pointer finds the region.
            let free = key != 0
                && shared.slots[place]
                    .compare_exchange(null_mut(), region, Ordering::Release, Ordering::Relaxed)
                    .is_ok();
            if free {
                shared.used.fetch_add(1, Ordering::Relaxed);
                self.last = self.last.next();
                shared.words[place].grant(self.last, key);
                return Some(Granted { key, incarnation: self.last });
            }
        }
    }

    /// Takes a region back that its container has withdrawn; false if that uses it. It is out of reach then, and to be removed.
    #[must_use]
    pub fn revoke(&self, granted: Granted) -> bool {
        self.shared.words[self.shared.place(granted.key)].revoke(granted.incarnation)
    }
}

#[cfg(any(test, feature = "fuzzing"))]
impl RegionTable {
    /// The word of the place that a key names.
    pub(crate) fn word(&self, key: u32) -> &KeyWord {
        &self.shared.words[self.shared.place(key)]
    }

    /// A table whose words nobody else writes.
    pub(crate) fn alone(regions: u32) -> (Self, Entrance) {
        use crate::shared::{Mapping, SealedFile};
        let count = places(regions) as usize;
        let file = SealedFile::create("keys", count * size_of::<KeyWord>()).unwrap();
        Self::new(Arc::new(Mapping::of(&file).unwrap()).headers(0, count))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shared::{Mapping, PAGE, SealedFile};

    const PD: PdId = PdId(1);

    fn region() -> MemoryRegion {
        let file = SealedFile::create("test", PAGE).unwrap();
        let mapping = Arc::new(Mapping::of(&file).unwrap());
        MemoryRegion::new(mapping, 100, 1000, 0x5000_0064, PD, Access::LOCAL_WRITE, 0).unwrap()
    }

    fn table() -> (RegionTable, Entrance, Granted) {
        let (table, mut entrance) = RegionTable::alone(8);
        let granted = entrance.insert(region(), || 0x107).unwrap();
        (table, entrance, granted)
    }

    fn admitted(table: &RegionTable, key: u32) -> bool {
        table.admit(key, PD, 0x5000_0064, 1, Access(0)).is_ok()
    }

    #[test]
    fn accesses_are_checked_against_key_domain_rights_and_range() {
        let (table, _entrance, Granted { key, .. }) = table();
        #[track_caller]
        fn case(
            table: &RegionTable,
            key: u32,
            pd: PdId,
            addr: u64,
            bytes: u64,
            access: Access,
            expected: Result<usize, AccessFault>,
        ) {
            assert_eq!(table.admit(key, pd, addr, bytes, access).map(|piece| piece.bytes()), expected);
        }
        let start = 0x5000_0064;
        case(&table, key, PD, start, 1000, Access::LOCAL_WRITE, Ok(1000));
        case(&table, key, PD, start + 1000, 0, Access(0), Ok(0));
        case(&table, key, PD, start, 1001, Access(0), Err(AccessFault::Range));
        case(&table, key, PD, start - 1, 1, Access(0), Err(AccessFault::Range));
        case(&table, key, PD, start + 1, u64::MAX, Access(0), Err(AccessFault::Range));
        case(&table, key, PD, u64::MAX, 2, Access(0), Err(AccessFault::Range));
        case(&table, key, PdId(2), start, 1, Access(0), Err(AccessFault::Domain));
        case(&table, key, PD, start, 1, Access::REMOTE_READ, Err(AccessFault::Rights));
        case(&table, key ^ 0x1000, PD, start, 1, Access(0), Err(AccessFault::Key));
    }

    #[test]
    fn a_removed_region_has_no_key() {
        let (mut table, mut entrance, granted) = table();
        assert!(table.remove(granted).is_some());
        assert_eq!(table.admit(granted.key, PD, 0x5000_0064, 1, Access(0)).unwrap_err(), AccessFault::Key);
        assert!(table.remove(granted).is_none());
        let next = entrance.insert(region(), || granted.key).unwrap();
        assert_eq!(next.key, granted.key);
        assert_ne!(next.incarnation, granted.incarnation);
    }

    #[test]
    fn a_region_answers_to_the_key_that_its_container_gave_it_last() {
        let (mut table, entrance, granted) = table();
        let word = &table.shared.words[7];
        assert!(word.withdraw(granted.incarnation, granted.key));
        assert!(!admitted(&table, granted.key) && !admitted(&table, 7) && !admitted(&table, 0));
        assert!(word.restore(granted.incarnation, 0x207));
        assert!(admitted(&table, 0x207) && !admitted(&table, granted.key));
        assert!(!entrance.revoke(granted), "it is in use");
        assert!(word.withdraw(granted.incarnation, 0x207));
        assert!(entrance.revoke(granted));
        assert!(!word.restore(granted.incarnation, 0x307) && !admitted(&table, 0x307));
        assert!(table.remove(granted).is_some());
    }

    #[test]
    fn words_of_places_without_a_region_and_nonsense_in_others_are_harmless() {
        let (mut table, _entrance, granted) = table();
        for (place, word) in table.shared.words.iter().enumerate() {
            word.grant(Incarnation::new(3), 0x1000 | place as u32);
        }
        for key in (0..16).map(|place| 0x1000 | place) {
            assert_eq!(admitted(&table, key), key & 15 == 7);
        }
        assert!(table.remove(granted).is_some());
        assert!((0..16).all(|place| !admitted(&table, 0x1000 | place)));
    }

    #[test]
    fn a_full_table_takes_no_more_and_gives_all_up() {
        let (table, mut entrance) = RegionTable::alone(8);
        let mut key = 0;
        let mut next = || {
            key += 1;
            key
        };
        assert_eq!((0..9).filter_map(|_| entrance.insert(region(), &mut next)).count(), 8);
        drop((table, entrance));
    }
}
