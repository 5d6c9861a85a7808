//! Where the real programs are, as far as the administrator says.

use ringfence_hook::config::{Config, Error, Runtime, Shim};
use serde::Deserialize;

/// The parts of the configuration that every container depends on, also those that are not ours.
#[derive(Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Places {
    pub runtime: Runtime,
    pub shim: Shim,
}

impl Places {
    /// Takes them from `config`. Of a file with a mistake elsewhere they still hold, and of one that cannot be read, parsed or
    /// trusted the defaults serve: such a file stops containers of ours, with its own message, and no others.
    pub fn of(config: &Result<Config, Error>) -> Self {
        match config {
            Ok(config) => Self { runtime: config.runtime.clone(), shim: config.shim.clone() },
            Err(Error::Invalid { path, .. }) => {
                std::fs::read_to_string(path).ok().and_then(|text| Self::parse(&text)).unwrap_or_default()
            }
            Err(_) => Self::default(),
        }
    }

    fn parse(text: &str) -> Option<Self> {
        toml::from_str(text).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mistakes_elsewhere_do_not_matter() {
        let places =
            Places::parse("typo = 1\n[runtime]\nruntimes = [\"youki\"]\n[policy.bounds]\nweight = \"heavy\"\n");
        assert_eq!(places.unwrap().runtime.runtimes, [std::path::PathBuf::from("youki")]);
        assert_eq!(Places::parse("typo = 1").unwrap(), Places::default());
        assert_eq!(Places::parse("[runtime\n"), None);
    }
}
