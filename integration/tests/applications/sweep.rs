//! Every program of integration/clients in every surroundings.

use super::Shared;
use super::batch::Batch;
use super::cases::{self, Case};
use super::engine::{Engine, Stage};
use super::surroundings::{self, Surroundings};
use anyhow::{Result, bail};
use ringfence_integration::node::Suite;
use ringfence_integration::node::applications::PROGRAMS;

/// Set to anything, it has every engine of every release tested, all of them swept in all surroundings, and by programs that take minutes.
const ALL: &str = "RINGFENCE_SWEEP_ALL";

/// The surroundings that are tested of a release and an engine. Unless all are asked for, some, of one engine, and each of one release:
/// those of both run beside each other.
pub fn of(suite: Suite, engine: Engine) -> Vec<&'static Surroundings> {
    let usual = surroundings::OTHERS.iter().filter(|around| !around.by_hand).enumerate();
    let is_here = |turn: usize| engine == Engine::Podman && suite == [Suite::Trixie, Suite::Bookworm][turn % 2];
    let others: Vec<_> = match everything() {
        true => surroundings::OTHERS.iter().collect(),
        false => usual.filter(|(turn, _)| is_here(*turn)).map(|(_, around)| around).collect(),
    };
    std::iter::once(&surroundings::DEFAULT).chain(others).collect()
}

/// The engines of a release. Unless all are asked for, podman of both, and of one release each what differs from that.
pub fn engines(suite: Suite) -> impl Iterator<Item = Engine> {
    let other = if suite == Suite::Trixie { Engine::Docker } else { Engine::Rootless };
    Engine::ALL.into_iter().filter(move |engine| everything() || [Engine::Podman, other].contains(engine))
}

fn everything() -> bool {
    std::env::var_os(ALL).is_some()
}

/// Fails with a line for each case that fails.
pub fn run(shared: &Shared, engine: Engine, around: &'static Surroundings) -> Result<()> {
    let failures = shared.on_stage(|stage| {
        let mut cases = clients(stage)?;
        // Otherwise they are tests of their own.
        if around.name != surroundings::DEFAULT.name {
            // Tens of thousands of registrations are the same everywhere.
            let is_long = |case: &Case| case.name.starts_with("resources: vma");
            cases.extend(cases::all().into_iter().filter(|case| everything() || !is_long(case)));
        }
        Batch::new(engine, around, cases).failures(stage)
    })?;
    if failures.is_empty() {
        return Ok(());
    }
    bail!("{} cases fail:\n{}", failures.len(), failures.join("\n"))
}

/// What runs against bare proxies in tests/clients.rs.
fn clients(stage: &Stage) -> Result<Vec<Case>> {
    let mut found = Vec::new();
    for program in stage.node.run(&["ls", &format!("{PROGRAMS}/clients")])?.lines() {
        let path = format!("{PROGRAMS}/clients/{program}");
        for name in stage.node.run(&[&path, "list"])?.lines() {
            found.push(Case::new(format!("{program}: {name}"), format!("{path} {name}")));
        }
    }
    for name in ["children", "once", "descriptors"] {
        found.push(Case::new(format!("process: {name}"), format!("{PROGRAMS}/process {name}")));
    }
    if everything() {
        for line in stage.node.run(&[&format!("{PROGRAMS}/semantics"), "list"])?.lines() {
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
