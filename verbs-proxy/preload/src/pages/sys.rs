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

/// Starts a thread or process that shares this one's memory, and calls `entry` on the stack that ends at `stack`; its number.
///
/// # Safety
/// `flags` has `CLONE_VM`; `entry` may be called with `argument` there, with thread-local memory that is not its own; nobody
/// else uses the stack until the clone has ended.
pub unsafe fn clone(stack: usize, entry: extern "C" fn(usize), argument: usize, flags: i32) -> Result<u32, i32> {
    let mut result = libc::SYS_clone as isize;
    // SAFETY: the clone starts with a copy of the registers at the instruction after the call, with an aligned stack of its
    // own, and never leaves this block.
    unsafe {
        asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "xor ebp, ebp",
            "mov rdi, r12",
            "call r13",
            "xor edi, edi",
            "mov eax, {exit}",
            "syscall",
            "ud2",
            "2:",
            exit = const libc::SYS_exit,
            inlateout("rax") result,
            in("rdi") flags, in("rsi") stack, in("rdx") 0, in("r10") 0, in("r8") 0,
            in("r12") argument, in("r13") entry,
            lateout("rcx") _, lateout("r11") _,
        );
    }
    if result < 0 { Err(-result as i32) } else { Ok(result as u32) }
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
    unsafe { mremap(from, length, length, flags, target) }.map(drop)
}

/// Moves pages to `target`, or to where there is room if that is zero, and leaves an empty mapping like theirs behind. Their
/// new address.
///
/// # Safety
/// Whoever uses the memory copes with zeros, or is kept from it; the range at `target` is the caller's to replace.
pub unsafe fn empty_into(from: usize, length: usize, target: usize) -> Result<usize, i32> {
    let fixed = if target == 0 { 0 } else { libc::MREMAP_FIXED };
    // SAFETY: promised by the caller.
    unsafe { mremap(from, length, length, libc::MREMAP_MAYMOVE | MREMAP_DONTUNMAP | fixed, target) }
}

/// A second mapping, somewhere, of what the shared mapping at `address` shows.
pub fn map_again(address: usize, length: usize) -> Result<usize, i32> {
    // SAFETY: replaces nothing. The kernel refuses what is not shared.
    unsafe { mremap(address, 0, length, libc::MREMAP_MAYMOVE, 0) }
}

/// A mapping of `bytes` in place of one of `before`; its address.
///
/// # Safety
/// Nothing uses the memory.
pub unsafe fn grow(address: usize, before: usize, bytes: usize) -> Result<usize, i32> {
    // SAFETY: promised by the caller.
    unsafe { mremap(address, before, bytes, libc::MREMAP_MAYMOVE, 0) }
}

const MREMAP_DONTUNMAP: i32 = 4;

/// # Safety
/// As for `mremap(2)`.
pub unsafe fn mremap(address: usize, before: usize, after: usize, flags: i32, target: usize) -> Result<usize, i32> {
    // SAFETY: promised by the caller.
    unsafe { call(libc::SYS_mremap, [address, before, after, flags as usize, target, 0]) }
}

/// # Safety
/// As for `madvise(2)`: some advice drops what is in memory.
pub unsafe fn madvise(address: usize, length: usize, advice: i32) -> Result<(), i32> {
    // SAFETY: promised by the caller.
    unsafe { call(libc::SYS_madvise, [address, length, advice as usize, 0, 0, 0]) }.map(drop)
}

/// Has the program's own userfaultfd, swap or a file bring in what is not there, where the kernel can be asked to (Linux 5.14).
/// Memory that was never touched stays empty.
pub fn bring_in(address: usize, length: usize) -> Result<(), i32> {
    const MADV_POPULATE_READ: i32 = 22;
    const EHWPOISON: i32 = 133;
    // SAFETY: reads the memory, if it may be read.
    match unsafe { madvise(address, length, MADV_POPULATE_READ) } {
        Err(libc::EFAULT | EHWPOISON) => Err(libc::EFAULT),
        // Not mapped, which others find out; or the kernel does not know the advice, or not for such memory.
        _ => Ok(()),
    }
}

/// Locks pages in memory as they come.
pub fn lock_on_fault(address: usize, length: usize) {
    const MLOCK_ONFAULT: usize = 1;
    // SAFETY: changes no contents. What cannot be locked stays as it is.
    let _ = unsafe { call(libc::SYS_mlock2, [address, length, MLOCK_ONFAULT, 0, 0, 0]) };
}

/// Locks pages in memory.
pub fn lock(address: usize, length: usize) {
    // SAFETY: as above.
    let _ = unsafe { call(libc::SYS_mlock, [address, length, 0, 0, 0, 0]) };
}

