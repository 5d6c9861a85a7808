//! Which pages are shared with the proxy, where, and for how many registrations.

use super::PAGE;
use super::array::Array;
use core::ops::Range;

/// Consecutive pages backed by consecutive bytes of one region and held by equally many registrations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Page number: address divided by the page size.
    pub first: usize,
    pub pages: usize,
    pub count: u32,
    pub region: u32,
    /// Page number in the region.
    pub offset: usize,
    /// Where the application's own mapping is kept meanwhile, emptied; zero if it was not.
    pub aside: usize,
}

impl Run {
    pub fn range(&self) -> Range<usize> {
        self.first..self.first + self.pages
    }

    fn end(&self) -> usize {
        self.first + self.pages
    }

    /// The part of the run inside `range`, which must overlap it.
    pub fn within(&self, range: &Range<usize>) -> Run {
        let first = self.first.max(range.start);
        let end = self.end().min(range.end);
        let skipped = first - self.first;
        let aside = if self.aside == 0 { 0 } else { self.aside + skipped * PAGE };
        Run { first, pages: end - first, offset: self.offset + skipped, aside, ..*self }
    }

    /// What is kept of the application's mapping at `address`, which must be in the run.
    pub fn aside_at(&self, address: usize) -> usize {
        if self.aside == 0 { 0 } else { self.aside + (address - self.first * PAGE) }
    }

    fn precedes(&self, next: &Run) -> bool {
        let aside = if self.aside == 0 { 0 } else { self.aside + self.pages * PAGE };
        self.end() == next.first
            && self.region == next.region
            && self.offset + self.pages == next.offset
            && aside == next.aside
    }
}

/// Runs sorted by page, never overlapping.
pub struct Table {
    runs: Array<Run>,
}

impl Table {
    pub const fn new() -> Self {
        Self { runs: Array::new() }
    }

    /// Makes room for a registration that adds so many runs, and for whatever splits it may cause in its life.
    pub fn reserve(&mut self, runs: usize) -> Result<(), i32> {
        self.runs.reserve(self.runs.len() + 2 * runs + 16)
    }

    #[cfg(test)]
    fn runs(&self) -> &[Run] {
        &self.runs
    }

    pub fn clear(&mut self) {
        self.runs.clear();
    }

