//! What is shared, and what [`super::acquire`] and [`super::release`] do, under the lock.
//!
//! Nothing here allocates by the C library, and nothing asks the proxy: see [`super::array`] and [`super::acquire`].

mod back;

use super::array::Array;
use super::maps::{self, Kind, Mapping};
use super::swap::{self, Area, Rest, Shared, Shown};
use super::sys::{self, Identity};
use super::table::{Run, Table};
use super::{PAGE, Regions, Segment};
use super::{bystander, interpose};
use back::discard;
use core::ops::{ControlFlow, Range};

/// The file behind a region.
#[derive(Clone, Copy)]
struct Backing {
    region: u32,
    identity: Identity,
    /// Bytes of the region. The file is longer.
    bytes: u64,
    /// Pages that runs of the table refer to.
    pages: usize,
    /// Some that runs referred to may still show somewhere, because there was no memory for private ones.
    astray: bool,
}

/// A region that the caller of [`State::acquire`] has to offer.
#[derive(Clone, Copy, Debug)]
pub struct Offer {
    pub region: u32,
    pub file: i32,
    pub bytes: u64,
}

/// What came of [`State::acquire`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Done,
    /// Nothing was done: it takes a region of so many bytes.
    Needs(u64),
}

pub struct State {
    table: Table,
    /// By region.
    backings: Array<Backing>,
    /// Regions that nothing refers to any more, for the caller to free.
    pub freed: Array<u32>,
    // Kept for their memory.
    mappings: Array<Mapping>,
    areas: Array<Area>,
    outdated: Array<Run>,
    runs: Array<Run>,
    pub segments: Array<Segment>,
}

impl State {
    pub const fn new() -> Self {
        Self {
            table: Table::new(),
            backings: Array::new(),
            freed: Array::new(),
            mappings: Array::new(),
            areas: Array::new(),
            outdated: Array::new(),
            runs: Array::new(),
            segments: Array::new(),
        }
    }

    /// Shares what of the pages is not shared yet, by the region that is offered, and counts one registration more for all of
    /// them. The offer is taken when the outcome is [`Outcome::Done`], also if it was of too many bytes, and in the list
    /// of freed regions after an error.
    pub fn acquire(
        &mut self,
        pages: &Range<usize>,
        writable: bool,
        offer: Option<Offer>,
        regions: &dyn Regions,
    ) -> Result<Outcome, i32> {
        let result = self.examine(pages, writable, regions).and_then(|total| {
            if total > 0 && offer.is_none_or(|offer| offer.bytes != total) {
                return Ok(Outcome::Needs(total));
            }
            self.drop_outdated(regions);
            match offer {
                Some(offer) if total > 0 => self.share(&offer, regions)?,
                Some(offer) => self.freed.push(offer.region),
                None => {}
            }
            self.table.reference(pages.clone());
            Ok(Outcome::Done)
        });
        if result.is_err() {
            self.runs.clear();
            self.table.remove_unheld(pages.clone(), &mut self.runs);
            self.give_back_all(regions);
            if let Some(offer) = offer
                && self.backing(offer.region).is_none()
                && !self.freed.contains(&offer.region)
            {
                self.freed.push(offer.region);
            }
        }
        interpose::set_shared(!self.backings.is_empty());
        result
    }

    pub fn release(&mut self, pages: Range<usize>, regions: &dyn Regions) {
        self.runs.clear();
        self.table.dereference(pages, &mut self.runs);
        self.give_back_all(regions);
        interpose::set_shared(!self.backings.is_empty());
    }

    /// The regions are gone: what shows them becomes private memory, where there is memory for it.
    pub fn forget(&mut self, regions: &dyn Regions) {
        self.runs.clear();
        self.table.remove(0..usize::MAX / PAGE, &mut self.runs);
        self.give_back_all(regions);
        self.backings.clear();
        self.freed.clear();
        interpose::set_shared(false);
    }

    /// In a forked child, which has private copies: nothing is shared.
    pub fn forget_in_child(&mut self) {
        self.table.clear();
        self.backings.clear();
        self.freed.clear();
        interpose::set_shared(false);
    }

    fn backing(&self, region: u32) -> Option<&Backing> {
        let at = self.backings.binary_search_by_key(&region, |backing| backing.region).ok()?;
        Some(&self.backings[at])
    }

    fn backing_mut(&mut self, region: u32) -> Option<&mut Backing> {
        let at = self.backings.binary_search_by_key(&region, |backing| backing.region).ok()?;
        Some(&mut self.backings[at])
    }

    fn backing_of(&self, mapping: &Mapping) -> Option<&Backing> {
        if !mapping.shared {
            return None;
        }
        let identity = mapping.identity();
        self.backings.iter().find(|backing| backing.identity == identity)
    }

    /// Whether the mapping shows the pages that the run says; the application may have mapped something else there.
    fn shows(&self, run: &Run, mapping: &Mapping) -> bool {
        let offset = (run.offset * PAGE + (mapping.start - run.first * PAGE)) as u64;
        mapping.shared
            && mapping.offset == offset
            && self.backing(run.region).is_some_and(|backing| backing.identity == mapping.identity())
    }

