//! Quantities as users write them: `10Gbit`, `4GiB`, `10k`.

use std::ops::RangeInclusive;

/// The largest number that a CPU can have.
const MAX_CPU: u32 = 8191;

/// Bit rates and their factor; decimal, as everywhere in networking.
const RATES: [(&str, u64); 5] =
    [("tbit", 1_000_000_000_000), ("gbit", 1_000_000_000), ("mbit", 1_000_000), ("kbit", 1_000), ("bit", 1)];

/// Operations per second and their factor; decimal, as rates are.
const OPS: [(&str, u64); 3] = [("G", 1_000_000_000), ("M", 1_000_000), ("k", 1_000)];

/// Sizes and their factor: IEC units, their Kubernetes short forms, and SI units with their `B`. A bare `G` is missing on
/// purpose: Kubernetes reads it as decimal and docker as binary.
const SIZES: [(&str, u64); 13] = [
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("Ti", 1 << 40),
    ("Gi", 1 << 30),
    ("Mi", 1 << 20),
    ("Ki", 1 << 10),
    ("TB", 1_000_000_000_000),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("kB", 1_000),
    ("KB", 1_000),
];

/// What [`rate`] takes, for messages.
pub const RATE_EXPECTED: &str =
    "a number and one of bit, kbit, mbit, gbit, tbit (powers of 1000, bits per second), such as 10Gbit or 2.5gbit";
/// What [`ops`] takes, for messages.
pub const OPS_EXPECTED: &str =
    "operations per second, or a number and one of k, M, G (powers of 1000), such as 10k or 2.5M";
/// What [`size`] takes, for messages.
pub const SIZE_EXPECTED: &str = "bytes, or a number and one of kB, MB, GB, TB, KiB, MiB, GiB, TiB, such as 4GiB";
/// What [`count`] takes, for messages.
pub const COUNT_EXPECTED: &str = "a whole number from 1 to 4294967295";

/// Bits per second, more than zero. `gbps` and the like are refused: tc reads them as bytes and others as bits.
pub fn rate(text: &str) -> Option<u64> {
    let (unit, factor) = RATES.iter().find(|(unit, _)| ends_with_ignoring_case(text, unit))?;
    scaled(&text[..text.len() - unit.len()], *factor)
}

/// Operations per second, more than zero.
pub fn ops(text: &str) -> Option<u64> {
    match OPS.iter().find(|(unit, _)| text.ends_with(unit)) {
        Some((unit, factor)) => scaled(&text[..text.len() - unit.len()], *factor),
        None => scaled(text, 1),
    }
}

/// Bytes, more than zero.
pub fn size(text: &str) -> Option<u64> {
    match SIZES.iter().find(|(unit, _)| text.ends_with(unit)) {
        Some((unit, factor)) => scaled(&text[..text.len() - unit.len()], *factor),
        None => scaled(text.strip_suffix('B').unwrap_or(text), 1),
    }
}

/// A number of objects, more than zero.
pub fn count(text: &str) -> Option<u32> {
    scaled(text, 1)?.try_into().ok()
}

/// CPUs or memory nodes as the kernel lists them, `0-3,8` (`cpuset(7)`, "List format"): ranges with both ends.
pub fn cpu_list(text: &str) -> Option<Vec<RangeInclusive<u32>>> {
    let number = |text: &str| {
        let digits = (1..=5).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_digit());
        digits.then(|| text.parse().ok())?.filter(|number| *number <= MAX_CPU)
    };
    let range = |text: &str| {
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        let (first, last) = (number(first)?, number(last)?);
        (first <= last).then_some(first..=last)
    };
    text.split(',').map(range).collect()
}

/// `bits` per second in the shortest form that [`rate`] reads back exactly.
pub fn show_rate(bits: u64) -> String {
    const NAMES: [(&str, u64); 5] =
        [("Tbit", 1_000_000_000_000), ("Gbit", 1_000_000_000), ("Mbit", 1_000_000), ("kbit", 1_000), ("bit", 1)];
    shortest(bits, &NAMES)
}

/// `ops` per second in the shortest form that [`ops`] reads back exactly.
pub fn show_ops(ops: u64) -> String {
    shortest(ops, &[OPS[0], OPS[1], OPS[2], ("", 1)])
}

/// `bytes` in the shortest form, binary, that [`size`] reads back exactly.
pub fn show_size(bytes: u64) -> String {
    shortest(bytes, &[SIZES[0], SIZES[1], SIZES[2], SIZES[3], ("", 1)])
}

/// `value` in one of these units, the last of which is 1, with at most three decimals; of two that are as short, in the larger.
fn shortest(value: u64, units: &[(&str, u64)]) -> String {
    let fit = units.iter().filter(|(_, factor)| *factor == 1 || *factor <= value);
    let shown = fit.filter_map(|(unit, factor)| {
        let thousandths = u128::from(value) * 1000;
        let factor = u128::from(*factor);
        thousandths.is_multiple_of(factor).then(|| {
            let (whole, decimals) = (thousandths / factor / 1000, thousandths / factor % 1000);
            let decimals = format!(".{decimals:03}");
            format!("{whole}{}{unit}", decimals.trim_end_matches('0').trim_end_matches('.'))
        })
    });
    shown.min_by_key(String::len).unwrap_or_default()
}

fn ends_with_ignoring_case(text: &str, unit: &str) -> bool {
    let (text, unit) = (text.as_bytes(), unit.as_bytes());
    text.len() >= unit.len() && text[text.len() - unit.len()..].eq_ignore_ascii_case(unit)
}

