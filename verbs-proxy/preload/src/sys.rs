//! Thin skins over system calls and errno.
//!
//! Plain `syscall` wherever glibc's own function is younger than 2.17, and wherever being a thread cancellation point
//! would leave a lock held.

// UNSAFETY: system calls.
#![allow(unsafe_code)]

pub use crate::descriptor::Fd;
use core::ffi::{CStr, c_int, c_long, c_void};
use core::ops::Range;
use core::ptr;
use core::sync::atomic::{AtomicU32, Ordering};
use zerocopy::IntoBytes;

/// Bytes of a page.
const PAGE_BYTES: usize = 4096;

/// A positive errno.
pub type Errno = c_int;

/// The calling thread's errno.
pub fn errno() -> Errno {
    // SAFETY: the C library's errno is always readable.
    unsafe { *libc::__errno_location() }
}

/// Sets the calling thread's errno.
pub fn set_errno(errno: Errno) {
    // SAFETY: the C library's errno is always writable.
    unsafe { *libc::__errno_location() = errno };
}

/// For verbs that return a pointer: null and errno on failure.
pub fn pointer_or_errno<T>(result: Result<*mut T, Errno>) -> *mut T {
    result.unwrap_or_else(|errno| {
        set_errno(errno);
        ptr::null_mut()
    })
}

/// For verbs that return zero or an errno. Providers set errno as well, and some programs read that instead.
pub fn zero_or_errno(result: Result<(), Errno>) -> c_int {
    match result {
        Ok(()) => 0,
        Err(errno) => {
            set_errno(errno);
            errno
        }
    }
}

/// For verbs that return zero or -1 and errno.
pub fn zero_or_minus_one(result: Result<(), Errno>) -> c_int {
    match result {
        Ok(()) => 0,
        Err(errno) => {
            set_errno(errno);
            -1
        }
    }
}

/// Closes a descriptor. Callers have seen that it is theirs.
pub fn close(fd: c_int) {
    // SAFETY: closing a number touches no memory; the callers own the descriptor.
    unsafe { libc::syscall(libc::SYS_close, fd) };
}

/// The process, from the kernel: glibc before 2.25 caches it.
pub fn getpid() -> u32 {
    // SAFETY: takes nothing.
    unsafe { libc::syscall(libc::SYS_getpid) as u32 }
}

/// Lets others run.
pub fn sched_yield() {
    // SAFETY: takes nothing.
    unsafe { libc::syscall(libc::SYS_sched_yield) };
}

/// How often the calling thread has lost its processor to another one, by yielding or otherwise: `ru_nivcsw` of getrusage(2), its lowest
/// bits. 0 where the kernel does not say, which is as good as never.
pub fn lost_processor() -> u32 {
    // SAFETY: plain data, which the kernel writes.
    let mut usage: libc::rusage = unsafe { core::mem::zeroed() };
    // SAFETY: the memory is writable for the call.
    unsafe { libc::syscall(libc::SYS_getrusage, libc::RUSAGE_THREAD, &raw mut usage) };
    usage.ru_nivcsw as u32
}

/// Sleeps while `word` holds `expected`.
pub fn futex_wait(word: &AtomicU32, expected: u32) {
    // SAFETY: the word outlives the call; without a timeout the kernel reads nothing else.
    unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG,
            expected,
            ptr::null::<libc::timespec>(),
        )
    };
}

/// Wakes up to `count` sleepers on `word`.
pub fn futex_wake(word: &AtomicU32, count: c_int) {
    // SAFETY: the kernel only uses the address.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG, count) };
}

fn checked(result: c_long) -> Result<usize, Errno> {
    if result < 0 { Err(errno()) } else { Ok(result as usize) }
}

/// Reads into `buffer`, like `read(2)`.
pub fn read(fd: c_int, buffer: &mut [u8]) -> Result<usize, Errno> {
    // SAFETY: the buffer is writable for its length. The C library's function, because programs cancel threads that
    // wait for events, and no lock is held here.
    checked(unsafe { libc::read(fd, buffer.as_mut_ptr().cast(), buffer.len()) } as c_long)
}

