//! `ringfence doctor`

use anyhow::{Result, bail};
use std::process::ExitCode;

/// Finds what is missing and says what mends it
#[derive(Debug, clap::Args)]
pub struct Args {}

impl Args {
    pub fn run(self) -> Result<ExitCode> {
        bail!("doctor is not built yet")
    }
}
