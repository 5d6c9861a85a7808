//! What containerd itself makes of a configuration: `containerd config dump`, before and after.

use super::files::Place;
use super::{File, NAME, Registration};
use crate::engines::host::Host;
use crate::engines::process::output;
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use toml::{Table, Value};

/// It takes some ten milliseconds, and a thousand times as long on a machine that is swamped.
const LIMIT: Duration = Duration::from_secs(60);
const PLUGINS: [&str; 2] = ["io.containerd.cri.v1.runtime", "io.containerd.grpc.v1.cri"];

/// The host's containerd, if it can be run here.
pub fn program(host: &Host) -> Option<PathBuf> {
    host.find_program("containerd").filter(|_| host.is_local())
}

/// Refuses `new` for the file `target` of `place` unless containerd gets the runtime from it, and nothing else changes.
pub fn compare(program: &Path, place: &Place, target: &Path, new: &str, registration: &Registration) -> Result<()> {
    let directory = tempfile::tempdir()?;
    let before = dump(program, place, target, None, directory.path())
        .with_context(|| format!("containerd itself refuses {}; mend it first", place.main.display()))?;
    if place.files.len() > 1 {
        let actual = run(program, &place.main)?;
        if let Some(difference) = first_difference("", &simple(actual), &simple(before.clone())) {
            bail!(
                "containerd does not read what {} imports ({difference}); older versions take a relative \
                 import with an asterisk from where they were started; write absolute paths",
                place.main.display()
            );
        }
    }
    let after = dump(program, place, target, Some(new), directory.path())
        .with_context(|| format!("containerd would refuse the new {}; nothing was changed", target.display()))?;
    match difference(before, after, registration) {
        None => Ok(()),
        Some(difference) => {
            bail!("the new {} would not do what it should: {difference}; nothing was changed", target.display())
        }
    }
}

/// containerd's view of the files, with `new` for `target` if given.
fn dump(program: &Path, place: &Place, target: &Path, new: Option<&str>, directory: &Path) -> Result<Table> {
    let mut main = match place.files.first() {
        Some(main) => main.file.clone(),
        None => File::parse("").map_err(anyhow::Error::msg)?,
    };
    let mut imports: Vec<_> = place.files.iter().skip(1).map(|loaded| loaded.path.display().to_string()).collect();
    if let Some(new) = new {
        let copy = directory.join("target.toml");
        std::fs::write(&copy, new)?;
        match imports.iter_mut().find(|path| Path::new(path) == target) {
            Some(import) => *import = copy.display().to_string(),
            None if target == place.main => main = File::parse(new).map_err(anyhow::Error::msg)?,
            None => imports.push(copy.display().to_string()),
        }
    }
    if !imports.is_empty() {
        main.set_imports(&imports);
    }
    let path = directory.join("main.toml");
    // containerd starts without a file as with an empty one, but 1.x dumps only the latter.
    std::fs::write(&path, main.to_string())?;
    run(program, &path)
}

fn run(program: &Path, config: &Path) -> Result<Table> {
    let mut command = Command::new(program);
    // As a service.
    command.current_dir("/").arg("--config").arg(config).args(["config", "dump"]);
    toml::from_str(&output(&mut command, LIMIT)?).context("containerd config dump printed no TOML")
}

/// How two dumps differ beyond the registration, in words.
fn difference(before: Table, after: Table, registration: &Registration) -> Option<String> {
    let runtime = runtimes(&mut after.clone()).and_then(|runtimes| runtimes.get(NAME).cloned());
    let Some(runtime) = runtime else {
        return Some(format!("containerd would not see the runtime {NAME}"));
    };
    let binary = runtime.get("options").and_then(|options| options.get("BinaryName")).and_then(Value::as_str);
    if binary != Some(&registration.binary) {
        return Some(format!("containerd would see BinaryName = {binary:?}"));
    }
    let (mut before, mut after) = (before, after);
    for dump in [&mut before, &mut after] {
        if let Some(runtimes) = runtimes(dump) {
            runtimes.remove(NAME);
        }
        if let (true, Some(containerd)) = (registration.set_as_default, containerd(dump)) {
            containerd.remove("default_runtime_name");
        }
    }
    first_difference("", &simple(before), &simple(after))
}

