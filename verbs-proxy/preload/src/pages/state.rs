//! What [`super::acquire`] and [`super::release`] do, under the lock.

use super::maps::{self, Kind, Mapping};
use super::swap::{self, Area};
use super::sys::{self, Identity};
use super::table::{Run, Table};
use super::{PAGE, Regions, Segment};
use alloc::vec::Vec;
use core::ops::Range;

/// The file behind a region.
struct Backing {
    region: u32,
    file: i32,
    identity: Identity,
    /// Pages that runs of the table refer to.
    pages: usize,
}

impl Backing {
    /// The descriptor, unless the application closed it (as daemons do with all that they do not know).
    fn file(&self) -> Option<i32> {
        (sys::identify(self.file) == Ok(self.identity)).then_some(self.file)
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
}

impl State {
    pub const fn new() -> Self {
        Self { table: Table::new(), backings: Vec::new() }
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
                self.drop_pages(&run, true, regions);
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

    pub fn forget(&mut self) {
        self.table.clear();
        for backing in self.backings.drain(..) {
            backing.close();
        }
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
                let area = Area { range: mapping.range, protection: mapping.protection };
                match areas.last_mut() {
                    Some(last) if last.range.end == area.range.start && last.protection == area.protection => {
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
        self.backings.push(Backing { region, file, identity, pages: 0 });
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
        let mut all_private = true;
        if let Some(backing) = self.backings.iter().find(|backing| backing.region == run.region) {
            match (backing.file(), maps::read(bytes(&run.range()))) {
                (Some(file), Ok(mappings)) => {
                    for mapping in mappings.iter().filter(|mapping| backing.is_mapped(run, mapping)) {
                        let area = Area { range: mapping.range.clone(), protection: mapping.protection };
                        all_private &= swap::privatise(&area, file, mapping.offset).is_ok();
                    }
                }
                _ => all_private = false,
            }
        }
        self.drop_pages(run, all_private, regions);
    }

    /// The table does not refer to the run's pages any more. Without `empty` they still show at their address (there was
    /// no memory for private ones): the mapping keeps the file alive, and the contents must stay.
    fn drop_pages(&mut self, run: &Run, empty: bool, regions: &mut dyn Regions) {
        let Some(backing) = self.backings.iter_mut().find(|backing| backing.region == run.region) else { return };
        backing.pages -= run.pages;
        if backing.pages > 0 {
            if let (true, Some(file)) = (empty, backing.file()) {
                sys::punch_hole(file, (run.offset * PAGE) as u64, (run.pages * PAGE) as u64);
            }
        } else {
            self.forget_unused(regions);
        }
    }

    fn forget_unused(&mut self, regions: &mut dyn Regions) {
        self.backings.retain(|backing| {
            if backing.pages == 0 {
                backing.close();
                regions.free(backing.region);
            }
            backing.pages > 0
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
    let needed = if writable { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_READ };
    let mut next = pages.start * PAGE;
    for mapping in mappings {
        if mapping.range.start != next || mapping.protection & needed != needed || mapping.kind == Kind::Kernel {
            return Err(libc::EFAULT);
        }
        next = mapping.range.end;
    }
    if next == pages.end * PAGE { Ok(()) } else { Err(libc::EFAULT) }
}

fn bytes(pages: &Range<usize>) -> Range<usize> {
    pages.start * PAGE..pages.end * PAGE
}
