//! System calls that write nothing but their result.
//!
//! The C library's wrappers store `errno` in thread-local memory. While a range is being replaced that memory may be in
//! it, and a write would wait for itself.

// UNSAFETY: enters the kernel.
#![allow(unsafe_code)]

use core::arch::asm;
use core::ffi::CStr;
use core::sync::atomic::AtomicU32;

/// # Safety
/// As the call's manual page says.
pub unsafe fn call(number: i64, arguments: [usize; 6]) -> Result<usize, i32> {
    let mut result = number as isize;
    // SAFETY: the kernel's calling convention; the caller answers for what the call does.
    unsafe {
        asm!("syscall",
            inlateout("rax") result,
            in("rdi") arguments[0], in("rsi") arguments[1], in("rdx") arguments[2],
            in("r10") arguments[3], in("r8") arguments[4], in("r9") arguments[5],
            lateout("rcx") _, lateout("r11") _,
            options(nostack));
    }
    if (-4095..0).contains(&result) { Err(-result as i32) } else { Ok(result as usize) }
}

pub fn open(path: &CStr, flags: i32) -> Result<i32, i32> {
    let arguments = [libc::AT_FDCWD as usize, path.as_ptr() as usize, flags as usize, 0, 0, 0];
    // SAFETY: reads a terminated path.
    unsafe { call(libc::SYS_openat, arguments) }.map(|file| file as i32)
}

pub fn close(file: i32) {
    // SAFETY: ends the use of a descriptor that the caller owns.
    let _ = unsafe { call(libc::SYS_close, [file as usize, 0, 0, 0, 0, 0]) };
}

pub fn read(file: i32, buffer: &mut [u8]) -> Result<usize, i32> {
    loop {
        // SAFETY: writes into `buffer` only.
        match unsafe { call(libc::SYS_read, [file as usize, buffer.as_mut_ptr() as usize, buffer.len(), 0, 0, 0]) } {
            Err(libc::EINTR) => {}
            result => return result,
        }
    }
}

/// Writes what the file takes at once; for what may get lost.
pub fn write(file: i32, bytes: &[u8]) {
    // SAFETY: reads `bytes`.
    let _ = unsafe { call(libc::SYS_write, [file as usize, bytes.as_ptr() as usize, bytes.len(), 0, 0, 0]) };
}

/// The end to read from and the end to write to.
pub fn pipe() -> Result<[i32; 2], i32> {
    let mut ends = [0i32; 2];
    // SAFETY: writes two descriptors.
    unsafe { call(libc::SYS_pipe2, [ends.as_mut_ptr() as usize, libc::O_CLOEXEC as usize, 0, 0, 0, 0]) }.map(|_| ends)
}

