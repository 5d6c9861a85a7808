//! Reading the configuration: one file, and `conf.d/*.toml` beside it merged over it in the order of their names.

use super::{Config, DEFAULT_PATH, Error};
use crate::rootless;
use serde::{Deserialize, de};
use std::io::{ErrorKind, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use toml::{Table, Value};

/// The directory of drop-ins, beside the configuration file.
const DROP_INS: &str = "conf.d";
/// The one array to which files add; others they replace.
const ADDED: &str = "device";

impl Config {
    /// Loads the file that the environment names, or the default one, which may be missing, and its drop-ins.
    pub fn load() -> Result<Self, Error> {
        let mut config = Self::load_from(&path())?;
        config.run_dir = rootless::run_dir(config.run_dir)?;
        Ok(config)
    }

    /// Loads `path`, which must exist unless it is [`DEFAULT_PATH`], and its drop-ins.
    pub fn load_from(path: &Path) -> Result<Self, Error> {
        Self::merge(&files(path)?)
    }

    /// The configuration of `files`, each merged over those before.
    fn merge(files: &[PathBuf]) -> Result<Self, Error> {
        let texts = files.iter().map(|path| Ok((path.as_path(), read(path)?)));
        let texts = texts.collect::<Result<Vec<_>, Error>>()?;
        match &texts[..] {
            [] => Ok(Self::default()),
            [(path, text)] => Self::parse(text).map_err(|message| invalid(path, message)),
            _ => merge(&texts),
        }
    }
}

/// The file that the environment names, or the default one.
fn path() -> PathBuf {
    Config::named().unwrap_or_else(|| DEFAULT_PATH.into())
}

/// The files that [`Config::load`] reads, in the order in which they are merged.
pub fn paths() -> Result<Vec<PathBuf>, Error> {
    files(&path())
}

fn files(path: &Path) -> Result<Vec<PathBuf>, Error> {
    let may_be_missing = path == Path::new(DEFAULT_PATH);
    let main = (!may_be_missing || path.symlink_metadata().is_ok()).then(|| path.to_owned());
    Ok(main.into_iter().chain(drop_ins(&path.with_file_name(DROP_INS))?).collect())
}

fn drop_ins(directory: &Path) -> Result<Vec<PathBuf>, Error> {
    let unreadable = |error| Error::Unreadable { path: directory.to_owned(), error };
    let entries = match std::fs::read_dir(directory) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        result => result.map_err(unreadable)?,
    };
    check_mode(directory, &directory.metadata().map_err(unreadable)?)?;
    let mut paths = Vec::new();
    for entry in entries {
        let path = entry.map_err(unreadable)?.path();
        let hidden = path.file_name().is_some_and(|name| name.as_bytes().starts_with(b"."));
        if !hidden && path.extension().is_some_and(|extension| extension == "toml") {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

fn read(path: &Path) -> Result<String, Error> {
    let unreadable = |error| Error::Unreadable { path: path.to_owned(), error };
    let mut file = std::fs::File::open(path).map_err(unreadable)?;
    check_mode(path, &file.metadata().map_err(unreadable)?)?;
    let mut text = String::new();
    file.read_to_string(&mut text).map_err(unreadable)?;
    Ok(text)
}

fn check_mode(path: &Path, metadata: &std::fs::Metadata) -> Result<(), Error> {
    let mode = metadata.mode();
    if mode & 0o002 != 0 {
        return Err(Error::Writable { path: path.to_owned(), mode: mode & 0o7777 });
    }
    Ok(())
}

/// One table of the configuration for those whom mistakes elsewhere do not concern, as `T`: what the files say of `name` that
/// can be read and trusted, merged. A file in which that table makes no `T` is passed over.
pub fn part<T: de::DeserializeOwned + Default>(name: &str) -> T {
    part_of(&path(), name)
}

fn part_of<T: de::DeserializeOwned + Default>(path: &Path, name: &str) -> T {
    let main = path.to_owned();
    let drop_ins = drop_ins(&path.with_file_name(DROP_INS)).unwrap_or_default();
    let mut part = Table::new();
    for file in std::iter::once(main).chain(drop_ins) {
        let table = read(&file).ok().and_then(|text| super::parse_unchecked::<Table>(&text).ok());
        let Some(Value::Table(upper)) = table.and_then(|mut table| table.remove(name)) else { continue };
        let mut merged = part.clone();
        lay_over(&mut merged, upper);
        if T::deserialize(merged.clone()).is_ok() {
            part = merged;
        }
    }
    T::deserialize(part).unwrap_or_default()
}

fn invalid(path: &Path, message: String) -> Error {
    Error::Invalid { path: path.to_owned(), message }
}

fn merge(texts: &[(&Path, String)]) -> Result<Config, Error> {
    let mut tables = Vec::new();
    for (path, text) in texts {
        // Each by itself first: only so does a mistake have a line.
        super::parse_unchecked::<Config>(text).map_err(|message| invalid(path, message))?;
        tables.push(super::parse_unchecked::<Table>(text).map_err(|message| invalid(path, message))?);
    }
    let mut merged = Table::new();
    let mut config = Config::default();
    let mut problem: Option<(&Path, String)> = None;
    for ((path, _), table) in texts.iter().zip(tables) {
        lay_over(&mut merged, table);
        config = Config::deserialize(merged.clone()).map_err(|error| invalid(path, error.message().to_owned()))?;
        // A later file may put a contradiction right; if none does, it is the fault of the one that brought it.
        problem = match (config.check(), problem) {
            (Ok(()), _) => None,
            (Err(message), Some(earlier)) if earlier.1 == message => Some(earlier),
            (Err(message), _) => Some((path, message)),
        };
    }
    problem.map_or(Ok(config), |(path, message)| Err(invalid(path, message)))
}

/// Merges `upper` over `lower`.
fn lay_over(lower: &mut Table, upper: Table) {
    for (key, value) in upper {
        match (lower.get_mut(&key), value) {
            (Some(Value::Table(lower)), Value::Table(upper)) => lay_over(lower, upper),
            (Some(Value::Array(lower)), Value::Array(upper)) if key == ADDED => lower.extend(upper),
            (_, value) => {
                lower.insert(key, value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Runtime, Shim};
    use proptest::prelude::*;
    use std::os::unix::fs::PermissionsExt;

    /// A directory with a configuration and drop-ins, by name.
    fn write(files: &[(&str, &str)]) -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join(DROP_INS)).unwrap();
        for (name, text) in files {
            std::fs::write(directory.path().join(name), text).unwrap();
        }
        let path = directory.path().join("config.toml");
        (directory, path)
    }

    #[test]
    fn drop_ins_are_merged_by_name() {
        let (_directory, path) = write(&[
            (
                "config.toml",
                "run-dir = \"/run/a\"\n[proxy]\nspin-us = 1\nready-timeout-ms = 1\n[runtime]\nruntimes = [\"runc\"]\n\
                 [[device]]\nname = \"a\"\nkind = \"soft\"\n[policy.profiles.gold.bounds]\nmax-qp = 1",
            ),
            (
                "conf.d/20.toml",
                "[proxy]\nspin-us = 3\n[policy.profiles.silver]\n[policy.profiles.gold.bounds]\nmax-mr = 2",
            ),
            ("conf.d/10.toml", "[proxy]\nspin-us = 2\nready-timeout-ms = 2\n[runtime]\nruntimes = [\"crun\", \"x\"]"),
            ("conf.d/30.toml", "[[device]]\nname = \"b\"\nkind = \"soft\""),
            ("conf.d/.hidden.toml", "nonsense"),
            ("conf.d/40.toml.bak", "nonsense"),
        ]);
        let config = Config::load_from(&path).unwrap();
        assert_eq!(config.run_dir, Path::new("/run/a"));
        assert_eq!((config.proxy.spin_us, config.proxy.ready_timeout_ms), (3, 2));
        assert_eq!(config.runtime.runtimes, [PathBuf::from("crun"), "x".into()]);
        assert_eq!(config.devices.iter().map(|device| device.name.as_str()).collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(config.policy.names().collect::<Vec<_>>(), ["default", "gold", "silver"]);
        let gold = &config.policy.profiles["gold"].bounds;
        assert_eq!((gold.max_qp, gold.max_mr), (Some(1), Some(2)));
    }

    #[test]
    fn the_wrong_file_is_named() {
        const BOUND: &str = "[policy.bounds]\nbandwidth = \"1Gbit\"";
        const ABOVE: &str = "[policy.defaults]\nbandwidth = \"2Gbit\"";
        for (files, name, expected) in [
            (vec![("config.toml", ""), ("conf.d/a.toml", "x = 1")], "conf.d/a.toml", "line 1: unknown field `x`"),
            (vec![("config.toml", "\nx = 1"), ("conf.d/a.toml", "")], "config.toml", "line 2: unknown field `x`"),
            (vec![("config.toml", ""), ("conf.d/a.toml", "[proxy")], "conf.d/a.toml", "line 1: "),
            (
                vec![("config.toml", BOUND), ("conf.d/a.toml", ABOVE), ("conf.d/b.toml", "")],
                "conf.d/a.toml",
                "is beyond",
            ),
            (
                vec![("config.toml", ABOVE), ("conf.d/a.toml", ""), ("conf.d/b.toml", BOUND)],
                "conf.d/b.toml",
                "is beyond",
            ),
            (
                vec![
                    ("config.toml", "[[device]]\nname = \"a\"\nkind = \"soft\""),
                    ("conf.d/a.toml", "[[device]]\nname = \"a\"\nkind = \"soft\""),
                ],
                "conf.d/a.toml",
                "device name = \"a\" is given twice",
            ),
        ] {
            let (directory, path) = write(&files);
            let message = Config::load_from(&path).unwrap_err().to_string();
            let file = directory.path().join(name);
            assert!(message.starts_with(&format!("configuration {}: ", file.display())), "{files:?}: {message}");
            assert!(message.contains(expected), "{files:?}: {message}");
        }
        // What one file brings a later one may put right.
        let (_directory, path) = write(&[
            ("config.toml", BOUND),
            ("conf.d/a.toml", ABOVE),
            ("conf.d/b.toml", "[policy.bounds]\nbandwidth = \"3Gbit\""),
        ]);
        assert!(Config::load_from(&path).is_ok());
    }

    #[test]
    fn what_everybody_may_write_is_refused() {
        for name in ["config.toml", "conf.d/a.toml", "conf.d"] {
            let (directory, path) = write(&[("config.toml", ""), ("conf.d/a.toml", "")]);
            let wrong = directory.path().join(name);
            std::fs::set_permissions(&wrong, std::fs::Permissions::from_mode(0o777)).unwrap();
            match Config::load_from(&path) {
                Err(Error::Writable { path, mode: 0o777 }) => assert_eq!(path, wrong),
                result => panic!("{name}: {result:?}"),
            }
        }
    }

    #[test]
    fn a_part_survives_mistakes_elsewhere() {
        let (directory, path) = write(&[
            ("config.toml", "typo = 1\n[runtime]\nruntimes = [\"youki\"]\npath = \"/x/runtime\""),
            ("conf.d/10.toml", "[policy.bounds]\nweight = \"heavy\""),
            ("conf.d/20.toml", "[runtime\n"),
            ("conf.d/30.toml", "[runtime]\nruntimes = 7"),
            ("conf.d/40.toml", "[runtime]\nruntimes = [\"evil\"]"),
            ("conf.d/50.toml", "[runtime]\npath = \"/y/runtime\""),
        ]);
        let untrusted = directory.path().join("conf.d/40.toml");
        std::fs::set_permissions(untrusted, std::fs::Permissions::from_mode(0o666)).unwrap();
        let expected = Runtime { path: "/y/runtime".into(), runtimes: vec!["youki".into()] };
        assert_eq!(part_of::<Runtime>(&path, "runtime"), expected);
        assert_eq!(part_of::<Shim>(&path, "shim"), Shim::default());
        std::fs::remove_file(&path).unwrap();
        let expected = Runtime { path: "/y/runtime".into(), ..Runtime::default() };
        assert_eq!(part_of::<Runtime>(&path, "runtime"), expected);
        assert_eq!(part_of::<Runtime>("/nowhere/config.toml".as_ref(), "runtime"), Runtime::default());
    }

    #[test]
    fn only_the_default_file_may_be_missing() {
        let (_directory, path) = write(&[]);
        assert!(matches!(Config::load_from(&path), Err(Error::Unreadable { .. })));
        let (directory, path) = write(&[("config.toml", "")]);
        std::os::unix::fs::symlink("nowhere", directory.path().join("conf.d/a.toml")).unwrap();
        assert!(matches!(Config::load_from(&path), Err(Error::Unreadable { .. })));
    }

    proptest! {
        /// One file cut in two at any of its keys means the same.
        #[test]
        fn a_key_may_be_in_any_file(in_drop_in in proptest::collection::vec(any::<bool>(), 6)) {
            const LINES: [(&str, &str); 6] = [
                ("proxy", "spin-us = 7"),
                ("proxy", "ready-timeout-ms = 9"),
                ("inject", "container-dir = \"/dev/x\""),
                ("policy.bounds", "max-qp = 5"),
                ("policy.profiles.p", "namespaces = [\"a\"]"),
                ("policy.profiles.p.bounds", "max-qp = 6"),
            ];
            let text = |wanted: &dyn Fn(usize) -> bool| -> String {
                let mut text = String::new();
                let mut open = "";
                for (_, (table, line)) in LINES.iter().enumerate().filter(|(i, _)| wanted(*i)) {
                    let header = if open == *table { String::new() } else { format!("[{table}]\n") };
                    (text, open) = (format!("{text}{header}{line}\n"), table);
                }
                text
            };
            let (_directory, path) =
                write(&[("config.toml", &text(&|i| !in_drop_in[i])), ("conf.d/a.toml", &text(&|i| in_drop_in[i]))]);
            let whole = Config::parse(&text(&|_| true)).unwrap();
            prop_assert_eq!(Config::load_from(&path).map_err(|error| error.to_string()), Ok(whole));
        }
    }
}
