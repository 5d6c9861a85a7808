//! The subcommands, each in a file of its own.

mod cdi;
mod completion;
mod config;
mod configure;
mod doctor;
mod drain;
mod explain;
mod gc;
mod info;
mod list;
mod man;
mod stats;
mod unconfigure;
mod version;

use anyhow::Result;
use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Gives containers RDMA behind their own fence.
#[derive(Debug, Parser)]
#[command(name = "ringfence", version, disable_help_subcommand = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Configure(configure::Args),
    Unconfigure(unconfigure::Args),
    Doctor(doctor::Args),
    Explain(explain::Args),
    List(list::Args),
    Stats(stats::Args),
    Info(info::Args),
    Drain(drain::Args),
    Gc(gc::Args),
    Cdi(cdi::Args),
    Config(config::Args),
    Version(version::Args),
    Completion(completion::Args),
    #[command(hide = true)]
    Man(man::Args),
}

impl Cli {
    /// Carries the command out.
    pub fn run(self) -> Result<ExitCode> {
        match self.command {
            Command::Configure(args) => args.run(),
            Command::Unconfigure(args) => args.run(),
            Command::Doctor(args) => args.run(),
            Command::Explain(args) => args.run(),
            Command::List(args) => args.run(),
            Command::Stats(args) => args.run(),
            Command::Info(args) => args.run(),
            Command::Drain(args) => args.run(),
            Command::Gc(args) => args.run(),
            Command::Cdi(args) => args.run(),
            Command::Config(args) => args.run(),
            Command::Version(args) => args.run(),
            Command::Completion(args) => args.run(),
            Command::Man(args) => args.run(),
        }
    }
}
