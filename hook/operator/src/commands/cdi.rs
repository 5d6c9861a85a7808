//! `ringfence cdi`

use crate::cdi::{self, Found, KIND, Spec};
use crate::output;
use anyhow::{Context, Result};
use ringfence_hook::config::Config;
use serde_json::json;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Where engines look for specifications of devices; the second is for dynamic ones, and goes before the first.
const DIRECTORIES: [&str; 2] = ["/etc/cdi", "/var/run/cdi"];
/// Where ours goes.
const OUTPUT: &str = "/etc/cdi/ringfence.json";

/// Container Device Interface: RDMA as a device that engines can give
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  ringfence cdi generate
  ringfence cdi generate --output - | less
  podman run --rm --device ringfence.dev/rdma=default IMAGE ibv_devices

There is one device for each of the administrator's profiles, and \"default\".")]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Writes the specification of our devices
    Generate {
        /// The file, or - for standard output
        #[arg(long, value_name = "FILE", default_value = OUTPUT)]
        output: PathBuf,
    },
    /// Lists our devices in the specifications that engines read, and whether those fit the configuration
    List {
        /// As JSON
        #[arg(long)]
        json: bool,
        /// Where to look instead; the last goes before the others
        #[arg(long = "directory", value_name = "DIR", default_values = DIRECTORIES)]
        directories: Vec<PathBuf>,
    },
}

impl Args {
    pub fn run(self) -> Result<ExitCode> {
        let config = Config::load()?;
        let spec = Spec::of(&config, Config::named().as_deref())?;
        match self.command {
            Command::Generate { output } => generate(&spec, &output)?,
            Command::List { json, directories } => list(&spec, &directories, json)?,
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn generate(spec: &Spec, path: &Path) -> Result<()> {
    let text = format!("{}\n", serde_json::to_string_pretty(spec)?);
    if path == "-" {
        return output::print(&text);
    }
    cdi::write(path, &text).with_context(|| path.display().to_string())
}

fn list(spec: &Spec, directories: &[PathBuf], json: bool) -> Result<()> {
    let found = cdi::find(directories)?;
    let shown: Vec<_> = found.iter().flat_map(|file| devices(file, spec)).collect();
    if json {
        let shown: Vec<_> =
            shown.iter().map(|[device, path, state]| json!({"device": device, "file": path, "state": state})).collect();
        return output::json(&shown);
    }
    if shown.is_empty() {
        return output::print(&format!("no devices of kind {KIND}; run ringfence cdi generate\n"));
    }
    let mut rows = vec![["DEVICE", "FILE", "STATE"].map(str::to_owned)];
    rows.extend(shown);
    output::print(&output::table(&rows))
}

/// Each device of `file`: its name, where it is, and whether it is as `spec` has it.
fn devices(file: &Found, spec: &Spec) -> Vec<[String; 3]> {
    let path = output::plain(&file.path.to_string_lossy());
    let theirs = match &file.spec {
        Ok(theirs) => theirs,
        Err(error) => return vec![["-".into(), path, format!("unreadable: {}", output::plain(error))]],
    };
    let names = theirs.devices.iter().map(|device| &device.name);
    let missing = spec.devices.iter().map(|device| &device.name).filter(|name| !names.clone().any(|n| n == *name));
    let mut rows: Vec<_> = theirs
        .devices
        .iter()
        .map(|device| {
            let state = match spec.devices.iter().find(|ours| ours.name == device.name) {
                None => "stale: no such profile; run ringfence cdi generate",
                Some(ours) if ours != device => "stale: differs from the configuration; run ringfence cdi generate",
                Some(_) => "current",
            };
            [format!("{KIND}={}", output::plain(&device.name)), path.clone(), state.to_owned()]
        })
        .collect();
    rows.extend(missing.map(|name| {
        [format!("{KIND}={name}"), path.clone(), "missing: a new profile; run ringfence cdi generate".into()]
    }));
    rows
}
