//! `ringfence list`

use anyhow::{Result, bail};
use std::process::ExitCode;

/// Lists the containers that have a proxy
#[derive(Debug, clap::Args)]
pub struct Args {}

impl Args {
    pub fn run(self) -> Result<ExitCode> {
        bail!("list is not built yet")
    }
}