fn containerd(dump: &mut Table) -> Option<&mut Table> {
    let plugins = dump.get_mut("plugins")?.as_table_mut()?;
    let key = *PLUGINS.iter().find(|key| plugins.contains_key(**key))?;
    plugins.get_mut(key)?.get_mut("containerd")?.as_table_mut()
}

fn runtimes(dump: &mut Table) -> Option<&mut Table> {
    containerd(dump)?.get_mut("runtimes")?.as_table_mut()
}

/// A dump without the list of files read, and without options that are given as nothing.
fn simple(mut dump: Table) -> Value {
    dump.remove("imports");
    let mut dump = Value::Table(dump);
    simplify(&mut dump);
    dump
}

fn simplify(value: &mut Value) {
    if let Value::Table(table) = value {
        table.iter_mut().for_each(|(_, value)| simplify(value));
        table.retain(|key, value| match value {
            // What containerd takes for a runtime that does not say.
            Value::String(text) if key == "sandbox_mode" || key == "sandboxer" => {
                !["", "podsandbox"].contains(&&**text)
            }
            Value::String(text) => !text.is_empty(),
            Value::Integer(number) => *number != 0,
            Value::Boolean(bool) => *bool,
            Value::Array(array) => !array.is_empty(),
            Value::Table(table) => !table.is_empty(),
            _ => true,
        });
    }
}

fn first_difference(path: &str, before: &Value, after: &Value) -> Option<String> {
    let (Value::Table(a), Value::Table(b)) = (before, after) else {
        return (before != after).then(|| format!("{path} would change from {before} to {after}"));
    };
    let mut keys: Vec<_> = a.keys().chain(b.keys()).collect();
    keys.sort();
    keys.iter().find_map(|key| {
        let path = if path.is_empty() { (*key).clone() } else { format!("{path}.{key}") };
        match (a.get(*key), b.get(*key)) {
            (Some(a), Some(b)) => first_difference(&path, a, b),
            (Some(_), None) => Some(format!("{path} would vanish")),
            (None, _) => Some(format!("{path} would appear")),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const RUNTIMES: &str = "plugins.\"io.containerd.grpc.v1.cri\".containerd";

    /// As containerd 1.7 prints it.
    fn dump(runc: &str, ringfence: &str, rest: &str) -> Table {
        toml::from_str(&format!(
            "imports = [\"/tmp/{}\"]\nversion = 2\n{rest}\n[{RUNTIMES}]\ndefault_runtime_name = \"runc\"\n\
             [{RUNTIMES}.runtimes.runc]\nruntime_type = \"io.containerd.runc.v2\"\n{runc}\n{ringfence}",
            ringfence.len()
        ))
        .unwrap()
    }

    #[test]
    fn only_the_registration_may_differ() {
        let registration =
            Registration { binary: "/usr/bin/ringfence-runtime".into(), set_as_default: false, runc: None };
        let ours = format!("[{RUNTIMES}.runtimes.ringfence.options]\nBinaryName = \"/usr/bin/ringfence-runtime\"\n");
        let before = || dump("sandbox_mode = \"podsandbox\"\noptions = { Root = \"\", IoUid = 0 }", "", "");
        let case = |after: Table| difference(before(), after, &registration);

        assert_eq!(case(dump("sandbox_mode = \"\"\noptions = {}", &ours, "")), None);
        assert_eq!(case(before()).unwrap(), "containerd would not see the runtime ringfence");
        let other = ours.replace("/usr", "/opt");
        assert!(case(dump("", &other, "")).unwrap().contains("BinaryName"));
        let systemd = "options = { SystemdCgroup = true }";
        assert!(case(dump(systemd, &ours, "")).unwrap().ends_with("runc.options would appear"));
        assert_eq!(case(dump("", &ours, "oom_score = -999")).unwrap(), "oom_score would appear");
        let lost = ours.clone() + "[plugins.x]\n";
        assert_eq!(case(dump("", &lost, "")), None);
        let changed = toml::from_str(&dump("", &ours, "").to_string().replace("\"runc\"", "\"x\"")).unwrap();
        assert!(case(changed).unwrap().contains("default_runtime_name would change from \"runc\" to \"x\""));
    }
}
