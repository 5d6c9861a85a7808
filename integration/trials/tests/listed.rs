//! That no test is lost: without Rust's test runner the compiler drops what is marked for it, and says nothing.

use ringfence_trials::tests;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

fn main() -> ExitCode {
    if std::env::var_os(SAMPLE).is_some() {
        return ringfence_trials::main(tests![skips, passes, fails]);
    }
    ringfence_trials::main(tests![
        programs_that_list_their_tests_mark_none,
        a_test_that_cannot_run_is_counted_as_ignored,
    ])
}

fn files(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            files(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

fn programs_that_list_their_tests_mark_none() {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap();
    let mut looked_at = 0;
    for package in ["hook", "hook/operator", "shim-wrapper", "integration", "integration/trials"] {
        let mut found = Vec::new();
        files(&repository.join(package).join("tests"), &mut found);
        looked_at += found.len();
        let manifest = std::fs::read_to_string(repository.join(package).join("Cargo.toml")).unwrap();
        for file in found {
            let text = std::fs::read_to_string(&file).unwrap();
            let marked = text.lines().filter(|line| line.trim() == "#[test]").count();
            assert_eq!(marked, 0, "{}: its tests belong into the list of its main", file.display());
            if file.parent() == Some(&repository.join(package).join("tests")) {
                let name = file.file_stem().unwrap().to_str().unwrap();
                let expected = format!("name = \"{name}\"\nharness = false\n");
                assert!(manifest.contains(&expected), "{package}/Cargo.toml has no [[test]] {expected}");
            }
        }
    }
    assert!(looked_at > 20, "only {looked_at} files were found");
}

/// Makes this program one with a test of each outcome.
const SAMPLE: &str = "RINGFENCE_TRIALS_SAMPLE";

fn skips() {
    ringfence_trials::skip("there is nothing to do");
}

fn passes() {}

fn fails() {
    std::panic::resume_unwind(Box::new("it fails"));
}

fn a_test_that_cannot_run_is_counted_as_ignored() {
    let run = |argument: &str| {
        let mut program = Command::new(std::env::current_exe().unwrap());
        let output = program.arg(argument).env(SAMPLE, "1").output().unwrap();
        (output.status.success(), String::from_utf8(output.stdout).unwrap())
    };
    let (all_well, said) = run("--test-threads=1");
    assert!(!all_well && said.contains("1 passed; 1 failed; 1 ignored"), "{said}");
    let (all_well, said) = run("skips");
    assert!(all_well && said.contains("0 passed; 0 failed; 1 ignored"), "{said}");
    assert!(said.ends_with("SKIPPED: listed: skips: there is nothing to do\n"), "{said}");
}
