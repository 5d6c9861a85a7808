//! `ringfence config`

use crate::output;
use anyhow::Result;
use ringfence_hook::config::{Config, DEFAULT_PATH};
use std::path::PathBuf;
use std::process::ExitCode;

/// The file that the package installs.
pub const EXAMPLE: &str = include_str!("../../../config.example.toml");

/// Prints, shows or checks the configuration
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  ringfence config default >/etc/ringfence/config.toml
  ringfence config validate ./config.toml && install -m 644 ./config.toml /etc/ringfence/config.toml
  RINGFENCE_CONFIG=./config.toml ringfence config show")]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Prints a configuration file with every key, its default and what it means
    Default,
    /// Checks a configuration file
    Validate {
        /// The file, instead of the one in force
        file: Option<PathBuf>,
    },
}

impl Args {
    pub fn run(self) -> Result<ExitCode> {
        match self.command {
            Command::Default => output::print(EXAMPLE)?,
            Command::Validate { file } => {
                let path = file.or_else(Config::named).unwrap_or_else(|| DEFAULT_PATH.into());
                Config::load_from(&path)?;
                output::print(&format!("{}: valid\n", output::plain(&path.to_string_lossy())))?;
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}
