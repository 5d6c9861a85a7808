//! How what was shared becomes private again.

// UNSAFETY: ends mappings of this module.
#![allow(unsafe_code)]

use super::{Backing, State, bytes};
use crate::pages::array::Array;
use crate::pages::maps::{self, Mapping};
use crate::pages::swap::{self, Rest, Shown};
use crate::pages::table::Run;
use crate::pages::{PAGE, Regions, sys};
use core::ops::{ControlFlow, Range};

impl State {
    /// Makes the pages of the runs that left the table private again.
    pub(super) fn give_back_all(&mut self, regions: &dyn Regions) {
        let runs = core::mem::replace(&mut self.runs, Array::new());
        for run in runs.iter() {
            self.give_back(run, regions);
        }
        self.runs = runs;
    }

    fn give_back(&mut self, run: &Run, regions: &dyn Regions) {
        let range = bytes(&run.range());
        let Some(&backing) = self.backing(run.region) else { return };
        let is_last = backing.pages == run.pages;
        // The proxy empties the file when the region is free; until then no more than a chunk may be there twice.
        let rest = if is_last && range.len() <= swap::CHUNK { Rest::Stays } else { Rest::Removed };
        let (mut next, mut found, mut failed, mut grown) = (range.start, 0, false, None);
        let visited = maps::visit(&range, false, |whole| {
            let Some(part) = whole.clip(&range) else { return ControlFlow::Continue(()) };
            if !self.shows(run, &part) {
                return ControlFlow::Continue(());
            }
            discard(run, &(next..part.start));
            next = part.end;
            found += part.length();
            let beyond = whole.start + backing.bytes.saturating_sub(whole.offset) as usize;
            if whole.end > beyond.max(range.end) {
                grown = whole.clip(&(beyond.max(range.end)..usize::MAX));
            }
            let Mapping { start, end, protection, .. } = part;
            let shown = Shown { start, end, protection, aside: run.aside_at(start) };
            let (done, result) = swap::give_back(&shown, rest);
            if result.is_err() {
                failed = true;
                discard(run, &(start + done..end));
            }
            ControlFlow::Continue(())
        });
        discard(run, &(next..range.end));
        if let Some(grown) = grown {
            failed |= self.privatise(&grown, regions).is_err();
        }
        // The application has moved the rest, or unmapped it.
        let offset = (run.offset * PAGE) as u64;
        if found < range.len() {
            failed |= visited.is_err()
                || self.privatise_shown(&backing, offset..offset + range.len() as u64, regions).is_err();
        }
        if failed && let Some(backing) = self.backing_mut(run.region) {
            backing.astray = true;
        }
        self.drop_pages(run, regions);
    }

    /// Makes private whatever shows these bytes of a file, wherever it is; and what lies beyond the region in the same mappings.
    fn privatise_shown(&self, backing: &Backing, bytes: Range<u64>, regions: &dyn Regions) -> Result<(), i32> {
        let mut result = Ok(());
        maps::visit(&(0..usize::MAX), false, |mapping| {
            let end = mapping.offset + mapping.length() as u64;
            let shows = mapping.shared && mapping.identity() == backing.identity;
            if shows && mapping.offset < bytes.end && bytes.start < end && !regions.is_own(mapping.start) {
                // Other parts of the same mapping are shared for their own sake.
                let last = if end > backing.bytes && bytes.end == backing.bytes { end } else { bytes.end.min(end) };
                let first = bytes.start.max(mapping.offset);
                let start = mapping.start;
                let part = start + (first - mapping.offset) as usize..start + (last - mapping.offset) as usize;
                if let Some(part) = mapping.clip(&part) {
                    result = result.and(self.privatise(&part, regions));
                }
            }
            ControlFlow::Continue(())
        })
        .and(result)
    }

    fn privatise(&self, mapping: &Mapping, regions: &dyn Regions) -> Result<(), i32> {
        if regions.is_own(mapping.start) {
            return Ok(());
        }
        let &Mapping { start, end, protection, .. } = mapping;
        swap::give_back(&Shown { start, end, protection, aside: 0 }, Rest::Stays).1
    }

    /// The table does not refer to the run's pages any more.
    pub(super) fn drop_pages(&mut self, run: &Run, regions: &dyn Regions) {
        if let Some(backing) = self.backing_mut(run.region) {
            backing.pages -= run.pages;
            self.forget_unused(run.region, regions);
        }
    }

    /// The proxy empties a region that is freed: not as long as the application sees it somewhere.
    pub(super) fn forget_unused(&mut self, region: u32, regions: &dyn Regions) {
        let Ok(at) = self.backings.binary_search_by_key(&region, |backing| backing.region) else { return };
        let backing = self.backings[at];
        if backing.pages > 0 {
            return;
        }
        // What could not be made private may have been unmapped since, or there is memory for it now.
        if backing.astray && self.privatise_shown(&backing, 0..u64::MAX, regions).is_err() {
            return;
        }
        self.backings.remove(at..at + 1);
        self.freed.push(region);
    }
}

/// Ends what is kept aside for a part of a run.
pub(super) fn discard(run: &Run, range: &Range<usize>) {
    if run.aside != 0 && range.start < range.end {
        // SAFETY: ours, and empty.
        unsafe { sys::munmap(run.aside_at(range.start), range.len()) };
    }
}
