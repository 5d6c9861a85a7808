//! The hooks.d files that podman and CRI-O read.
//!
//! Only stages that both know: a file that names podman's `precreate` keeps CRI-O from starting.

use super::host::Host;
use super::plan::Plan;
use anyhow::{Result, bail};
use ringfence_hook::config::Hook;
use serde_json::json;
use std::path::{Path, PathBuf};

/// Where both engines look, unless they are told otherwise.
pub const SYSTEM: &str = "/usr/share/containers/oci/hooks.d";
/// All annotations that the hook takes for ours, bare, of a pod or of one container of it, also with an unknown key: the hook is
/// to say so, instead of the container starting without what was asked for.
pub const ANNOTATIONS: &str = r"^([^/]*\.)?ringfence\.dev/";
/// Our files: name and stage.
pub const FILES: [(&str, &str); 2] =
    [("50-ringfence-createruntime.json", "createRuntime"), ("50-ringfence-poststop.json", "poststop")];

/// One file's content.
pub fn text(hook: &Hook, stage: &str) -> String {
    let json = json!({
        "version": "1.0.0",
        "hook": {
            "path": hook.path,
            "args": ["ringfence-hook", stage],
            // Never none: runtimes then give hooks the environment of the container's image.
            "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"],
            "timeout": hook.timeout,
        },
        "when": { "annotations": { ANNOTATIONS: ".*" } },
        "stages": [stage],
    });
    format!("{json:#}\n")
}

/// Adds the files in `directory` to `plan`. The hook must exist: podman refuses every container otherwise.
pub fn write(plan: &mut Plan, host: &Host, directory: &Path, hook: &Hook) -> Result<()> {
    host.require_program(&hook.path)?;
    FILES.iter().try_for_each(|(name, stage)| plan.set(host, &directory.join(name), Some(text(hook, stage))))
}

/// Has `plan` remove the files from `directory`.
pub fn remove(plan: &mut Plan, host: &Host, directory: &Path) -> Result<()> {
    FILES.iter().try_for_each(|(name, _)| plan.set(host, &directory.join(name), None))
}

/// The directories that `drop_in` has to name so that `directory` is one of them; `None` if it already is. `files` are all
/// others that the engine reads; its default is [`SYSTEM`].
pub fn to_be_named(
    files: &[(PathBuf, String)],
    section: &str,
    drop_in: &Path,
    directory: &Path,
) -> Result<Option<Vec<PathBuf>>> {
    let mut directories = directories(files, section)?.unwrap_or_else(|| vec![SYSTEM.into()]);
    if directories.iter().any(|present| present == directory) {
        return Ok(None);
    }
    // Of one directory, files are read in the order of their names.
    let later = files.iter().filter(|(path, _)| path.parent() == drop_in.parent() && path.as_path() > drop_in);
    for (path, text) in later {
        if self::directories(&[(path.clone(), text.clone())], section)?.is_some() {
            bail!(
                "{} sets hooks_dir and is read after {}; add {} to it, then try again",
                path.display(),
                drop_in.display(),
                directory.display()
            );
        }
    }
    directories.push(directory.to_owned());
    Ok(Some(directories))
}

/// `hooks_dir` of files of TOML, each of which replaces what those before it say; `None` if none says it. Of podman 5's
/// attribute `{append = true}` the last counts, and holds for the files after it too.
pub fn directories(files: &[(PathBuf, String)], section: &str) -> Result<Option<Vec<PathBuf>>> {
    let mut directories = None::<Vec<PathBuf>>;
    let mut append = false;
    for (path, text) in files {
        let table: toml::Table = toml::from_str(text).map_err(|error| super::broken_toml(path, text, &error))?;
        let keys: Vec<_> = section.split('.').chain(["hooks_dir"]).collect();
        let (last, sections) = keys.split_last().expect("two keys or more");
        let found = sections.iter().try_fold(&table, |table, key| table.get(*key)?.as_table());
        let Some(values) = found.and_then(|table| table.get(*last)?.as_array()) else { continue };
        for value in values {
            append = value.get("append").and_then(toml::Value::as_bool).unwrap_or(append);
        }
        let named = values.iter().filter_map(toml::Value::as_str).map(PathBuf::from);
        match &mut directories {
            Some(directories) if append => directories.extend(named),
            _ if append => directories = Some([PathBuf::from(SYSTEM)].into_iter().chain(named).collect()),
            _ => directories = Some(named.collect()),
        }
    }
    Ok(directories)
}

/// The texts of `paths` that exist, and of the files in directories among them that end in `.conf`, or in anything if
/// `suffix` is empty.
pub fn read_all(host: &Host, paths: &[PathBuf], suffix: &str, except: &Path) -> Result<Vec<(PathBuf, String)>> {
    let mut files = Vec::new();
    for path in paths {
        let located = host.locate(path)?;
        let mut names = vec![path.clone()];
        if located.is_dir() {
            let entries = std::fs::read_dir(&located).into_iter().flatten().flatten();
            names = entries.map(|entry| path.join(entry.file_name())).collect();
            names.retain(|path| {
                path.to_string_lossy().ends_with(suffix) && !host.locate(path).is_ok_and(|p| p.is_dir())
            });
            names.sort();
        }
        for name in names.into_iter().filter(|name| name != except) {
            files.extend(host.read(&name)?.map(|text| (name, text)));
        }
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ringfence_hook::annotations::is_ours;

    /// As the engines match them: Go's regexp and POSIX's agree on this pattern with `regex` of grep.
    #[test]
    fn the_hook_is_called_for_all_that_it_takes_for_its_own() {
        for name in [
            "ringfence.dev/enable",
            "enable.ringfence.dev/pod",
            "max-qp.ringfence.dev/container.app",
            "Enable.ringfence.dev/pod",
            "max_qp.ringfence.dev/pod",
            "a.weight.ringfence.dev/pod",
            ".ringfence.dev/",
            "xringfence.dev/enable",
            "example.com/ringfence.dev/enable",
            "ringfence.device/enable",
        ] {
            let mut grep = std::process::Command::new("grep");
            let mut grep = grep.args(["-Eq", ANNOTATIONS]).stdin(std::process::Stdio::piped()).spawn().unwrap();
            std::io::Write::write_all(&mut grep.stdin.take().unwrap(), name.as_bytes()).unwrap();
            assert_eq!(grep.wait().unwrap().success(), is_ours(name), "{name}");
        }
    }
}
