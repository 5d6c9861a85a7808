//! `ringfence config`

use crate::output;
use anyhow::Result;
use ringfence_hook::config::{self, Config, DEFAULT_PATH};
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
    /// Shows the configuration in force, with defaults, all files merged
    Show {
        /// As JSON instead of TOML
        #[arg(long)]
        json: bool,
    },
    /// Checks the configuration
    Validate {
        /// The file, with conf.d/*.toml beside it, instead of those in force
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
                let files = match file {
                    Some(path) => {
                        Config::load_from(&path)?;
                        vec![path]
                    }
                    None => {
                        Config::load()?;
                        config::paths()?
                    }
                };
                let lines = files.iter().map(|path| format!("{}: valid\n", output::plain(&path.to_string_lossy())));
                output::print(&lines.collect::<String>())?;
                if files.is_empty() {
                    output::print(&format!("{DEFAULT_PATH}: missing, so that all defaults hold\n"))?;
                }
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}
