//! `ringfence-runtime`: edits `config.json` on `create` and `run`, then becomes the real runtime, on every verb.

use crate::arguments::{Invocation, Verb};
use crate::bundle::ConfigFile;
use crate::decide;
use crate::edit::{self, Facts, Hook};
use crate::find::Search;
use crate::json::Object;
use crate::places::Places;
use crate::report::report;
use crate::shim;
use ringfence_hook::config::{Config, DEFAULT_PATH, ENVIRONMENT, Error};
use ringfence_hook::{Code, Failure};
use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

/// Counts in the environment how often we have become another runtime.
const DEPTH: &str = "RINGFENCE_RUNTIME_DEPTH";
/// Wrappers of other vendors may stand between us and the real runtime, and hooks may call runtimes; a loop goes on for ever.
const DEEPEST: u32 = 8;
/// The names by which engines call us through the shim's links.
const LINKS: [&str; 2] = ["runc", "crun"];

/// Becomes the real runtime; the exit code is of what kept us from it, after saying so.
pub fn main() -> ExitCode {
    let mut arguments = std::env::args_os();
    let called = arguments.next().unwrap_or_default();
    let mut invocation = Invocation::parse(&called, arguments);
    let Err(failure) = run(&called, &mut invocation);
    report(&failure, &invocation.log);
    ExitCode::FAILURE
}

fn run(called: &OsString, invocation: &mut Invocation) -> Result<std::convert::Infallible, Failure> {
    let depth = std::env::var(DEPTH).ok().and_then(|depth| depth.parse().ok()).unwrap_or(0);
    if depth >= DEEPEST {
        let message = format!(
            "the OCI runtime that it becomes is again ringfence-runtime, {depth} times over; \
             name the real one in [runtime] runtimes of {}",
            config_path().display()
        );
        return Err(Failure::new(Code::Config, message));
    }
    let config = Config::load();
    let places = Places::of(&config);
    let search = Search::new(&places.shim.links, &[&places.runtime.path]);
    let program = real(called, &places, &search)?;
    if invocation.verb != Verb::Other {
        prepare(invocation, &config)?;
    }
    let mut command = Command::new(&program);
    command.args(&invocation.arguments).env(DEPTH, (depth + 1).to_string());
    if std::env::var_os("PATH").is_some() {
        command.env("PATH", search.path());
    }
    let error = command.exec();
    Err(Failure::new(
        Code::Config,
        format!("cannot execute {}: {error}; [runtime] runtimes names another", program.display()),
    ))
}

/// The runtime to become: the one that the engine meant, if it called us by its name, or the first that is there.
fn real(called: &OsString, places: &Places, search: &Search) -> Result<PathBuf, Failure> {
    let meant = Path::new(called).file_name().and_then(|name| LINKS.iter().find(|link| **link == name)).map(Path::new);
    let configured = places.runtime.runtimes.iter().map(PathBuf::as_path);
    let mut names: Vec<_> = meant.into_iter().collect();
    names.extend(configured.filter(|name| Some(*name) != meant));
    if let Some(program) = names.iter().find_map(|name| search.find(name)) {
        return Ok(program);
    }
    let shown = |name: &&Path| match name.is_absolute() && search.is_ours(name) {
        true => format!("{} (which is ringfence-runtime itself)", name.display()),
        false => name.display().to_string(),
    };
    let message = format!(
        "no OCI runtime found: looked for {} in {}; install one, or name it in [runtime] runtimes of {}",
        names.iter().map(shown).collect::<Vec<_>>().join(", "),
        Path::new(search.path()).display(),
        config_path().display()
    );
    Err(Failure::new(Code::Config, message))
}

/// Edits `config.json` if the container is ours.
fn prepare(invocation: &mut Invocation, config: &Result<Config, Error>) -> Result<(), Failure> {
    // Only now: a mistake in the engine's flag keeps no container from being listed, stopped or removed.
    let policy = std::mem::replace(&mut invocation.policy, Ok(None))?;
    let Some(file) = ConfigFile::read(&invocation.config)? else { return Ok(()) };
    let parsed = file.text().map_err(|defect| defect.to_string()).and_then(|text| {
        let object = Object::parse(text).map_err(|error| format!("is not a valid OCI configuration: {error}"))?;
        let facts = Facts::of(&object).map_err(|error| format!("is not a valid OCI configuration: {error}"))?;
        Ok((object, facts))
    });
    let (mut object, facts) = match parsed {
        Ok(parsed) => parsed,
        // Not known to be ours: the real runtime may say what it thinks of it.
        Err(_) if policy.is_none() && !file.mentions_us() => return Ok(()),
        Err(problem) => return Err(unusable(&file, &problem)),
    };
    // An engine has its own way to say it; the shim's configuration has no place for it.
    if shim::is_above() && !invocation.manages_cgroups && facts.is_systemd_path() {
        invocation.add_global("--systemd-cgroup");
    }
    // What the engine gave this container, by CDI, is closer to it than what it told us for all of them.
    let effective = facts.policy.as_deref().or(policy.as_deref());
    if !facts.has_process {
        return Ok(());
    }
    let Some(nodes) = decide::nodes(&facts, &file.directory(), effective, config)? else { return Ok(()) };
    if invocation.verb == Verb::Restore {
        let message = "a container with RDMA cannot be restored: its connections and memory registrations are in no \
             checkpoint; start it anew, or restore it with ringfence.dev/enable=false";
        return Err(Failure::new(Code::Denied, message));
    }
    let config = config.as_ref().map_err(|error| Failure::new(Code::Config, error.to_string()))?;
    let hook = hook(config, policy)?;
    match edit::edit(&mut object, &hook, &nodes) {
        Ok(true) => file.replace(&object.to_text()),
        Ok(false) => Ok(()),
        Err(error) => Err(unusable(&file, &format!("is not a valid OCI configuration: {error}"))),
    }
}

fn unusable(file: &ConfigFile, problem: &str) -> Failure {
    Failure::new(Code::State, format!("{} {problem}", file.path().display()))
}

fn hook(config: &Config, policy: Option<String>) -> Result<Hook, Failure> {
    let text = |what: &str, path: &Path| {
        let wrong =
            || Failure::new(Code::Config, format!("{what} {path:?} is not UTF-8; config.json can only hold text"));
        path.to_str().map(str::to_owned).ok_or_else(wrong)
    };
    let mut env = vec!["PATH=/usr/sbin:/usr/bin:/sbin:/bin".to_owned()];
    if let Some(path) = Config::named() {
        // The hook runs in another directory.
        let path = std::path::absolute(&path).unwrap_or(path);
        env.push(format!("{ENVIRONMENT}={}", text(ENVIRONMENT, &path)?));
    }
    Ok(Hook { path: text("hook.path", &config.hook.path)?, timeout: config.hook.timeout, env, policy })
}

/// The configuration file, for messages.
fn config_path() -> PathBuf {
    Config::named().unwrap_or_else(|| DEFAULT_PATH.into())
}
