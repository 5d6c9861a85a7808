//! `ringfence-hook createRuntime|prestart|poststop`, with the OCI container state on standard input.

use ringfence_hook::{Code, Failure, create, stop};
use std::io::Write;
use std::process::ExitCode;

const USAGE: &str =
    "usage: ringfence-hook createRuntime|prestart|poststop, with the OCI container state on standard input";

fn main() -> ExitCode {
    // By hand: the hook is in the way of every container's start, ours or not.
    let mut arguments = std::env::args_os().skip(1);
    let stage = arguments.next().filter(|_| arguments.next().is_none());
    let input = std::io::stdin().lock();
    let result = match stage.as_ref().and_then(|stage| stage.to_str()) {
        Some("createRuntime" | "prestart") => create(input),
        Some("poststop") => stop(input),
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
