//! `ringfence configure`

use anyhow::{Result, bail};
use std::process::ExitCode;

/// Registers Ringfence with a container engine
#[derive(Debug, clap::Args)]
pub struct Args {}

impl Args {
    pub fn run(self) -> Result<ExitCode> {
        bail!("configure is not built yet")
    }
}
