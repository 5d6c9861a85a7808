//! Where the real programs are, as far as the administrator says.

use ringfence_hook::config::{self, Config, Error, Runtime, Shim};

/// The parts of the configuration that every container depends on, also those that are not ours.
#[derive(Debug, PartialEq, Eq)]
pub struct Places {
    pub runtime: Runtime,
    pub shim: Shim,
}

impl Places {
    /// Takes them from `config`. Of files with a mistake elsewhere they still hold: such a mistake stops containers of ours,
    /// with its own message, and no others. Above all, what was made by one runtime must not be given to another to remove.
    pub fn of(config: &Result<Config, Error>) -> Self {
        match config {
            Ok(config) => Self { runtime: config.runtime.clone(), shim: config.shim.clone() },
            Err(_) => Self { runtime: config::part("runtime"), shim: config::part("shim") },
        }
    }
}
