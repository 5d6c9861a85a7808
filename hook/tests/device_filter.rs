//! Programs of the kernel's that decide about devices, replaced by ones that let one more be opened.

// UNSAFETY: loads and attaches such programs, as runtimes do.
#![allow(unsafe_code)]

use ringfence_hook::device_filter::allow;
use ringfence_trials::{needs_root, skip, tests};
use rustix::fs::{Mode, OFlags};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, Stdio};

fn main() -> ExitCode {
    ringfence_trials::main(tests![one_device_may_be_opened_and_no_other])
}

/// A cgroup of version 2, with a process in it.
struct Cgroup {
    directory: PathBuf,
    sleeper: Child,
}

impl Cgroup {
    fn new() -> Self {
        needs_root("it makes a control group");
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let mount = mounts.lines().find(|line| line.contains(" - cgroup2 ")).and_then(|line| line.split(' ').nth(4));
        let Some(mount) = mount else { skip("version 2 of control groups is not mounted") };
        let directory = PathBuf::from(mount).join(format!("rf-filter-{}", std::process::id()));
        if let Err(error) = std::fs::create_dir(&directory) {
            skip(format!("no control group can be made in {mount}: {error}"));
        }
        let script = format!("echo $$ >{}/cgroup.procs && echo in && exec sleep 600", directory.display());
        let mut sleeper = Command::new("sh").args(["-c", &script]).stdout(Stdio::piped()).spawn().unwrap();
        let mut said = [0; 3];
        io::Read::read_exact(sleeper.stdout.as_mut().unwrap(), &mut said).unwrap();
        Self { directory, sleeper }
    }

    /// Whether a process in it can open `path` for reading and writing.
    fn opens(&self, path: &str) -> bool {
        let script = format!("echo $$ >{}/cgroup.procs && exec 3<>{path}", self.directory.display());
        Command::new("sh").args(["-c", &script]).stderr(Stdio::null()).status().unwrap().success()
    }

    fn allow(&self, major: u32, minor: u32) {
        assert!(allow(self.sleeper.id() as i32, major, minor).unwrap(), "its control group is not seen");
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = self.sleeper.kill();
        let _ = self.sleeper.wait();
        let _ = std::fs::remove_dir(&self.directory);
    }
}

fn one_device_may_be_opened_and_no_other() {
    let cgroup = Cgroup::new();
    // With none attached nothing is in the way, and nothing is done.
    cgroup.allow(1, 3);
    assert!(cgroup.opens("/dev/null") && cgroup.opens("/dev/zero"));

    // As a runtime does: all but /dev/full is denied.
    let rest = [
        instruction(0x61, 3, 1, 8, 0),
        instruction(0xb7, 0, 0, 0, 1),
        instruction(0x15, 3, 0, 1, 7),
        instruction(0xb7, 0, 0, 0, 0),
        instruction(0x95, 0, 0, 0, 0),
    ];
    for programs in 1..=2 {
        attach(&cgroup, &rest);
        let seen = || ["/dev/null", "/dev/zero", "/dev/full"].map(|path| cgroup.opens(path));
        assert_eq!(seen(), [false, false, true], "{programs}");
        cgroup.allow(1, 3);
        assert_eq!(seen(), [true, false, true], "{programs}");
        // Again, as for a second hook.
        cgroup.allow(1, 5);
        assert_eq!(seen(), [true, true, true], "{programs}");
        assert!(!cgroup.opens("/dev/random"));
    }
}

/// `struct bpf_insn`
fn instruction(code: u8, to: u64, from: u64, offset: u64, value: u64) -> u64 {
    u64::from(code) | to << 8 | from << 12 | offset << 16 | value << 32
}

/// Attaches a program of `BPF_PROG_TYPE_CGROUP_DEVICE` beside those that are there (`BPF_F_ALLOW_MULTI`).
fn attach(cgroup: &Cgroup, program: &[u64]) {
    const PROG_LOAD: i32 = 5;
    const PROG_ATTACH: i32 = 8;
    let load = [15 | (program.len() as u64) << 32, program.as_ptr() as u64, c"Apache-2.0".as_ptr() as u64, 0, 0, 0];
    let fd = bpf(PROG_LOAD, &load).unwrap();
    // SAFETY: just made, and nobody else has it.
    let program = unsafe { OwnedFd::from_raw_fd(fd) };
    let directory = rustix::fs::open(&cgroup.directory, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).unwrap();
    let fds = directory.as_raw_fd() as u64 | (program.as_raw_fd() as u64) << 32;
    bpf(PROG_ATTACH, &[fds, 6 | 2 << 32, 0]).unwrap();
}

fn bpf(command: i32, attributes: &[u64]) -> io::Result<i32> {
    // SAFETY: the attributes have that size, and what they point to outlives the call.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command, attributes.as_ptr(), std::mem::size_of_val(attributes)) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as i32) }
}
