//! Root file systems of containers: unmodified Debian, made from the distribution's packages without any registry.

use crate::command::{Running, command};
use crate::{artifacts, machine, sandbox};
use anyhow::{Context, Result, bail, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// What is in the image besides Debian's minimum.
const PACKAGES: [&str; 7] =
    ["hwloc-nox", "ibverbs-providers", "ibverbs-utils", "perftest", "python3-pyverbs", "rdmacm-utils", "ucx-utils"];

/// Where it says which packages it was made with.
const MADE_WITH: &str = "var/lib/ringfence-image-packages";

static NEXT: AtomicU32 = AtomicU32::new(0);

/// Names a directory whose file system is the image instead, such as `/` on a machine that has the packages and no network.
const IMAGE: &str = "RINGFENCE_TEST_IMAGE";

/// A root file system that containers share and none of them writes to.
#[derive(Clone, Debug)]
pub struct Image {
    dir: PathBuf,
}

/// One container's own view of an [`Image`]: what it writes is gone when this is dropped.
#[derive(Debug)]
pub struct Rootfs {
    dir: PathBuf,
    layers: PathBuf,
}

impl Image {
    /// The host's own Debian release with the verbs tools; from the cache, or made (15 s and the network).
    pub fn debian() -> Result<Self> {
        if let Some(dir) = std::env::var_os(IMAGE) {
            return Ok(Self { dir: dir.into() });
        }
        let Some(suite) = machine::debian_suite() else {
            bail!("/etc/os-release has no VERSION_CODENAME: this needs Debian 12 or 13");
        };
        let dir = artifacts::cache().join(format!("rootfs-{suite}"));
        if std::fs::read_to_string(dir.join(MADE_WITH)).ok() != Some(PACKAGES.join(",")) {
            match make(&suite, &dir) {
                // Without the network tests do with what there is, and skip what it lacks.
                Err(error) if dir.exists() => println!("{} is not of today's packages: {error:#}", dir.display()),
                result => result?,
            }
        }
        Ok(Self { dir })
    }

    /// Where [`Self::debian`] is or will be; an error if it is not there and cannot be made.
    pub fn source() -> Result<PathBuf> {
        let is_there = Self::is_cached() || std::env::var_os(IMAGE).is_some();
        ensure!(is_there || machine::is_installed("mmdebstrap"), "mmdebstrap not installed: run integration/test.sh");
        Ok(artifacts::cache())
    }

    /// Whether [`Self::debian`] would come from the cache.
    #[must_use]
    pub fn is_cached() -> bool {
        machine::debian_suite().is_some_and(|suite| artifacts::cache().join(format!("rootfs-{suite}")).exists())
    }

    /// A container's own copy, by overlay.
    pub fn instance(&self) -> Result<Rootfs> {
        let layers = sandbox::work_dir().join(format!("rootfs-{}", NEXT.fetch_add(1, Ordering::Relaxed)));
        let [upper, work, dir] = ["upper", "work", "root"].map(|name| layers.join(name));
        for path in [&upper, &work, &dir] {
            std::fs::create_dir_all(path).with_context(|| format!("cannot create {}", path.display()))?;
        }
        let options =
            format!("lowerdir={},upperdir={},workdir={}", self.dir.display(), upper.display(), work.display());
        mount(Some("overlay"), &dir, Some("overlay"), MsFlags::empty(), Some(options.as_str()))
            .with_context(|| format!("cannot mount an overlay of {}", self.dir.display()))?;
        Ok(Rootfs { dir, layers })
    }
}

impl Rootfs {
    /// Its root directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What was written to it: relative paths below the root, sorted.
    pub fn written(&self) -> Result<Vec<PathBuf>> {
        let upper = self.layers.join("upper");
        let mut found = Vec::new();
        let mut pending = vec![upper.clone()];
        while let Some(dir) = pending.pop() {
            for entry in std::fs::read_dir(&dir)? {
                let path = entry?.path();
                if path.is_dir() && !path.is_symlink() {
                    pending.push(path.clone());
                } else {
                    found.push(path.strip_prefix(&upper)?.to_owned());
                }
            }
        }
        found.sort();
        Ok(found)
    }
}

impl Drop for Rootfs {
    fn drop(&mut self) {
        umount2(&self.dir, MntFlags::MNT_DETACH).ok();
        std::fs::remove_dir_all(&self.layers).ok();
    }
}

fn make(suite: &str, dir: &Path) -> Result<()> {
    std::fs::create_dir_all(artifacts::cache())?;
    let partial = sandbox::partial_dir();
    let include = format!("--include={}", PACKAGES.join(","));
    let target = partial.to_str().context("the repository's path is not UTF-8")?;
    let words = ["mmdebstrap", "--variant=minbase", &include, suite, target];
    Running::start(command(&words))?.wait(Duration::from_secs(600))?.success()?;
    std::fs::write(partial.join(MADE_WITH), PACKAGES.join(","))?;
    if dir.exists() {
        std::fs::remove_dir_all(dir).with_context(|| format!("cannot remove {}", dir.display()))?;
    }
    std::fs::rename(&partial, dir).with_context(|| format!("cannot move {target} to {}", dir.display()))
}
