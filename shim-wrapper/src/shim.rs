//! `containerd-shim-ringfence-v2`: becomes containerd's runc shim, which then finds `ringfence-runtime` as its `runc`.
//!
//! Standard input (the runtime's options, or since containerd 2.3 its bootstrap parameters) is the real shim's to read, and
//! containerd takes whatever comes on standard output and error for its answer: both stay untouched unless we fail.

use crate::find::{self, Search};
use crate::places::Places;
use ringfence_hook::config::Config;
use ringfence_hook::{Code, Failure};
use std::ffi::{OsStr, OsString};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

/// Tells [`crate::runtime`] that it was called by way of the shim.
const ENVIRONMENT: &str = "RINGFENCE_SHIM";
/// The shim to become.
const REAL: &str = "containerd-shim-runc-v2";

/// Whether the shim is above us.
pub(crate) fn is_above() -> bool {
    std::env::var_os(ENVIRONMENT).is_some()
}

/// Becomes the real shim; the exit code is of what kept us from it, after saying so.
pub fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let Err(failure) = run(&arguments);
    // Without an end of line, as the real shim: containerd goes on with ": exit status 1".
    let _ = std::io::stderr().write_all(format!("containerd-shim-ringfence-v2: {failure}").as_bytes());
    ExitCode::FAILURE
}

fn run(arguments: &[OsString]) -> Result<std::convert::Infallible, Failure> {
    let places = Places::of(&Config::load());
    let (links, search) = (&places.shim.links, Search::new(&places.shim.links, &[&places.shim.path]));
    let program = real(&places, &search, publish_binary(arguments))?;
    // Only before something is made: what is there must be deletable, and the version told, whatever is missing.
    if arguments.last().is_some_and(|action| action == "start") {
        check(links)?;
    }
    let mut path = links.clone().into_os_string();
    path.push(":");
    path.push(find::without(search.path(), links));
    let error = Command::new(&program).arg0(REAL).args(arguments).env("PATH", path).env(ENVIRONMENT, "1").exec();
    Err(Failure::new(Code::Config, format!("cannot execute {}: {error}; [shim] real names another", program.display())))
}

/// Without our link the real shim would run the real runc, and the container would start without us.
fn check(links: &Path) -> Result<(), Failure> {
    let link = links.join("runc");
    match link.metadata() {
        Ok(_) => Ok(()),
        Err(error) => Err(Failure::new(
            Code::Config,
            format!(
                "{}: {error}; it must be a link to ringfence-runtime, or [shim] links must name its directory",
                link.display()
            ),
        )),
    }
}

/// The configured shim; or the one beside the calling containerd, which is of its version; or the one in `PATH`.
fn real(places: &Places, search: &Search, publish_binary: Option<&OsStr>) -> Result<PathBuf, Failure> {
    let beside = publish_binary.map(Path::new).filter(|path| path.is_absolute());
    let beside = beside.and_then(Path::parent).map(|directory| directory.join(REAL));
    let candidates = match &places.shim.real {
        Some(real) => vec![real.clone()],
        None => beside.into_iter().chain([REAL.into()]).collect(),
    };
    if let Some(program) = candidates.iter().find_map(|candidate| search.find(candidate)) {
        return Ok(program);
    }
    let ours = match candidates.iter().any(|candidate| search.is_ours(candidate)) {
        true => " and not containerd-shim-ringfence-v2 itself",
        false => "",
    };
    let candidates: Vec<_> = candidates.iter().map(|candidate| candidate.display().to_string()).collect();
    let message = format!(
        "no containerd shim found: looked for {} with PATH={}; [shim] real must name a {REAL}{ours}",
        candidates.join(", "),
        Path::new(search.path()).display()
    );
    Err(Failure::new(Code::Config, message))
}

/// The containerd that calls, by its flag, in any form that Go has for it.
fn publish_binary(arguments: &[OsString]) -> Option<&OsStr> {
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        let bytes = argument.as_bytes();
        let Some(flag) = bytes.strip_prefix(b"--").or_else(|| bytes.strip_prefix(b"-")) else { continue };
        if flag.is_empty() {
            return None;
        }
        if flag == b"publish-binary" {
            return rest.next().map(OsString::as_os_str);
        }
        if let Some(value) = flag.strip_prefix(b"publish-binary=") {
            return Some(OsStr::from_bytes(value));
        }
        // Whose value may look like a flag.
        if [&b"namespace"[..], b"address", b"id", b"bundle", b"socket"].contains(&flag) {
            rest.next();
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_calling_containerd() {
        for (line, expected) in [
            (
                "-namespace k8s.io -address /a -publish-binary /usr/bin/containerd -id x start",
                Some("/usr/bin/containerd"),
            ),
            ("-publish-binary=/c -id x start", Some("/c")),
            ("--publish-binary /c start", Some("/c")),
            ("--publish-binary=/c start", Some("/c")),
            ("-debug -new-flag -publish-binary /c start", Some("/c")),
            ("-namespace -publish-binary -id x -publish-binary /c delete", Some("/c")),
            ("-info", None),
            ("-v", None),
            ("", None),
            ("-publish-binary", None),
            ("-- -publish-binary /c", None),
        ] {
            let arguments: Vec<_> = line.split_whitespace().map(OsString::from).collect();
            assert_eq!(publish_binary(&arguments), expected.map(OsStr::new), "{line}");
        }
    }
}
