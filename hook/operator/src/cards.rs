//! RDMA cards of the configuration: as the kernel shows them, and what policies can grant of them.

use crate::engines::process;
use crate::output::plain;
use anyhow::{Context, Result};
use ringfence_hook::annotations::Mode;
use ringfence_hook::card::{self, Card, Port, SYS};
use ringfence_hook::card_counters;
use ringfence_hook::config::{Config, Device, Kind};
use ringfence_hook::exclusive::{self, Place};
use ringfence_hook::rdma_cm;
use ringfence_hook::units::show_size;
use ringfence_launch::Class;
use ringfence_launch::card::{DESCRIBE, Description, Help};
use ringfence_launch::marks::Marks;
use ringfence_launch::pkeys::Pkey;
use serde::Serialize;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// How long libibverbs may take to open a card.
const PATIENCE: Duration = Duration::from_secs(10);

/// What is told of an iWARP card.
pub const IWARP: &str = "an iWARP card, whose queue pairs no proxy can connect";

/// A card, and what is known of it.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Shown {
    name: String,
    /// How containers may have it.
    modes: Vec<Mode>,
    /// Whether the kernel shows each card in all network namespaces, or in one only, as mode exclusive needs it.
    netns_mode: &'static str,
    /// In whose network namespace it is.
    #[serde(flatten)]
    place: Place,
    /// As the kernel shows it.
    card: Option<Card>,
    /// What policies can grant, as libibverbs says.
    grants: Option<Description>,
    /// What is not as it should be.
    problems: Vec<String>,
}

/// What libibverbs says of a card, by the proxy's program, which can load it.
pub fn describe(config: &Config, device: &Device) -> Result<Description> {
    let program = config.proxy.program(Kind::Ibverbs);
    let text =
        process::output(Command::new(&program).args([DESCRIBE, &device.name, &device.port.to_string()]), PATIENCE)?;
    serde_json::from_str(&text).with_context(|| format!("{} is of another version", program.display()))
}

/// What policies can grant, in words.
pub fn show(card: &Description) -> String {
    let help = card.help.iter().map(|Help { name, offered, detail }| {
        format!("; {name}: {} ({detail})", if *offered { "offered" } else { "not offered" })
    });
    format!(
        "policies can grant {} queue pairs of {} requests, {} regions of at most {}; {} GIDs; {}{}{}",
        card.max_qp,
        card.max_qp_depth,
        card.max_mr,
        show_size(card.max_mr_bytes),
        card.gids.len(),
        if card.pkeys.is_empty() { String::new() } else { format!("P_Keys {}; ", card.pkeys.join(", ")) },
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
    let place = exclusive::place(config, &device.name);
    let found = Card::find(Path::new(SYS), &device.name);
    // That a container has it is as it was asked for.
    let is_lent = matches!(place, Place::Container(_));
    let card = found.map_err(|missing| problems.extend((!is_lent).then(|| missing.to_string()))).ok();
    let modes = [Mode::Proxied, Mode::Passthrough, Mode::Exclusive].into_iter();
    let mut modes: Vec<Mode> = modes.filter(|mode| device.serves(*mode) && config.policy.allows(*mode)).collect();
    // Its proxy would not start, whatever libibverbs says of the card.
    if card::iwarp(Path::new(SYS)).contains(&device.name) {
        modes.retain(|mode| *mode != Mode::Proxied);
        problems.push(IWARP.to_owned());
    }
    let netns_mode = if card::is_of_one_namespace(Path::new(SYS)) { "exclusive" } else { "shared" };
    if modes.contains(&Mode::Exclusive) && netns_mode == "shared" {
        problems.push(exclusive::SHARED.to_owned());
    }
    problems.extend(rdma_cm::Host::of(Path::new(SYS), device).err().map(|missing| missing.to_string()));
    problems.extend(card.iter().flat_map(|card| card.complaints(device.port)).map(|complaint| complaint.to_string()));
    let mut grants = None;
    if modes.contains(&Mode::Proxied) && !is_lent {
        match describe(config, device) {
            Ok(mut described) => {
                described.help.push(card_counters::help(&device.name, device.port));
                described.help.push(marks(device));
                let lacks = |key: &&Pkey| !described.pkeys.contains(&key.to_string());
                problems.extend(device.pkeys.iter().flatten().find(lacks).map(|key| {
                    format!(
                        "port {} of {} has no P_Key {key}, which is among pkeys of the [[device]]: containers do not start",
                        device.port, device.name
                    )
                }));
                grants = Some(described);
            }
            Err(error) => problems.push(plain(&format!("{error:#}"))),
        }
    }
    Shown { name: device.name.clone(), modes, netns_mode, place, card, grants, problems }
}

/// What the administrator has packets marked with, which every card takes.
fn marks(device: &Device) -> Help {
    let show = |marks: Marks| {
        let level = marks.service_level.map(|level| format!("service level {}", u8::from(level)));
        let class = marks.traffic_class.map(|class| format!("traffic class {}", u8::from(class)));
        let said: Vec<_> = level.into_iter().chain(class).collect();
        if said.is_empty() { "as applications say".to_owned() } else { said.join(" and ") }
    };
    let mut detail = show(device.marks(Class::None));
    if device.marks(Class::Latency) != device.marks(Class::None) {
        detail += &format!("; for class latency {}", show(device.marks(Class::Latency)));
    }
    Help { name: "forced service level and traffic class".into(), offered: true, detail }
}

/// Where it is, in words; `None` where that goes without saying, or is a problem that is told.
pub fn show_place(place: &Place) -> Option<String> {
    match place {
        Place::Container(container) => {
            Some(format!("in the network namespace of container {container}, which has it for itself"))
        }
        Place::Host | Place::Elsewhere | Place::Nowhere => None,
    }
}

impl Shown {
    /// As a row of a table.
    pub fn row(&self) -> [String; 2] {
        let modes: Vec<_> = self.modes.iter().map(|mode| mode.name()).collect();
        let mut parts = vec![if modes.is_empty() { "allowed in no mode".to_owned() } else { modes.join(", ") }];
        parts.push(format!("netns mode {}", self.netns_mode));
        parts.extend(show_place(&self.place));
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
