//! What may be said on the command line.

use clap::Parser;
use std::path::PathBuf;

/// Lets a thousand containers share one link, in simulated time, by the scheduler that ships.
///
/// Prints each figure beside its goal and draws them as SVG. Fails if a goal is missed: the lines on standard error say which
/// container had what share of the link, and what it should have had.
#[derive(Debug, Parser)]
#[command(name = "simulation")]
pub struct Arguments {
    /// Fewer containers, for a shorter time: seconds instead of minutes
    #[arg(long)]
    pub quick: bool,
    /// Where the drawings go; made if it is not there
    #[arg(default_value = "target/simulation")]
    pub directory: PathBuf,
}
