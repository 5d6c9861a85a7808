//! `ringfence completion`

use crate::commands::Cli;
use crate::output;
use anyhow::Result;
use clap::CommandFactory;
use clap_complete::Shell;
use std::process::ExitCode;

/// Prints a completion script for a shell
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  ringfence completion bash >/usr/share/bash-completion/completions/ringfence
  ringfence completion zsh >/usr/share/zsh/vendor-completions/_ringfence
  ringfence completion fish >/usr/share/fish/vendor_completions.d/ringfence.fish")]
pub struct Args {
    shell: Script,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Script {
    Bash,
    Zsh,
    Fish,
}

impl Args {
    pub fn run(self) -> Result<ExitCode> {
        let shell = match self.shell {
            Script::Bash => Shell::Bash,
            Script::Zsh => Shell::Zsh,
            Script::Fish => Shell::Fish,
        };
        let mut script = Vec::new();
        clap_complete::generate(shell, &mut Cli::command(), "ringfence", &mut script);
        output::print(&String::from_utf8(script)?)?;
        Ok(ExitCode::SUCCESS)
    }
}
