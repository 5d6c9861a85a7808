//! What [`super::acquire`] and [`super::release`] do, under the lock.

use super::maps::{self, Kind, Mapping};
use super::patch::Patch;
use super::swap::{self, Area};
use super::sys::{self, Identity};
use super::table::{Run, Table};
use super::{PAGE, Regions, Segment};
use super::{bystander, freeze};
use alloc::vec::Vec;
use core::ops::{ControlFlow, Range};

/// The file behind a region.
struct Backing {
    region: u32,
    file: i32,
    identity: Identity,
    /// Pages that runs of the table refer to.
    pages: usize,
    /// Some that runs referred to may still show somewhere: they could not be made private, or were moved.
    astray: bool,
}

impl Backing {
    /// The descriptor, unless the application closed it (as daemons do with all that they do not know).
    fn file(&self) -> Option<i32> {
        (sys::identify(self.file) == Ok(self.identity)).then_some(self.file)
    }

    /// Whether the application sees some of these bytes, at whatever address.
    fn shows(&self, bytes: &Range<u64>, regions: &dyn Regions) -> bool {
        let shows = |mapping: &Mapping| {
            let end = mapping.offset + mapping.range.len() as u64;
            let identity = Identity { device: mapping.device, inode: mapping.inode };
            mapping.shared
                && identity == self.identity
                && mapping.offset < bytes.end
                && bytes.start < end
                && !regions.is_own(mapping.range.start)
        };
        maps::read(0..usize::MAX).map_or(true, |all| all.iter().any(shows))
    }

    /// Whether it must not be freed yet: the proxy empties what is.
    fn is_in_use(&self, regions: &dyn Regions) -> bool {
        self.pages > 0 || (self.astray && self.shows(&(0..u64::MAX), regions))
    }

    fn close(&self) {
        if let Some(file) = self.file() {
            sys::close(file);
        }
    }

    /// Whether the mapping shows the page of this file that `run` says; the application may have mapped something else
    /// there, or nothing.
    fn is_mapped(&self, run: &Run, mapping: &Mapping) -> bool {
        let offset = (run.offset * PAGE + (mapping.range.start - run.first * PAGE)) as u64;
        let identity = Identity { device: mapping.device, inode: mapping.inode };
        mapping.shared && identity == self.identity && mapping.offset == offset
    }
}

pub struct State {
    table: Table,
    backings: Vec<Backing>,
    patches: Vec<Patch>,
}

impl State {
    pub const fn new() -> Self {
        Self { table: Table::new(), backings: Vec::new(), patches: Vec::new() }
    }

    pub fn acquire(
        &mut self,
        pages: Range<usize>,
        writable: bool,
        regions: &mut dyn Regions,
    ) -> Result<Vec<Segment>, i32> {
        let mappings = maps::read(bytes(&pages))?;
        check_access(&pages, &mappings, writable)?;
        let outdated = self.outdated(&pages, &mappings);
        let areas = self.areas(&pages, &mappings, &outdated)?;
        // From here on the table tells the truth: what is not ours any more is a gap.
        for run in &outdated {
            for run in self.table.remove(run.range()) {
                self.drop_pages(&run, false, regions);
            }
        }
        let result = self.share(&areas, &outdated, regions);
        if let Err(error) = result {
            for run in self.table.remove_unheld(pages) {
                self.give_back(&run, regions);
            }
            return Err(error);
        }
        self.table.reference(pages.clone());
        Ok(self.segments(pages))
    }

    pub fn release(&mut self, pages: Range<usize>, regions: &mut dyn Regions) {
        for run in self.table.dereference(pages) {
            self.give_back(&run, regions);
        }
    }

    /// Whether the pages show `segments`, one after the other.
    pub fn still_shows(&self, pages: &Range<usize>, writable: bool, segments: &[Segment]) -> bool {
        let needed = needed(writable);
        let mut next = pages.start * PAGE;
        for segment in segments {
            let Some(backing) = self.backings.iter().find(|backing| backing.region == segment.region) else {
                return false;
            };
            let range = next..next.saturating_add(segment.length as usize);
            let visited = maps::visit(&range, false, |mapping| {
                let Some(mapping) = mapping.clip(&range) else { return ControlFlow::Continue(()) };
                let offset = segment.offset + (mapping.range.start - range.start) as u64;
                if mapping.range.start != next
                    || !mapping.shared
                    || mapping.protection & needed != needed
                    || mapping.identity() != backing.identity
                    || mapping.offset != offset
                {
                    return ControlFlow::Break(());
                }
                next = mapping.range.end;
                ControlFlow::Continue(())
            });
            if visited.is_err() || next != range.end {
                return false;
            }
        }
        next == pages.end * PAGE
    }

