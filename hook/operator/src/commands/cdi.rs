//! `ringfence cdi`

use anyhow::{Result, bail};
use std::process::ExitCode;

/// Container Device Interface
#[derive(Debug, clap::Args)]
pub struct Args {}

impl Args {
    pub fn run(self) -> Result<ExitCode> {
        bail!("cdi is not built yet")
    }
}