    /// The parts of runs inside `range`, by page.
    pub fn overlapping(&self, range: Range<usize>) -> impl Iterator<Item = Run> + '_ {
        let runs = &self.runs[self.position(range.start)..];
        let end = range.end;
        runs.iter().take_while(move |run| run.first < end).map(move |run| run.within(&range))
    }

    /// The run that holds the page.
    pub fn at(&self, page: usize) -> Option<&Run> {
        self.runs.get(self.position(page)).filter(|run| run.first <= page)
    }

    /// Where the next run begins that begins after `page`.
    pub fn next_after(&self, page: usize) -> usize {
        self.runs.get(self.runs.partition_point(|run| run.first <= page)).map_or(usize::MAX, |run| run.first)
    }

    /// Adds a run in a gap.
    pub fn insert(&mut self, run: Run) {
        debug_assert!(self.overlapping(run.range()).next().is_none(), "{run:?} overlaps another run");
        let at = self.position(run.first);
        self.runs.insert(at, run);
    }

    /// One more registration for each page of `range`; pages without a run stay without.
    pub fn reference(&mut self, range: Range<usize>) {
        let indices = self.isolate(&range);
        for run in &mut self.runs[indices.clone()] {
            run.count += 1;
        }
        self.join(indices);
    }

    /// One registration less for each page of `range`; the runs that nobody holds any more move from the table to `out`.
    pub fn dereference(&mut self, range: Range<usize>, out: &mut Array<Run>) {
        let indices = self.isolate(&range);
        for run in &mut self.runs[indices.clone()] {
            run.count = run.count.saturating_sub(1);
        }
        self.take(indices, |run| run.count == 0, out);
    }

    /// Moves the runs inside `range` from the table to `out`, whoever holds them.
    pub fn remove(&mut self, range: Range<usize>, out: &mut Array<Run>) {
        let indices = self.isolate(&range);
        self.take(indices, |_| true, out);
    }

    /// Moves the runs inside `range` that nobody holds from the table to `out`.
    pub fn remove_unheld(&mut self, range: Range<usize>, out: &mut Array<Run>) {
        let indices = self.isolate(&range);
        self.take(indices, |run| run.count == 0, out);
    }

    /// Index of the first run that ends after `page`.
    fn position(&self, page: usize) -> usize {
        self.runs.partition_point(|run| run.end() <= page)
    }

    /// Splits runs at both ends of `range`; the indices of those inside.
    fn isolate(&mut self, range: &Range<usize>) -> Range<usize> {
        self.split(range.start);
        self.split(range.end);
        self.position(range.start)..self.runs.partition_point(|run| run.first < range.end)
    }

    fn split(&mut self, page: usize) {
        let at = self.position(page);
        let Some(run) = self.runs.get(at).copied().filter(|run| run.first < page) else { return };
        self.runs[at] = run.within(&(page..run.end()));
        self.runs.insert(at, run.within(&(run.first..page)));
    }

    fn take(&mut self, indices: Range<usize>, wanted: impl Fn(&Run) -> bool, taken: &mut Array<Run>) {
        let mut kept = indices.start;
        for index in indices.clone() {
            let run = self.runs[index];
            if !wanted(&run) {
                self.runs[kept] = run;
                kept += 1;
            } else if let Some(last) = taken.last_mut().filter(|last| last.precedes(&run)) {
                last.pages += run.pages;
            } else {
                taken.push(run);
            }
        }
        self.runs.remove(kept..indices.end);
        self.join(indices.start..kept);
    }

    /// Merges runs in and next to `indices` that a split has separated and nothing separates any more.
    fn join(&mut self, indices: Range<usize>) {
        let first = indices.start.saturating_sub(1);
        let last = (indices.end + 1).min(self.runs.len());
        let mut kept = first;
        for index in first + 1..last {
            let run = self.runs[index];
            let previous = &mut self.runs[kept];
            if previous.precedes(&run) && previous.count == run.count {
                previous.pages += run.pages;
            } else {
                kept += 1;
                self.runs[kept] = run;
            }
        }
        if kept + 1 < last {
            self.runs.remove(kept + 1..last);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    fn at(table: &Table, page: usize) -> Option<Run> {
        table.overlapping(page..page + 1).next()
    }

    fn run(first: usize, pages: usize, count: u32) -> Run {
        Run { first, pages, count, region: 7, offset: first - 10, aside: first * PAGE + (1 << 20) }
    }

    /// The runs that `change` takes out.
    fn taken(table: &mut Table, change: impl FnOnce(&mut Table, &mut Array<Run>)) -> Vec<Run> {
        let mut out = Array::new();
        change(table, &mut out);
        out.to_vec()
    }

    /// The pages of `range` without a run.
    fn gaps(table: &Table, range: Range<usize>) -> Vec<Range<usize>> {
        let mut gaps: Vec<Range<usize>> = Vec::new();
        for page in range.filter(|&page| table.at(page).is_none()) {
            match gaps.last_mut() {
                Some(last) if last.end == page => last.end = page + 1,
                _ => gaps.push(page..page + 1),
            }
        }
        gaps
    }

    #[test]
    fn overlapping_registrations_split_and_join_again() {
        let mut table = Table::new();
        table.insert(run(10, 10, 1));
        table.reference(13..16);
        assert_eq!(table.runs(), [run(10, 3, 1), run(13, 3, 2), run(16, 4, 1)]);
        assert_eq!(taken(&mut table, |table, out| table.dereference(13..16, out)), []);
        assert_eq!(table.runs(), [run(10, 10, 1)]);
    }

    #[test]
    fn pages_leave_with_their_last_registration() {
        let mut table = Table::new();
        table.insert(run(10, 10, 1));
        table.reference(13..16);
        let freed = taken(&mut table, |table, out| table.dereference(10..20, out));
        assert_eq!(freed, [run(10, 3, 0), run(16, 4, 0)]);
        assert_eq!(gaps(&table, 8..22), [8..13, 16..22]);
        assert_eq!((table.next_after(8), table.next_after(13)), (13, usize::MAX));
        let freed = taken(&mut table, |table, out| table.dereference(13..16, out));
        assert_eq!(freed, [run(13, 3, 0)]);
        assert!(table.runs().is_empty());
    }

    #[test]
    fn unrelated_neighbours_stay_apart() {
        let mut table = Table::new();
        table.insert(run(10, 2, 1));
        table.insert(Run { region: 8, ..run(12, 2, 1) });
        table.insert(Run { region: 8, offset: 9, ..run(14, 2, 1) });
        table.insert(Run { region: 8, offset: 11, ..run(16, 2, 1) });
        table.insert(Run { region: 8, offset: 13, aside: 0, ..run(18, 2, 1) });
        table.reference(10..20);
        assert_eq!(table.runs().len(), 4);
        assert_eq!(at(&table, 13).map(|run| run.region), Some(8));
        assert_eq!(at(&table, 20), None);
    }

    #[derive(Clone, Debug)]
    enum Step {
        Acquire(Range<usize>),
        Release(usize),
        Remove(Range<usize>),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let range = || (0usize..40, 1usize..12).prop_map(|(first, pages)| first..first + pages);
        let step = prop_oneof![
            4 => range().prop_map(Step::Acquire),
            3 => (0usize..16).prop_map(Step::Release),
            1 => range().prop_map(Step::Remove),
        ];
        proptest::collection::vec(step, 0..80)
    }

    proptest! {
        /// The model keeps one entry a page: count, region, offset.
        #[test]
        fn behaves_like_a_map_of_pages(steps in steps()) {
            let mut table = Table::new();
            let mut model: BTreeMap<usize, (u32, u32, usize)> = BTreeMap::new();
            let mut held: Vec<Range<usize>> = Vec::new();
            for (region, step) in (1u32..).zip(steps) {
                match step {
                    Step::Acquire(range) => {
                        let mut offset = 0;
                        for gap in gaps(&table, range.clone()) {
                            for page in gap.clone() {
                                prop_assert!(!model.contains_key(&page));
                                model.insert(page, (0, region, offset + page - gap.start));
                            }
                            let run = Run { pages: gap.len(), count: 0, region, offset, ..run(gap.start.max(10), 1, 0) };
                            let run = Run { first: gap.start, ..run };
                            table.insert(run);
                            offset += gap.len();
                        }
                        table.reference(range.clone());
                        for page in range.clone() {
                            model.get_mut(&page).expect("no gap is left").0 += 1;
                        }
                        held.push(range);
                    }
                    Step::Release(which) if which < held.len() => {
                        let range = held.swap_remove(which);
                        let freed = taken(&mut table, |table, out| table.dereference(range.clone(), out));
                        let mut expected = Vec::new();
                        for page in range {
                            let Some(entry) = model.get_mut(&page) else { continue };
                            entry.0 -= 1;
                            if entry.0 == 0 {
                                expected.push((page, entry.1, entry.2));
                                model.remove(&page);
                            }
                        }
                        let pages = |run: &Run| {
                            let run = *run;
                            run.range().map(move |page| (page, run.region, run.offset + page - run.first))
                        };
                        prop_assert_eq!(freed.iter().flat_map(pages).collect::<Vec<_>>(), expected);
                    }
                    Step::Release(_) => {}
                    Step::Remove(range) => {
                        taken(&mut table, |table, out| table.remove(range.clone(), out));
                        model.retain(|page, _| !range.contains(page));
                        held.retain(|other| other.end <= range.start || range.end <= other.start);
                        // Those that overlapped are forgotten, so their other pages go as well.
                        let lost: Vec<usize> =
                            model.keys().copied().filter(|page| !held.iter().any(|range| range.contains(page))).collect();
                        for page in lost {
                            taken(&mut table, |table, out| table.remove(page..page + 1, out));
                            model.remove(&page);
                        }
                        for (page, entry) in &mut model {
                            let count = held.iter().filter(|range| range.contains(page)).count() as u32;
                            while entry.0 > count {
                                entry.0 -= 1;
                                taken(&mut table, |table, out| table.dereference(*page..page + 1, out));
                            }
                        }
                    }
                }
                let mut previous: Option<Run> = None;
                for run in table.runs() {
                    prop_assert!(run.pages > 0 && run.count > 0);
                    if let Some(previous) = previous {
                        prop_assert!(previous.end() <= run.first);
                        prop_assert!(!(previous.precedes(run) && previous.count == run.count));
                    }
                    previous = Some(*run);
                }
                for page in 0..60 {
                    let found = at(&table, page).map(|run| (run.count, run.region, run.offset));
                    prop_assert_eq!(found, model.get(&page).copied());
                }
            }
        }
    }
}
