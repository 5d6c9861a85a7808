//! `ringfence version`

use crate::output;
use anyhow::Result;
use serde_json::json;
use std::process::ExitCode;

/// As the workspace has it.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
/// What was built.
pub const COMMIT: &str = env!("RINGFENCE_COMMIT");

/// Shows the version and the commit that it was built from
#[derive(Debug, clap::Args)]
pub struct Args {
    /// As JSON
    #[arg(long)]
    json: bool,
}

impl Args {
    pub fn run(self) -> Result<ExitCode> {
        if self.json {
            output::json(&json!({"version": VERSION, "commit": COMMIT}))?;
        } else {
            output::print(&format!("ringfence {VERSION} ({COMMIT})\n"))?;
        }
        Ok(ExitCode::SUCCESS)
    }
}