/// `number` times `factor`, if that is a whole number above zero. At most three decimals, so that no value is ever rounded.
fn scaled(number: &str, factor: u64) -> Option<u64> {
    let (whole, decimals) = number.split_once('.').map_or((number, None), |(whole, rest)| (whole, Some(rest)));
    let digits = |s: &str| !s.is_empty() && s.bytes().all(|b| b.is_ascii_digit());
    if !digits(whole) || decimals.is_some_and(|d| !digits(d) || d.len() > 3) {
        return None;
    }
    let decimals = decimals.unwrap_or("");
    let thousandths = decimals.parse::<u128>().unwrap_or(0) * 10u128.pow(3 - decimals.len() as u32);
    let total = whole.parse::<u64>().ok()? as u128 * 1000 + thousandths;
    let total = total * u128::from(factor);
    (total > 0 && total.is_multiple_of(1000)).then_some(total / 1000)?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn rates() {
        for (text, expected) in [
            ("10Gbit", Some(10_000_000_000)),
            ("10gbit", Some(10_000_000_000)),
            ("100Mbit", Some(100_000_000)),
            ("2.5Gbit", Some(2_500_000_000)),
            ("1kbit", Some(1000)),
            ("1TBIT", Some(1_000_000_000_000)),
            ("7bit", Some(7)),
            ("0.5bit", None),
            ("0Gbit", None),
            ("10", None),
            ("10gbps", None),
            ("10Gb", None),
            ("10Gib", None),
            ("gbit", None),
            ("", None),
            ("-1gbit", None),
            ("+1gbit", None),
            ("1 gbit", None),
            ("1e3gbit", None),
            ("1.gbit", None),
            (".5gbit", None),
            ("1.2345gbit", None),
            ("99999999tbit", None),
            ("999999999999999999999999bit", None),
            ("10Gbït", None),
            ("١Gbit", None),
        ] {
            assert_eq!(rate(text), expected, "{text:?}");
        }
    }

    #[test]
    fn operations() {
        for (text, expected) in [
            ("10k", Some(10_000)),
            ("2.5M", Some(2_500_000)),
            ("1G", Some(1_000_000_000)),
            ("1", Some(1)),
            ("7.5", None),
            ("0k", None),
            ("10K", None),
            ("10m", None),
            ("10k/s", None),
            ("10 k", None),
            ("k", None),
            ("", None),
            ("99999999999999999G", None),
        ] {
            assert_eq!(ops(text), expected, "{text:?}");
        }
    }

    #[test]
    fn sizes() {
        for (text, expected) in [
            ("4GiB", Some(4 << 30)),
            ("512MiB", Some(512 << 20)),
            ("1GB", Some(1_000_000_000)),
            ("4Gi", Some(4 << 30)),
            ("1.5KiB", Some(1536)),
            ("65536", Some(65536)),
            ("4096B", Some(4096)),
            ("0.3KiB", None),
            ("4G", None),
            ("4gib", None),
            ("0", None),
            ("", None),
            ("B", None),
            ("-4GiB", None),
            ("16777216TiB", None),
        ] {
            assert_eq!(size(text), expected, "{text:?}");
        }
    }

    #[test]
    fn counts() {
        for (text, expected) in [
            ("1", Some(1)),
            ("4294967295", Some(u32::MAX)),
            ("4294967296", None),
            ("0", None),
            ("1k", None),
            ("", None),
        ] {
            assert_eq!(count(text), expected, "{text:?}");
        }
    }

    #[test]
    fn lists_of_cpus() {
        for (text, expected) in [
            ("0", Some(vec![0..=0])),
            ("0-3,8", Some(vec![0..=3, 8..=8])),
            ("8191", Some(vec![8191..=8191])),
            ("8192", None),
            ("3-0", None),
            ("", None),
            (",", None),
            ("0-", None),
            ("-1", None),
            ("0,,1", None),
            ("0 1", None),
            ("0-7:1/2", None),
            ("all", None),
        ] {
            assert_eq!(cpu_list(text), expected, "{text:?}");
        }
    }

    #[test]
    fn the_shortest_form_is_shown() {
        for (value, rate, ops, size) in [
            (1, "1bit", "1", "1"),
            (999, "999bit", "999", "999"),
            (1_000, "1kbit", "1k", "1000"),
            (1_500, "1.5kbit", "1.5k", "1500"),
            (1_001, "1001bit", "1001", "1001"),
            (1_536, "1536bit", "1536", "1536"),
            (65_536, "65536bit", "65536", "64KiB"),
            (100_000, "100kbit", "100k", "100000"),
            (2_500_000, "2.5Mbit", "2.5M", "2500000"),
            (2_500_000_000, "2.5Gbit", "2.5G", "2500000000"),
            (1_234_567_000, "1234567kbit", "1234567k", "1234567000"),
            (3 << 29, "1610612736bit", "1610612736", "1.5GiB"),
            (40_000_000_000_000, "40Tbit", "40000G", "39062500000KiB"),
        ] {
            assert_eq!((&*show_rate(value), &*show_ops(value), &*show_size(value)), (rate, ops, size), "{value}");
        }
    }

    proptest! {
        #[test]
        fn what_is_shown_reads_back(value in 1..u64::MAX) {
            prop_assert_eq!(rate(&show_rate(value)), Some(value));
            prop_assert_eq!(size(&show_size(value)), Some(value));
            prop_assert_eq!(ops(&show_ops(value)), Some(value));
        }

        #[test]
        fn no_text_panics(text in ".*") {
            let _ = (rate(&text), ops(&text), size(&text), count(&text), cpu_list(&text));
        }
    }
}