    pub fn forget(&mut self) {
        self.table.clear();
        for backing in self.backings.drain(..) {
            backing.close();
        }
        freeze::forget();
    }

    /// What is shared at this moment, for a fork.
    pub fn prepare_patches(&mut self) {
        self.patches.clear();
        let runs = self.table.runs();
        let (Some(first), Some(last)) = (runs.first(), runs.last()) else { return };
        let Ok(mappings) = maps::read(first.first * PAGE..(last.first + last.pages) * PAGE) else { return };
        let mut mappings = &mappings[..];
        for run in runs {
            let range = bytes(&run.range());
            let Some(backing) = self.backings.iter().find(|backing| backing.region == run.region) else { continue };
            mappings = &mappings[mappings.partition_point(|mapping| mapping.range.end <= range.start)..];
            for mapping in mappings.iter().take_while(|mapping| mapping.range.start < range.end) {
                let Some(mapping) = mapping.clone().clip(&range) else { continue };
                if let (true, Some(file)) = (backing.is_mapped(run, &mapping), backing.file()) {
                    let Mapping { range, protection, offset, .. } = mapping;
                    self.patches.push(Patch { range, protection, file, offset });
                }
            }
        }
    }

    pub fn patches(&self) -> &[Patch] {
        &self.patches
    }

    /// Keeps the memory: in a fork's child nothing should be given back.
    pub fn clear_patches(&mut self) {
        self.patches.clear();
    }

    /// The parts of runs whose addresses show other memory today: the application unmapped them while registered.
    fn outdated(&self, pages: &Range<usize>, mappings: &[Mapping]) -> Vec<Run> {
        let mut outdated = Vec::new();
        for run in self.table.overlapping(pages.clone()) {
            let backing = self.backings.iter().find(|backing| backing.region == run.region);
            for mapping in mappings {
                let Some(mapping) = mapping.clone().clip(&bytes(&run.range())) else { continue };
                if !backing.is_some_and(|backing| backing.is_mapped(&run, &mapping)) {
                    outdated.push(run.within(&(mapping.range.start / PAGE..mapping.range.end / PAGE)));
                }
            }
        }
        outdated
    }

    /// What has to be shared: the gaps and the outdated runs, by protection.
    fn areas(&self, pages: &Range<usize>, mappings: &[Mapping], outdated: &[Run]) -> Result<Vec<Area>, i32> {
        let mut ranges = self.table.gaps(pages.clone());
        ranges.extend(outdated.iter().map(Run::range));
        ranges.sort_by_key(|range| range.start);
        let mut areas: Vec<Area> = Vec::new();
        for range in &ranges {
            for mapping in mappings {
                let Some(mapping) = mapping.clone().clip(&bytes(range)) else { continue };
                if mapping.shared || mapping.kind == Kind::Huge {
                    return Err(libc::EOPNOTSUPP);
                }
                let file_backed = mapping.inode != 0;
                let is_stack = mapping.kind == Kind::Stack || bystander::is_own_stack(&mapping.range);
                let area = Area { range: mapping.range, protection: mapping.protection, file_backed, is_stack };
                match areas.last_mut() {
                    Some(last)
                        if last.range.end == area.range.start
                            && last.protection == area.protection
                            && last.file_backed == area.file_backed =>
                    {
                        last.is_stack |= area.is_stack;
                        last.range.end = area.range.end;
                    }
                    _ => areas.push(area),
                }
            }
        }
        Ok(areas)
    }

    /// Shares `areas` by a new region; their runs enter the table with the counts of the outdated ones they replace.
    fn share(&mut self, areas: &[Area], outdated: &[Run], regions: &mut dyn Regions) -> Result<(), i32> {
        let total: usize = areas.iter().map(|area| area.range.len()).sum();
        if total == 0 {
            return Ok(());
        }
        let (region, file) = regions.allocate(total as u64)?;
        let identity = match sys::identify(file) {
            Ok(identity) => identity,
            Err(error) => {
                regions.free(region);
                return Err(error);
            }
        };
        sys::close_on_exec(file);
        self.backings.push(Backing { region, file, identity, pages: 0, astray: false });
        areas.iter().filter(|area| area.is_stack).for_each(|area| extend_stack(area, file));
        let mut offset = 0;
        let mut result = Ok(());
        for area in areas {
            let mut done = 0;
            result = swap::share(area, file, offset as u64, &mut done);
            let run =
                Run { first: area.range.start / PAGE, pages: done / PAGE, count: 0, region, offset: offset / PAGE };
            if done > 0 {
                self.insert(run, outdated);
            }
            if result.is_err() {
                break;
            }
            offset += done;
        }
        if result.is_err() {
            self.forget_unused(regions);
        }
        result
    }

