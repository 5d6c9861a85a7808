//! `ringfence gc`

use anyhow::{Result, bail};
use std::process::ExitCode;

/// Removes what containers left behind
#[derive(Debug, clap::Args)]
pub struct Args {}

impl Args {
    pub fn run(self) -> Result<ExitCode> {
        bail!("gc is not built yet")
    }
}
