//! Directories of hooks.d files, ours and others': one bad file stops every container.

use super::Report;
use crate::engines::host::Host;
use serde_json::Value;
use std::path::{Path, PathBuf};

/// Checks all files of `directory` for `engine`.
pub fn check(report: &mut Report, host: &Host, engine: &str, directory: &Path, refuses_precreate: bool) {
    let Ok(entries) = host.locate(directory).and_then(|directory| Ok(std::fs::read_dir(directory)?)) else { return };
    let mut files: Vec<PathBuf> = entries.flatten().map(|entry| directory.join(entry.file_name())).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "json"));
    files.sort();
    for path in files {
        let shown = path.display();
        let text = match host.read(&path) {
            Ok(text) => text.unwrap_or_default(),
            Err(error) => {
                report.warn(engine, format!("{error:#}"), "sudo ringfence doctor");
                continue;
            }
        };
        let hook: Value = match serde_json::from_str(&text) {
            Ok(hook) => hook,
            Err(error) => {
                report.fail(
                    engine,
                    format!("{shown} is broken, so that no container starts: {error}"),
                    format!("rm {shown}"),
                );
                continue;
            }
        };
        let program = hook.pointer("/hook/path").and_then(Value::as_str).unwrap_or("");
        if !host.exists(Path::new(program)) {
            let message = format!("{shown} names {program:?}, which does not exist, so that no container starts");
            report.fail(engine, message, format!("rm {shown}, or install its program"));
        }
        let stages = hook.get("stages").and_then(Value::as_array);
        if refuses_precreate && stages.into_iter().flatten().any(|stage| stage == "precreate") {
            let message = format!("{shown} names the stage precreate, with which CRI-O does not start");
            report.fail(engine, message, format!("move {shown} to a directory that only podman's hooks_dir names"));
        }
    }
}
