//! `ringfence man`

use anyhow::{Result, bail};
use std::process::ExitCode;

/// Writes the man pages
#[derive(Debug, clap::Args)]
pub struct Args {}

impl Args {
    pub fn run(self) -> Result<ExitCode> {
        bail!("man is not built yet")
    }
}