/// Rings the worker's bell.
pub fn ring(fd: c_int) -> Result<(), Errno> {
    let (byte, flags) = (1_u8, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL);
    loop {
        // SAFETY: one readable byte, and no address.
        let sent = unsafe { libc::syscall(libc::SYS_sendto, fd, &raw const byte, 1, flags, ptr::null::<c_void>(), 0) };
        match checked(sent) {
            // A full bell rings already.
            Ok(_) | Err(libc::EAGAIN) => return Ok(()),
            // Short of memory: the worker would sleep on.
            Err(libc::ENOBUFS | libc::ENOMEM | libc::EINTR) => sched_yield(),
            Err(errno) => return Err(errno),
        }
    }
}

/// How often something is sent again for which the kernel has no memory.
const TRIES: u32 = 1000;

/// Sends one datagram, with a descriptor beside it if there is one to pass.
pub fn sendmsg(fd: c_int, parts: &[&[u8]], pass: Option<c_int>) -> Result<(), Errno> {
    let mut iov = [libc::iovec { iov_base: ptr::null_mut(), iov_len: 0 }; 4];
    assert!(parts.len() <= iov.len(), "a datagram of {} parts", parts.len());
    for (slot, part) in iov.iter_mut().zip(parts) {
        *slot = libc::iovec { iov_base: part.as_ptr().cast_mut().cast(), iov_len: part.len() };
    }
    // SAFETY: all-zero is a valid `msghdr`.
    let mut message: libc::msghdr = unsafe { core::mem::zeroed() };
    message.msg_iov = iov.as_mut_ptr();
    message.msg_iovlen = parts.len();
    let mut control = [0_u64; 4];
    if let Some(pass) = pass {
        message.msg_control = control.as_mut_ptr().cast();
        // SAFETY: computes sizes; both are below that of `control`.
        let (space, length) = unsafe { (libc::CMSG_SPACE(4), libc::CMSG_LEN(4)) };
        message.msg_controllen = space as _;
        // SAFETY: `control` has room for a header and one descriptor, and is aligned for the header.
        unsafe {
            let header = libc::CMSG_FIRSTHDR(&raw const message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = length as _;
            libc::CMSG_DATA(header).cast::<c_int>().write_unaligned(pass);
        }
    }
    let mut tries = 0;
    loop {
        // SAFETY: the message names `parts`, which are borrowed and only read.
        match checked(unsafe { libc::syscall(libc::SYS_sendmsg, fd, &raw const message, libc::MSG_NOSIGNAL) }) {
            Ok(_) => return Ok(()),
            Err(libc::EINTR) => {}
            // Short of memory, as a program may be that is at its limit: nothing has been sent.
            Err(libc::ENOBUFS | libc::ENOMEM) if tries < TRIES => {
                tries += 1;
                sched_yield();
            }
            // A program made all of its descriptors non-blocking.
            Err(libc::EAGAIN) => wait_for(fd, libc::POLLOUT),
            Err(errno) => return Err(errno),
        }
    }
}

/// Receives one datagram and up to `N` descriptors, which are close-on-exec. Zero bytes mean that the peer is gone, `EAGAIN`
/// that there was none for [`PATIENCE`].
pub fn recvmsg<const N: usize>(fd: c_int, buffer: &mut [u8], fds: &mut [Option<Fd>; N]) -> Result<usize, Errno> {
    const CONTROL_WORDS: usize = 16;
    let mut iov = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    let mut control = [0_u64; CONTROL_WORDS];
    // SAFETY: all-zero is a valid `msghdr`.
    let mut message: libc::msghdr = unsafe { core::mem::zeroed() };
    message.msg_iov = &raw mut iov;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&control);
    let received = loop {
        // SAFETY: buffer and control are writable for the lengths given and outlive the call.
        match checked(unsafe { libc::syscall(libc::SYS_recvmsg, fd, &raw mut message, libc::MSG_CMSG_CLOEXEC) }) {
            Err(libc::EINTR) => {}
            other => break other?,
        }
    };
    let mut count = 0;
    // SAFETY: the kernel filled `control` and set its length.
    let mut header = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
    while !header.is_null() {
        // SAFETY: CMSG_FIRSTHDR and CMSG_NXTHDR only return headers that lie within `control`.
        let (level, kind, length) = unsafe { ((*header).cmsg_level, (*header).cmsg_type, (*header).cmsg_len) };
        if level == libc::SOL_SOCKET && kind == libc::SCM_RIGHTS {
            // SAFETY: computes a size.
            let number = (length - unsafe { libc::CMSG_LEN(0) } as usize) / size_of::<c_int>();
            for index in 0..number {
                // SAFETY: the header's length covers this many descriptors; they may be unaligned.
                let number = unsafe { libc::CMSG_DATA(header).cast::<c_int>().add(index).read_unaligned() };
                // What does not fit is closed right away. What another thread has closed already is missing.
                let fd = Fd::adopt(number);
                if let (Some(slot), Ok(fd)) = (fds.get_mut(count), fd) {
                    *slot = Some(fd);
                }
                count += 1;
            }
        }
        // SAFETY: `header` lies within the message's control data.
        header = unsafe { libc::CMSG_NXTHDR(&raw const message, header) };
    }
    // Descriptors that the process has no room for are missing in `fds`: the message itself is whole.
    if message.msg_flags & libc::MSG_TRUNC != 0 || count > N {
        return Err(libc::EPROTO);
    }
    Ok(received)
}