    /// Whether memory is registered under any of these addresses, whatever is there today.
    pub fn has_any_of(&self, range: &Range<usize>) -> bool {
        self.table.overlapping(range.start / PAGE..range.end.div_ceil(PAGE)).next().is_some()
    }

    /// The parts of a mapping that show a region's file: those that the table knows, with what is kept aside for them, and
    /// those that were moved there, or have grown, without.
    pub fn each_shown(&self, mapping: &Mapping, each: &mut impl FnMut(&Shown)) {
        if self.backing_of(mapping).is_none() {
            return;
        }
        let mut start = mapping.start;
        while start < mapping.end {
            let run = self.table.at(start / PAGE).filter(|run| {
                let part = mapping.clip(&(start..start + PAGE));
                part.is_some_and(|part| self.shows(run, &part))
            });
            let end = match run {
                Some(run) => (run.first + run.pages) * PAGE,
                None => self.table.next_after(start / PAGE).saturating_mul(PAGE),
            };
            let end = end.min(mapping.end);
            let aside = run.map_or(0, |run| run.aside_at(start));
            each(&Shown { start, end, protection: mapping.protection, aside });
            start = end;
        }
    }

    /// Whether the pages show `segments`, one after the other.
    pub fn still_shows(&self, pages: &Range<usize>, writable: bool, segments: &[Segment]) -> bool {
        let needed = needed(writable);
        let mut next = pages.start * PAGE;
        for segment in segments {
            let Some(backing) = self.backing(segment.region) else { return false };
            let range = next..next.saturating_add(segment.length as usize);
            let visited = maps::visit(&range, false, |mapping| {
                let Some(mapping) = mapping.clip(&range) else { return ControlFlow::Continue(()) };
                let offset = segment.offset + (mapping.start - range.start) as u64;
                if mapping.start != next
                    || !mapping.shared
                    || mapping.protection & needed != needed
                    || mapping.identity() != backing.identity
                    || mapping.offset != offset
                {
                    return ControlFlow::Break(());
                }
                next = mapping.end;
                ControlFlow::Continue(())
            });
            if visited.is_err() || next != range.end {
                return false;
            }
        }
        next == pages.end * PAGE
    }

    /// Whether the pages may be shared in parts: whether all of them can be written. What was read-only from the first on would never
    /// be one mapping again.
    ///
    /// `EFAULT` and `EOPNOTSUPP` as for [`super::acquire`].
    pub fn is_apart(&mut self, pages: &Range<usize>, writable: bool) -> Result<bool, i32> {
        let range = bytes(pages);
        self.mappings.clear();
        maps::read(&range, &mut self.mappings)?;
        check_access(&range, &self.mappings, writable)?;
        let is_other = |mapping: &Mapping| mapping.shared && self.backing_of(mapping).is_none();
        if self.mappings.iter().any(|mapping| is_other(mapping) || mapping.kind == Kind::Huge) {
            return Err(libc::EOPNOTSUPP);
        }
        Ok(self.mappings.iter().all(|mapping| mapping.protection & libc::PROT_WRITE != 0))
    }

    /// Looks at what is mapped, and plans: `areas` are to be shared, `outdated` are parts of runs whose addresses show other
    /// memory today. How many bytes are to be shared.
    fn examine(&mut self, pages: &Range<usize>, writable: bool, regions: &dyn Regions) -> Result<u64, i32> {
        let range = bytes(pages);
        let mut strays = false;
        for _ in 0..2 {
            self.mappings.clear();
            maps::read(&range, &mut self.mappings)?;
            check_access(&range, &self.mappings, writable)?;
            // What the application has moved here, or has let grow, becomes private first.
            strays = self.privatise_strays(regions)?;
            if !strays {
                break;
            }
        }
        if strays {
            return Err(libc::EAGAIN);
        }
        self.outdated.clear();
        self.areas.clear();
        let mut total = 0;
        for mapping in self.mappings.iter() {
            let mut start = mapping.start;
            while start < mapping.end {
                let (run, end) = match self.table.at(start / PAGE) {
                    Some(run) => (Some(*run), (run.first + run.pages) * PAGE),
                    None => (None, self.table.next_after(start / PAGE).saturating_mul(PAGE)),
                };
                let end = end.min(mapping.end);
                let Some(part) = mapping.clip(&(start..end)) else { break };
                start = end;
                if let Some(run) = run {
                    if self.shows(&run, &part) {
                        continue;
                    }
                    self.outdated.push(run.within(&(part.start / PAGE..end / PAGE)));
                }
                if part.shared || part.kind == Kind::Huge {
                    return Err(libc::EOPNOTSUPP);
                }
                let area = Area {
                    start: part.start,
                    end,
                    protection: part.protection,
                    file_backed: part.inode != 0,
                    is_stack: part.kind == Kind::Stack || bystander::is_own_stack(&part.range()),
                };
                total += area.length() as u64;
                match self.areas.last_mut() {
                    // Parts of one mapping.
                    Some(last) if last.end == area.start && last.start >= mapping.start => last.end = end,
                    _ => self.areas.push(area),
                }
            }
        }
        self.table.reserve(self.areas.len() + self.outdated.len())?;
        self.backings.reserve(1)?;
        self.freed.reserve(self.outdated.len() + 2)?;
        Ok(total)
    }

