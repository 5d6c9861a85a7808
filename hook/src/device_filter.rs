//! Device nodes with version 2 of cgroups, where programs of the kernel's decide who may open which (`BPF_PROG_TYPE_CGROUP_DEVICE`).
//!
//! The runtime's and systemd's programs of a container's cgroup are replaced, each by one that lets one device be read and
//! written, and then is the program that was there, instruction by instruction. It must be one of plain arithmetic, as theirs are.
//! (To call it instead, by an array of programs, would not do: the kernel empties that when nobody has it open.) Whoever attaches
//! a new one later, as runc does on `docker update`, has the last word. So has systemd when it is reloaded, unless it was told
//! ([`grant_for_good`]).

#![allow(unsafe_code)]
// UNSAFETY: bpf(2); each call's attributes are plain numbers, and addresses of buffers that outlive the call.

use crate::cgroup::{self, Membership};
use crate::systemd;
use rustix::fs::{Mode, OFlags};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

/// Of `enum bpf_cmd`, `enum bpf_prog_type` and `enum bpf_attach_type` in `<linux/bpf.h>`.
const PROG_LOAD: i32 = 5;
const PROG_ATTACH: i32 = 8;
const PROG_GET_FD_BY_ID: i32 = 13;
const OBJ_GET_INFO_BY_FD: i32 = 15;
const PROG_QUERY: i32 = 16;
const CGROUP_DEVICE_PROGRAM: u64 = 15;
const CGROUP_DEVICE: u64 = 6;
/// `BPF_F_ALLOW_MULTI` and `BPF_F_REPLACE`.
const ALLOW_MULTI: u32 = 2;
const REPLACE: u32 = 4;

/// How often, and after how long, a cgroup is looked at again whose programs change meanwhile.
const RETRIES: u32 = 50;
const RETRY: Duration = Duration::from_millis(10);

/// The most programs of one cgroup; the kernel has no more.
const MAX_PROGRAMS: usize = 64;
/// The longest program that is taken over, in instructions; runtimes' have some ten for each rule.
const MAX_LENGTH: usize = 1 << 16;

/// Lets the container of `pid` read and write the character device `major:minor`, with either version of cgroups; `false` if its
/// cgroup cannot be seen.
pub fn grant(pid: i32, major: u32, minor: u32) -> io::Result<bool> {
    let (theirs, ours) = (cgroup::of(pid)?, cgroup::of(std::process::id() as i32)?);
    let decides = theirs.iter().find(|membership| membership.controls("devices"));
    let decides = decides.or_else(|| theirs.iter().find(|membership| membership.controllers.is_empty()));
    // One that it has in common with its runtime is none of its own, and restricts no container.
    if decides.is_some_and(|own| own.is_root || ours.iter().any(|runtimes| runtimes.directory == own.directory)) {
        return Ok(true);
    }
    Ok(cgroup::allow_device(pid, major, minor)? || allow(pid, major, minor)?)
}

/// As [`grant`], and so that it lasts where systemd has the container in a scope.
pub fn grant_for_good(pid: i32, major: u32, minor: u32) -> io::Result<bool> {
    // First, because it attaches a program of its own, which is then one of those that are replaced.
    if systemd::runs()
        && let Some(scope) = scope(&cgroup::of(pid)?, pid)
    {
        systemd::allow_device(&scope, major, minor)?;
    }
    grant(pid, major, minor)
}

/// The scope of the container of `pid`; crun has it in a cgroup below.
fn scope(memberships: &[Membership], pid: i32) -> Option<String> {
    let decides = memberships.iter().find(|membership| membership.controls("devices"));
    let decides = decides.or_else(|| memberships.iter().find(|membership| membership.controllers.is_empty()))?;
    let directory = Some(decides).filter(|own| own.holds(pid))?.directory.as_path();
    let scope = directory.ancestors().take(2).find(|path| path.extension().is_some_and(|kind| kind == "scope"))?;
    Some(scope.file_name()?.to_str()?.to_owned())
}

/// As [`grant`] with version 2, whatever programs there are.
pub fn allow(pid: i32, major: u32, minor: u32) -> io::Result<bool> {
    let memberships = cgroup::of(pid)?;
    let Some(own) = memberships.iter().find(|membership| membership.controllers.is_empty() && membership.holds(pid))
    else {
        return Ok(false);
    };
    allow_in(&own.directory, major, minor)?;
    // crun has the container in a cgroup below its scope, to which systemd attaches what it was told of devices.
    let parent = own.directory.parent().filter(|parent| parent.extension().is_some_and(|kind| kind == "scope"));
    parent.map_or(Ok(()), |scope| allow_in(scope, major, minor))?;
    Ok(true)
}

fn allow_in(directory: &Path, major: u32, minor: u32) -> io::Result<()> {
    // A program that is listed may be gone a moment later: systemd attaches its own anew when it has something to apply.
    for _ in 0..RETRIES {
        match replace_in(directory, major, minor) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => std::thread::sleep(RETRY),
            result => return result,
        }
    }
    replace_in(directory, major, minor)
}

