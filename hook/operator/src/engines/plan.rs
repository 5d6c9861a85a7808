//! Changes to an engine's files: shown, or carried out whole.

use super::host::Host;
use anyhow::{Context, Result, bail};
use std::fmt::Write as _;
use std::io::{ErrorKind, Write as _};
use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

/// What an engine's files are to become.
#[derive(Debug, Default)]
pub struct Plan {
    /// In the order in which they are to be made.
    pub changes: Vec<Change>,
    /// What the administrator should know besides.
    pub notes: Vec<String>,
    /// What makes the engine read its changed files.
    pub next: Option<&'static str>,
}

/// One file's.
#[derive(Debug)]
pub struct Change {
    /// Where it is for us, links followed.
    path: PathBuf,
    /// `None` for no file.
    old: Option<String>,
    new: Option<String>,
}

impl Plan {
    /// Has the host's file at `path` become `new`; `None` removes it. What is so already is no change.
    pub fn set(&mut self, host: &Host, path: &Path, new: Option<String>) -> Result<()> {
        let old = host.read(path)?;
        if old != new {
            self.changes.push(Change { path: host.locate(path)?, old, new });
        }
        Ok(())
    }

    /// The changes as one unified diff.
    pub fn diff(&self) -> String {
        let mut text = String::new();
        for Change { path, old, new } in &self.changes {
            let name = |side: &Option<String>| match side {
                Some(_) => path.display().to_string(),
                None => "/dev/null".into(),
            };
            let (before, after) = (old.as_deref().unwrap_or(""), new.as_deref().unwrap_or(""));
            let diff = similar::TextDiff::from_lines(before, after);
            let _ = write!(text, "{}", diff.unified_diff().header(&name(old), &name(new)));
        }
        text
    }

    /// Carries the changes out. If one fails, those before it are undone.
    pub fn apply(&self) -> Result<()> {
        for (i, change) in self.changes.iter().enumerate() {
            if let Err(error) = change.apply() {
                let left: Vec<_> = self.changes[..i].iter().rev().filter_map(|change| change.undo().err()).collect();
                if let Some(undo) = left.first() {
                    bail!("{error:#}; and what was changed before cannot be undone: {undo:#}");
                }
                return Err(error.context("nothing was changed"));
            }
        }
        Ok(())
    }
}

impl Change {
    /// What happened to the file, in words.
    pub fn describe(&self) -> String {
        let verb = match (&self.old, &self.new) {
            (None, _) => "wrote",
            (_, None) => "removed",
            _ => "changed",
        };
        format!("{verb} {}", self.path.display())
    }

    fn apply(&self) -> Result<()> {
        write(&self.path, self.old.as_deref(), self.new.as_deref())
    }

    fn undo(&self) -> Result<()> {
        write(&self.path, self.new.as_deref(), self.old.as_deref())
    }
}

/// Replaces a file of the content `old` by `new`, at once, with the same owner and mode.
fn write(path: &Path, old: Option<&str>, new: Option<&str>) -> Result<()> {
    let current = match std::fs::read_to_string(path) {
        Ok(text) => Some(text),
        Err(error) if error.kind() == ErrorKind::NotFound => None,
        Err(error) => bail!("cannot read {}: {error}", path.display()),
    };
    if current.as_deref() != old {
        bail!("{} has just been changed by somebody else; try again", path.display());
    }
    let Some(new) = new else {
        return std::fs::remove_file(path).with_context(|| format!("cannot remove {}", path.display()));
    };
    let failed = || format!("cannot write {}", path.display());
    let directory = path.parent().context("a file needs a directory")?;
    std::fs::create_dir_all(directory).with_context(failed)?;
    // Engines read every *.toml, *.conf or *.json of some directories.
    let mut file = tempfile::Builder::new().prefix(".ringfence-").tempfile_in(directory).with_context(failed)?;
    file.write_all(new.as_bytes()).with_context(failed)?;
    match std::fs::metadata(path) {
        Ok(metadata) => {
            file.as_file().set_permissions(metadata.permissions()).with_context(failed)?;
            let temporary = file.as_file().metadata().with_context(failed)?;
            if (temporary.uid(), temporary.gid()) != (metadata.uid(), metadata.gid()) {
                fchown(file.as_file(), Some(metadata.uid()), Some(metadata.gid())).with_context(failed)?;
            }
        }
        Err(_) => file.as_file().set_permissions(PermissionsExt::from_mode(0o644)).with_context(failed)?,
    }
    file.as_file().sync_all().with_context(failed)?;
    file.persist(path).map_err(|error| error.error).with_context(failed)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(root: &Path) -> Host {
        Host::new(Some(root), false).unwrap()
    }

    #[test]
    fn a_failed_change_undoes_those_before_it() {
        let root = tempfile::tempdir().unwrap();
        let (a, b) = (root.path().join("a"), root.path().join("b"));
        std::fs::write(&a, "old").unwrap();
        std::fs::set_permissions(&a, PermissionsExt::from_mode(0o600)).unwrap();
        std::fs::write(&b, "old").unwrap();
        let mut plan = Plan::default();
        plan.set(&host(root.path()), Path::new("/a"), Some("new".into())).unwrap();
        plan.set(&host(root.path()), Path::new("/new/c"), Some("new".into())).unwrap();
        plan.set(&host(root.path()), Path::new("/b"), Some("new".into())).unwrap();
        std::fs::write(&b, "somebody else's").unwrap();
        let error = format!("{:#}", plan.apply().unwrap_err());
        assert!(error.contains("nothing was changed") && error.contains("somebody else"), "{error}");
        assert_eq!(std::fs::read_to_string(&a).unwrap(), "old");
        assert_eq!(std::fs::metadata(&a).unwrap().mode() & 0o777, 0o600);
        assert!(!root.path().join("new/c").exists());
        assert_eq!(std::fs::read_to_string(&b).unwrap(), "somebody else's");
    }

    #[test]
    fn a_diff_names_files_that_come_and_go() {
        let root = tempfile::tempdir().unwrap();
        std::fs::write(root.path().join("gone"), "x\n").unwrap();
        let mut plan = Plan::default();
        plan.set(&host(root.path()), Path::new("/gone"), None).unwrap();
        plan.set(&host(root.path()), Path::new("/come"), Some("y\n".into())).unwrap();
        let diff = plan.diff();
        assert!(diff.contains("+++ /dev/null\n") && diff.contains("-x\n"), "{diff}");
        assert!(diff.contains("--- /dev/null\n") && diff.contains("+y\n"), "{diff}");
    }
}