    fn insert(&mut self, run: Run, outdated: &[Run]) {
        if let Some(backing) = self.backings.iter_mut().find(|backing| backing.region == run.region) {
            backing.pages += run.pages;
        }
        self.table.insert(run);
        for old in outdated.iter().filter(|old| old.first < run.first + run.pages && run.first < old.first + old.pages)
        {
            for _ in 0..old.count {
                self.table.reference(run.within(&old.range()).range());
            }
        }
    }

    /// Makes the pages of a run that left the table private again.
    fn give_back(&mut self, run: &Run, regions: &mut dyn Regions) {
        let mut private = 0;
        if let Some(backing) = self.backings.iter().find(|backing| backing.region == run.region)
            && let (Some(file), Ok(mappings)) = (backing.file(), maps::read(bytes(&run.range())))
        {
            for mapping in mappings.iter().filter(|mapping| backing.is_mapped(run, mapping)) {
                let (range, protection) = (mapping.range.clone(), mapping.protection);
                let length = range.len();
                let area = Area { range, protection, file_backed: true, is_stack: false };
                if swap::privatise(&area, file, mapping.offset).is_ok() {
                    private += length / PAGE;
                }
            }
        }
        self.drop_pages(run, private == run.pages, regions);
    }

    /// The table does not refer to the run's pages any more. Without `empty` they may still show, at their address (there was
    /// no memory for private ones) or where the application moved them: the contents must stay while they do.
    fn drop_pages(&mut self, run: &Run, empty: bool, regions: &mut dyn Regions) {
        let Some(backing) = self.backings.iter_mut().find(|backing| backing.region == run.region) else { return };
        backing.pages -= run.pages;
        let (start, length) = ((run.offset * PAGE) as u64, (run.pages * PAGE) as u64);
        let empty = empty || !backing.shows(&(start..start + length), regions);
        backing.astray |= !empty;
        if backing.pages > 0 {
            if let (true, Some(file)) = (empty, backing.file()) {
                sys::punch_hole(file, start, length);
            }
        } else {
            self.forget_unused(regions);
        }
    }

    fn forget_unused(&mut self, regions: &mut dyn Regions) {
        self.backings.retain(|backing| {
            let used = backing.is_in_use(regions);
            if !used {
                backing.close();
                regions.free(backing.region);
            }
            used
        });
    }

    fn segments(&self, pages: Range<usize>) -> Vec<Segment> {
        let mut segments: Vec<Segment> = Vec::new();
        for run in self.table.overlapping(pages) {
            let (offset, length) = ((run.offset * PAGE) as u64, (run.pages * PAGE) as u64);
            match segments.last_mut() {
                Some(last) if last.region == run.region && last.offset + last.length == offset => last.length += length,
                _ => segments.push(Segment { region: run.region, offset, length }),
            }
        }
        segments
    }
}

fn check_access(pages: &Range<usize>, mappings: &[Mapping], writable: bool) -> Result<(), i32> {
    let needed = needed(writable);
    let mut next = pages.start * PAGE;
    for mapping in mappings {
        if mapping.range.start != next || mapping.protection & needed != needed || mapping.kind == Kind::Kernel {
            return Err(libc::EFAULT);
        }
        next = mapping.range.end;
    }
    if next == pages.end * PAGE { Ok(()) } else { Err(libc::EFAULT) }
}

fn needed(writable: bool) -> i32 {
    if writable { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_READ }
}

/// Leaves some of a growing stack below the area: the kernel extends only its own mapping, not a file's.
///
/// The kernel names only the upper part of a stack that has been split already, so this may find other memory; then it
/// reads a byte there, or nothing. What it writes to the file is overwritten by the area's contents.
fn extend_stack(area: &Area, file: i32) {
    let below = area.range.start.saturating_sub(16 * PAGE);
    let _ = sys::pwrite(file, below, 1, 0);
}

fn bytes(pages: &Range<usize>) -> Range<usize> {
    pages.start * PAGE..pages.end * PAGE
}
