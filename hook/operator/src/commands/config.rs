//! `ringfence config`

use anyhow::{Result, bail};
use std::process::ExitCode;

/// Shows, checks or prints the configuration
#[derive(Debug, clap::Args)]
pub struct Args {}

impl Args {
    pub fn run(self) -> Result<ExitCode> {
        bail!("config is not built yet")
    }
}