/// Whether the mapping is locked in memory: then the kernel refuses to be told that its first page is not needed soon, which
/// changes nothing else.
pub fn is_locked(address: usize) -> bool {
    const MADV_COLD: i32 = 20;
    // SAFETY: advice that keeps the contents.
    unsafe { madvise(address, super::PAGE, MADV_COLD) == Err(libc::EINVAL) }
}

/// The opposite.
pub fn unlock(address: usize, length: usize) {
    // SAFETY: as above.
    let _ = unsafe { call(libc::SYS_munlock, [address, length, 0, 0, 0, 0]) };
}

/// How long a file this process may write, in bytes.
pub fn longest_file() -> u64 {
    let mut limit = libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
    let arguments = [0, libc::RLIMIT_FSIZE as usize, 0, &raw mut limit as usize, 0, 0];
    // SAFETY: writes one structure.
    let _ = unsafe { call(libc::SYS_prlimit64, arguments) };
    limit.rlim_cur
}

/// Writes to memory that may be written, without changing it. As an instruction, because the compiler makes a load of an
/// addition of zero.
pub fn touch(address: usize) {
    unreported(|| {
        // SAFETY: zero is added, at once for all other threads, to whatever is there.
        unsafe { asm!("lock add byte ptr [{}], 0", in(reg) address, options(nostack)) };
    });
}

/// Whether valgrind runs the program.
pub fn is_emulated() -> bool {
    const RUNNING_ON_VALGRIND: usize = 0x1001;
    ask_valgrind(RUNNING_ON_VALGRIND, 0) != 0
}

/// Asks valgrind by what is no instruction's work otherwise (`valgrind/valgrind.h`). Zero where there is none.
fn ask_valgrind(question: usize, argument: usize) -> usize {
    let question = [question, argument, 0, 0, 0, 0];
    let mut answer = 0usize;
    // SAFETY: turns a register all the way round, and exchanges one with itself.
    unsafe {
        asm!(
            "rol rdi, 3", "rol rdi, 13", "rol rdi, 61", "rol rdi, 51", "xchg rbx, rbx",
            in("rax") question.as_ptr(), inout("rdx") answer, out("rdi") _, options(nostack, readonly)
        );
    }
    answer
}

/// Has valgrind report nothing of `work`: pages are used whole, with what lies between an allocator's blocks.
fn unreported(work: impl FnOnce()) {
    const CHANGE_ERR_DISABLEMENT: usize = 0x1801;
    ask_valgrind(CHANGE_ERR_DISABLEMENT, 1);
    work();
    ask_valgrind(CHANGE_ERR_DISABLEMENT, 1usize.wrapping_neg());
}

/// Copies bytes between mappings. Not the C library's function, which a sanitizer may have replaced by one that looks at
/// what is copied, and not the kernel, which would need a descriptor.
///
/// # Safety
/// Both ranges are mapped, and do not overlap; nothing uses the target.
pub unsafe fn copy(from: usize, to: usize, length: usize) {
    unreported(|| {
        // SAFETY: promised by the caller.
        unsafe {
            asm!("rep movsb", inout("rsi") from => _, inout("rdi") to => _, inout("rcx") length => _,
                options(nostack, preserves_flags));
        }
    });
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

/// How many threads this process has, by the path that says it.
pub fn threads() -> Option<u32> {
    let mut status = core::mem::MaybeUninit::<libc::stat>::uninit();
    // SAFETY: reads a terminated path, writes a `stat`.
    let result = unsafe {
        call(libc::SYS_stat, [c"/proc/self/task".as_ptr() as usize, status.as_mut_ptr() as usize, 0, 0, 0, 0])
    };
    // The directory and its own entry are links, too.
    // SAFETY: the call succeeded, so all of it is written.
    result.ok().map(|_| unsafe { status.assume_init() }.st_nlink.saturating_sub(2) as u32)
}

/// Reads from the start of a file.
pub fn read_at_start(file: i32, buffer: &mut [u8]) -> Result<usize, i32> {
    // SAFETY: writes into the buffer.
    unsafe { call(libc::SYS_pread64, [file as usize, buffer.as_mut_ptr() as usize, buffer.len(), 0, 0, 0]) }
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

/// Nanoseconds of a clock that only goes forward.
pub fn now() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes a time.
    let _ =
        unsafe { call(libc::SYS_clock_gettime, [libc::CLOCK_MONOTONIC as usize, &raw mut time as usize, 0, 0, 0, 0]) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// Lets others run.
pub fn give_way() {
    // SAFETY: touches no memory.
    let _ = unsafe { call(libc::SYS_sched_yield, [0; 6]) };
}

/// Sleeps less than a second.
pub fn sleep(nanoseconds: i64) {
    let time = libc::timespec { tv_sec: 0, tv_nsec: nanoseconds };
    // SAFETY: reads a time.
    let _ = unsafe { call(libc::SYS_nanosleep, [&raw const time as usize, 0, 0, 0, 0, 0]) };
}
