//! What the demonstration says: text for people, or one JSON object a line.

use crate::contention::{LINK, Outcome};
use serde_json::{Value, json};

/// Where results go.
pub struct Report {
    json: bool,
}

impl Report {
    /// Text, or JSON.
    pub fn new(json: bool) -> Self {
        Self { json }
    }

    /// What is being done, so that nobody has to wonder.
    pub fn progress(&self, line: &str) {
        if self.json {
            eprintln!("{line}");
        } else {
            println!("{line}");
        }
    }

    /// A program's key figure.
    pub fn figure(&self, program: &str, what: &str, figure: &Figure) {
        if self.json {
            let (value, unit) = figure.json();
            println!("{}", json!({"name": program, "what": what, "value": value, "unit": unit}));
        } else {
            println!("  {program:<18} {what:<44} {}", figure.text());
        }
    }

    /// How the tenants fared.
    pub fn outcomes(&self, outcomes: &[Outcome]) {
        if self.json {
            for outcome in outcomes {
                let bulk = outcome.bulk;
                println!(
                    "{}",
                    json!({
                        "name": outcome.scenario,
                        "latency_typical_us": outcome.latency.typical,
                        "latency_p99_us": outcome.latency.p99,
                        "bulk_a_gbits": bulk.map(|bulk| bulk.a),
                        "bulk_b_gbits": bulk.map(|bulk| bulk.b),
                    })
                );
            }
            return;
        }
        println!("\n  A modelled link of {LINK}/s    latency tenant, 64 bytes      bulk A (16 QPs)   bulk B (4 QPs)");
        println!("                                   typical          99 %");
        for outcome in outcomes {
            let gbits = |rate: Option<f64>| rate.map_or("-".into(), |rate| format!("{rate:.2} Gbit/s"));
            println!(
                "  {:<28} {:>10.0} µs {:>10.0} µs {:>20} {:>16}",
                outcome.scenario,
                outcome.latency.typical,
                outcome.latency.p99,
                gbits(outcome.bulk.map(|bulk| bulk.a)),
                gbits(outcome.bulk.map(|bulk| bulk.b)),
            );
        }
        println!();
    }
}

/// A number that says how well something went.
pub enum Figure {
    /// Gbit/s.
    Bandwidth(f64),
    /// Microseconds: the commonest and the 99th percentile.
    Latency(f64, f64),
    /// Millions a second.
    Rate(f64),
    /// Something seen.
    Seen(String),
}

impl Figure {
    fn text(&self) -> String {
        match self {
            Self::Bandwidth(gbits) => format!("{gbits:>8.2} Gbit/s"),
            Self::Latency(typical, p99) => format!("{typical:>8.2} µs, 99 % within {p99:.2} µs"),
            Self::Rate(mpps) => format!("{mpps:>8.3} million/s"),
            Self::Seen(text) => text.clone(),
        }
    }

    fn json(&self) -> (Value, &'static str) {
        match self {
            Self::Bandwidth(gbits) => (json!(gbits), "Gbit/s"),
            Self::Latency(typical, _) => (json!(typical), "us"),
            Self::Rate(mpps) => (json!(mpps), "M/s"),
            Self::Seen(text) => (json!(text), ""),
        }
    }
}
