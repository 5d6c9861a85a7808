//! The page on which a proxy counts: `<container_dir>/counters`.
//!
//! The proxy makes the file while it is root, mode 0600, maps it for writing and closes it before it hears of its container. So
//! a proxy that was taken over can write nonsense there, and neither shorten the file nor lengthen it. Everybody else reads.
//! The worker writes with plain stores of one thread; a number is right by itself, but not of the same moment as the next one.
//!
//! The page is little-endian 64-bit words. Fields keep their places: what is new goes where there was zero before, and a
//! page whose fields mean something else has another [`VERSION`].

use serde::ser::{Serialize, SerializeMap, Serializer};
use zerocopy::FromBytes;

const _: () = assert!(cfg!(target_endian = "little"), "words are stored as they are");

/// The file's name in the container's directory.
pub const FILE: &str = "counters";
/// Its bytes.
pub const BYTES: usize = 4096;
/// Its first word: `ringfcnt`.
pub const MAGIC: u64 = u64::from_le_bytes(*b"ringfcnt");
/// Its second word.
pub const VERSION: u64 = 1;

/// Opcodes that are counted, by their `enum ibv_wr_opcode`.
pub const OPCODES: [&str; 7] =
    ["rdma-write", "rdma-write-with-imm", "send", "send-with-imm", "rdma-read", "compare-and-swap", "fetch-and-add"];
/// Statuses of failed completions, by their `enum ibv_wc_status`; the first is success, which is not counted.
pub const STATUSES: [&str; 22] = [
    "success",
    "loc-len-err",
    "loc-qp-op-err",
    "loc-eec-op-err",
    "loc-prot-err",
    "wr-flush-err",
    "mw-bind-err",
    "bad-resp-err",
    "loc-access-err",
    "rem-inv-req-err",
    "rem-access-err",
    "rem-op-err",
    "retry-exc-err",
    "rnr-retry-exc-err",
    "loc-rdd-viol-err",
    "rem-inv-rd-req-err",
    "rem-abort-err",
    "inv-eecn-err",
    "inv-eec-state-err",
    "fatal-err",
    "resp-timeout-err",
    "general-err",
];
/// What a container has a quota of, in the order of their places.
pub const QUOTAS: [&str; 11] = [
    "queue-pairs",
    "completion-queues",
    "memory-regions",
    "memory-region-bytes",
    "page-bytes",
    "page-files",
    "queue-bytes",
    "other-objects",
    "memory-region-handles",
    "kept-bytes",
    "kept-regions",
];
/// Places of [`Page::delays`].
pub const DELAYS: usize = 48;

/// Work requests of one opcode.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, serde::Serialize)]
#[repr(C)]
pub struct Work<W = u64> {
    /// That were carried out.
    pub operations: W,
    /// Of them, and of what has been carried out of others.
    pub bytes: W,
}

/// What is held of something, against what may be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, serde::Serialize)]
#[repr(C)]
pub struct Quota<W = u64> {
    /// Held now.
    pub used: W,
    /// At most.
    pub limit: W,
}

/// The page. `W` is a word: atomic for who writes it.
#[derive(Debug, FromBytes)]
#[repr(C)]
pub struct Page<W = u64> {
    /// [`MAGIC`].
    pub magic: W,
    /// [`VERSION`].
    pub version: W,
    reserved_head: [W; 6],
    /// Its requests that were carried out, by opcode: bytes that it sent, or fetched by READs and atomics.
    pub sent: [Work<W>; 16],
    /// Requests of others, itself among them, that it carried out as their responder, by opcode.
    pub received: [Work<W>; 16],
    /// Completions with errors, by status.
    pub errors: [W; 32],
    /// Requests by the time between the worker's taking them in and their first piece's post: the first place counts those
    /// that went at once, without a look at the clock, and place `n` those that waited less than 2^`n` ns and no less than half of
    /// that. The last place has no bound.
    pub delays: [W; DELAYS],
    /// Nanoseconds during which at least one queue pair waited for the container's rates or its share of the link.
    pub throttled_ns: W,
    /// Its requests that were answered with "receiver not ready".
    pub rnr_received: W,
    /// Requests of others that it answered so.
    pub rnr_sent: W,
    /// Its requests that were tried again because no answer came in time.
    pub timeouts: W,
    /// Requests of others that came once more.
    pub repeated: W,
    /// READs of others that were told to come later, since its own rate let no more out.
    pub reads_deferred: W,
    /// Completions that were lost, since their queue was full.
    pub completions_lost: W,
    /// Links to other proxies, now.
    pub links: W,
    /// Links that there have been.
    pub links_made: W,
    /// Links that ended because the other end broke their protocol.
    pub links_failed: W,
    reserved_worker: [W; 94],
    /// What the container holds, by the places of [`QUOTAS`].
    pub quotas: [Quota<W>; 16],
    /// Lines that the proxy had to say.
    pub lines: W,
    /// Lines that were not logged: too many, or nobody took them.
    pub lines_unlogged: W,
    reserved: [W; 222],
}

