//! `ringfence unconfigure`

use anyhow::{Result, bail};
use std::process::ExitCode;

/// Takes Ringfence out of a container engine's configuration
#[derive(Debug, clap::Args)]
pub struct Args {}

impl Args {
    pub fn run(self) -> Result<ExitCode> {
        bail!("unconfigure is not built yet")
    }
}
