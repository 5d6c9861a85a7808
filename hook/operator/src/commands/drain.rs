//! `ringfence drain`

use crate::output::{self, plain};
use anyhow::{Context, Result, bail};
use ringfence_hook::config::{Config, Kind};
use ringfence_launch::operator::{DONE, DRAIN, RESUME};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, recv, send, socket_with,
};
use serde_json::json;
use std::io::ErrorKind;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

/// How long one proxy may take: it destroys what its container has made on the card.
const PATIENCE: Duration = Duration::from_secs(30);

/// Has all proxies of a card close it, so that its driver can be replaced
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  ringfence drain mlx5_0 && modprobe -r mlx5_ib && modprobe mlx5_ib
  ringfence drain --resume mlx5_0

Containers go on without the card: what they had under way fails in order, their queue pairs are in error, and each of their
contexts hears of DEVICE_FATAL, as when a card fails. When the card has been away, as when its module was loaded anew, proxies open it
again by its GUID, at the latest after two seconds; --resume has them do so at once, though it never was. Programs open the device
anew then. The exit status is 1 if a proxy did not do it; the others have. Only proxies of devices of kind ibverbs keep a
driver; the kernel shows them with rdma resource show qp.")]
pub struct Args {
    /// The device, as in the configuration
    device: String,
    /// Have it opened again
    #[arg(long)]
    resume: bool,
    /// As JSON
    #[arg(long)]
    json: bool,
}

impl Args {
    pub fn run(self) -> Result<ExitCode> {
        let config = Config::load()?;
        let device = &self.device;
        let known = config.devices.iter().find(|known| known.name == *device);
        let Some(known) = known else {
            let names: Vec<_> = config.devices.iter().map(|known| known.name.as_str()).collect();
            bail!("the configuration has no device {device}; there are {}", names.join(", "));
        };
        if known.kind == Kind::Soft {
            bail!("device {device} is of kind soft: it keeps no driver");
        }
        let word = if self.resume { RESUME } else { DRAIN };
        let sockets = config.run_dir.join("fabric").join(device).join("sockets");
        let entries = match std::fs::read_dir(&sockets) {
            // No container has had it since the node was started.
            Err(error) if error.kind() == ErrorKind::NotFound => Vec::new(),
            entries => {
                entries.and_then(Iterator::collect).with_context(|| format!("cannot read {}", sockets.display()))?
            }
        };
        let (mut done, mut failed) = (0, Vec::new());
        for entry in entries {
            match tell(&entry.path(), word) {
                Ok(true) => done += 1,
                // It has ended, and its warden is about to remove the socket.
                Ok(false) => {}
                Err(error) => failed.push(format!("{}: {error}", entry.path().display())),
            }
        }
        match self.json {
            true => output::json(&json!({"device": device, "proxies": done, "failed": failed}))?,
            false => {
                let what = if self.resume { "look for" } else { "have closed" };
                let mut text = format!("{done} proxies {what} {device}\n");
                failed.iter().for_each(|line| text += &format!("not done: {}\n", plain(line)));
                output::print(&text)?;
            }
        }
        Ok(if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

/// Tells a proxy. False if there is none.
fn tell(path: &Path, word: &[u8]) -> Result<bool, Errno> {
    let socket: OwnedFd = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    for timeout in [Timeout::Recv, Timeout::Send] {
        set_socket_timeout(&socket, timeout, Some(PATIENCE))?;
    }
    match connect(&socket, &SocketAddrUnix::new(path)?) {
        Err(Errno::CONNREFUSED | Errno::NOENT) => return Ok(false),
        connected => connected?,
    }
    send(&socket, word, SendFlags::NOSIGNAL)?;
    let mut answer = [0; 16];
    let (bytes, _) = recv(&socket, &mut answer, RecvFlags::empty())?;
    // One that hangs up does not do what this user says.
    if answer[..bytes] == *DONE { Ok(true) } else { Err(Errno::PERM) }
}
