//! The registrations with docker, podman and CRI-O.

use super::{Report, hooks};
use crate::engines::host::Host;
use crate::engines::process::output;
use crate::engines::{Engine, Options, crio as crio_files, docker as docker_file, hooks_d, podman as podman_files};
use ringfence_hook::config::Config;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// How long a program may take to say its version.
const LIMIT: Duration = Duration::from_secs(20);
/// The first docker whose `docker run` has `--annotation`.
const ANNOTATIONS: u32 = 25;

/// What a program says of its version, in one line.
pub fn version(host: &Host, program: &str) -> String {
    let Some(path) = host.find_program(program) else { return format!("{program} is not there") };
    let text = output(Command::new(path).arg("--version"), LIMIT).unwrap_or_else(|error| format!("{error:#}"));
    text.lines().next().unwrap_or("it does not say its version").trim().to_owned()
}

/// Checks docker.
pub fn docker(report: &mut Report, host: &Host, config: &Config) {
    let configure = "ringfence configure --engine docker && systemctl reload docker";
    let version = version(host, "dockerd");
    let major = version.split(|c: char| !c.is_ascii_digit()).find_map(|part| part.parse::<u32>().ok());
    let hint = if major.is_some_and(|major| major < ANNOTATIONS) {
        "; it has no --annotation, so containers take what their runtime's profile gives"
    } else {
        ""
    };
    report.ok("docker", format!("{version}{hint}"));
    let path = match docker_file::config_path(host, &Options::default()) {
        Ok(path) => path,
        Err(error) => return report.warn("docker", format!("{error:#}"), "sudo ringfence doctor"),
    };
    let text = host.read(&path).map(Option::unwrap_or_default);
    let flag = docker_file::flags::find(host, docker_file::DEFAULT_RUNTIME).unwrap_or_default();
    let named = text.as_ref().ok().and_then(|text| docker_file::default_runtime(text).unwrap_or_default());
    match (flag, named) {
        (Some(flag), Some(named)) => {
            let (flag, file) = (flag.value, flag.file.display());
            let message = format!(
                "dockerd does not start: {file} has --default-runtime={flag}, and {} names {named}, too",
                path.display()
            );
            report.fail("docker", message, format!("take default-runtime out of {} or {file}", path.display()));
        }
        (Some(flag), None) => {
            let message = format!("the default runtime is {}, by a flag in {}", flag.value, flag.file.display());
            report.ok("docker", message);
        }
        (None, _) => {}
    }
    let registered = match text.and_then(|text| docker_file::registered(&text)) {
        Ok(registered) => registered,
        Err(error) => return report.fail("docker", format!("{}: {error:#}", path.display()), "correct that file"),
    };
    for (name, program) in &registered {
        let is_link = docker_file::is_link(program, &config.runtime.path);
        if *program == config.runtime.path || is_link && host.is_program(program) {
            report.ok("docker", format!("{} registers {name}", path.display()));
        } else if is_link {
            report.fail("docker", format!("runtime {name} is {}, which is missing", program.display()), configure);
        } else {
            let message = format!("runtime {name} is {}, not {}", program.display(), config.runtime.path.display());
            report.fail("docker", message, configure);
        }
    }
    if registered.is_empty() {
        report.warn("docker", "no runtime of Ringfence is registered", configure);
    }
}

/// Checks podman: root's, or the calling user's.
pub fn podman(report: &mut Report, host: &Host, config: &Config) {
    report.ok("podman", version(host, "podman"));
    let user = if host.is_rootless() { " --user" } else { "" };
    let configure = format!("ringfence configure --engine podman{user}");
    let files = podman_files::Files::of(host, None);
    let mut read = files.read.clone();
    read.push(files.drop_in.clone());
    let paths = hooks_d::read_all(host, &read, ".conf", Path::new(""));
    hooks_and_runtime(
        report,
        host,
        config,
        &Registration {
            engine: Engine::Podman,
            directories: paths.and_then(|files| hooks_d::directories(&files, "engine")),
            hooks: files.hooks,
            drop_in: files.drop_in,
            configure,
            refuses_precreate: false,
        },
    );
}

/// Checks CRI-O.
pub fn crio(report: &mut Report, host: &Host, config: &Config) {
    report.ok("crio", version(host, "crio"));
    hooks_and_runtime(
        report,
        host,
        config,
        &Registration {
            engine: Engine::Crio,
            directories: crio_files::files(host, Path::new(""))
                .and_then(|files| hooks_d::directories(&files, "crio.runtime")),
            hooks: hooks_d::SYSTEM.into(),
            drop_in: crio_files::path(None),
            configure: "ringfence configure --engine crio && systemctl restart crio".into(),
            refuses_precreate: true,
        },
    );
}

/// What podman and CRI-O have in common.
struct Registration {
    engine: Engine,
    /// As configured; `None` for the default.
    directories: anyhow::Result<Option<Vec<PathBuf>>>,
    /// Where our files should be.
    hooks: PathBuf,
    drop_in: PathBuf,
    configure: String,
    refuses_precreate: bool,
}

fn hooks_and_runtime(report: &mut Report, host: &Host, config: &Config, registration: &Registration) {
    let name = registration.engine.name();
    let directories = match &registration.directories {
        Ok(directories) => directories.clone().unwrap_or_else(|| vec![hooks_d::SYSTEM.into()]),
        Err(error) => return report.fail(name, format!("{error:#}"), "correct that file"),
    };
    let before = report.checks.len();
    for directory in &directories {
        hooks::check(report, host, name, directory, registration.refuses_precreate);
    }
    let ours = hooks_d::FILES.map(|(file, stage)| (registration.hooks.join(file), hooks_d::text(&config.hook, stage)));
    let present = ours.iter().filter(|(path, _)| host.exists(path)).count();
    if present == 0 && !host.exists(&registration.drop_in) {
        return report.warn(name, "Ringfence is not registered", &registration.configure);
    }
    if !directories.contains(&registration.hooks) {
        let message = format!("hooks_dir names {directories:?}, not {}", registration.hooks.display());
        report.fail(name, message, &registration.configure);
    }
    for (path, text) in ours {
        match host.read(&path) {
            Ok(Some(found)) if found == text => {}
            Ok(Some(_)) => report.warn(name, format!("{} is not up to date", path.display()), &registration.configure),
            Ok(None) => report.fail(name, format!("{} is missing", path.display()), &registration.configure),
            Err(error) => report.warn(name, format!("{error:#}"), "sudo ringfence doctor"),
        }
    }
    match host.read(&registration.drop_in) {
        Ok(Some(text)) if config.runtime.path.to_str().is_some_and(|path| text.contains(&format!("\"{path}\""))) => {}
        Ok(None) => report.warn(name, "the runtime ringfence is not registered", &registration.configure),
        Ok(Some(_)) => {
            let message = format!(
                "{} names another program than {}",
                registration.drop_in.display(),
                config.runtime.path.display()
            );
            report.fail(name, message, &registration.configure);
        }
        Err(error) => report.warn(name, format!("{error:#}"), "sudo ringfence doctor"),
    }
    if report.checks.len() == before {
        report.ok(name, "hooks and runtime are registered");
    }
}
