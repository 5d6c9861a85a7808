//! Three tenants on one modelled link: one that waits for small messages, two that move bulk data.
//!
//! What they compete for is the link and not two cores' time: the link is slow, the latency tenant sleeps while it waits
//! (`-e`), and the bulk tenants, whose program can only spin, do so on time that nobody else wants.

use crate::report::Report;
use anyhow::{Context, Result, ensure};
use ringfence_integration::command::wait_until;
use ringfence_integration::config::Config;
use ringfence_integration::container::{Builder, Container};
use ringfence_integration::netns::{self, Netns};
use ringfence_integration::perftest::{self, Latency, Pair};
use ringfence_integration::rootfs::Image;
use std::time::{Duration, Instant};

/// The modelled link.
pub const LINK: &str = "1Gbit";

/// Of how many seconds of each bulk tenant's the bandwidth is the mean. As many are measured as the machine takes for it, all of
/// them while the others send, too.
const SECONDS: usize = 4;

/// How long a machine may take for a scenario before something is wrong with it.
const PATIENCE: Duration = Duration::from_secs(60);

/// What the bulk tenants reached, Gbit/s.
#[derive(Clone, Copy, Debug)]
pub struct Bulk {
    /// The greedy one, with 16 queue pairs.
    pub a: f64,
    /// The modest one, with 4.
    pub b: f64,
}

/// How the tenants fared in a scenario.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Its name.
    pub scenario: &'static str,
    /// The latency tenant's messages.
    pub latency: Latency,
    /// If there were bulk tenants.
    pub bulk: Option<Bulk>,
}

type Annotations = &'static [(&'static str, &'static str)];

/// The tenants' annotations under ringfence.dev/.
struct Policies {
    latency: Annotations,
    a: Annotations,
    b: Annotations,
}

struct Scenario {
    name: &'static str,
    with_bulk: bool,
    policies: Policies,
}

const NONE: Policies = Policies { latency: &[], a: &[], b: &[] };

const SCENARIOS: [Scenario; 4] = [
    Scenario { name: "alone", with_bulk: false, policies: NONE },
    Scenario { name: "together, no policy", with_bulk: true, policies: NONE },
    Scenario {
        name: "classes, weights 1 : 3",
        with_bulk: true,
        policies: Policies {
            latency: &[("class", "latency")],
            a: &[("class", "bulk"), ("weight", "100")],
            b: &[("class", "bulk"), ("weight", "300")],
        },
    },
    Scenario {
        name: "the same, A capped at 100M",
        with_bulk: true,
        policies: Policies {
            latency: &[("class", "latency")],
            a: &[("class", "bulk"), ("weight", "100"), ("bandwidth", "100Mbit")],
            b: &[("class", "bulk"), ("weight", "300")],
        },
    },
];

/// A sender, its receiver, and their networks. Fields drop in order: containers first.
struct Tenant {
    receiver: Container,
    sender: Container,
    _networks: (Netns, Netns),
}

impl Tenant {
    fn start(image: &Image, config: &Config, annotations: Annotations) -> Result<Self> {
        let networks = netns::pair()?;
        let start = |netns: &Netns| {
            let builder = Builder::with_rdma(config, netns);
            let builder = annotations.iter().fold(builder, |builder, (key, value)| builder.annotation(key, value));
            builder.start(image)
        };
        Ok(Self { receiver: start(&networks.0)?, sender: start(&networks.1)?, _networks: networks })
    }

    /// Sends until it is stopped, and says every second how much that was.
    fn bulk(&self, queue_pairs: &str) -> Result<Stream> {
        let args =
            ["-F", "--report_gbits", "-q", queue_pairs, "-s", "262144", "-t", "8", "--run_infinitely", "-D", "1"];
        let args = [&args[..], &PATIENT].concat();
        let starter = ["nice", "-n", "19", "stdbuf", "-oL"];
        let pair = perftest::start_by(&starter, &self.receiver, &self.sender, "ib_write_bw", &args)?;
        Ok(Stream { pair, before: 0 })
    }
}

