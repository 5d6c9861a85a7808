//! What containers counted, as people read it: rates against limits.

use crate::output::{self, plain};
use ringfence_hook::Container;
use ringfence_hook::card_counters::CardCounters;
use ringfence_hook::units::{show_ops, show_rate, show_size};
use ringfence_launch::Limits;
use ringfence_launch::counters::{OPCODES, Page, QUOTAS, STATUSES};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// What one container has counted at one moment.
#[derive(Debug)]
pub struct Sample {
    /// The container.
    pub container: Container,
    /// Its counters, or why there are none.
    pub counted: Result<Page, String>,
    /// What its card counts, if it does.
    pub card: Option<CardCounters>,
    /// When: milliseconds since 1970.
    pub time_ms: u64,
    at: Instant,
}

/// What it did between two of them, per second.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rates {
    /// Bits that left its memory.
    pub out: f64,
    /// Bits that its READs and atomics brought in.
    pub fetched: f64,
    /// Bits that were sent and written to it.
    pub into: f64,
    /// Its work requests.
    pub operations: f64,
    /// Those that it carried out for others.
    pub served: f64,
    /// The part of the time in which queue pairs waited, 0 to 1.
    pub throttled: f64,
    /// Against these.
    pub limits: Limits,
}

impl Sample {
    /// Now.
    pub fn new(container: Container, counted: Result<Page, String>, card: Option<CardCounters>) -> Self {
        let time_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64);
        Self { container, counted, card, time_ms, at: Instant::now() }
    }

    /// What was done since `before`; nothing without that, or if it is another container of the same id.
    pub fn rates(&self, before: Option<&Sample>) -> Rates {
        let limits = self.container.limits.clone().unwrap_or_default();
        let nothing = Rates { limits: limits.clone(), ..Rates::default() };
        let (Ok(now), Some(before)) = (&self.counted, before) else { return nothing };
        let Ok(then) = &before.counted else { return nothing };
        if before.container.init != self.container.init {
            return nothing;
        }
        let seconds = self.at.saturating_duration_since(before.at).as_secs_f64().max(1e-9);
        // Forged counts may go back.
        let per_second = |count: fn(&Page) -> u64| count(now).saturating_sub(count(then)) as f64 / seconds;
        Rates {
            out: 8.0 * per_second(Page::bytes_out),
            fetched: 8.0 * per_second(Page::bytes_fetched),
            into: 8.0 * per_second(Page::bytes_in),
            operations: per_second(Page::operations),
            served: per_second(Page::operations_received),
            throttled: (per_second(|page| page.throttled_ns) / 1e9).min(1.0),
            limits,
        }
    }
}

/// A number with three digits and a decimal prefix.
pub fn about(value: f64, unit: &str) -> String {
    const PREFIXES: [&str; 7] = ["", "k", "M", "G", "T", "P", "E"];
    let (mut value, mut prefix) = (value, 0);
    // What rounds to a thousand has the next prefix.
    while value >= 999.5 && prefix + 1 < PREFIXES.len() {
        (value, prefix) = (value / 1000.0, prefix + 1);
    }
    let decimals = match value {
        value if prefix == 0 && (value.fract() == 0.0 || value >= 10.0) => 0,
        value if value < 9.995 => 2,
        value if value < 99.95 => 1,
        _ => 0,
    };
    let digits = format!("{value:.decimals$}");
    let digits = if digits.contains('.') { digits.trim_end_matches('0').trim_end_matches('.') } else { &digits };
    format!("{digits}{}{unit}", PREFIXES[prefix])
}

/// A rate against its limit, if it has one.
pub fn share_of(rate: String, limit: Option<String>) -> String {
    format!("{rate}/{}", limit.as_deref().unwrap_or("-"))
}

/// Bytes in a binary unit, rounded down to two digits at least.
pub fn size(bytes: u64) -> String {
    let unit = [1u64 << 40, 1 << 30, 1 << 20, 1 << 10].into_iter().find(|unit| bytes >= 10 * unit).unwrap_or(1);
    exact_size(bytes / unit * unit)
}

/// Bytes in the largest binary unit that shows them exactly.
fn exact_size(bytes: u64) -> String {
    if bytes == 0 { "0".into() } else { show_size(bytes) }
}

