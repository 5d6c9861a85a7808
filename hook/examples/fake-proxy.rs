//! Stands in for the proxy in the hook's tests: checks what it was given, says so, and ends with the container's init.
//!
//! It has no environment to be told what to do, so its own file name says it: `mute` never gets ready, `refusing` says why
//! not, `dying` exits without a word, `hungry` takes memory without end for its first client, `busy` takes all processor time that
//! two threads can get, `ready` works, and so does `ringfence-proxy-ibverbs`, for a card.
#![allow(unsafe_code)]
// UNSAFETY: takes ownership of the descriptors that the hook promises.

use ringfence_launch::{DeviceKind, FD_INIT, FD_LISTENER, FD_NETNS, FD_READY, FD_SYSFS, Launch};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{Mode, OFlags};
use std::io::Write;
use std::os::fd::{FromRawFd, OwnedFd};

fn main() {
    // SAFETY: the hook placed exactly these descriptors, and nothing else here owns them.
    let [listener, init, ready, network] =
        [FD_LISTENER, FD_INIT, FD_READY, FD_NETNS].map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
    let mut ready = std::fs::File::from(ready);
    let name = std::env::current_exe().unwrap().file_name().unwrap().to_str().unwrap().to_owned();
    match name.as_str() {
        "mute" => std::thread::sleep(std::time::Duration::from_secs(60)),
        "refusing" => return writeln!(ready, "device soft0 is on fire").unwrap(),
        "dying" => std::process::exit(3),
        _ => {}
    }
    let launch = match check(&network) {
        Ok(launch) => launch,
        Err(reason) => return writeln!(ready, "{reason}").unwrap(),
    };
    writeln!(ready, "ready").unwrap();
    drop(ready);
    if name == "busy" {
        (0..2).for_each(|_| {
            std::thread::spawn(|| {
                loop {
                    std::hint::spin_loop();
                }
            });
        });
    }
    loop {
        let mut fds = [PollFd::new(&init, PollFlags::IN), PollFd::new(&listener, PollFlags::IN)];
        poll(&mut fds, None).unwrap();
        if !fds[0].revents().is_empty() {
            let _ = std::fs::remove_dir_all(&launch.container_dir);
            return;
        }
        let client = rustix::net::accept(&listener).unwrap();
        if name == "hungry" {
            let mut eaten = Vec::new();
            loop {
                eaten.push(vec![1u8; 1 << 20]);
            }
        }
        let _ = rustix::io::write(&client, b"hello from the host");
    }
}

/// What a proxy may rely on.
fn check(network: &OwnedFd) -> Result<Launch, String> {
    let arguments: Vec<String> = std::env::args().collect();
    let [name, option, path] = arguments.as_slice() else { return Err(format!("arguments {arguments:?}")) };
    if (name.as_str(), option.as_str()) != ("ringfence-proxy", "--launch") {
        return Err(format!("arguments {arguments:?}"));
    }
    let environment: Vec<_> = std::env::vars().collect();
    if environment != [("PATH".to_owned(), "/usr/sbin:/usr/bin:/sbin:/bin".to_owned())] {
        return Err(format!("environment {environment:?}"));
    }
    let target =
        |fd: i32| std::fs::read_link(format!("/proc/self/fd/{fd}")).map_err(|error| format!("fd {fd}: {error}"));
    for (fd, expected) in [
        (0, "/dev/null"),
        (1, "/dev/null"),
        (2, "/dev/null"),
        (3, "socket:"),
        (4, "anon_inode:"),
        (5, "pipe:"),
        (6, "net:"),
    ] {
        let found = target(fd)?;
        // pidfds have their own file system on newer kernels.
        let allowed = [expected, if fd == FD_INIT { "pidfd:" } else { expected }];
        if !allowed.iter().any(|allowed| found.to_string_lossy().starts_with(allowed)) {
            return Err(format!("fd {fd} is {found:?}"));
        }
    }
    let status = std::fs::read_to_string("/proc/self/status").map_err(|error| error.to_string())?;
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or("").trim().to_owned();
    for (name, expected) in
        [("Umask:", "0077"), ("SigBlk:", "0000000000000000"), ("NStgid:", &std::process::id().to_string())]
    {
        if field(name) != expected {
            return Err(format!("{name} {}", field(name)));
        }
    }
    if rustix::process::getsid(None).map_err(|error| error.to_string())? != rustix::process::getpid() {
        return Err("not in a session of its own".into());
    }
    let text = std::fs::read(path).map_err(|error| format!("{path}: {error}"))?;
    let launch: Launch = serde_json::from_slice(&text).map_err(|error| format!("{path}: {error}"))?;
    let program = std::env::current_exe().map_err(|error| error.to_string())?;
    if program.ends_with("ringfence-proxy-ibverbs") != (launch.device.kind == DeviceKind::Ibverbs) {
        return Err(format!("{} is to serve a device of kind {:?}", program.display(), launch.device.kind));
    }
    // The listing itself has one more descriptor.
    let open = std::fs::read_dir("/proc/self/fd").map_err(|error| error.to_string())?.count();
    let expected = if launch.sysfs { 9 } else { 8 };
    if open != expected {
        return Err(format!("{} descriptors are open", open - 1));
    }
    if launch.sysfs {
        fill()?;
    }
    let theirs = rustix::fs::stat(format!("/proc/{}/ns/net", launch.init_pid)).map_err(|error| error.to_string())?;
    if rustix::fs::fstat(network).map_err(|error| error.to_string())?.st_ino != theirs.st_ino {
        return Err("fd 6 is another network namespace".into());
    }
    Ok(launch)
}

/// Shows a file as the proxy shows its device.
fn fill() -> Result<(), String> {
    // SAFETY: the hook placed this descriptor, and nothing else here owns it.
    let tree = unsafe { OwnedFd::from_raw_fd(FD_SYSFS) };
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let file = rustix::fs::openat(&tree, "class/infiniband/fake0", flags, Mode::from_raw_mode(0o444));
    file.map(drop).map_err(|error| format!("fd {FD_SYSFS}: {error}"))
}
