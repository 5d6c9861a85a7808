//! `ringfence version`

use anyhow::{Result, bail};
use std::process::ExitCode;

/// Shows versions
#[derive(Debug, clap::Args)]
pub struct Args {}

impl Args {
    pub fn run(self) -> Result<ExitCode> {
        bail!("version is not built yet")
    }
}
