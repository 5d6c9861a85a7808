//! What dockerd is told on its command line, by its unit and the files that this names.
//!
//! dockerd does not start if a flag and `daemon.json` say the same thing (`the following directives are specified both as a flag
//! and in the configuration file`), so what flags say has to be known.

use crate::engines::host::Host;
use anyhow::Result;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Where units are, the first that has one counts (`systemd.unit(5)`).
const UNITS: [&str; 5] = [
    "/etc/systemd/system",
    "/run/systemd/system",
    "/usr/local/lib/systemd/system",
    "/usr/lib/systemd/system",
    "/lib/systemd/system",
];
const UNIT: &str = "docker.service";
/// What init scripts without systemd read, Debian's and Alpine's.
const OTHERS: [&str; 2] = ["/etc/default/docker", "/etc/conf.d/docker"];

/// A flag, and the file that has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flag {
    /// Its value.
    pub value: String,
    /// Where it is.
    pub file: PathBuf,
}

/// The flag `--<name>` of dockerd; the last one if there are several.
pub fn find(host: &Host, name: &str) -> Result<Option<Flag>> {
    let words = command_line(host)?;
    let flag = format!("--{name}");
    let mut found = None;
    for (i, (word, file)) in words.iter().enumerate() {
        let value = match word.strip_prefix(&flag) {
            Some("") => words.get(i + 1).map(|(next, _)| next.clone()),
            Some(rest) => rest.strip_prefix('=').map(str::to_owned),
            None => None,
        };
        found = value.map(|value| Flag { value, file: file.clone() }).or(found);
    }
    Ok(found)
}

/// The words of dockerd's command line, as far as files say, each with the file that it is in.
fn command_line(host: &Host) -> Result<Vec<(String, PathBuf)>> {
    let files = unit_files(host)?;
    let mut commands: Vec<(String, PathBuf)> = Vec::new();
    let mut variables: BTreeMap<String, (String, PathBuf)> = BTreeMap::new();
    let mut environment_files = Vec::new();
    for (path, text) in &files {
        for line in logical_lines(text) {
            let Some((key, value)) = line.split_once('=') else { continue };
            let value = value.trim();
            match key.trim() {
                // An empty one takes back those before it.
                "ExecStart" if value.is_empty() => commands.clear(),
                "ExecStart" => commands.push((value.to_owned(), path.clone())),
                "Environment" => add(&mut variables, words(value), path),
                "EnvironmentFile" if value.is_empty() => environment_files.clear(),
                "EnvironmentFile" => environment_files.push(PathBuf::from(value.trim_start_matches('-'))),
                _ => {}
            }
        }
    }
    if files.is_empty() {
        environment_files = OTHERS.map(PathBuf::from).to_vec();
    }
    for path in environment_files {
        for line in host.read(&path)?.iter().flat_map(|text| logical_lines(text)) {
            let assignment = line.trim().trim_start_matches("export ").to_owned();
            if let Some((name, value)) = assignment.split_once('=') {
                variables.insert(name.trim().to_owned(), (words(value).join(" "), path.clone()));
            }
        }
    }
    if files.is_empty() {
        return Ok(variables.into_values().flat_map(|(value, file)| split(&value, &file)).collect());
    }
    let commands = commands.into_iter().flat_map(|(command, file)| split(&command, &file));
    let words = commands.flat_map(|(word, file)| {
        let name = word.strip_prefix('$').map(|name| name.trim_start_matches('{').trim_end_matches('}'));
        match name.and_then(|name| variables.get(name)) {
            Some((value, file)) => split(value, file),
            None => vec![(word, file)],
        }
    });
    Ok(words.collect())
}

fn split(text: &str, file: &Path) -> Vec<(String, PathBuf)> {
    words(text).into_iter().map(|word| (word, file.to_owned())).collect()
}

fn add(variables: &mut BTreeMap<String, (String, PathBuf)>, assignments: Vec<String>, file: &Path) {
    for assignment in assignments {
        if let Some((name, value)) = assignment.split_once('=') {
            variables.insert(name.to_owned(), (value.to_owned(), file.to_owned()));
        }
    }
}

