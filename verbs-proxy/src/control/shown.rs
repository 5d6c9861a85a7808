//! What of a region neighbours may see.
//!
//! A neighbour sees memory through a descriptor, and a descriptor reaches all of its file. So only files are shown that hold nothing
//! but whole pages of the region: bytes beside a region, on its first and last page, are never reachable, nor are other regions of
//! the same file. What lies on such pages is copied for whoever is to have it ([`crate::device::soft::bounce`]), and goes by the
//! responder.

use crate::fabric::neighbours::SharedRun;
use std::ops::Range;

/// The longest row of files that are whole and hold nothing but pages of the region, with its place in the mapping of `runs`, of
/// which `region` is the region.
pub fn whole_files(runs: &[SharedRun], region: &Range<u64>) -> (Range<u64>, Vec<SharedRun>) {
    let whole =
        |run: &SharedRun| run.file.own().is_some_and(|file| run.offset == 0 && run.bytes == file.bytes() as u64);
    row_within(runs.iter().map(|run| (run.bytes, whole(run))), region)
        .map_or((0..0, Vec::new()), |(bytes, row)| (bytes, runs[row].to_vec()))
}

/// Of parts with their bytes that lie side by side, the longest row of those that may be in it and lie in `region`.
fn row_within(parts: impl Iterator<Item = (u64, bool)>, region: &Range<u64>) -> Option<(Range<u64>, Range<usize>)> {
    let (mut best, mut begun, mut at) = (None::<(Range<u64>, Range<usize>)>, None, 0);
    for (index, (bytes, fits)) in parts.enumerate() {
        let part = at..at + bytes;
        at = part.end;
        if !fits || part.start < region.start || part.end > region.end {
            begun = None;
            continue;
        }
        let (first, start) = *begun.get_or_insert((index, part.start));
        if best.as_ref().is_none_or(|(best, _)| best.end - best.start < part.end - start) {
            best = Some((start..part.end, first..index + 1));
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_parts_within_the_region_are_shown() {
        #[track_caller]
        fn case(parts: &[(u64, bool)], region: Range<u64>, expected: Option<(Range<u64>, Range<usize>)>) {
            assert_eq!(row_within(parts.iter().copied(), &region), expected);
        }
        case(&[(8192, true)], 0..8192, Some((0..8192, 0..1)));
        case(&[(8192, true)], 1..8192, None);
        case(&[(8192, true)], 0..8191, None);
        case(&[(8192, false)], 0..8192, None);
        case(&[(4096, true), (8192, true), (4096, true)], 100..16_000, Some((4096..12_288, 1..2)));
        case(&[(4096, true), (8192, true), (4096, true)], 0..16_000, Some((0..12_288, 0..2)));
        case(&[(4096, true), (4096, false), (8192, true)], 0..16_384, Some((8192..16_384, 2..3)));
        case(&[(8192, true), (4096, false), (4096, true)], 0..16_384, Some((0..8192, 0..1)));
        case(&[], 0..0, None);
    }
}
