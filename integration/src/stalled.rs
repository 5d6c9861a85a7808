//! Memory that stops whoever touches it.

// UNSAFETY: a page that the kernel is told not to fill.
#![allow(unsafe_code)]

use anyhow::{Context, Result, ensure};
use nix::libc;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::thread::JoinHandle;

/// A page that stops whoever touches it, until [`Self::answer`].
pub struct StalledPage {
    faults: OwnedFd,
    address: usize,
}

const PAGE: usize = 4096;

impl StalledPage {
    /// One of the calling process.
    ///
    /// # Errors
    /// If the kernel gives this process no userfaultfd.
    pub fn new() -> Result<Self> {
        // `linux/userfaultfd.h`.
        const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
        const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
        const UFFD_API: u64 = 0xaa;
        const MISSING: u64 = 1;
        // One that blocks says to poll(2) that it is broken, at once, whether somebody waits for the page or not.
        //
        // SAFETY: a system call without pointers.
        let faults = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) };
        ensure!(faults >= 0, "userfaultfd: {}", std::io::Error::last_os_error());
        // SAFETY: the system call just made it, and nobody else has it.
        let faults = unsafe { OwnedFd::from_raw_fd(i32::try_from(faults).context("a descriptor")?) };
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a fresh mapping anywhere.
        let page = unsafe { libc::mmap(std::ptr::null_mut(), PAGE, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
        ensure!(page != libc::MAP_FAILED, "no page: {}", std::io::Error::last_os_error());
        let mut api = [UFFD_API, 0, 0];
        let mut register = [page as u64, PAGE as u64, MISSING, 0];
        // SAFETY: the structures are as long as the requests' numbers say, and live across the calls.
        let done = unsafe {
            libc::ioctl(faults.as_raw_fd(), UFFDIO_API, api.as_mut_ptr()) == 0
                && libc::ioctl(faults.as_raw_fd(), UFFDIO_REGISTER, register.as_mut_ptr()) == 0
        };
        ensure!(done, "userfaultfd: {}", std::io::Error::last_os_error());
        Ok(Self { faults, address: page as usize })
    }

    /// A thread that writes the page into the file, and stands still in it. The file's lock is its own as long.
    ///
    /// # Errors
    /// If it does not get that far.
    pub fn write_from(&self, file: File) -> Result<JoinHandle<()>> {
        let thread = self.will_write_from(file);
        self.wait_for_fault().map(|()| thread)
    }

    /// The same, which somebody else's hold on the lock may keep from it for a while.
    #[must_use]
    pub fn will_write_from(&self, file: File) -> JoinHandle<()> {
        let address = self.address;
        std::thread::spawn(move || {
            // SAFETY: the page is never unmapped. What the call answers does not matter.
            unsafe { libc::pwrite(file.as_raw_fd(), address as *const _, PAGE, 0) };
        })
    }

    /// A thread that will receive into the page, and stand still in it.
    ///
    /// # Errors
    /// None at present.
    pub fn read_into(&self, from: OwnedFd) -> Result<JoinHandle<()>> {
        let address = self.address;
        Ok(std::thread::spawn(move || {
            // SAFETY: the page is never unmapped. What the call answers does not matter.
            unsafe { libc::read(from.as_raw_fd(), address as *mut _, 8) };
        }))
    }

    fn wait_for_fault(&self) -> Result<()> {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let mut fds = [PollFd::new(&self.faults, PollFlags::IN)];
        let ready = poll(&mut fds, Some(&Timespec { tv_sec: 10, tv_nsec: 0 }))?;
        let revents = fds[0].revents();
        ensure!(ready == 1 && revents == PollFlags::IN, "nobody touches the page: {revents:?}");
        Ok(())
    }

    /// Lets everybody go on.
    pub fn answer(self) {
        drop(self.faults);
    }
}