/// What `share` of the requests waited at most.
pub fn delay(page: &Page, share: f64) -> String {
    match page.delay_quantile(share) {
        None => "-".into(),
        Some(0) => "0".into(),
        Some(nanos) => {
            let (value, unit) = match nanos {
                nanos if nanos < 1 << 10 => (nanos as f64, "ns"),
                nanos if nanos < 1 << 20 => (nanos as f64 / 1e3, "us"),
                nanos if nanos < 1 << 30 => (nanos as f64 / 1e6, "ms"),
                nanos => (nanos as f64 / 1e9, "s"),
            };
            format!("{}{unit}", about(value, ""))
        }
    }
}

/// All that one container has counted.
pub fn describe(sample: &Sample, before: Option<&Sample>) -> String {
    let Ok(page) = &sample.counted else { return String::new() };
    let rates = sample.rates(before);
    let limit = |limit: Option<String>| limit.unwrap_or_else(|| "-".into());
    let limits = &rates.limits;
    let row = |cells: [&str; 3]| cells.map(str::to_owned);
    let mut text = format!("container {}\n\n", plain(&sample.container.id));
    text += &output::table(&[
        row(["", "PER SECOND", "LIMIT"]),
        row(["out", &about(rates.out, "bit"), &limit(limits.bandwidth.map(|rate| show_rate(rate.bits())))]),
        row(["fetched", &about(rates.fetched, "bit"), &limit(limits.bandwidth_rx.map(|rate| show_rate(rate.bits())))]),
        row(["in", &about(rates.into, "bit"), ""]),
        row(["operations", &about(rates.operations, ""), &limit(limits.ops.map(|rate| show_ops(rate.ops())))]),
        row(["operations for others", &about(rates.served, ""), ""]),
        row(["throttled", &format!("{:.0}%", rates.throttled * 100.0), ""]),
    ]);
    text += "\n";
    text += &output::table(&work(page));
    text += "\n";
    text += &output::table(&quotas(page));
    text += "\n";
    text += &output::table(&others(page));
    if let Some(card) = &sample.card {
        text += "\n";
        text += &output::table(&of_card(card));
    }
    text
}

fn of_card(card: &CardCounters) -> Vec<[String; 2]> {
    let header = ["CARD".to_owned(), String::new()];
    let queue_pairs = ["queue pairs that it counts".to_owned(), card.queue_pairs.to_string()];
    let values = card.values.iter().map(|(name, value)| [plain(name), value.to_string()]);
    [header, queue_pairs].into_iter().chain(values).collect()
}

fn work(page: &Page) -> Vec<[String; 5]> {
    let header = ["REQUESTS", "SENT", "BYTES", "RECEIVED", "BYTES"].map(str::to_owned);
    let rows = OPCODES.iter().zip(page.sent).zip(page.received).map(|((name, sent), received)| {
        let numbers = [sent.operations, sent.bytes, received.operations, received.bytes].map(|n| n.to_string());
        let [a, b, c, d] = numbers;
        [(*name).to_owned(), a, b, c, d]
    });
    [header].into_iter().chain(rows).collect()
}

fn quotas(page: &Page) -> Vec<[String; 3]> {
    let header = ["QUOTA", "USED", "LIMIT"].map(str::to_owned);
    let rows = QUOTAS.iter().zip(page.quotas).map(|(name, quota)| {
        let show = |value: u64| if name.ends_with("bytes") { exact_size(value) } else { value.to_string() };
        [(*name).to_owned(), show(quota.used), show(quota.limit)]
    });
    [header].into_iter().chain(rows).collect()
}

