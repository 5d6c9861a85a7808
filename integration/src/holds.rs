//! What holds for every proxy, whatever its device: what it has given up, that it sleeps, and that rates are kept.

use crate::command::{run, wait_until};
use crate::direct::DirectProxy;
use anyhow::{Context, Result, ensure};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// What a proxy may see of file systems.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    /// Entries of its root, in order.
    pub root: &'a [&'a str],
    /// Its mounts: where they are, and what their options begin with.
    pub mounts: &'a [(&'a str, &'a str)],
    /// What it has open of them.
    pub held: &'a [&'a str],
}

/// A field of `/proc/PID/status`.
///
/// # Errors
/// If there is none.
pub fn status(pid: i32, field: &str) -> Result<String> {
    field_of(&std::fs::read_to_string(format!("/proc/{pid}/status"))?, field).with_context(|| format!("of {pid}"))
}

fn field_of(status: &str, field: &str) -> Result<String> {
    let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    line.map(|value| value.trim().replace('\t', " ")).with_context(|| format!("no field {field}"))
}

fn namespace(pid: i32, name: &str) -> Result<PathBuf> {
    Ok(std::fs::read_link(format!("/proc/{pid}/ns/{name}"))?)
}

/// Whether a proxy has kept nothing of what it was started with. Which user it is.
///
/// # Errors
/// What it has kept.
pub fn given_up(proxy: &DirectProxy, view: View<'_>) -> Result<u32> {
    let pid = proxy.pid();
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        // One may have ended since.
        let Ok(status) = std::fs::read_to_string(task?.path().join("status")) else { continue };
        for (field, expected) in [
            ("CapEff", "0000000000000000"),
            ("CapPrm", "0000000000000000"),
            ("CapInh", "0000000000000000"),
            ("CapAmb", "0000000000000000"),
            ("NoNewPrivs", "1"),
            ("Seccomp", "2"),
            ("Groups", ""),
        ] {
            let found = field_of(&status, field)?;
            ensure!(found == expected, "{field} of {} is {found:?}", field_of(&status, "Name")?);
        }
    }
    let (uid, gid) = (status(pid, "Uid")?, status(pid, "Gid")?);
    let id: u32 = uid.split(' ').next().context("an id")?.parse()?;
    ensure!(uid == [id.to_string().as_str(); 4].join(" ") && gid == uid, "Uid {uid:?}, Gid {gid:?}");
    ensure!((2_000_000_000..2_000_001_023).contains(&id), "user {id}");
    // Undumpable: its files in /proc are root's, not its user's.
    ensure!(std::fs::metadata(format!("/proc/{pid}/environ"))?.uid() == 0, "it can be dumped");
    ensure!(namespace(pid, "mnt")? != namespace(std::process::id() as i32, "mnt")?, "it has the host's mounts");
    let root = std::fs::read_dir(format!("/proc/{pid}/root"))?.flatten();
    let mut root: Vec<_> = root.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    root.sort();
    ensure!(root == view.root, "its root has {root:?}");
    let text = std::fs::read_to_string(format!("/proc/{pid}/mountinfo"))?;
    // `proc_pid_mountinfo(5)`: the fifth field is where it is, the sixth its options.
    let mut mounts: Vec<_> =
        text.lines().filter_map(|line| line.split(' ').nth(4).zip(line.split(' ').nth(5))).collect();
    mounts.sort_unstable();
    let as_expected = |((place, options), (expected, begins)): (&(&str, &str), &(&str, &str))| {
        place == expected && options.starts_with(begins)
    };
    ensure!(mounts.len() == view.mounts.len() && mounts.iter().zip(view.mounts).all(as_expected), "mounts: {text}");
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))?.flatten() {
        let target = std::fs::read_link(entry.path())?;
        let target = target.to_string_lossy();
        // The lock of its LID, which is empty and open for reading, is the one file with a name that it holds.
        let harmless = ["socket:", "anon_inode:", "pipe:", "/memfd:ringfence", "/dev/null"];
        let known = harmless.iter().any(|start| target.starts_with(start))
            || target.contains("fabric/lids/")
            || view.held.contains(&&*target);
        ensure!(known || entry.file_name().to_string_lossy().parse::<u32>()? < 3, "it holds {target}");
    }
    Ok(id)
}

/// Whether a proxy sleeps when `process` has used verbs and nobody does any more.
///
/// # Errors
/// The time that it used all the same.
pub fn sleeps(proxy: &DirectProxy, process: &Path) -> Result<()> {
    let mut command = proxy.command(process)?;
    command.arg("once");
    run(command)?;
    let mut last = None;
    wait_until("the proxy to fall asleep", Duration::from_secs(10), || {
        std::thread::sleep(Duration::from_millis(200));
        let now = proxy.processor_ticks().ok();
        std::mem::replace(&mut last, now) == now
    })?;
    let before = proxy.processor_ticks()?;
    std::thread::sleep(Duration::from_secs(2));
    let used = proxy.processor_ticks()? - before;
    ensure!(used <= 1, "an idle proxy used {used} ticks of 10 ms in 2 s");
    Ok(())
}

/// Whether `bench`, with these words, moves no more than `most` bytes per second, within 3 % over two seconds. Less than that is for a
/// benchmark to find: others may have the processors here. How many bytes it saw move.
///
/// # Errors
/// What it moved.
pub fn is_held_to(proxy: &DirectProxy, bench: &Path, words: &[&str], most: f64) -> Result<f64> {
    let mut command = proxy.command(bench)?;
    command.args(words);
    let output = run(command)?;
    let windows: Vec<f64> = output.lines().filter_map(|line| line.strip_prefix("window ")?.parse().ok()).collect();
    ensure!(windows.len() > 5, "too few windows:\n{output}");
    let seen = windows.iter().sum::<f64>();
    let found = seen / windows.len() as f64 * 10.0;
    ensure!(found <= most * 1.03, "{found} bytes/s; at most {most} are allowed");
    ensure!(found >= most / 100.0, "{found} bytes/s of {most} that are allowed");
    Ok(seen)
}