fn replace_in(directory: &Path, major: u32, minor: u32) -> io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let cgroup = rustix::fs::open(directory, flags, Mode::empty())?;
    let mut ids = [0_u32; MAX_PROGRAMS];
    // Cgroup and kind; flags asked with, and answered; where the numbers go, and how many there are.
    let mut query =
        [word(cgroup.as_raw_fd() as u32, CGROUP_DEVICE as u32), 0, ids.as_mut_ptr() as u64, MAX_PROGRAMS as u64];
    bpf(PROG_QUERY, &mut query)?;
    let (attached, count) = ((query[1] >> 32) as u32, query[3] as u32);
    for id in ids.into_iter().take(count as usize) {
        let old = bpf_fd(PROG_GET_FD_BY_ID, &mut [id.into(), 0])?;
        let new = load(&[before(major, minor), instructions_of(&old)?].concat())?;
        let (flags, replaced) = match attached & ALLOW_MULTI {
            0 => (attached, 0),
            _ => (ALLOW_MULTI | REPLACE, old.as_raw_fd() as u32),
        };
        let fds = word(cgroup.as_raw_fd() as u32, new.as_raw_fd() as u32);
        bpf(PROG_ATTACH, &mut [fds, word(CGROUP_DEVICE as u32, flags), replaced.into()])?;
    }
    Ok(())
}

/// Loads a program, in the machine's words of `struct bpf_insn`: code, registers, offset, value.
fn load(program: &[u64]) -> io::Result<OwnedFd> {
    // Kind and length, program, license.
    let kind = word(CGROUP_DEVICE_PROGRAM as u32, program.len() as u32);
    let mut load = [kind, program.as_ptr() as u64, c"Apache-2.0".as_ptr() as u64, 0, 0, 0];
    bpf_fd(PROG_LOAD, &mut load)
}

/// The beginning of a program that answers for `major:minor`, and goes on for all else with the registers as they were.
fn before(major: u32, minor: u32) -> Vec<u64> {
    vec![
        // r2 = kind of device and access, of r1: struct bpf_cgroup_dev_ctx
        instruction(0x61, 2, 1, 0, 0),
        // unless it is a character device (2), and no node is to be made (1 << 16): go on
        instruction(0x45, 2, 0, 8, 1 << 16),
        instruction(0x57, 2, 0, 0, 0xffff),
        instruction(0x55, 2, 0, 6, 2),
        // unless it has these numbers: go on
        instruction(0x61, 2, 1, 4, 0),
        instruction(0x55, 2, 0, 4, major as i32),
        instruction(0x61, 2, 1, 8, 0),
        instruction(0x55, 2, 0, 2, minor as i32),
        // return 1
        instruction(0xb7, 0, 0, 0, 1),
        instruction(0x95, 0, 0, 0, 0),
    ]
}

fn instruction(code: u8, to: u8, from: u8, offset: i16, value: i32) -> u64 {
    let registers = u64::from(to | from << 4);
    u64::from(code) | registers << 8 | u64::from(offset as u16) << 16 | u64::from(value as u32) << 32
}

/// The instructions of a program that is loaded.
fn instructions_of(program: &OwnedFd) -> io::Result<Vec<u64>> {
    let mut instructions = Vec::new();
    loop {
        let bytes = size_of_val(&instructions[..]);
        // The begin of `struct bpf_prog_info`: kind and number, tag, lengths of the machine's and the kernel's own form, and where
        // these go.
        let mut info = [0, 0, word(0, bytes as u32), 0, instructions.as_mut_ptr() as u64];
        let length = size_of_val(&info) as u32;
        bpf(OBJ_GET_INFO_BY_FD, &mut [word(program.as_raw_fd() as u32, length), info.as_mut_ptr() as u64])?;
        let there = (info[2] >> 32) as usize / 8;
        let unknown =
            |what: &str| Err(io::Error::other(format!("the program of its cgroup that decides about devices {what}")));
        match there {
            _ if there == instructions.len() && info[4] == 0 => return unknown("cannot be read"),
            _ if there == instructions.len() => {
                return if instructions.iter().all(is_plain) { Ok(instructions) } else { unknown("is no runtime's") };
            }
            0 | MAX_LENGTH.. => return unknown("has an odd length"),
            _ => instructions = vec![0_u64; there],
        }
    }
}

/// Whether it loads from what was asked, computes, jumps or ends; not one that calls, or that names a map.
fn is_plain(instruction: &u64) -> bool {
    let (code, class) = (*instruction as u8, *instruction as u8 & 7);
    matches!(class, 1 | 4 | 7) || matches!(class, 5 | 6) && code != 0x85
}

fn word(low: u32, high: u32) -> u64 {
    u64::from(low) | u64::from(high) << 32
}

fn bpf_fd(command: i32, attributes: &mut [u64]) -> io::Result<OwnedFd> {
    let fd = bpf(command, attributes)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn bpf(command: i32, attributes: &mut [u64]) -> io::Result<i32> {
    let size = size_of_val(attributes);
    // SAFETY: the attributes have that size, and addresses in them are of the caller's buffers, which have the lengths that stand
    // beside them.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attributes.as_mut_ptr(), size) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as i32) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scope_is_that_of_the_container_or_above() {
        let own = std::process::id() as i32;
        let directory = tempfile::tempdir().unwrap();
        let found = |path: &str| {
            let directory = directory.path().join(path);
            std::fs::create_dir_all(&directory).unwrap();
            std::fs::write(directory.join("cgroup.procs"), format!("{own}\n")).unwrap();
            scope(&[Membership { controllers: Vec::new(), directory, is_root: false }], own)
        };
        assert_eq!(found("a.slice/c1.scope").as_deref(), Some("c1.scope"));
        assert_eq!(found("a.slice/c2.scope/container").as_deref(), Some("c2.scope"));
        assert_eq!(found("a.slice/c3.scope/x/y"), None);
        assert_eq!(found("c4"), None);
    }

    #[test]
    fn programs_that_do_more_than_compute_are_known() {
        assert!(before(1, 3).iter().all(is_plain));
        for other in [instruction(0x85, 0, 0, 0, 12), instruction(0x18, 2, 1, 0, 3), instruction(0x7b, 10, 1, -8, 0)] {
            assert!(!is_plain(&other), "{other:x}");
        }
    }
}