/// Whether the peer of a socket has hung up.
pub fn hung_up(fd: c_int) -> bool {
    poll(fd, 0, 0) & (libc::POLLHUP | libc::POLLERR | libc::POLLNVAL) != 0
}

/// Waits for what may be waited for without end.
pub fn wait_for(fd: c_int, events: i16) {
    poll(fd, events, -1);
}

/// Lets others run until there is something to read, for some ten microseconds at most: most answers are there by then, and to
/// be woken for them takes as long again. Where many want the processor, giving way takes a round of all of them, and to be
/// woken a twentieth of that: then the next answers are waited for asleep.
pub fn await_soon(fd: c_int) {
    const LOOKS: u32 = 50;
    /// Nanoseconds that giving way takes if nobody but the proxy runs meanwhile, and much more.
    const DEAR: u64 = 200_000;
    const ASLEEP: u32 = 256;
    /// So many answers more are waited for asleep.
    static LEFT: AtomicU32 = AtomicU32::new(0);
    let left = LEFT.load(Ordering::Relaxed);
    if left > 0 {
        LEFT.store(left - 1, Ordering::Relaxed);
        return;
    }
    let mut begun = now();
    for _ in 0..LOOKS {
        if poll(fd, libc::POLLIN, 0) != 0 {
            return;
        }
        sched_yield();
        let ended = now();
        if ended.saturating_sub(begun) > DEAR {
            LEFT.store(ASLEEP, Ordering::Relaxed);
            return;
        }
        begun = ended;
    }
}

/// Nanoseconds of a clock that only goes forward.
fn now() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes a time; the C library's function, which asks the kernel by no system call.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// What a descriptor is ready for; nothing after an interruption.
fn poll(fd: c_int, events: i16, timeout: c_int) -> i16 {
    let mut poll = libc::pollfd { fd, events, revents: 0 };
    // SAFETY: one `pollfd`, writable. Not the C library's function, which threads are cancelled in.
    let ready = unsafe { libc::syscall(libc::SYS_poll, &raw mut poll, 1_usize, timeout) };
    if ready == 1 { poll.revents } else { 0 }
}

/// How long an answer may take before somebody may want to end the program that waits for it: longer than any does.
const PATIENCE: libc::timeval = libc::timeval { tv_sec: 1, tv_usec: 0 };

