//! Asks containerd for pods as the kubelet does, for tests that are scripts: Debian has no crictl.

use anyhow::Result;
use clap::Parser;
use ringfence_integration::engines::cri::{Cri, Options, SOCKET};

/// Pods by containerd's CRI plugin
#[derive(Parser)]
enum Command {
    /// Run a pod in the host's network namespace; prints its id, and those of its containers
    Run {
        /// The RuntimeClass's handler
        handler: String,
        /// The control group of the pod
        cgroup_parent: String,
        /// Annotations of the pod
        #[arg(long, value_name = "KEY=VALUE", value_parser = annotation)]
        annotation: Vec<(String, String)>,
        /// Names of its containers, which idle
        #[arg(required = true)]
        containers: Vec<String>,
    },
    /// Stop and remove a pod
    Remove {
        /// Its id
        pod: String,
    },
}

fn annotation(text: &str) -> Result<(String, String), &'static str> {
    let (key, value) = text.split_once('=').ok_or("no = in it")?;
    Ok((key.into(), value.into()))
}

fn main() -> Result<()> {
    let command = Command::parse();
    let cri = Cri::open(SOCKET.into())?;
    match command {
        Command::Run { handler, cgroup_parent, annotation, containers } => {
            let annotations: Vec<_> = annotation.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
            let pod = cri.pod_in(&cgroup_parent, &handler, &annotations)?;
            let mut ids = Vec::new();
            for name in &containers {
                ids.push(pod.start(name, &Options::default())?);
            }
            println!("{}", pod.leave());
            ids.iter().for_each(|id| println!("{id}"));
            Ok(())
        }
        Command::Remove { pod } => cri.remove(&pod),
    }
}
