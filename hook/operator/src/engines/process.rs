//! Programs of engines, run with an end.

use anyhow::{Context, Result, bail};
use std::io::{Read, Seek};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// What `command` prints; an error if it fails or takes longer than `limit`.
pub fn output(command: &mut Command, limit: Duration) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    // Files, since a pipe that nobody reads stops a program that prints much.
    let (mut stdout, mut stderr) = (tempfile::tempfile()?, tempfile::tempfile()?);
    command.stdin(Stdio::null()).stdout(stdout.try_clone()?).stderr(stderr.try_clone()?);
    let mut child = command.spawn().with_context(|| format!("cannot run {name}"))?;
    let deadline = Instant::now() + limit;
    let status = loop {
        match child.try_wait()? {
            Some(status) => break status,
            None if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(5)),
            None => {
                let _ = child.kill();
                let _ = child.wait();
                bail!("{name} took longer than {} s", limit.as_secs());
            }
        }
    };
    let read = |file: &mut std::fs::File| -> Result<String> {
        let mut bytes = Vec::new();
        file.rewind()?;
        file.take(16 << 20).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    let text = read(&mut stdout)?;
    if !status.success() {
        let stderr = read(&mut stderr)?;
        bail!("{name}: {}", stderr.lines().last().unwrap_or("it failed without a word"));
    }
    Ok(text)
}