fn others(page: &Page) -> Vec<[String; 2]> {
    let errors = STATUSES.iter().zip(page.errors).skip(1).filter(|(_, count)| *count > 0);
    let mut rows: Vec<[String; 2]> =
        errors.map(|(name, count)| [format!("completions with {name}"), count.to_string()]).collect();
    let delays = [0.5, 0.99, 0.999].map(|share| delay(page, share)).join(", ");
    rows.push(["queueing delay of 50%, 99%, 99.9%, at most".into(), delays]);
    let counts = [
        ("throttled, ms", page.throttled_ns / 1_000_000),
        ("tried again, receiver not ready", page.rnr_received),
        ("answered so", page.rnr_sent),
        ("tried again, no answer in time", page.timeouts),
        ("came again", page.repeated),
        ("READs of others put off for the rate", page.reads_deferred),
        ("completions lost, queue full", page.completions_lost),
        ("links to other proxies", page.links),
        ("of all that there were", page.links_made),
        ("of them failed", page.links_failed),
        ("lines that the proxy said", page.lines),
        ("of them not logged", page.lines_unlogged),
    ];
    rows.extend(counts.map(|(name, count)| [name.to_owned(), count.to_string()]));
    rows
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use ringfence_hook::Status;
    use ringfence_launch::BitRate;
    use ringfence_launch::counters::{BYTES, MAGIC, Quota, VERSION, Work};
    use std::time::Duration;

    pub fn container(id: &str) -> Container {
        Container {
            id: id.into(),
            init: Some(Status { pid: 10, alive: true }),
            proxy: Some(Status { pid: 11, alive: true }),
            device: "soft0".into(),
            policy: "gold".into(),
            limits: Some(Limits { bandwidth: BitRate::new(10_000_000_000), ..Default::default() }),
            since: 100,
            cgroups: Vec::new(),
            unit: None,
            memory: None,
            warnings: Vec::new(),
        }
    }

    /// A container that has written `bytes` in as many requests as milliseconds went by.
    pub fn sample(id: &str, millis: u64, bytes: u64) -> Sample {
        let mut head = vec![0; BYTES];
        head[..8].copy_from_slice(&MAGIC.to_le_bytes());
        head[8..16].copy_from_slice(&VERSION.to_le_bytes());
        let mut page = Page::read(&head).unwrap();
        page.sent[0] = Work { operations: millis, bytes };
        page.delays[0] = millis;
        page.throttled_ns = millis * 250_000;
        page.quotas[0] = Quota { used: 2, limit: 256 };
        page.quotas[3] = Quota { used: 4096, limit: 16 << 30 };
        let mut sample = Sample::new(container(id), Ok(page), None);
        sample.at += Duration::from_millis(millis);
        sample
    }

    #[test]
    fn numbers_have_three_digits() {
        for (value, expected) in [
            (0.0, "0b"),
            (7.0, "7b"),
            (0.25, "0.25b"),
            (999.4, "999b"),
            (999.6, "1kb"),
            (1234.0, "1.23kb"),
            (12_345.0, "12.3kb"),
            (123_456.0, "123kb"),
            (10e9, "10Gb"),
            (2e22, "20000Eb"),
        ] {
            assert_eq!(about(value, "b"), expected);
        }
    }

    #[test]
    fn sizes_are_short() {
        for (bytes, expected) in [
            (0, "0"),
            (7, "7"),
            (4096, "4KiB"),
            ((10 << 10) + 1, "10KiB"),
            (16 << 30, "16GiB"),
            (u64::MAX, "16777215TiB"),
        ] {
            assert_eq!(size(bytes), expected, "{bytes}");
        }
    }

    #[test]
    fn another_container_of_the_same_id_has_no_rates_yet() {
        let (before, mut after) = (sample("c1", 0, 0), sample("c1", 1000, 1000));
        // The two samples are taken one after the other.
        assert!((after.rates(Some(&before)).out - 8000.0).abs() < 800.0);
        after.container.init = Some(Status { pid: 12, alive: true });
        assert_eq!(after.rates(Some(&before)).out, 0.0);
        assert_eq!(before.rates(None).operations, 0.0);
    }

    #[test]
    fn forged_counts_are_shown_like_others() {
        let mut forged = vec![0xff; BYTES];
        forged[..8].copy_from_slice(&MAGIC.to_le_bytes());
        forged[8..16].copy_from_slice(&VERSION.to_le_bytes());
        let mut after = sample("c1", 1000, 0);
        after.counted = Ok(Page::read(&forged).unwrap());
        for before in [None, Some(&sample("c1", 0, 5))] {
            assert!(describe(&after, before).contains("18446744073709551615"));
        }
    }

    #[test]
    fn everything_is_described() {
        let text = describe(&sample("c1", 1000, 0), None);
        for name in OPCODES.iter().chain(&QUOTAS) {
            assert!(text.contains(name), "{name}");
        }
        assert!(text.contains("10Gbit") && !text.contains("CARD"), "{text}");
        let mut counted = sample("c1", 1000, 0);
        let values = [("rdma_tx\n_bytes".into(), 4711)].into();
        counted.card = Some(CardCounters { queue_pairs: 3, values });
        let text = describe(&counted, None);
        let lines: Vec<_> = text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
        let expected = ["CARD", "queue pairs that it counts 3", "rdma_tx\u{fffd}_bytes 4711"];
        assert_eq!(lines[lines.len() - 3..], expected);
    }
}
