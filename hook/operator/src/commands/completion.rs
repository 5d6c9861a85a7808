//! `ringfence completion`

use anyhow::{Result, bail};
use std::process::ExitCode;

/// Prints a completion script for a shell
#[derive(Debug, clap::Args)]
pub struct Args {}

impl Args {
    pub fn run(self) -> Result<ExitCode> {
        bail!("completion is not built yet")
    }
}
