//! Specifications of the Container Device Interface, <https://github.com/cncf-tags/container-device-interface>.

use anyhow::{Result, bail};
use ringfence_hook::config::{Config, ENVIRONMENT};
use serde::{Deserialize, Serialize};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// Vendor and class of our devices.
pub const KIND: &str = "ringfence.dev/rdma";

/// A specification: one device for each of the administrator's profiles.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Spec {
    cdi_version: String,
    kind: String,
    pub devices: Vec<Device>,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Device {
    pub name: String,
    container_edits: Edits,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Edits {
    hooks: Vec<Hook>,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Hook {
    hook_name: String,
    path: PathBuf,
    args: Vec<String>,
    /// Never empty: some runtimes give the hook the image's environment otherwise (CVE-2025-23266).
    env: Vec<String>,
    timeout: u32,
}

impl Spec {
    /// What `config` offers. `named` is the configuration file that the hook is to be told of, if it is not the usual one.
    pub fn of(config: &Config, named: Option<&Path>) -> Result<Self> {
        let names: Vec<_> = config.policy.names().map(str::to_owned).collect();
        if let Some(name) = names.iter().find(|name| !is_device_name(name)) {
            bail!("profile {name:?} is no name for a device; it must begin and end with one of A-Z a-z 0-9");
        }
        // The lowest version that has all that is used, so that old engines read it: names that begin with a digit came
        // with 0.5.0.
        let digits = names.iter().any(|name| name.starts_with(|c: char| c.is_ascii_digit()));
        let devices = names.into_iter().map(|name| Device::of(name, config, named)).collect::<Result<_>>()?;
        Ok(Self { cdi_version: if digits { "0.5.0" } else { "0.3.0" }.into(), kind: KIND.into(), devices })
    }
}

impl Device {
    fn of(profile: String, config: &Config, named: Option<&Path>) -> Result<Self> {
        let mut env = vec!["PATH=/usr/sbin:/usr/bin:/sbin:/bin".to_owned()];
        if let Some(path) = named {
            let path = std::path::absolute(path)?;
            let Some(path) = path.to_str() else { bail!("{ENVIRONMENT}={path:?} is not UTF-8") };
            env.push(format!("{ENVIRONMENT}={path}"));
        }
        let hook = |stage: &str, more: &[&str]| Hook {
            hook_name: stage.into(),
            path: config.hook.path.clone(),
            args: ["ringfence-hook", stage].iter().chain(more).map(|&argument| argument.into()).collect(),
            env: env.clone(),
            timeout: config.hook.timeout,
        };
        let hooks = vec![hook("createRuntime", &["--policy", &profile]), hook("poststop", &[])];
        Ok(Self { name: profile, container_edits: Edits { hooks } })
    }
}

/// As the interface has it, `ValidateDeviceName`.
fn is_device_name(name: &str) -> bool {
    let ends = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
    ends(name.chars().next())
        && ends(name.chars().next_back())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || "_-.:".contains(c))
}

/// Writes `text` to `path`, readable for all, so that an engine sees it whole or not at all.
pub fn write(path: &Path, text: &str) -> io::Result<()> {
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::create_dir_all(directory)?;
    // Engines read only names that end in .json or .yaml.
    let mut name = std::ffi::OsString::from(".");
    name.push(path.file_name().ok_or(io::ErrorKind::InvalidInput)?);
    name.push(format!(".{}", std::process::id()));
    let temporary = directory.join(name);
    let mut file = std::fs::OpenOptions::new().write(true).create_new(true).open(&temporary)?;
    let written = file
        .write_all(text.as_bytes())
        // Whatever the mask is.
        .and_then(|()| file.set_permissions(std::fs::Permissions::from_mode(0o644)))
        .and_then(|()| file.sync_all())
        .and_then(|()| std::fs::rename(&temporary, path));
    written.inspect_err(|_| {
        let _ = std::fs::remove_file(&temporary);
    })
}

/// A file with devices of our kind, or one of ours that cannot be understood.
pub struct Found {
    pub path: PathBuf,
    pub spec: Result<Spec, String>,
}

/// Our specifications in `directories`, those that are missing left out.
pub fn find(directories: &[PathBuf]) -> Result<Vec<Found>> {
    let mut found = Vec::new();
    for directory in directories {
        let entries = match std::fs::read_dir(directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => bail!("{}: {error}", directory.display()),
            Ok(entries) => entries,
        };
        let mut paths: Vec<_> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
        paths.sort();
        found.extend(paths.into_iter().filter_map(read));
    }
    Ok(found)
}

/// The specification in `path`; `None` if it is another vendor's.
fn read(path: PathBuf) -> Option<Found> {
    if path.extension().is_none_or(|extension| extension != "json") {
        return None;
    }
    let named_ours = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("ringfence"));
    let spec = std::fs::read(&path).map_err(|error| error.to_string()).and_then(|bytes| {
        let value: serde_json::Value = serde_json::from_slice(&bytes).map_err(|error| error.to_string())?;
        Ok(value)
    });
    match spec {
        Ok(value) if value["kind"] == KIND => {
            Some(Found { path, spec: serde_json::from_value(value).map_err(|error| error.to_string()) })
        }
        Err(error) if named_ours => Some(Found { path, spec: Err(error) }),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_configuration_offers_the_default_device() {
        let spec = Spec::of(&Config::default(), None).unwrap();
        let expected = serde_json::json!({
            "cdiVersion": "0.3.0",
            "kind": "ringfence.dev/rdma",
            "devices": [{
                "name": "default",
                "containerEdits": {"hooks": [
                    {
                        "hookName": "createRuntime",
                        "path": "/usr/bin/ringfence-hook",
                        "args": ["ringfence-hook", "createRuntime", "--policy", "default"],
                        "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"],
                        "timeout": 30,
                    },
                    {
                        "hookName": "poststop",
                        "path": "/usr/bin/ringfence-hook",
                        "args": ["ringfence-hook", "poststop"],
                        "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"],
                        "timeout": 30,
                    },
                ]},
            }],
        });
        assert_eq!(serde_json::to_value(&spec).unwrap(), expected);
    }

    #[test]
    fn the_hook_reads_the_configuration_that_the_devices_were_made_of() {
        let spec = Spec::of(&Config::default(), Some("/opt/rf.toml".as_ref())).unwrap();
        for hook in &spec.devices[0].container_edits.hooks {
            assert_eq!(hook.env[1], "RINGFENCE_CONFIG=/opt/rf.toml");
        }
    }

    #[test]
    fn device_names() {
        for (name, usable) in [
            ("default", true),
            ("a", true),
            ("0gold", true),
            ("gold.v2_x-y:z", true),
            ("", false),
            ("-a", false),
            ("a-", false),
            ("a/b", false),
            ("ä", false),
        ] {
            assert_eq!(is_device_name(name), usable, "{name:?}");
        }
    }

    #[test]
    fn only_our_specifications_are_found() {
        let directory = tempfile::tempdir().unwrap();
        let put = |name: &str, text: &str| std::fs::write(directory.path().join(name), text).unwrap();
        put("nvidia.json", r#"{"kind": "nvidia.com/gpu", "cdiVersion": "0.5.0", "devices": []}"#);
        put("broken.json", "{");
        put("x.json", &serde_json::to_string(&Spec::of(&Config::default(), None).unwrap()).unwrap());
        put("ringfence.json", "{");
        put("ringfence.json.old", "{");
        let found = find(&[directory.path().to_owned(), "/nonexistent".into()]).unwrap();
        let names: Vec<_> =
            found.iter().map(|f| (f.path.file_name().unwrap().to_str().unwrap(), f.spec.is_ok())).collect();
        assert_eq!(names, [("ringfence.json", false), ("x.json", true)]);
    }

    #[test]
    fn a_file_is_replaced_whole_and_readable_for_all() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("cdi/ringfence.json");
        write(&path, "1").unwrap();
        write(&path, "2").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "2");
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o7777, 0o644);
        assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }
}
