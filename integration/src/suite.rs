//! A test program whose tests run in the sandbox, and are counted as ignored, loudly, where they cannot run.

use crate::{machine, sandbox};
use anyhow::Result;
use libtest_mimic::{Arguments, Failed, Trial};
use std::process::ExitCode;

/// What the tests of a program need.
pub struct Needs {
    /// Programs in `PATH`.
    pub programs: &'static [&'static str],
    /// Built files; each function says how to get what is missing.
    pub built: &'static [fn() -> Result<std::path::PathBuf>],
}

/// Runs the tests that `list` returns. One at a time: they measure, and the machine may have two cores.
pub fn main(label: &str, needs: &Needs, list: impl FnOnce() -> Result<Vec<Trial>>) -> ExitCode {
    let mut arguments = Arguments::from_args();
    arguments.test_threads.get_or_insert(1);
    let missing = needs.built.iter().find_map(|built| built().err());
    let obstacle = machine::obstacle(needs.programs).or_else(|| missing.map(|error| format!("{error:#}")));
    if let Some(reason) = obstacle {
        println!("SKIPPED: {label}: {reason}");
        let trial = Trial::test(format!("{label} (all: {reason})"), || Ok(())).with_ignored_flag(true);
        arguments.include_ignored = false;
        arguments.ignored = false;
        return libtest_mimic::run(&arguments, vec![trial]).exit_code();
    }
    sandbox::run(label, || match list() {
        Ok(trials) => libtest_mimic::run(&arguments, trials).exit_code(),
        Err(error) => {
            eprintln!("{label}: {error:#}");
            ExitCode::FAILURE
        }
    })
}

/// A test that fails with the error that it returns.
pub fn test(name: impl Into<String>, run: impl FnOnce() -> Result<()> + Send + 'static) -> Trial {
    Trial::test(name, move || run().map_err(|error| Failed::from(format!("{error:#}"))))
}