/// Connects a SEQPACKET socket to a path.
pub fn connect(path: &[u8]) -> Result<Fd, Errno> {
    // SAFETY: all-zero is a valid address.
    let mut address: libc::sockaddr_un = unsafe { core::mem::zeroed() };
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    if path.len() >= address.sun_path.len() {
        return Err(libc::ENAMETOOLONG);
    }
    for (to, from) in address.sun_path.iter_mut().zip(path) {
        *to = *from as libc::c_char;
    }
    // SAFETY: plain numbers.
    let fd = checked(unsafe {
        libc::syscall(libc::SYS_socket, libc::AF_UNIX, libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC, 0)
    })?;
    let fd = Fd::adopt(fd as c_int)?;
    let patience = PATIENCE;
    // SAFETY: a readable value of this size. Without it, waiting has no end; nothing else depends on it.
    unsafe {
        libc::syscall(
            libc::SYS_setsockopt,
            fd.number()?,
            libc::SOL_SOCKET,
            libc::SO_RCVTIMEO,
            &raw const patience,
            size_of::<libc::timeval>(),
        )
    };
    loop {
        // SAFETY: the address is readable for its size.
        let result = unsafe {
            libc::syscall(libc::SYS_connect, fd.number()?, &raw const address, size_of::<libc::sockaddr_un>())
        };
        match checked(result) {
            Ok(_) => return Ok(fd),
            Err(libc::EINTR) => {}
            Err(errno) => return Err(errno),
        }
    }
}

/// Maps `bytes` of a file for reading and writing, or anonymous private memory.
pub fn map(bytes: usize, file: Option<&Fd>) -> Result<*mut c_void, Errno> {
    let (flags, fd) = match file {
        Some(fd) => (libc::MAP_SHARED, fd.number()?),
        None => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1),
    };
    // SAFETY: a new mapping at an address of the kernel's choice disturbs nothing.
    let address = unsafe { libc::mmap(ptr::null_mut(), bytes, libc::PROT_READ | libc::PROT_WRITE, flags, fd, 0) };
    if address == libc::MAP_FAILED { Err(errno()) } else { Ok(address) }
}

/// Gives advice about a mapping of ours.
pub fn advise(address: *mut c_void, bytes: usize, advice: c_int) -> Result<(), Errno> {
    // SAFETY: callers pass ranges that they mapped, and advice about forks only.
    if unsafe { libc::madvise(address, bytes, advice) } == 0 { Ok(()) } else { Err(errno()) }
}

/// An environment variable, unless the program runs with more rights than its user.
pub fn environment(name: &core::ffi::CStr) -> Option<&'static [u8]> {
    // SAFETY: reads the auxiliary vector.
    if unsafe { libc::getauxval(libc::AT_SECURE) } != 0 {
        return None;
    }
    // SAFETY: a terminated name; the value is a terminated string that lives as long as nobody changes the environment,
    // which callers do not outlast.
    unsafe {
        let value = libc::getenv(name.as_ptr());
        (!value.is_null()).then(|| core::ffi::CStr::from_ptr(value).to_bytes())
    }
}

/// Opens a path, close-on-exec.
pub fn open(path: &CStr, flags: c_int) -> Result<Fd, Errno> {
    // SAFETY: reads a terminated path.
    let number = unsafe { libc::syscall(libc::SYS_openat, libc::AT_FDCWD, path.as_ptr(), flags | libc::O_CLOEXEC, 0) };
    Fd::adopt(checked(number)? as c_int)
}

/// What a symbolic link says.
pub fn read_link(path: &CStr, target: &mut [u8]) -> Result<usize, Errno> {
    let (buffer, length) = (target.as_mut_ptr(), target.len());
    // SAFETY: reads a terminated path and writes into the buffer.
    checked(unsafe { libc::syscall(libc::SYS_readlinkat, libc::AT_FDCWD, path.as_ptr(), buffer, length) })
}

/// `fcntl(2)` with a command that takes a number or nothing.
pub fn fcntl(fd: c_int, command: c_int, argument: c_int) -> Result<c_int, Errno> {
    // SAFETY: touches no memory.
    checked(unsafe { libc::syscall(libc::SYS_fcntl, fd, command, argument) }).map(|answer| answer as c_int)
}

