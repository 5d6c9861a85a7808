//! `ringfence explain`

use anyhow::{Result, bail};
use std::process::ExitCode;

/// Shows what would happen to a container, and why
#[derive(Debug, clap::Args)]
pub struct Args {}

impl Args {
    pub fn run(self) -> Result<ExitCode> {
        bail!("explain is not built yet")
    }
}
