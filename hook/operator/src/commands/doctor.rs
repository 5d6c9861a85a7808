//! `ringfence doctor`

use crate::doctor::{Check, Report, Status, examine};
use crate::engines::Engine;
use crate::engines::host::Host;
use crate::output;
use anyhow::Result;
use serde_json::json;
use std::process::ExitCode;

/// Finds what is missing and says what mends it
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  ringfence doctor
  ringfence doctor --engine containerd --json

It changes nothing. Without root it sees less. The exit status is 1 if there are problems.")]
pub struct Args {
    /// Looks at this engine only; may be given more than once
    #[arg(long, value_name = "ENGINE")]
    engine: Vec<Engine>,
    /// As JSON
    #[arg(long)]
    json: bool,
}

impl Args {
    pub fn run(self) -> Result<ExitCode> {
        let is_rootless = !rustix::process::geteuid().is_root() && std::env::var_os("HOME").is_some();
        let host = Host::new(None, is_rootless)?;
        let report = examine(&host, Some(&self.engine[..]).filter(|engines| !engines.is_empty()));
        let (problems, warnings) = (report.count(Status::Problem), report.count(Status::Warning));
        match self.json {
            true => output::json(&json!({"checks": report.checks, "problems": problems, "warnings": warnings}))?,
            false => output::print(&show(&report))?,
        }
        Ok(if problems == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

fn show(report: &Report) -> String {
    let width = report.checks.iter().map(|check| check.subject.len()).max().unwrap_or(0);
    let mut text: String = report.checks.iter().map(|check| line(check, width)).collect();
    let count = |status, name: &str| match report.count(status) {
        1 => format!("1 {name}"),
        count => format!("{count} {name}s"),
    };
    text += &format!("\n{}, {}\n", count(Status::Problem, "problem"), count(Status::Warning, "warning"));
    text
}

fn line(check: &Check, width: usize) -> String {
    let status = match check.status {
        Status::Ok => "ok     ",
        Status::Warning => "WARNING",
        Status::Problem => "PROBLEM",
    };
    let fix = check.fix.iter().map(|fix| format!("{:width$}           -> {fix}\n", "")).collect::<String>();
    format!("{status}  {:width$}  {}\n{fix}", check.subject, check.message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_mends_it_stands_below() {
        let ok = Check { subject: "kernel".into(), status: Status::Ok, message: "fine".into(), fix: None };
        let subject = "podman".to_owned();
        let bad = Check { subject, status: Status::Problem, message: "bad".into(), fix: Some("mend it".into()) };
        assert_eq!(
            show(&Report { checks: vec![ok, bad] }),
            "ok       kernel  fine\nPROBLEM  podman  bad\n                 -> mend it\n\n1 problem, 0 warnings\n"
        );
    }
}
