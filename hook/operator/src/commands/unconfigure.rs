//! `ringfence unconfigure`

use super::configure::Target;
use crate::engines::Options;
use anyhow::Result;
use std::process::ExitCode;

/// Takes Ringfence out of a container engine's configuration
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  ringfence unconfigure --engine containerd --dry-run
  ringfence unconfigure --engine all

The files become what they were before `ringfence configure`; with `all` also those of engines that are no longer installed.")]
pub struct Args {
    #[command(flatten)]
    target: Target,
}

impl Args {
    pub fn run(self) -> Result<ExitCode> {
        let options = Options { config: self.target.config(), ..Options::default() };
        self.target.each(false, "not configured", |engine, host| engine.unconfigure(host, &options))
    }
}
