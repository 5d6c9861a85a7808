//! Ringfence's own files.

use super::Report;
use crate::engines::host::Host;
use ringfence_hook::config::Config;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

const REINSTALL: &str = "apt-get install --reinstall ringfence, or correct the path in /etc/ringfence/config.toml";

/// The configuration; all defaults if it is broken.
pub fn config(report: &mut Report) -> Config {
    match Config::load() {
        Ok(config) => {
            report.ok("config", "the configuration is valid");
            config
        }
        Err(error) => {
            report.fail("config", error.to_string(), "correct it, then ringfence config validate");
            Config::default()
        }
    }
}

/// Programs, library and links.
pub fn programs(report: &mut Report, host: &Host, config: &Config) {
    let files: [(&str, &Path, bool); 5] = [
        ("hook", &config.hook.path, true),
        ("runtime", &config.runtime.path, true),
        ("shim", &config.shim.path, true),
        ("proxy", &config.proxy.path, true),
        ("library", &config.inject.library, false),
    ];
    let before = report.checks.len();
    for (name, path, is_program) in files {
        file(report, name, path, is_program);
    }
    for name in ["runc", "crun"] {
        let link = config.shim.links.join(name);
        match (same_file(&link, &config.runtime.path), link.exists()) {
            (true, _) => {}
            (false, true) => {
                let fix = format!("ln -sfn {} {}", config.runtime.path.display(), link.display());
                report.fail("programs", format!("{} is not {}", link.display(), config.runtime.path.display()), fix);
            }
            (false, false) => report.fail("programs", format!("the link {} is missing", link.display()), REINSTALL),
        }
    }
    if report.checks.len() == before {
        report.ok("programs", "hook, runtime, shim, proxy, library and links are in place");
    }
    runtimes(report, host, config);
    run_dir(report, &config.run_dir);
}

fn file(report: &mut Report, name: &str, path: &Path, is_program: bool) {
    let shown = path.display();
    let metadata = match path.metadata() {
        Ok(metadata) => metadata,
        Err(error) => return report.fail("programs", format!("{name} {shown}: {error}"), REINSTALL),
    };
    if !metadata.is_file() {
        report.fail("programs", format!("{name} {shown} is not a file"), REINSTALL);
    } else if is_program && metadata.mode() & 0o111 == 0 {
        report.fail("programs", format!("{name} {shown} is not executable"), format!("chmod +x {shown}"));
    } else if metadata.uid() != 0 {
        let message = format!("{name} {shown}, which root runs, belongs to user {}", metadata.uid());
        report.fail("programs", message, format!("chown root:root {shown}"));
    } else if metadata.mode() & 0o022 != 0 {
        let message = format!("{name} {shown}, which root runs, can be written by others than root");
        report.fail("programs", message, format!("chmod go-w {shown}"));
    }
}

/// The OCI runtimes that the wrapper may become.
fn runtimes(report: &mut Report, host: &Host, config: &Config) {
    let mut found = Vec::new();
    for runtime in &config.runtime.runtimes {
        let path = if runtime.is_absolute() {
            runtime.exists().then(|| runtime.clone())
        } else {
            runtime.to_str().and_then(|name| host.find_program(name))
        };
        found.extend(path.filter(|path| !same_file(path, &config.runtime.path)));
    }
    match found.first() {
        Some(path) => report.ok("programs", format!("ringfence-runtime becomes {}", path.display())),
        None => {
            let message = format!(
                "none of {:?} is installed, so that ringfence-runtime has nothing to become",
                config.runtime.runtimes
            );
            report.fail("programs", message, "install runc, or name the runtime in [runtime] runtimes");
        }
    }
}

fn run_dir(report: &mut Report, path: &Path) {
    let shown = path.display();
    // The user's own, who is told of it.
    let user = rustix::process::geteuid();
    let owner = if user.is_root() { "root".to_owned() } else { format!("user {}", user.as_raw()) };
    match path.symlink_metadata() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            report.ok("run-dir", format!("{shown} is made by the first container"));
        }
        Err(error) => report.warn("run-dir", format!("{shown}: {error}"), "sudo ringfence doctor"),
        Ok(metadata) if !metadata.is_dir() => {
            report.fail("run-dir", format!("{shown} is not a directory"), format!("rm {shown}"));
        }
        Ok(metadata) if metadata.uid() != user.as_raw() || metadata.mode() & 0o022 != 0 => {
            let message = format!("{shown} can be written by others than {owner}");
            report.fail("run-dir", message, format!("chown {} {shown} && chmod go-w {shown}", user.as_raw()));
        }
        Ok(_) => report.ok("run-dir", format!("{shown} is writable for {owner} alone")),
    }
}

fn same_file(a: &Path, b: &Path) -> bool {
    let identity = |path: &Path| path.metadata().ok().map(|metadata| (metadata.dev(), metadata.ino()));
    identity(a).is_some() && identity(a) == identity(b)
}
