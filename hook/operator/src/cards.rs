//! RDMA cards of the configuration: as the kernel shows them, and what policies can grant of them.

use crate::engines::process;
use crate::output::plain;
use anyhow::{Context, Result};
use ringfence_hook::annotations::Mode;
use ringfence_hook::card::{Card, Port, SYS};
use ringfence_hook::config::{Config, Device, Kind};
use ringfence_hook::rdma_cm;
use ringfence_hook::units::show_size;
use ringfence_launch::card::{DESCRIBE, Description, Help};
use serde::Serialize;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// How long libibverbs may take to open a card.
const PATIENCE: Duration = Duration::from_secs(10);

/// A card, and what is known of it.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Shown {
    name: String,
    /// How containers may have it.
    modes: Vec<Mode>,
    /// As the kernel shows it.
    card: Option<Card>,
    /// What policies can grant, as libibverbs says.
    grants: Option<Description>,
    /// What is not as it should be.
    problems: Vec<String>,
}

/// What libibverbs says of a card, by the proxy's program, which can load it.
pub fn describe(config: &Config, name: &str) -> Result<Description> {
    let program = config.proxy.program(Kind::Ibverbs);
    let text = process::output(Command::new(&program).args([DESCRIBE, name]), PATIENCE)?;
    serde_json::from_str(&text).with_context(|| format!("{} is of another version", program.display()))
}

/// What policies can grant, in words.
pub fn show(card: &Description) -> String {
    let help = card.help.iter().map(|Help { name, offered, detail }| {
        format!("; {name}: {} ({detail})", if *offered { "offered" } else { "not offered" })
    });
    format!(
        "policies can grant {} queue pairs of {} requests, {} regions of at most {}; {} GIDs; {}{}",
        card.max_qp,
        card.max_qp_depth,
        card.max_mr,
        show_size(card.max_mr_bytes),
        card.gids.len(),
        if card.atomics { "atomics" } else { "no atomics" },
        help.collect::<String>()
    )
}

/// The cards of the configuration.
pub fn all(config: &Config) -> Vec<Shown> {
    config.devices.iter().filter(|device| device.kind == Kind::Ibverbs).map(|device| of(config, device)).collect()
}

fn of(config: &Config, device: &Device) -> Shown {
    let mut problems = Vec::new();
    let card = Card::find(Path::new(SYS), &device.name).map_err(|missing| problems.push(missing.to_string())).ok();
    let modes = [Mode::Proxied, Mode::Passthrough].into_iter();
    let modes: Vec<Mode> = modes.filter(|mode| device.serves(*mode) && config.policy.allows(*mode)).collect();
    problems.extend(rdma_cm::Host::of(Path::new(SYS), device).err().map(|missing| missing.to_string()));
    problems.extend(card.iter().flat_map(Card::complaints).map(|complaint| complaint.to_string()));
    let mut grants = None;
    if modes.contains(&Mode::Proxied) {
        match describe(config, &device.name) {
            Ok(described) => grants = Some(described),
            Err(error) => problems.push(plain(&format!("{error:#}"))),
        }
    }
    Shown { name: device.name.clone(), modes, card, grants, problems }
}

impl Shown {
    /// As a row of a table.
    pub fn row(&self) -> [String; 2] {
        let modes: Vec<_> = self.modes.iter().map(|mode| mode.name()).collect();
        let mut parts = vec![if modes.is_empty() { "allowed in no mode".to_owned() } else { modes.join(", ") }];
        if let Some(card) = &self.card {
            parts.push(format!("node GUID {}", card.node_guid));
            parts.extend(card.driver.as_ref().map(|driver| format!("driver {driver}")));
            parts.extend(card.ports.iter().map(|port| {
                let interfaces = port.interfaces.join(", ");
                let Port { number, state, rate, link_layer, .. } = port;
                format!("port {number} {state}, {rate}, {link_layer} {interfaces}").trim_end().to_owned()
            }));
        }
        parts.extend(self.grants.as_ref().map(show));
        parts.extend(self.problems.iter().cloned());
        [format!("card {}", self.name), plain(&parts.join("; "))]
    }
}
