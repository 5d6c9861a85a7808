//! Where the built programs are.

use anyhow::{Result, ensure};
use std::path::{Path, PathBuf};

/// The repository's root directory.
#[must_use]
pub fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate lies in the workspace")
}

fn built(relative: &str, how: &str) -> Result<PathBuf> {
    let path = repository().join("target").join(relative);
    ensure!(path.exists(), "{} does not exist: run `{how}` first", path.display());
    Ok(path)
}

/// The verbs proxy.
pub fn proxy() -> Result<PathBuf> {
    built("x86_64-unknown-linux-gnu/release/ringfence-proxy", "cargo build --release")
}

/// The verbs proxy with a real card.
pub fn ibverbs_proxy() -> Result<PathBuf> {
    built("ibverbs/ringfence-proxy-ibverbs", "verbs-proxy/ibverbs/link.sh")
}

/// The test build of the verbs proxy that obeys its container, and stops where a test says. It is never built for release.
pub fn obedient_proxy() -> Result<PathBuf> {
    let how = "cargo build --package ringfence-proxy --features obedient --target-dir target/obedient";
    built("obedient/x86_64-unknown-linux-gnu/debug/ringfence-proxy", how)
}

/// The OCI hook.
pub fn hook() -> Result<PathBuf> {
    built("x86_64-unknown-linux-gnu/release/ringfence-hook", "cargo build --release")
}

/// The operator's command, `ringfence`.
pub fn operator() -> Result<PathBuf> {
    built("x86_64-unknown-linux-gnu/release/ringfence", "cargo build --release")
}

/// The library that containers see as libibverbs.so.1.
pub fn library() -> Result<PathBuf> {
    built("preload/libibverbs.so.1", "verbs-proxy/preload/link.sh")
}

/// The Debian package with all of them.
pub fn package() -> Result<PathBuf> {
    let version = env!("CARGO_PKG_VERSION");
    built(&format!("deb/ringfence_{version}_amd64.deb"), "hook/package/build-deb.sh")
}

/// Source of a verbs program for tests.
#[must_use]
pub fn client_source(name: &str) -> PathBuf {
    repository().join("integration/clients").join(name)
}

/// Where root file systems are kept between runs.
#[must_use]
pub fn cache() -> PathBuf {
    repository().join("integration/.cache")
}
