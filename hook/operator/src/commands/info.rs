//! `ringfence info`

use anyhow::{Result, bail};
use std::process::ExitCode;

/// Shows this node: devices, limits, engines
#[derive(Debug, clap::Args)]
pub struct Args {}

impl Args {
    pub fn run(self) -> Result<ExitCode> {
        bail!("info is not built yet")
    }
}
