//! `ringfence`: the operator's command.

mod cards;
mod cdi;
mod commands;
mod doctor;
mod engines;
mod explanation;
mod output;
mod rates;

use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    match commands::Cli::parse().run() {
        Ok(code) => code,
        Err(error) => {
            output::complain(&format!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}
