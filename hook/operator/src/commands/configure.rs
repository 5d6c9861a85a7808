//! `ringfence configure`

use crate::engines::host::Host;
use crate::engines::plan::{Change, Plan};
use crate::engines::{Engine, Options};
use crate::output;
use anyhow::{Result, bail};
use clap::builder::PossibleValue;
use std::path::PathBuf;
use std::process::ExitCode;

/// Registers Ringfence with a container engine
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  ringfence configure --engine containerd --dry-run
  ringfence configure --engine docker --policy gold
  ringfence configure --engine all

What stands in the engine's files stays as it is written; a second call changes nothing. The engine is not restarted: what to run is said.
Where containerd is installed, it is asked what it makes of the new file before that replaces the old one.")]
pub struct Args {
    #[command(flatten)]
    target: Target,
    /// Runs every container that names no runtime with Ringfence's
    #[arg(long)]
    set_as_default: bool,
    /// Gives the runtime's containers this profile, as runtime ringfence-NAME (docker only)
    #[arg(long, value_name = "NAME")]
    policy: Option<String>,
}

/// Which engine's files are meant; the same for `configure` and `unconfigure`.
#[derive(Debug, clap::Args)]
pub struct Target {
    /// The engine, or all that are installed
    #[arg(long, value_name = "ENGINE")]
    engine: Choice,
    /// Shows the changes as a diff and makes none
    #[arg(long)]
    dry_run: bool,
    /// The engine's configuration file, if not the usual one
    #[arg(long, value_name = "PATH")]
    config: Option<PathBuf>,
    /// Works on the host whose root file system is mounted here
    #[arg(long, value_name = "DIR", conflicts_with = "user")]
    root: Option<PathBuf>,
    /// Works on the calling user's rootless podman
    #[arg(long)]
    user: bool,
}

/// One engine or all.
#[derive(Clone, Copy, Debug)]
enum Choice {
    One(Engine),
    All,
}

impl clap::ValueEnum for Choice {
    fn value_variants<'a>() -> &'a [Self] {
        &[
            Self::One(Engine::Containerd),
            Self::One(Engine::Docker),
            Self::One(Engine::Podman),
            Self::One(Engine::Crio),
            Self::All,
        ]
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(PossibleValue::new(match self {
            Self::One(engine) => engine.name(),
            Self::All => "all",
        }))
    }
}

impl Args {
    pub fn run(self) -> Result<ExitCode> {
        let options =
            Options { config: self.target.config.clone(), set_as_default: self.set_as_default, policy: self.policy };
        self.target.each(true, "already configured", |engine, host| engine.configure(host, &options))
    }
}

impl Target {
    /// The file that was named.
    pub fn config(&self) -> Option<PathBuf> {
        self.config.clone()
    }

    /// Makes and carries out, or shows, the plan of each engine. With `if_installed` the host must have it, unless its
    /// files are named.
    pub fn each(
        self,
        if_installed: bool,
        nothing: &str,
        work: impl Fn(Engine, &Host) -> Result<Plan>,
    ) -> Result<ExitCode> {
        let host = Host::new(self.root.as_deref(), self.user)?;
        let named = self.config.is_some() || self.root.is_some();
        let engines = match self.engine {
            Choice::One(engine) => vec![engine],
            Choice::All if self.config.is_some() => bail!("--config is one engine's file; name that by --engine"),
            Choice::All if self.user => vec![Engine::Podman],
            Choice::All => {
                Engine::ALL.into_iter().filter(|engine| !if_installed || engine.is_installed(&host)).collect()
            }
        };
        if engines.is_empty() {
            bail!("no engine is installed here: no containerd, dockerd, podman or crio");
        }
        let mut code = ExitCode::SUCCESS;
        let several = engines.len() > 1;
        for engine in engines {
            if if_installed && !named && !engine.is_installed(&host) {
                bail!("{} is not installed here; nothing to configure", engine.name());
            }
            let done = work(engine, &host).and_then(|plan| self.carry_out(engine, &plan, nothing));
            match done {
                Ok(()) => {}
                Err(error) if several => {
                    output::complain(&format!("{}: {error:#}", engine.name()));
                    code = ExitCode::FAILURE;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(code)
    }

    fn carry_out(&self, engine: Engine, plan: &Plan, nothing: &str) -> Result<()> {
        let mut lines = Vec::new();
        if plan.changes.is_empty() {
            lines.push(nothing.to_owned());
        }
        if self.dry_run {
            output::print(&plan.diff())?;
        } else {
            plan.apply()?;
            lines.extend(plan.changes.iter().map(Change::describe));
            lines.extend(plan.notes.iter().cloned());
            let place = if self.root.is_some() { "on the host: " } else { "" };
            lines.extend(plan.next.map(|next| format!("now run {place}{next}")));
        }
        let lines: String = lines.iter().map(|line| format!("{}: {line}\n", engine.name())).collect();
        output::print(&lines)
    }
}
