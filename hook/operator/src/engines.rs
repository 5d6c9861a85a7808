//! Container engines, and how each is told of Ringfence.
//!
//! An engine's module decides what its files are to hold, as a [`Plan`]; [`Plan::apply`] alone writes.

pub mod containerd;
pub mod crio;
pub mod docker;
pub mod hooks_d;
pub mod host;
pub mod plan;
pub mod podman;
pub mod process;

use anyhow::{Result, bail};
use host::Host;
use plan::Plan;
use std::path::{Path, PathBuf};

/// The engines that can be told of Ringfence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
#[allow(missing_docs)]
pub enum Engine {
    Containerd,
    Docker,
    Podman,
    Crio,
}

/// What an administrator may choose about a registration.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Another configuration file than the engine's usual one.
    pub config: Option<PathBuf>,
    /// Every container that names no runtime is to run with Ringfence's.
    pub set_as_default: bool,
    /// The profile that containers of this runtime get.
    pub policy: Option<String>,
}

impl Engine {
    /// Every engine, in the order in which they are worked on.
    pub const ALL: [Self; 4] = [Self::Containerd, Self::Docker, Self::Podman, Self::Crio];

    /// As users write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Containerd => "containerd",
            Self::Docker => "docker",
            Self::Podman => "podman",
            Self::Crio => "crio",
        }
    }

    /// Whether the host has the engine, by its programs.
    pub fn is_installed(self, host: &Host) -> bool {
        let programs: &[&str] = match self {
            Self::Containerd => &["containerd", "k3s", "rke2"],
            Self::Docker => &["dockerd"],
            Self::Podman => &["podman"],
            Self::Crio => &["crio"],
        };
        programs.iter().any(|program| host.find_program(program).is_some())
    }

    /// What registers Ringfence with the engine.
    pub fn configure(self, host: &Host, options: &Options) -> Result<Plan> {
        if options.policy.is_some() && self != Self::Docker {
            bail!(
                "--policy is for --engine docker, whose runtimes have arguments; with {} name the profile by the annotation ringfence.dev/policy",
                self.name()
            );
        }
        if host.is_rootless() && self != Self::Podman {
            bail!("--user is for --engine podman; {} is configured by root", self.name());
        }
        match self {
            Self::Containerd => containerd::files::configure(host, options),
            Self::Docker => docker::configure_host(host, options),
            Self::Podman => podman::configure(host, options),
            Self::Crio => crio::configure(host, options),
        }
    }

    /// What takes Ringfence out of the engine's configuration.
    pub fn unconfigure(self, host: &Host, options: &Options) -> Result<Plan> {
        match self {
            Self::Containerd => containerd::files::unconfigure(host, options),
            Self::Docker => docker::unconfigure_host(host, options),
            Self::Podman => podman::unconfigure(host, options),
            Self::Crio => crio::unconfigure(host, options),
        }
    }
}

/// Whether `name` can be a runtime's or a profile's name: it goes into files and arguments unquoted.
pub fn is_plain_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 63
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
        && !name.starts_with(['-', '.'])
}

/// What is wrong with a file of TOML, with the place.
fn broken_toml(path: &Path, text: &str, error: &toml::de::Error) -> anyhow::Error {
    let line = error.span().map_or(1, |span| text[..span.start.min(text.len())].matches('\n').count() + 1);
    let message = error.message().trim_end().replace('\n', ", ");
    anyhow::anyhow!("{}: line {line}: {message}; mend it first, nothing was changed", path.display())
}
