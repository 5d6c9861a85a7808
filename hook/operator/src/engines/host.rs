//! The machine whose engines are configured: this one, or one whose root file system is mounted somewhere.

use anyhow::{Context, Result, bail};
use ringfence_hook::config::{self, Config};
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};

/// Where programs are looked for: engines run with a `PATH` such as this, whatever the administrator's is.
const PROGRAM_DIRECTORIES: [&str; 6] = ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"];
/// As many as the kernel follows.
const MAX_LINKS: usize = 40;

/// A host, by its root file system.
#[derive(Clone, Debug)]
pub struct Host {
    root: PathBuf,
    /// The home directory of a user with an engine of their own.
    home: Option<PathBuf>,
}

impl Host {
    /// The host whose root is at `root`; this one if that is `None`.
    pub fn new(root: Option<&Path>, user: bool) -> Result<Self> {
        let root = match root {
            None => "/".into(),
            Some(root) => {
                root.canonicalize().with_context(|| format!("--root {}: give the host's root", root.display()))?
            }
        };
        let home = match (user, std::env::var_os("HOME")) {
            (false, _) => None,
            (true, _) if rustix::process::geteuid().is_root() => {
                bail!("--user is for a user's rootless podman; as root leave it out")
            }
            (true, Some(home)) if Path::new(&home).is_absolute() => Some(PathBuf::from(home)),
            (true, _) => bail!("--user needs HOME to be the user's home directory"),
        };
        Ok(Self { root, home })
    }

    /// Whether it is the machine that we run on.
    pub fn is_local(&self) -> bool {
        self.root == Path::new("/")
    }

    /// Whether a user's own engine is meant.
    pub fn is_rootless(&self) -> bool {
        self.home.is_some()
    }

    /// The directory of the user's configuration, as the host names it.
    pub fn user_config(&self) -> Option<PathBuf> {
        let home = self.home.as_ref()?;
        let variable = std::env::var_os("XDG_CONFIG_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
        Some(variable.unwrap_or_else(|| home.join(".config")))
    }

    /// Where the host's `path` is for us. Symbolic links, also of directories, lead to where they lead on the host.
    /// What does not exist is taken as it is written.
    pub fn locate(&self, path: &Path) -> Result<PathBuf> {
        let mut links = 0;
        let mut pending: Vec<_> = path.components().rev().map(|part| part.as_os_str().to_owned()).collect();
        let mut located = PathBuf::from("/");
        while let Some(part) = pending.pop() {
            match Path::new(&part).components().next() {
                None | Some(Component::CurDir) => {}
                Some(Component::RootDir | Component::Prefix(_)) => located = "/".into(),
                Some(Component::ParentDir) => _ = located.pop(),
                Some(Component::Normal(_)) => match std::fs::read_link(self.join(&located.join(&part))) {
                    Ok(target) => {
                        links += 1;
                        if links > MAX_LINKS {
                            bail!("{}: too many symbolic links", path.display());
                        }
                        pending.extend(target.components().rev().map(|part| part.as_os_str().to_owned()));
                    }
                    Err(_) => located.push(part),
                },
            }
        }
        Ok(self.join(&located))
    }

    fn join(&self, path: &Path) -> PathBuf {
        self.root.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// The host's file; `None` if there is none.
    pub fn read(&self, path: &Path) -> Result<Option<String>> {
        let located = self.locate(path)?;
        match std::fs::read_to_string(&located) {
            Ok(text) => Ok(Some(text)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) if error.kind() == ErrorKind::InvalidData => {
                bail!("{} is not UTF-8 text; mend it first, nothing was changed", located.display())
            }
            Err(error) => bail!("cannot read {}: {error}; nothing was changed", located.display()),
        }
    }

    /// Whether the host has `path`, of whatever kind.
    pub fn exists(&self, path: &Path) -> bool {
        self.locate(path).is_ok_and(|path| path.exists())
    }

    /// A program of the host's by its name.
    pub fn find_program(&self, name: &str) -> Option<PathBuf> {
        let paths = PROGRAM_DIRECTORIES.iter().map(|directory| Path::new(directory).join(name));
        paths.into_iter().find(|path| self.is_program(path))
    }

    /// Whether the host has a program of this path.
    pub fn is_program(&self, path: &Path) -> bool {
        let metadata = self.locate(path).and_then(|path| Ok(std::fs::metadata(path)?));
        metadata.is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
    }

    /// Refuses to register a program that the host does not have: engines fail their containers then.
    pub fn require_program(&self, path: &Path) -> Result<()> {
        if self.is_program(path) {
            return Ok(());
        }
        bail!("{} is missing or not executable on this host; install Ringfence first", path.display())
    }

    /// Ringfence's own configuration on the host.
    pub fn config(&self) -> Result<Config> {
        if self.is_local() {
            return Ok(Config::load()?);
        }
        let path = Path::new(config::DEFAULT_PATH);
        if self.exists(path) { Ok(Config::load_from(&self.locate(path)?)?) } else { Ok(Config::default()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn links_lead_where_they_lead_on_the_host() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path().canonicalize().unwrap();
        let host = Host::new(Some(&root), false).unwrap();
        std::fs::create_dir_all(root.join("srv/real")).unwrap();
        std::fs::create_dir(root.join("etc")).unwrap();
        symlink("/srv/real", root.join("etc/absolute")).unwrap();
        symlink("../srv/./real", root.join("etc/relative")).unwrap();
        symlink("../../../../srv/real", root.join("etc/above")).unwrap();
        symlink("loop", root.join("etc/loop")).unwrap();
        for name in ["absolute", "relative", "above"] {
            let path = Path::new("/etc").join(name).join("new.toml");
            let located = host.locate(&path).unwrap();
            assert_eq!(located, root.join("srv/real/new.toml"), "{name}");
        }
        assert!(host.locate(Path::new("/etc/loop")).unwrap_err().to_string().contains("too many symbolic links"));
    }
}
