//! Network namespaces: finding one again by its number, and working in it.

use crate::mountinfo::{Mountinfo, descriptor_path};
use rustix::fs::{Mode, OFlags};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

/// The number of the network namespace `namespace`: unique among those that there are, and free again when it is gone.
pub fn number(namespace: BorrowedFd<'_>) -> io::Result<u64> {
    Ok(rustix::fs::fstat(namespace)?.st_ino)
}

/// That of this process.
pub fn own() -> io::Result<OwnedFd> {
    open(Path::new("/proc/self/ns/net"))
}

/// The namespace at `path`. What a container's process has put there in its stead, such as a FIFO or a device, is not opened: that may
/// wait for somebody, or do something.
fn open(path: &Path) -> io::Result<OwnedFd> {
    let found = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    if rustix::fs::fstatfs(&found)?.f_type != NSFS {
        let message = format!("{} is no namespace", path.display());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    }
    Ok(rustix::fs::open(descriptor_path(&found), OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?)
}

/// `NSFS_MAGIC` of `<linux/magic.h>`.
const NSFS: rustix::fs::FsWord = 0x6e73_6673;

/// Does `work` in the network namespace `namespace`, in a thread of its own: whatever becomes of that, this one never leaves its own.
pub fn inside<T: Send>(namespace: BorrowedFd<'_>, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().spawn_scoped(scope, || {
            move_into_link_name_space(namespace, Some(LinkNameSpaceType::Network))?;
            work()
        });
        thread?.join().unwrap_or_else(|_| Err(io::Error::other("the thread in another network namespace failed")))
    })
}

/// The network namespace with this number, if something that can be seen from here holds it: a process, a mount as those of
/// `ip netns` and of engines, or a descriptor. What holds a namespace besides these are sockets in it, and mounts of other mount
/// namespaces.
pub fn find(number: u64) -> Option<OwnedFd> {
    let processes = processes();
    let by_process = processes.iter().map(|process| process.join("ns/net"));
    let by_mount = Mountinfo::read().map(|mounts| mounts.of_namespace(&name(number))).unwrap_or_default();
    let is_it = |namespace: &OwnedFd| self::number(namespace.as_fd()).is_ok_and(|found| found == number);
    let open = |path: PathBuf| open(&path).ok().filter(is_it);
    by_process.chain(by_mount).find_map(open).or_else(|| {
        let links = processes.iter().flat_map(|process| children(&process.join("fd")));
        let name = PathBuf::from(name(number));
        links.filter(|link| std::fs::read_link(link).is_ok_and(|target| target == name)).find_map(open)
    })
}

/// As `/proc` and mountinfo name it.
fn name(number: u64) -> String {
    format!("net:[{number}]")
}

fn processes() -> Vec<PathBuf> {
    let is_process = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default();
        name.as_encoded_bytes().iter().all(u8::is_ascii_digit)
    };
    children(Path::new("/proc")).filter(is_process).collect()
}

fn children(directory: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    std::fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};
    use std::time::{Duration, Instant};

    /// A network namespace of another process, and what ends that.
    fn with_namespace(test: impl FnOnce(OwnedFd, u64, &mut dyn FnMut())) {
        let mut child = Command::new("unshare");
        child.args(["--net", "sh", "-c", "echo; read x"]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = child.spawn().unwrap();
        let mut line = [0];
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut line).expect("this test needs root");
        let namespace = open(Path::new(&format!("/proc/{}/ns/net", child.id()))).unwrap();
        let number = number(namespace.as_fd()).unwrap();
        test(namespace, number, &mut || {
            let _ = child.kill();
            child.wait().unwrap();
        });
        let _ = child.kill();
        child.wait().unwrap();
    }

    /// One after the other: the number of one that is gone is the next one's.
    #[test]
    fn namespaces_are_found_and_worked_in() {
        found_by_a_process_and_by_a_descriptor_and_not_when_it_is_gone();
        work_in_another_leaves_this_one_as_it_is();
    }

    #[test]
    fn what_is_no_namespace_is_not_opened() {
        let path = std::env::temp_dir().join(format!("ringfence-netns-{}", std::process::id()));
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, Mode::RUSR, 0).unwrap();
        // Nobody writes to it.
        let opened = open(&path);
        std::fs::remove_file(&path).unwrap();
        assert_eq!(opened.unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }

    fn found_by_a_process_and_by_a_descriptor_and_not_when_it_is_gone() {
        with_namespace(|namespace, number, end| {
            assert_ne!(number, super::number(own().unwrap().as_fd()).unwrap());
            let found = || find(number).map(|found| super::number(found.as_fd()).unwrap());
            assert_eq!(found(), Some(number));
            end();
            // Our own descriptor holds it.
            assert_eq!(found(), Some(number));
            drop(namespace);
            // Children of other tests may have it for a moment.
            let deadline = Instant::now() + Duration::from_secs(10);
            while found().is_some() {
                assert!(Instant::now() < deadline);
            }
        });
    }

    fn work_in_another_leaves_this_one_as_it_is() {
        with_namespace(|namespace, number, _| {
            let here = || super::number(open(Path::new("/proc/thread-self/ns/net"))?.as_fd());
            let before = here().unwrap();
            assert_eq!(inside(namespace.as_fd(), here).unwrap(), number);
            let failed = inside(namespace.as_fd(), || Err::<(), _>(io::Error::from_raw_os_error(libc::EBUSY)));
            assert_eq!(failed.unwrap_err().raw_os_error(), Some(libc::EBUSY));
            assert_eq!(here().unwrap(), before);
        });
    }
}
