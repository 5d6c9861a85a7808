//! Finds the real programs, which must not be ours under another name.

use std::ffi::{OsStr, OsString};
use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Where programs are if the environment does not say.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A search that avoids our own programs.
pub struct Search {
    path: OsString,
    ours: Vec<(u64, u64)>,
}

impl Search {
    /// Searches the environment's `PATH` without the directory `links`. What is the same file as this program or as one of
    /// `ours` is not found, by whatever link.
    pub fn new(links: &Path, ours: &[&Path]) -> Self {
        let path = std::env::var_os("PATH").filter(|path| !path.is_empty()).unwrap_or_else(|| DEFAULT_PATH.into());
        let ours = ours.iter().copied().chain([Path::new("/proc/self/exe")]);
        Self { path: without(&path, links), ours: ours.filter_map(|path| path.metadata().ok()).map(identity).collect() }
    }

    /// What is searched.
    pub fn path(&self) -> &OsStr {
        &self.path
    }

    /// The program `name`: itself if it is an absolute path, otherwise the first in the path.
    pub fn find(&self, name: &Path) -> Option<PathBuf> {
        if name.is_absolute() {
            return self.is_program(name).then(|| name.to_owned());
        }
        // Relative directories are of whoever calls, and Go, in which the engines are written, ignores them, too.
        let directories = std::env::split_paths(&self.path).filter(|directory| directory.is_absolute());
        directories.map(|directory| directory.join(name)).find(|program| self.is_program(program))
    }

    /// Whether `path` is one of our own programs.
    pub fn is_ours(&self, path: &Path) -> bool {
        path.metadata().is_ok_and(|found| self.ours.contains(&identity(found)))
    }

    fn is_program(&self, path: &Path) -> bool {
        let program = |found: &Metadata| found.is_file() && found.mode() & 0o111 != 0;
        path.metadata().is_ok_and(|found| program(&found) && !self.ours.contains(&identity(found)))
    }
}

/// `path` without `directory`, whatever it is called there.
pub fn without(path: &OsStr, directory: &Path) -> OsString {
    let avoided = directory.metadata().ok().map(identity);
    let other =
        |entry: &PathBuf| entry != directory && (avoided.is_none() || entry.metadata().ok().map(identity) != avoided);
    // Cannot fail: what was split at colons has none.
    std::env::join_paths(std::env::split_paths(path).filter(other)).unwrap_or_else(|_| path.to_owned())
}

fn identity(found: Metadata) -> (u64, u64) {
    (found.dev(), found.ino())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    #[test]
    fn only_programs_that_are_not_ours_are_found() {
        let lab = tempfile::tempdir().unwrap();
        let at = |name: &str| lab.path().join(name);
        for directory in ["links", "a", "b", "c"] {
            std::fs::create_dir(at(directory)).unwrap();
        }
        let program = |name: &str, mode: u32| {
            std::fs::write(at(name), "").unwrap();
            std::fs::set_permissions(at(name), std::fs::Permissions::from_mode(mode)).unwrap();
        };
        program("ours", 0o755);
        program("links/runc", 0o755);
        program("a/runc", 0o644);
        std::fs::create_dir(at("a/crun")).unwrap();
        symlink(at("ours"), at("b/runc")).unwrap();
        std::fs::hard_link(at("ours"), at("b/crun")).unwrap();
        program("c/runc", 0o755);
        symlink("runc", at("c/crun")).unwrap();
        symlink(at("links"), at("also-links")).unwrap();

        let given = ["links", "also-links", "a", "b", "c"].map(at);
        let path = without(&std::env::join_paths(given).unwrap(), &at("links"));
        assert_eq!(path, std::env::join_paths(["a", "b", "c"].map(at)).unwrap());
        let search = Search { path, ours: vec![identity(at("ours").metadata().unwrap())] };
        assert_eq!(search.find(Path::new("runc")), Some(at("c/runc")));
        assert_eq!(search.find(Path::new("crun")), Some(at("c/crun")));
        assert_eq!(search.find(&at("c/runc")), Some(at("c/runc")));
        for missing in [at("b/runc"), at("b/crun"), at("a/runc"), at("a/crun"), at("nothing"), "youki".into()] {
            assert_eq!(search.find(&missing), None, "{missing:?}");
        }
        assert!(search.is_ours(&at("b/runc")) && search.is_ours(&at("b/crun")) && !search.is_ours(&at("c/runc")));
    }

    #[test]
    fn relative_directories_are_not_searched() {
        let search = Search { path: ".::bin:/nowhere".into(), ours: Vec::new() };
        assert_eq!(search.find(Path::new("Cargo.toml")), None);
    }
}