    /// Makes private what shows one of our files in `mappings` and is not where the table has it. Whether there was any.
    fn privatise_strays(&self, regions: &dyn Regions) -> Result<bool, i32> {
        let (mut any, mut result) = (false, Ok(()));
        for mapping in self.mappings.iter().filter(|mapping| !regions.is_own(mapping.start)) {
            self.each_shown(mapping, &mut |shown| {
                let known = self.table.at(shown.start / PAGE).is_some_and(|run| {
                    let part = mapping.clip(&(shown.start..shown.end));
                    part.is_some_and(|part| self.shows(run, &part))
                });
                if !known && result.is_ok() {
                    any = true;
                    result = swap::give_back(shown, Rest::Stays).1;
                }
            });
        }
        result.map(|()| any)
    }

    /// From here on the table tells the truth: what is not ours any more is a gap.
    fn drop_outdated(&mut self, regions: &dyn Regions) {
        let mut runs = core::mem::replace(&mut self.runs, Array::new());
        runs.clear();
        for at in 0..self.outdated.len() {
            let range = self.outdated[at].range();
            self.table.remove(range, &mut runs);
        }
        for run in runs.iter() {
            discard(run, &bytes(&run.range()));
            // The application may have moved it.
            if let Some(backing) = self.backing_mut(run.region) {
                backing.astray = true;
            }
            self.drop_pages(run, regions);
        }
        self.runs = runs;
    }

    /// Shares `areas` by a new region; their runs enter the table with the counts of the outdated ones they replace.
    fn share(&mut self, offer: &Offer, regions: &dyn Regions) -> Result<(), i32> {
        let identity = sys::identify(offer.file)?;
        let backing = Backing { region: offer.region, identity, bytes: offer.bytes, pages: 0, astray: false };
        let at = self.backings.partition_point(|backing| backing.region < offer.region);
        self.backings.insert(at, backing);
        self.areas.iter().filter(|area| area.is_stack).for_each(|area| extend_stack(area, offer.file));
        let (mut offset, mut result) = (0, Ok(()));
        for at in 0..self.areas.len() {
            let area = self.areas[at];
            let mut shared = Shared::default();
            result = swap::share(&area, offer.file, offset as u64, &mut shared);
            if shared.bytes > 0 {
                let Shared { bytes, aside } = shared;
                let (region, offset) = (offer.region, offset / PAGE);
                self.insert(Run { first: area.start / PAGE, pages: bytes / PAGE, count: 0, region, offset, aside });
            }
            if result.is_err() {
                break;
            }
            offset += shared.bytes;
        }
        if result.is_err() {
            self.forget_unused(offer.region, regions);
        }
        result
    }

    fn insert(&mut self, run: Run) {
        if let Some(backing) = self.backing_mut(run.region) {
            backing.pages += run.pages;
        }
        self.table.insert(run);
        let end = run.first + run.pages;
        for old in self.outdated.iter().filter(|old| old.first < end && run.first < old.first + old.pages) {
            for _ in 0..old.count {
                self.table.reference(run.within(&old.range()).range());
            }
        }
    }

    /// Whether anything is shared.
    pub fn shares(&self) -> bool {
        !self.backings.is_empty()
    }

    /// Puts the segments of the pages, by address, into `out`.
    pub fn segments(&self, pages: Range<usize>, out: &mut Array<Segment>) {
        for run in self.table.overlapping(pages) {
            let (offset, length) = ((run.offset * PAGE) as u64, (run.pages * PAGE) as u64);
            match out.last_mut() {
                Some(last) if last.region == run.region && last.offset + last.length == offset => last.length += length,
                _ => out.push(Segment { region: run.region, offset, length }),
            }
        }
    }
}

fn check_access(range: &Range<usize>, mappings: &[Mapping], writable: bool) -> Result<(), i32> {
    let needed = needed(writable);
    let mut next = range.start;
    for mapping in mappings {
        if mapping.start != next || mapping.protection & needed != needed || mapping.kind == Kind::Kernel {
            return Err(libc::EFAULT);
        }
        next = mapping.end;
    }
    if next == range.end { Ok(()) } else { Err(libc::EFAULT) }
}

fn needed(writable: bool) -> i32 {
    if writable { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_READ }
}

/// Leaves some of a growing stack below the area: the kernel extends only its own mapping, not a file's.
///
/// The kernel names only the upper part of a stack that has been split already, so this may find other memory; then it
/// reads a byte there, or nothing. What it writes to the file is overwritten by the area's contents.
fn extend_stack(area: &Area, file: i32) {
    let below = area.start.saturating_sub(16 * PAGE);
    let _ = sys::pwrite(file, below, 1, 0);
}

fn bytes(pages: &Range<usize>) -> Range<usize> {
    pages.start * PAGE..pages.end * PAGE
}
