//! `ringfence-hook createRuntime|prestart|poststop [--policy NAME]`, with the OCI container state on standard input.

use ringfence_hook::annotations::is_device_name;
use ringfence_hook::{Code, Failure, Input, create, stop};
use std::ffi::{OsStr, OsString};
use std::io::{IsTerminal, Write};
use std::process::ExitCode;

const USAGE: &str = "usage: ringfence-hook createRuntime|prestart|poststop [--policy NAME], with the OCI container state on standard input";

const HELP: &str = "\
The OCI hook that gives containers RDMA. Engines call it; `ringfence configure` registers it with them.
It reads the container's state (OCI runtime specification, \"State\") from standard input.

  createRuntime, prestart   start the container's verbs proxy and bring the library in
  poststop                  remove what was made for the container
  --policy NAME             the administrator's choice: RDMA by this profile, even without annotations

What it refuses, `ringfence list --failures` shows.";

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    match (arguments.next().as_deref().and_then(OsStr::to_str), arguments.next()) {
        (Some("--help" | "-h"), None) => {
            println!("{USAGE}\n\n{HELP}");
            return ExitCode::SUCCESS;
        }
        (Some("--version" | "-V"), None) => {
            println!("ringfence-hook {}", env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
        _ => {}
    }
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            // There is nobody to tell if this fails; the exit code says the most of it.
            let _ = std::io::stderr().write_all(format!("ringfence-hook: {failure}\n").as_bytes());
            failure.report();
            ExitCode::from(failure.code as u8)
        }
    }
}

fn run() -> Result<(), Failure> {
    let arguments = std::env::args_os().skip(1).map(OsString::into_string).collect::<Result<Vec<_>, _>>();
    let arguments = arguments.unwrap_or_default();
    let parsed = parse(&arguments);
    let mut input = Input::stdin().map_err(|error| Failure::new(Code::State, format!("standard input: {error}")))?;
    match parsed {
        Ok((Stage::Create, policy)) => create(input, policy),
        // What is to be undone is on record.
        Ok((Stage::Poststop, _)) => stop(input),
        Err(failure) => {
            // crun writes the state to whom does not read it, and dies of that without a word.
            if !std::io::stdin().is_terminal() {
                let _ = std::io::copy(&mut input, &mut std::io::sink());
            }
            Err(failure)
        }
    }
}

enum Stage {
    Create,
    Poststop,
}

/// Parses the arguments, by hand: the hook is in the way of every container's start, ours or not.
fn parse(arguments: &[String]) -> Result<(Stage, Option<&str>), Failure> {
    let usage = || Failure::new(Code::Usage, USAGE);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let (stage, policy) = match arguments[..] {
        [stage] => (stage, None),
        [stage, "--policy", policy] => (stage, Some(policy)),
        [stage, option] => (stage, Some(option.strip_prefix("--policy=").ok_or_else(usage)?)),
        _ => return Err(usage()),
    };
    let stage = match stage {
        "createRuntime" | "prestart" => Stage::Create,
        "poststop" => Stage::Poststop,
        _ => return Err(usage()),
    };
    if let Some(policy) = policy.filter(|policy| !is_device_name(policy)) {
        let message = format!("--policy {policy:?} is no profile's name, which has 1 to 63 of A-Z a-z 0-9 _ . -");
        return Err(Failure::new(Code::Usage, message));
    }
    Ok((stage, policy))
}
