//! Test programs that make their surroundings, and whose tests are counted as ignored, loudly, where they cannot run.
//!
//! Rust's own test runner has no way to ignore a test while it runs. A program with `harness = false` in its Cargo.toml lists its
//! tests instead of marking them, and those that are forgotten are dead code:
//!
//! ```no_run
//! fn a_container_is_joined() {
//!     ringfence_trials::needs_root("it makes containers");
//! }
//!
//! fn main() -> std::process::ExitCode {
//!     ringfence_trials::main(ringfence_trials::tests![a_container_is_joined])
//! }
//! ```

pub mod huge_pages;
pub mod surroundings;

pub use libtest_mimic::{Arguments, Failed, Trial};

use libtest_mimic::Completion;
use std::fmt;
use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};

/// The tests that were skipped so far, and why.
static SKIPPED: Mutex<Vec<(String, String)>> = Mutex::new(Vec::new());

/// Why a test cannot run here. As a panic's payload ([`skip`]) or as a test's error it makes the test an ignored one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Skipped(pub String);

impl fmt::Display for Skipped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "skipped: {}", self.0)
    }
}

impl std::error::Error for Skipped {}

/// Leaves the test that calls it, which is then counted as ignored. What it holds is dropped.
pub fn skip(reason: impl Into<String>) -> ! {
    // Without the message of a panic: it is none.
    std::panic::resume_unwind(Box::new(Skipped(reason.into())))
}

/// Leaves the test unless root runs it. `why` begins with "it".
pub fn needs_root(why: &str) {
    if !nix::unistd::geteuid().is_root() {
        skip(format!("{why} and needs root"));
    }
}

/// A test that fails by a panic, or by the error that it returns; how an error is written, or that it means [`Skipped`], says
/// `explain`.
pub fn test_with<E: 'static>(
    name: impl Into<String>,
    run: impl FnOnce() -> Result<(), E> + Send + 'static,
    explain: fn(E) -> Result<Skipped, Failed>,
) -> Trial {
    let name = name.into();
    let title = name.clone();
    Trial::ignorable_test(name, move || {
        let skipped = match std::panic::catch_unwind(AssertUnwindSafe(run)) {
            Ok(Ok(())) => return Ok(Completion::Completed),
            Ok(Err(error)) => explain(error)?,
            Err(payload) => match payload.downcast::<Skipped>() {
                Ok(skipped) => *skipped,
                Err(payload) => std::panic::resume_unwind(payload),
            },
        };
        SKIPPED.lock().unwrap_or_else(PoisonError::into_inner).push((title, skipped.0.clone()));
        Ok(Completion::ignored_with(skipped.0))
    })
}

/// A test that fails by a panic.
pub fn test(name: impl Into<String>, run: impl FnOnce() + Send + 'static) -> Trial {
    test_with(
        name,
        || {
            run();
            Ok::<(), Failed>(())
        },
        Err,
    )
}

/// The tests that are these functions, by their names.
#[macro_export]
macro_rules! tests {
    ($($test:path),* $(,)?) => { ::std::vec![$($crate::test(::std::stringify!($test), $test)),*] };
}

/// What runs a fuzzer's input.
pub type FuzzTarget = fn(&[u8]);

/// Runs the corpus of each of these fuzzers' targets, `integration/fuzz/corpus/<name>`, through it.
///
/// # Panics
/// If an input does not hold, or a target has no corpus.
pub fn replay(targets: &[(&str, FuzzTarget)]) {
    let corpora = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus");
    for (name, target) in targets {
        let inputs = std::fs::read_dir(corpora.join(name)).unwrap_or_else(|error| panic!("the corpus {name}: {error}"));
        let mut count = 0;
        for input in inputs {
            let path = input.expect("a readable directory").path();
            // Shown if it does not hold.
            println!("{}", path.display());
            target(&std::fs::read(&path).expect("a readable file"));
            count += 1;
        }
        assert!(count > 0, "the corpus {name} is empty");
        target(&[]);
    }
}

/// Runs the tests that the program's arguments choose, as Rust's test runner does, in surroundings that containers can be made in.
#[must_use]
pub fn main(tests: Vec<Trial>) -> ExitCode {
    let arguments = Arguments::from_args();
    if let Err(error) = surroundings::arrange() {
        eprintln!("{error}");
        return ExitCode::FAILURE;
    }
    run(&arguments, tests)
}

/// Runs tests, and says in the end which were skipped, one line for each that begins with `SKIPPED: `.
#[must_use]
pub fn run(arguments: &Arguments, tests: Vec<Trial>) -> ExitCode {
    let conclusion = libtest_mimic::run(arguments, tests);
    for (name, reason) in SKIPPED.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
        println!("SKIPPED: {}: {name}: {reason}", program());
    }
    conclusion.exit_code()
}

/// The test program's name, without cargo's hash.
fn program() -> String {
    let path = std::env::current_exe().unwrap_or_default();
    let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    stem.rsplit_once('-').map_or(stem.clone(), |(name, _)| name.to_owned())
}
