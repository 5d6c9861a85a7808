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
    /// Shows the configuration in force, defaults included
    Show {
        /// As JSON instead of TOML
        #[arg(long)]
        json: bool,
    },
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
            Command::Show { json } => {
                let config = Config::load()?;
                match json {
                    true => output::json(&config)?,
                    false => output::print(&toml::to_string(&config)?)?,
                }
            }
            Command::Validate { file } => {
                let state = match file.as_deref() {
                    Some(path) => Config::load_from(path).map(|_| "valid"),
                    // What the hook does, which goes by its defaults if there is no file.
                    None => Config::load().map(|_| "in force, and valid"),
                }?;
                let path = file.or_else(Config::named).unwrap_or_else(|| DEFAULT_PATH.into());
                let state = if path.exists() { state } else { "missing, so that all defaults hold" };
                output::print(&format!("{}: {state}\n", output::plain(&path.to_string_lossy())))?;
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}
