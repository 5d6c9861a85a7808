//! Tests of the crate as a whole: of the shared library that `link.sh` makes.

mod library;
mod symbols;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// The shared library, made once.
pub fn library() -> &'static Path {
    static LIBRARY: OnceLock<PathBuf> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("link.sh");
        let out = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/preload-test");
        let output = Command::new("sh").arg(&script).arg(&out).output().unwrap();
        assert!(output.status.success(), "{}: {}", script.display(), String::from_utf8_lossy(&output.stderr));
        out.join("libibverbs.so.1").canonicalize().unwrap()
    })
}

/// A program with our library preloaded and no proxy: its standard output and error.
fn preloaded(program: &str, arguments: &[&str]) -> (bool, String) {
    let output = Command::new(program)
        .args(arguments)
        .env("LD_PRELOAD", library())
        .env("RINGFENCE_SOCKET", "/nonexistent/verbs.sock")
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    (output.status.success(), text)
}
