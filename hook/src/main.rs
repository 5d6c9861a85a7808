//! `ringfence-hook createRuntime|prestart|poststop`, with the OCI container state on standard input.

use ringfence_hook::{Code, Failure, Input, create, stop};
use std::io::Write;
use std::process::ExitCode;

fn input() -> Result<Input, Failure> {
    Input::stdin().map_err(|error| Failure::new(Code::State, format!("standard input: {error}")))
}

const USAGE: &str =
    "usage: ringfence-hook createRuntime|prestart|poststop, with the OCI container state on standard input";

fn main() -> ExitCode {
    // By hand: the hook is in the way of every container's start, ours or not.
    let mut arguments = std::env::args_os().skip(1);
    let stage = arguments.next().filter(|_| arguments.next().is_none());
    let result = match stage.as_ref().and_then(|stage| stage.to_str()) {
        Some("createRuntime" | "prestart") => input().and_then(create),
        Some("poststop") => input().and_then(stop),
        _ => Err(Failure::new(Code::Usage, USAGE)),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            // There is nobody to tell if this fails; the exit code says the most of it.
            let _ = std::io::stderr().write_all(format!("ringfence-hook: {failure}\n").as_bytes());
            ExitCode::from(failure.code as u8)
        }
    }
}
