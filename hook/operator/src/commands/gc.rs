//! `ringfence gc`

use crate::output::{self, plain};
use anyhow::Result;
use ringfence_hook::config::Config;
use ringfence_hook::{Collected, Container, collect, containers};
use serde_json::json;
use std::process::ExitCode;

/// Exit status: something was left. The next call tries again.
const LEFT: u8 = 3;

/// Removes what containers left behind whose clean-up never came
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  ringfence gc --dry-run
  ringfence gc

Containers that run lose nothing. The package's ringfence-gc.timer calls it now and then. The exit status is 3 if
something had to be left, as while another container lives on the same root file system.")]
pub struct Args {
    /// Only say of which containers something is left
    #[arg(long)]
    dry_run: bool,
    /// As JSON
    #[arg(long)]
    json: bool,
}

impl Args {
    pub fn run(self) -> Result<ExitCode> {
        let config = Config::load()?;
        if self.dry_run {
            let ended: Vec<_> = containers(&config)?.into_iter().filter(has_ended).collect();
            match self.json {
                true => output::json(&json!({"left-behind": ended}))?,
                false => output::print(&ended.iter().map(would_remove).collect::<String>())?,
            }
            return Ok(ExitCode::SUCCESS);
        }
        let collected = collect(&config)?;
        match self.json {
            true => output::json(&collected)?,
            false => output::print(&show(&collected))?,
        }
        Ok(if collected.left.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(LEFT) })
    }
}

fn has_ended(container: &Container) -> bool {
    container.init.is_none_or(|init| !init.alive)
}

fn would_remove(container: &Container) -> String {
    let proxy = container.proxy.filter(|proxy| proxy.alive).map(|proxy| format!(", proxy {}", proxy.pid));
    let cgroups: String = container.cgroups.iter().map(|path| format!(", {}", path.display())).collect();
    format!("would remove {}: its record{}{}\n", plain(&container.id), proxy.unwrap_or_default(), plain(&cgroups))
}

fn show(collected: &Collected) -> String {
    let removed = collected.removed.iter().map(|removed| ("removed", &removed.container, removed.what.join(", ")));
    let left = collected.left.iter().map(|left| ("left", &left.container, left.why.clone()));
    let line =
        |(what, container, more): (_, &String, String)| format!("{what} {}: {}\n", plain(container), plain(&more));
    removed.chain(left).map(line).collect()
}