/// The unit's own file and then its drop-ins in the order of their names, of which those in directories further in front hide
/// others.
fn unit_files(host: &Host) -> Result<Vec<(PathBuf, String)>> {
    let mut files = Vec::new();
    for directory in UNITS {
        let path = Path::new(directory).join(UNIT);
        if let Some(text) = host.read(&path)? {
            files.push((path, text));
            break;
        }
    }
    let mut drop_ins: BTreeMap<String, PathBuf> = BTreeMap::new();
    for directory in UNITS.iter().rev() {
        let directory = Path::new(directory).join(format!("{UNIT}.d"));
        let entries = host.locate(&directory).ok().and_then(|path| std::fs::read_dir(path).ok());
        let names =
            entries.into_iter().flatten().flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
        drop_ins.extend(names.filter(|name| name.ends_with(".conf")).map(|name| (name.clone(), directory.join(name))));
    }
    for path in drop_ins.into_values() {
        files.extend(host.read(&path)?.map(|text| (path, text)));
    }
    Ok(files)
}

/// The lines of `text` that are no comments, continued ones as one.
fn logical_lines(text: &str) -> Vec<String> {
    let mut lines = Vec::new();
    let mut begun = String::new();
    for line in text.lines() {
        if line.trim_start().starts_with(['#', ';']) {
            continue;
        }
        match line.trim_end().strip_suffix('\\') {
            Some(part) => begun = format!("{begun}{part} "),
            None => lines.push(std::mem::take(&mut begun) + line),
        }
    }
    lines.push(begun);
    lines
}

/// The words of `text`, without the quotes that keep them together.
fn words(text: &str) -> Vec<String> {
    let mut words = Vec::new();
    let (mut word, mut quote) = (None::<String>, None);
    for c in text.chars() {
        match quote {
            Some(open) if c == open => quote = None,
            None if c == '"' || c == '\'' => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            None if c.is_whitespace() => words.extend(word.take()),
            _ => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXEC: &str =
        "[Service]\nExecStart=/usr/sbin/dockerd -H fd:// $DOCKER_OPTS\nEnvironmentFile=-/etc/default/docker\n";

    /// The flag `--default-runtime` on a host with `files`, and the file that has it.
    fn found(files: &[(&str, &str)]) -> Option<(String, String)> {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        let host = Host::new(Some(root.path()), false).unwrap();
        let flag = find(&host, "default-runtime").unwrap()?;
        Some((flag.value, flag.file.to_str().unwrap().to_owned()))
    }

    #[test]
    fn the_flag_is_found_wherever_systemd_finds_it() {
        const UNIT: &str = "lib/systemd/system/docker.service";
        const DROP_IN: &str = "etc/systemd/system/docker.service.d/10.conf";
        let in_drop_in = |text: &'static str| found(&[(UNIT, EXEC), (DROP_IN, text)]);
        let expected = |value: &str, file: &str| Some((value.to_owned(), format!("/{file}")));
        assert_eq!(found(&[(UNIT, EXEC)]), None);
        assert_eq!(found(&[]), None);
        assert_eq!(found(&[(UNIT, "ExecStart=dockerd --default-runtime=a -D")]), expected("a", UNIT));
        assert_eq!(found(&[(UNIT, "ExecStart=dockerd --default-runtimes=a --x --default-runtime-x b")]), None);
        assert_eq!(found(&[(UNIT, "#ExecStart=dockerd --default-runtime=a")]), None);
        assert_eq!(
            in_drop_in(
                "[Service]\nExecStart=\nExecStart=/usr/bin/dockerd \\\n  # why\n  --default-runtime \\\n  nvidia"
            ),
            expected("nvidia", DROP_IN)
        );
        assert_eq!(in_drop_in("[Service]\nEnvironment=\"DOCKER_OPTS=-D --default-runtime=a\""), expected("a", DROP_IN));
        assert_eq!(
            in_drop_in("[Service]\nEnvironment=OTHER=--default-runtime=a"),
            None,
            "nobody asks for that variable"
        );
        let default = ("etc/default/docker", "# x\nDOCKER_OPTS=\"--default-runtime 'a'\"\n");
        assert_eq!(found(&[(UNIT, EXEC), default]), expected("a", "etc/default/docker"));
        assert_eq!(found(&[(UNIT, "ExecStart=dockerd"), default]), None, "the unit does not name that file");
        assert_eq!(found(&[default]), expected("a", "etc/default/docker"), "without systemd");
        let taken_back = "[Service]\nExecStart=\nExecStart=dockerd -H fd://";
        assert_eq!(found(&[(UNIT, "ExecStart=dockerd --default-runtime=a"), (DROP_IN, taken_back)]), None);
        // A drop-in of the same name further in front hides it.
        let hidden = (
            "usr/lib/systemd/system/docker.service.d/10.conf",
            "[Service]\nExecStart=\nExecStart=dockerd --default-runtime=b",
        );
        assert_eq!(found(&[(UNIT, EXEC), hidden]), expected("b", hidden.0));
        assert_eq!(found(&[(UNIT, EXEC), hidden, (DROP_IN, "")]), None);
    }
}
