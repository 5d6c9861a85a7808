//! Every program of integration/clients in every surroundings.

use super::Shared;
use super::batch::Batch;
use super::cases::{self, Case};
use super::engine::{Engine, Stage};
use super::surroundings::{self, Surroundings};
use anyhow::{Result, bail};
use ringfence_integration::node::Suite;
use ringfence_integration::node::applications::PROGRAMS;

/// Set to anything, it has all releases and engines swept, and by programs that take minutes.
const ALL: &str = "RINGFENCE_SWEEP_ALL";

/// The surroundings that are tested of a release and an engine: of one of each, unless all are asked for.
pub fn of(suite: Suite, engine: Engine) -> &'static [Surroundings] {
    let is_swept = everything() || (suite, engine) == (Suite::Trixie, Engine::Podman);
    if is_swept { &surroundings::ALL } else { &[] }
}

fn everything() -> bool {
    std::env::var_os(ALL).is_some()
}

/// Fails with a line for each case that fails.
pub fn run(shared: &Shared, engine: Engine, around: &'static Surroundings) -> Result<()> {
    let failures = shared.on_stage(|stage| {
        let batch = Batch::new(engine, around, programs(stage)?);
        batch.failures(stage)
    })?;
    if failures.is_empty() {
        return Ok(());
    }
    bail!("{} cases fail:\n{}", failures.len(), failures.join("\n"))
}

/// What runs against bare proxies in tests/clients.rs, and the applications' cases.
fn programs(stage: &Stage) -> Result<Vec<Case>> {
    let mut found = cases::all();
    let list = |program: &str| stage.node.run(&[&format!("{PROGRAMS}/{program}"), "list"]);
    for name in list("memory")?.lines() {
        found.push(Case::new(format!("memory: {name}"), format!("{PROGRAMS}/memory {name}")));
    }
    for name in ["children", "once", "descriptors"] {
        found.push(Case::new(format!("process: {name}"), format!("{PROGRAMS}/process {name}")));
    }
    if everything() {
        for line in list("semantics")?.lines() {
            let mut words = line.split(' ');
            let name = words.next().unwrap_or_default();
            for sides in words {
                // The other side is another process of the container.
                let command = format!("PEER_SOCKET=/dev/ringfence/verbs.sock {PROGRAMS}/semantics {name} {sides}");
                found.push(Case::new(format!("semantics: {name}: {sides}"), command));
            }
        }
    }
    Ok(found)
}