const _: () = assert!(size_of::<Page>() == BYTES);
// What the worker writes and what others write lie on different cache lines.
const _: () = assert!(std::mem::offset_of!(Page, quotas) == 2048);

/// Why a file is no page of counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoPage {
    /// It has not [`BYTES`].
    Length(usize),
    /// It does not begin with [`MAGIC`].
    Magic(u64),
    /// It has another [`VERSION`].
    Version(u64),
}

impl std::error::Error for NoPage {}

impl std::fmt::Display for NoPage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Length(bytes) => write!(f, "it has {bytes} bytes instead of {BYTES}"),
            Self::Magic(found) => write!(f, "it begins with {found:#018x} instead of {MAGIC:#018x}"),
            Self::Version(found) => {
                write!(
                    f,
                    "it has version {found}, and this program knows version {VERSION}: the proxy is of another version of Ringfence"
                )
            }
        }
    }
}

impl Page {
    /// A copy of the page that these bytes of the file are. Nothing in it is believed but its version: all are counts.
    ///
    /// # Errors
    /// If they are none.
    pub fn read(bytes: &[u8]) -> Result<Self, NoPage> {
        let page = Self::read_from_bytes(bytes).map_err(|_| NoPage::Length(bytes.len()))?;
        match (page.magic, page.version) {
            (MAGIC, VERSION) => Ok(page),
            (MAGIC, version) => Err(NoPage::Version(version)),
            (magic, _) => Err(NoPage::Magic(magic)),
        }
    }

    /// Bytes that left the container's memory: SENDs, WRITEs, and what READs and atomics, of others or its own, took out of it.
    #[must_use]
    pub fn bytes_out(&self) -> u64 {
        let (sent, received) = (&self.sent[..4], &self.received[4..7]);
        sent.iter().chain(received).map(|work| work.bytes).fold(0, u64::wrapping_add)
    }

    /// Bytes that its READs and atomics brought in.
    #[must_use]
    pub fn bytes_fetched(&self) -> u64 {
        self.sent[4..7].iter().map(|work| work.bytes).fold(0, u64::wrapping_add)
    }

    /// Bytes that others, or itself, SENT and WROTE to it.
    #[must_use]
    pub fn bytes_in(&self) -> u64 {
        self.received[..4].iter().map(|work| work.bytes).fold(0, u64::wrapping_add)
    }

    /// Its requests, of any opcode.
    #[must_use]
    pub fn operations(&self) -> u64 {
        self.sent.iter().map(|work| work.operations).fold(0, u64::wrapping_add)
    }

    /// Requests that it carried out for others.
    #[must_use]
    pub fn operations_received(&self) -> u64 {
        self.received.iter().map(|work| work.operations).fold(0, u64::wrapping_add)
    }

    /// Completions with errors, of any status.
    #[must_use]
    pub fn failed(&self) -> u64 {
        self.errors.iter().copied().fold(0, u64::wrapping_add)
    }

    /// The place of [`Self::delays`] for a request that waited so long.
    #[inline(always)]
    #[must_use]
    pub fn delay_place(nanos: u64) -> usize {
        ((u64::BITS - nanos.leading_zeros()) as usize).min(DELAYS - 1)
    }

    /// An upper bound, in nanoseconds, of what `share` of all requests waited at most, 0 to 1; `None` without requests.
    #[must_use]
    pub fn delay_quantile(&self, share: f64) -> Option<u64> {
        // As floats, in which forged counts have a sum.
        let total: f64 = self.delays.iter().map(|count| *count as f64).sum();
        let mut sum = 0.0;
        let within = |count: &u64| {
            sum += *count as f64;
            sum >= share * total
        };
        let place = self.delays.iter().position(within).filter(|_| total > 0.0)?;
        Some(if place == 0 { 0 } else { 1 << place })
    }
}

/// Several of something, by their names.
struct Named<'a, T>(&'a [&'a str], &'a [T]);

impl<T: Serialize> Serialize for Named<'_, T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().zip(self.1))
    }
}