/// A descriptor of our own for somebody else's file.
pub fn duplicate(fd: c_int) -> Result<Fd, Errno> {
    Fd::adopt(fcntl(fd, libc::F_DUPFD_CLOEXEC, 0)?)
}

/// Status of an open file.
pub fn stat(fd: c_int) -> Result<libc::stat, Errno> {
    // SAFETY: all-zero is a valid `stat`.
    let mut status: libc::stat = unsafe { core::mem::zeroed() };
    // SAFETY: writes a `stat`.
    checked(unsafe { libc::syscall(libc::SYS_fstat, fd, &raw mut status) })?;
    Ok(status)
}

/// The kind of an open file's file system: its magic number.
pub fn file_system(fd: c_int) -> Result<u64, Errno> {
    // SAFETY: all-zero is a valid `statfs`.
    let mut status: libc::statfs = unsafe { core::mem::zeroed() };
    // SAFETY: writes a `statfs`.
    checked(unsafe { libc::syscall(libc::SYS_fstatfs, fd, &raw mut status) })?;
    Ok(status.f_type as u64)
}

/// Shows `each` the names in an open directory until it answers something.
pub fn each_entry<T>(directory: c_int, mut each: impl FnMut(&[u8]) -> Option<T>) -> Option<T> {
    /// Where a `linux_dirent64` says how long it is ...
    const LENGTH: usize = 16;
    /// ... and where its name begins.
    const NAME: usize = 19;
    let mut buffer = [0_u64; 256];
    loop {
        let (start, size) = (buffer.as_mut_ptr(), size_of_val(&buffer));
        // SAFETY: writes into the buffer.
        let filled = checked(unsafe { libc::syscall(libc::SYS_getdents64, directory, start, size) }).ok()?;
        let mut entries = &buffer.as_bytes()[..filled];
        while let Some(length) = entries.get(LENGTH..LENGTH + 2) {
            let length = usize::from(u16::from_ne_bytes([length[0], length[1]]));
            let (entry, rest) = entries.split_at_checked(length).filter(|_| length > NAME)?;
            entries = rest;
            let name = entry[NAME..].split(|byte| *byte == 0).next().unwrap_or_default();
            if let Some(found) = each(name) {
                return Some(found);
            }
        }
        if filled == 0 {
            return None;
        }
    }
}

/// Makes pages for these addresses, as the first access would. `EFAULT` where that is not possible.
pub fn populate(pages: &Range<usize>, writable: bool) -> Result<(), Errno> {
    /// `MADV_POPULATE_READ`, since Linux 5.14.
    const READ: c_int = 22;
    /// `MADV_POPULATE_WRITE`, as well.
    const WRITE: c_int = 23;
    let advise = |start: usize, length: usize, advice: c_int| {
        // SAFETY: fills page tables, and changes nothing that is there.
        checked(unsafe { libc::syscall(libc::SYS_madvise, start, length, advice) })
    };
    match advise(pages.start, pages.len(), if writable { WRITE } else { READ }) {
        Ok(_) => return Ok(()),
        Err(libc::EINVAL) => {}
        Err(libc::ENOMEM) => return Err(libc::ENOMEM),
        Err(_) => return Err(libc::EFAULT),
    }
    let known = 0_u8;
    if advise((&raw const known).addr() & !(PAGE_BYTES - 1), PAGE_BYTES, READ).is_ok() {
        // The kernel knows the advice, but has no way for this memory.
        return Err(libc::EFAULT);
    }
    // Older kernels make a page of shared memory for whoever reads it, too, and this way without a signal where they cannot.
    for page in pages.clone().step_by(PAGE_BYTES) {
        let mut byte = 0_u8;
        let local = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
        let remote = libc::iovec { iov_base: page as *mut c_void, iov_len: 1 };
        // SAFETY: reads one byte of the process itself, if it is there.
        let read = unsafe {
            libc::syscall(
                libc::SYS_process_vm_readv,
                getpid(),
                &raw const local,
                1_usize,
                &raw const remote,
                1_usize,
                0_usize,
            )
        };
        checked(read)?;
    }
    Ok(())
}
