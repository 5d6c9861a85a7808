//! Programs run to an end or a deadline, with what they said.

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::process::PidfdFlags;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

static NEXT_LOG: AtomicU32 = AtomicU32::new(0);

/// A program under way; killed when dropped.
#[derive(Debug)]
pub struct Running {
    what: String,
    child: Child,
    log: PathBuf,
}

/// A program that has ended.
#[derive(Debug)]
pub struct Ended {
    /// The command line, for messages.
    pub what: String,
    /// How it ended.
    pub status: ExitStatus,
    /// Standard output and standard error, interleaved.
    pub output: String,
}

impl Running {
    /// Starts `command` with its output going to a file of the sandbox.
    pub fn start(command: Command) -> Result<Self> {
        Self::start_reading(command, Stdio::null())
    }

    /// The same with something to read on its standard input.
    pub fn start_reading(mut command: Command, input: Stdio) -> Result<Self> {
        let what = describe(&command);
        let log = crate::sandbox::work_dir().join(format!("log-{}", NEXT_LOG.fetch_add(1, Ordering::Relaxed)));
        let file = File::create(&log).with_context(|| format!("cannot create {}", log.display()))?;
        command.stdin(input).stdout(file.try_clone()?).stderr(file);
        let child = command.spawn().with_context(|| format!("cannot start {what}"))?;
        Ok(Self { what, child, log })
    }

    /// The program's process.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    /// What it has said so far.
    #[must_use]
    pub fn output(&self) -> String {
        std::fs::read(&self.log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    /// Whether it has ended.
    pub fn has_ended(&mut self) -> bool {
        !matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits for the end; past `limit`, kills it and fails with what it said.
    pub fn wait(mut self, limit: Duration) -> Result<Ended> {
        // One that has been waited for has no pidfd.
        if self.child.try_wait()?.is_none() {
            let pid = rustix::process::Pid::from_child(&self.child);
            let process = rustix::process::pidfd_open(pid, PidfdFlags::empty()).context("cannot open a pidfd")?;
            let mut ended = [PollFd::new(&process, PollFlags::IN)];
            let deadline = Instant::now() + limit;
            while rustix::event::poll(&mut ended, Some(&left(deadline)?)).or_else(interrupted)? == 0 {
                if Instant::now() >= deadline {
                    bail!("{} did not end within {limit:?}; it said:\n{}", self.what, self.output());
                }
            }
        }
        let status = self.child.wait()?;
        Ok(Ended { what: self.what.clone(), status, output: self.output() })
    }

    /// Ends it now.
    pub fn kill(mut self) -> String {
        self.end();
        self.output()
    }

    fn end(&mut self) {
        // Both fail only if the child has ended and been waited for already.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.end();
        std::fs::remove_file(&self.log).ok();
    }
}

impl Ended {
    /// Its output, if it ended well.
    pub fn success(self) -> Result<String> {
        if !self.status.success() {
            bail!("{} failed ({}):\n{}", self.what, self.status, self.output.trim_end());
        }
        Ok(self.output)
    }
}

/// Runs `command` and returns its output; an error if it fails or takes longer than a minute.
pub fn run(command: Command) -> Result<String> {
    Running::start(command)?.wait(Duration::from_secs(60))?.success()
}

/// A command from its words.
#[must_use]
pub fn command(words: &[&str]) -> Command {
    let mut command = Command::new(words[0]);
    command.args(&words[1..]);
    command
}

/// Waits until `condition` holds, at most `limit`.
pub fn wait_until(what: &str, limit: Duration, mut condition: impl FnMut() -> bool) -> Result<()> {
    let deadline = Instant::now() + limit;
    while !condition() {
        if Instant::now() >= deadline {
            bail!("waited {limit:?} in vain: {what}");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

fn left(deadline: Instant) -> Result<Timespec> {
    Ok(Timespec::try_from(deadline.saturating_duration_since(Instant::now()))?)
}

/// A signal is no event.
fn interrupted(error: Errno) -> rustix::io::Result<usize> {
    if error == Errno::INTR { Ok(0) } else { Err(error) }
}

fn describe(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy().into_owned()];
    words.extend(command.get_args().map(|arg| arg.to_string_lossy().into_owned()));
    words.join(" ")
}

/// Whether a process is a proxy's warden: it has the same command line. `process`: its directory in a `/proc`.
#[must_use]
pub fn is_warden(process: &Path) -> bool {
    std::fs::read(process.join("comm")).is_ok_and(|name| name == b"ringfence-ward\n")
}