/// Writes all of `length` bytes at `address` to the file. Memory that cannot be read is `EFAULT`, not a fault.
pub fn pwrite(file: i32, address: usize, length: usize, offset: u64) -> Result<(), i32> {
    let mut done = 0;
    while done < length {
        let arguments = [file as usize, address + done, length - done, offset as usize + done, 0, 0];
        // SAFETY: the kernel checks that it may read the memory.
        match unsafe { call(libc::SYS_pwrite64, arguments) } {
            Ok(0) => return Err(libc::EIO),
            Ok(written) => done += written,
            Err(libc::EINTR) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Reads `length` bytes of the file.
///
/// # Safety
/// Nothing else uses the memory at `address`.
pub unsafe fn pread(file: i32, address: usize, length: usize, offset: u64) -> Result<(), i32> {
    let mut done = 0;
    while done < length {
        let arguments = [file as usize, address + done, length - done, offset as usize + done, 0, 0];
        // SAFETY: the caller owns the memory.
        match unsafe { call(libc::SYS_pread64, arguments) } {
            Ok(0) => return Err(libc::EIO),
            Ok(read) => done += read,
            Err(libc::EINTR) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// # Safety
/// As for `mmap(2)`: with `MAP_FIXED` the range is the caller's to replace.
pub unsafe fn mmap(
    address: usize,
    length: usize,
    protection: i32,
    flags: i32,
    file: i32,
    offset: u64,
) -> Result<usize, i32> {
    let arguments = [address, length, protection as usize, flags as usize, file as usize, offset as usize];
    // SAFETY: promised by the caller.
    unsafe { call(libc::SYS_mmap, arguments) }
}

/// Fresh private memory.
pub fn anonymous(length: usize) -> Result<usize, i32> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: replaces nothing.
    unsafe { mmap(0, length, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) }
}

/// # Safety
/// Nothing uses the memory.
pub unsafe fn munmap(address: usize, length: usize) {
    // SAFETY: promised by the caller.
    let _ = unsafe { call(libc::SYS_munmap, [address, length, 0, 0, 0, 0]) };
}

/// Moves pages over those at `target`.
///
/// # Safety
/// Nothing uses the memory at `from`; the range at `target` is the caller's to replace.
pub unsafe fn move_pages(from: usize, length: usize, target: usize) -> Result<(), i32> {
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    // SAFETY: promised by the caller.
    unsafe { call(libc::SYS_mremap, [from, length, length, flags as usize, target, 0]) }.map(drop)
}

/// # Safety
/// Whoever uses the memory copes with the new protection.
pub unsafe fn mprotect(address: usize, length: usize, protection: i32) -> Result<(), i32> {
    // SAFETY: promised by the caller.
    unsafe { call(libc::SYS_mprotect, [address, length, protection as usize, 0, 0, 0]) }.map(drop)
}

/// # Safety
/// `argument` is what the request wants.
pub unsafe fn ioctl(file: i32, request: u64, argument: usize) -> Result<usize, i32> {
    // SAFETY: promised by the caller.
    unsafe { call(libc::SYS_ioctl, [file as usize, request as usize, argument, 0, 0, 0]) }
}

/// Device and inode of an open file: who it is, whatever happened to its descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    pub device: (u32, u32),
    pub inode: u64,
}

pub fn identify(file: i32) -> Result<Identity, i32> {
    let mut status = core::mem::MaybeUninit::<libc::stat>::uninit();
    // SAFETY: writes a `stat`.
    unsafe { call(libc::SYS_fstat, [file as usize, status.as_mut_ptr() as usize, 0, 0, 0, 0])? };
    // SAFETY: the call succeeded, so all of it is written.
    let status = unsafe { status.assume_init() };
    Ok(Identity { device: (libc::major(status.st_dev), libc::minor(status.st_dev)), inode: status.st_ino })
}

/// The same file under the lowest free number that is at least `lowest`; closed by `execve`.
pub fn duplicate(file: i32, lowest: i32) -> Result<i32, i32> {
    let arguments = [file as usize, libc::F_DUPFD_CLOEXEC as usize, lowest as usize, 0, 0, 0];
    // SAFETY: makes a descriptor.
    unsafe { call(libc::SYS_fcntl, arguments) }.map(|file| file as i32)
}

pub fn close_on_exec(file: i32) {
    // SAFETY: changes a flag of a descriptor that the caller owns.
    let _ =
        unsafe { call(libc::SYS_fcntl, [file as usize, libc::F_SETFD as usize, libc::FD_CLOEXEC as usize, 0, 0, 0]) };
}

/// Gives the file's pages back to the system.
pub fn punch_hole(file: i32, offset: u64, length: u64) {
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    let arguments = [file as usize, mode as usize, offset as usize, length as usize, 0, 0];
    // SAFETY: changes the file; its owner asked for it. Failure leaves the pages in use until the file goes.
    let _ = unsafe { call(libc::SYS_fallocate, arguments) };
}

pub fn futex_wait(word: &AtomicU32, expected: u32) {
    let operation = libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG;
    let arguments = [core::ptr::from_ref(word) as usize, operation as usize, expected as usize, 0, 0, 0];
    // SAFETY: reads the word. Spurious returns are the caller's to expect.
    let _ = unsafe { call(libc::SYS_futex, arguments) };
}

pub fn futex_wake(word: &AtomicU32, waiters: i32) {
    let operation = libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG;
    let arguments = [core::ptr::from_ref(word) as usize, operation as usize, waiters as usize, 0, 0, 0];
    // SAFETY: touches no memory.
    let _ = unsafe { call(libc::SYS_futex, arguments) };
}

pub fn process() -> u32 {
    // SAFETY: only answers.
    unsafe { call(libc::SYS_getpid, [0; 6]) }.unwrap_or(0) as u32
}

pub fn thread() -> u32 {
    // SAFETY: only answers.
    unsafe { call(libc::SYS_gettid, [0; 6]) }.unwrap_or(0) as u32
}
