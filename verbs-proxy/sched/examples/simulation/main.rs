//! A thousand containers on one link, in simulated time, by the scheduler that ships.

mod arguments;
mod chart;
mod figure;
mod model;
mod parts;

use arguments::Arguments;
use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    let Arguments { quick, directory } = Arguments::parse();
    if let Err(error) = std::fs::create_dir_all(&directory) {
        eprintln!("simulation: cannot make {}: {error}", directory.display());
        return ExitCode::FAILURE;
    }
    let mut missed = Vec::new();
    for part in parts::ALL {
        let part = part(quick);
        for figure in &part.figures {
            println!("{figure}");
        }
        missed.extend(part.figures.into_iter().flat_map(|figure| figure.missed()));
        let path = directory.join(part.file);
        if let Err(error) = std::fs::write(&path, part.chart.draw()) {
            eprintln!("simulation: cannot write {}: {error}", path.display());
            return ExitCode::FAILURE;
        }
        println!("  {}", path.display());
    }
    for line in &missed {
        eprintln!("simulation: {line}");
    }
    if missed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
