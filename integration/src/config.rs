//! The administrator's configuration for one test or demonstration.

use crate::{artifacts, sandbox};
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

static NEXT: AtomicU32 = AtomicU32::new(0);

/// A configuration file with a node-wide run-time directory of its own: containers of different configurations do not
/// see each other's devices. Gone when dropped.
#[derive(Debug)]
pub struct Config {
    dir: PathBuf,
}

impl Config {
    /// The built programs, one software device `soft0`, and `more` as it is (tables only).
    pub fn new(more: &str) -> Result<Self> {
        Self::write("", "", "kind = \"soft\"", more)
    }

    /// Like [`Self::new`], with `inject` in the table of that name.
    pub fn injecting(inject: &str, more: &str) -> Result<Self> {
        Self::write("", inject, "kind = \"soft\"", more)
    }

    /// Like [`Self::new`], with a modelled link that all containers share.
    ///
    /// The proxies never spin: on a slow link there is nothing to spin for, and containers outnumber the cores.
    pub fn with_link(rate: &str, more: &str) -> Result<Self> {
        Self::write("spin-us = 0", "", &format!("kind = \"soft\"\nlink = \"{rate}\""), more)
    }

    fn write(proxy: &str, inject: &str, device: &str, more: &str) -> Result<Self> {
        let dir = sandbox::work_dir().join(format!("node-{}", NEXT.fetch_add(1, Ordering::Relaxed)));
        std::fs::create_dir(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        let config = Self { dir };
        let text = format!(
            "run-dir = {:?}\n[proxy]\n{proxy}\npath = {:?}\n[inject]\n{inject}\nlibrary = {:?}\n[[device]]\nname = \"soft0\"\n{device}\n{more}\n",
            config.run_dir(),
            artifacts::proxy()?,
            artifacts::library()?,
        );
        std::fs::write(config.path(), text)?;
        Ok(config)
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.dir.join("config.toml")
    }

    /// Containers that are started from now on get this proxy.
    pub fn set_proxy(&self, proxy: &Path) -> Result<()> {
        let text = std::fs::read_to_string(self.path())?;
        let built = format!("path = {:?}", artifacts::proxy()?);
        std::fs::write(self.path(), text.replacen(&built, &format!("path = {proxy:?}"), 1))?;
        Ok(())
    }

    /// The node-wide run-time directory.
    #[must_use]
    pub fn run_dir(&self) -> PathBuf {
        self.dir.join("run")
    }

    /// Containers that have a proxy's directory under the run-time directory.
    #[must_use]
    pub fn live_containers(&self) -> Vec<String> {
        names_in(&self.run_dir().join("containers"))
    }
}

impl Drop for Config {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.dir).ok();
    }
}

fn names_in(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}
