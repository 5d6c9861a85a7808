//! Finds what keeps Ringfence from working on this host.
//!
//! Each subject has a module that appends [`Check`]s; none changes anything.

mod containerd;
mod hooks;
mod installation;
mod kernel;
mod node;
mod registrations;

use crate::engines::Engine;
use crate::engines::host::Host;
use ringfence_hook::config::Config;
use serde::Serialize;

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum Status {
    Ok,
    /// Something works less well, or could not be seen.
    Warning,
    /// Containers do not get RDMA, or do not start.
    Problem,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What it belongs to, such as `kernel` or an engine's name.
    pub subject: String,
    /// The verdict.
    pub status: Status,
    /// One line: what was found.
    pub message: String,
    /// The command that mends it, if one does.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fix: Option<String>,
}

/// The checks so far.
#[derive(Debug, Default)]
pub struct Report {
    /// In the order of their making.
    pub checks: Vec<Check>,
}

impl Report {
    fn add(&mut self, subject: &str, status: Status, message: impl Into<String>, fix: Option<String>) {
        let message = crate::output::plain(&message.into());
        self.checks.push(Check { subject: subject.into(), status, message, fix });
    }

    fn ok(&mut self, subject: &str, message: impl Into<String>) {
        self.add(subject, Status::Ok, message, None);
    }

    fn warn(&mut self, subject: &str, message: impl Into<String>, fix: impl Into<String>) {
        self.add(subject, Status::Warning, message, Some(fix.into()));
    }

    fn fail(&mut self, subject: &str, message: impl Into<String>, fix: impl Into<String>) {
        self.add(subject, Status::Problem, message, Some(fix.into()));
    }

    /// How many checks came to `status`.
    pub fn count(&self, status: Status) -> usize {
        self.checks.iter().filter(|check| check.status == status).count()
    }
}

/// Looks at everything; with `engines` at no others than those, whether they are installed or not.
pub fn examine(host: &Host, engines: Option<&[Engine]>) -> Report {
    let mut report = Report::default();
    kernel::check(&mut report);
    let config = installation::config(&mut report);
    installation::programs(&mut report, host, &config);
    node::check(&mut report, &config);
    match engines {
        Some(engines) => engines.iter().for_each(|engine| engine_check(&mut report, host, &config, *engine)),
        None => {
            let found: Vec<_> = Engine::ALL.into_iter().filter(|engine| engine.is_installed(host)).collect();
            if found.is_empty() {
                report.warn(
                    "engines",
                    "none of containerd, dockerd, podman and crio is installed",
                    "install an engine",
                );
            }
            found.into_iter().for_each(|engine| engine_check(&mut report, host, &config, engine));
        }
    }
    report
}

fn engine_check(report: &mut Report, host: &Host, config: &Config, engine: Engine) {
    let name = engine.name();
    if !engine.is_installed(host) {
        return report.fail(name, "it is not installed", format!("install {name}"));
    }
    match engine {
        Engine::Containerd => containerd::check(report, host, config),
        Engine::Docker => registrations::docker(report, host, config),
        Engine::Podman => registrations::podman(report, host, config),
        Engine::Crio => registrations::crio(report, host, config),
    }
}