/// As `ringfence stats --json` shows it.
impl Serialize for Page {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        /// `[below, requests]`: the first has no time, the last no bound.
        fn delays(counts: &[u64; DELAYS]) -> Vec<Delay> {
            let bound = |place: usize| match place {
                0 => Some(0),
                place if place == DELAYS - 1 => None,
                place => Some(1 << place),
            };
            counts.iter().enumerate().map(|(place, count)| Delay { below_ns: bound(place), requests: *count }).collect()
        }
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("sent", &Named(&OPCODES, &self.sent))?;
        map.serialize_entry("received", &Named(&OPCODES, &self.received))?;
        map.serialize_entry("errors", &Named(&STATUSES[1..], &self.errors[1..]))?;
        map.serialize_entry("queueing-delays", &delays(&self.delays))?;
        for (name, value) in [
            ("throttled-ns", self.throttled_ns),
            ("rnr-received", self.rnr_received),
            ("rnr-sent", self.rnr_sent),
            ("timeouts", self.timeouts),
            ("repeated", self.repeated),
            ("reads-deferred", self.reads_deferred),
            ("completions-lost", self.completions_lost),
            ("links", self.links),
            ("links-made", self.links_made),
            ("links-failed", self.links_failed),
            ("lines", self.lines),
            ("lines-unlogged", self.lines_unlogged),
        ] {
            map.serialize_entry(name, &value)?;
        }
        map.serialize_entry("quotas", &Named(&QUOTAS, &self.quotas))?;
        map.end()
    }
}

#[derive(serde::Serialize)]
#[serde(rename_all = "kebab-case")]
struct Delay {
    /// Zero: at once.
    below_ns: Option<u64>,
    requests: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes() -> Vec<u8> {
        let mut bytes = vec![0; BYTES];
        bytes[..8].copy_from_slice(&MAGIC.to_le_bytes());
        bytes[8..16].copy_from_slice(&VERSION.to_le_bytes());
        bytes
    }

    #[test]
    fn what_is_no_page_is_told() {
        let good = bytes();
        assert_eq!(Page::read(&good).unwrap().operations(), 0);
        assert_eq!(Page::read(&good[..BYTES - 1]).unwrap_err(), NoPage::Length(BYTES - 1));
        assert_eq!(Page::read(&[]).unwrap_err(), NoPage::Length(0));
        let mut other = bytes();
        other[8] = 2;
        assert_eq!(Page::read(&other).unwrap_err(), NoPage::Version(2));
        other[0] = 0;
        assert!(matches!(Page::read(&other), Err(NoPage::Magic(_))));
    }

    #[test]
    fn forged_counts_are_only_counts() {
        let mut forged = vec![0xff; BYTES];
        forged[..16].copy_from_slice(&bytes()[..16]);
        let page = Page::read(&forged).unwrap();
        assert_eq!(page.operations(), 0u64.wrapping_sub(16));
        assert!(page.delay_quantile(0.5).is_some() && page.bytes_out() > 0 && page.bytes_fetched() > 0);
        assert!(serde_json::to_string(&page).unwrap().contains("18446744073709551615"));
    }

    #[test]
    fn a_delay_has_the_place_that_its_bounds_say() {
        for (nanos, place) in [(0, 0), (1, 1), (2, 2), (3, 2), (4, 3), (u64::MAX, DELAYS - 1)] {
            assert_eq!(Page::delay_place(nanos), place, "{nanos}");
        }
        let mut page = Page::read(&bytes()).unwrap();
        assert_eq!(page.delay_quantile(0.5), None);
        (page.delays[0], page.delays[11]) = (90, 10);
        assert_eq!((page.delay_quantile(0.5), page.delay_quantile(0.99)), (Some(0), Some(2048)));
    }

    #[test]
    fn json_has_the_names_that_are_documented() {
        let mut bytes = bytes();
        // The first word of `received`, RDMA WRITE's operations.
        let at = std::mem::offset_of!(Page, received);
        bytes[at] = 7;
        let json = serde_json::to_value(Page::read(&bytes).unwrap()).unwrap();
        assert_eq!(json["received"]["rdma-write"], serde_json::json!({"operations": 7, "bytes": 0}));
        assert_eq!(json["errors"]["rem-access-err"], 0);
        assert_eq!(json["errors"].get("success"), None);
        assert_eq!(json["queueing-delays"][0], serde_json::json!({"below-ns": 0, "requests": 0}));
        assert_eq!(json["queueing-delays"][DELAYS - 1]["below-ns"], serde_json::Value::Null);
        assert_eq!(json["quotas"]["memory-region-bytes"]["limit"], 0);
    }
}