/// A bulk tenant's program.
struct Stream {
    pair: Pair,
    /// How many seconds it had told of when the measurement began.
    before: usize,
}

impl Stream {
    fn seconds(&self) -> Vec<f64> {
        perftest::bandwidths(&self.pair.output()).iter().map(|row| row.gbits).collect()
    }

    fn begin(&mut self) {
        self.before = self.seconds().len();
    }

    /// The seconds that began after the measurement did.
    fn measured(&self) -> Vec<f64> {
        self.seconds().split_off(self.before).into_iter().skip(1).collect()
    }

    fn is_alive(&mut self) -> Result<()> {
        ensure!(!self.pair.has_ended(), "bulk data stopped by themselves:\n{}", self.pair.output());
        Ok(())
    }
}

/// Runs all scenarios.
pub fn run(image: &Image, report: &Report) -> Result<Vec<Outcome>> {
    report.progress("\nThree tenants on one link: small messages, bulk A with 16 queue pairs, bulk B with 4");
    let mut outcomes = Vec::new();
    for scenario in SCENARIOS {
        report.progress(&format!("  measuring: {}", scenario.name));
        outcomes.push(measure(image, &scenario).with_context(|| scenario.name)?);
    }
    report.outcomes(&outcomes);
    Ok(outcomes)
}

fn measure(image: &Image, scenario: &Scenario) -> Result<Outcome> {
    let config = Config::with_link(LINK, "")?;
    let policies = &scenario.policies;
    let latency = Tenant::start(image, &config, policies.latency)?;
    if !scenario.with_bulk {
        return Ok(Outcome { scenario: scenario.name, latency: small_messages(&latency)?, bulk: None });
    }
    let (a, b) = (Tenant::start(image, &config, policies.a)?, Tenant::start(image, &config, policies.b)?);
    let mut bulk = [a.bulk("16")?, b.bulk("4")?];
    // Until both have exchanged addresses and fill the link.
    wait_until("bulk data of both tenants", PATIENCE, || {
        bulk.iter_mut().any(|bulk| bulk.is_alive().is_err()) || bulk.iter().all(|bulk| !bulk.seconds().is_empty())
    })?;
    bulk.iter_mut().for_each(Stream::begin);
    let began = Instant::now();
    let mut runs = Vec::new();
    while runs.is_empty() || bulk.iter().any(|bulk| bulk.measured().len() < SECONDS) {
        bulk.iter_mut().try_for_each(Stream::is_alive)?;
        ensure!(began.elapsed() < PATIENCE, "no {SECONDS} seconds of bulk data within {PATIENCE:?}");
        runs.push(small_messages(&latency)?);
    }
    bulk.iter_mut().try_for_each(Stream::is_alive)?;
    let [a, b] = bulk.map(|bulk| {
        let seconds = bulk.measured();
        seconds.iter().sum::<f64>() / seconds.len() as f64
    });
    // Of several runs the one in the middle.
    runs.sort_by(|one, other| one.p99.total_cmp(&other.p99));
    let latency = runs.swap_remove(runs.len() / 2);
    Ok(Outcome { scenario: scenario.name, latency, bulk: Some(Bulk { a, b }) })
}

/// A local ACK timeout of 2 s (`ibv_modify_qp(3)`): that a busy machine has not given a proxy its turn for half a second is no
/// loss of packets.
const PATIENT: [&str; 2] = ["-u", "19"];

fn small_messages(tenant: &Tenant) -> Result<Latency> {
    let args = [&["-F", "-e", "-s", "64", "-n", "1000"][..], &PATIENT].concat();
    let output = perftest::run(&tenant.receiver, &tenant.sender, "ib_send_lat", &args)?;
    perftest::latencies(&output).first().copied().with_context(|| format!("no figure in:\n{output}"))
}
