//! Accesses to memory that may be gone: pages of a file that the container can shrink, punch or fill up.
//!
//! Such an access raises SIGBUS. The few routines that make one are assembler, side by side. The handler of SIGBUS, when it finds
//! the thread in one of them, has it go on at the routines' common end with the address at fault as the result; anywhere else
//! the signal does what it always did. (gVisor's `safecopy` and OpenVMM's `trycopy` do the same. A system call that copies,
//! `process_vm_readv`, would answer an error as well, but costs a microsecond for each piece and would have to be allowed.)
//!
//! What makes it sound: to the compiler each routine is a foreign function that takes plain numbers, may change the bytes that it
//! was given and returns a number. It makes no call, and touches neither the stack nor a register that its caller keeps, so a
//! return is right wherever it was interrupted. The handler reads constants and changes two registers of the thread that it
//! interrupted, nothing else.

// UNSAFETY: assembler, a signal handler, and memory that only the kernel knows to be there.
#![allow(unsafe_code)]

use std::arch::global_asm;
use std::ffi::{c_int, c_void};
use std::sync::OnceLock;

global_asm!(
    ".pushsection .text.ringfence_guarded, \"ax\", @progbits",
    ".globl ringfence_guarded_begin",
    ".hidden ringfence_guarded_begin",
    "ringfence_guarded_begin:",
    // (to: rdi, from: rsi, bytes but one: rdx). The last byte goes last: who waits for a WRITE polls it.
    ".globl ringfence_guarded_copy",
    ".hidden ringfence_guarded_copy",
    "ringfence_guarded_copy:",
    "mov rcx, rdx",
    "rep movsb",
    "mov al, byte ptr [rsi]",
    "mov byte ptr [rdi], al",
    "xor eax, eax",
    "ret",
    // (to: rdi, from: rsi), both aligned: one load and one store.
    ".globl ringfence_guarded_copy_8",
    ".hidden ringfence_guarded_copy_8",
    "ringfence_guarded_copy_8:",
    "mov rdx, qword ptr [rsi]",
    "mov qword ptr [rdi], rdx",
    "xor eax, eax",
    "ret",
    ".globl ringfence_guarded_copy_4",
    ".hidden ringfence_guarded_copy_4",
    "ringfence_guarded_copy_4:",
    "mov edx, dword ptr [rsi]",
    "mov dword ptr [rdi], edx",
    "xor eax, eax",
    "ret",
    // (place: rdi, expected: rsi, new: rdx, found: rcx)
    ".globl ringfence_guarded_swap",
    ".hidden ringfence_guarded_swap",
    "ringfence_guarded_swap:",
    "mov rax, rsi",
    "lock cmpxchg qword ptr [rdi], rdx",
    "mov qword ptr [rcx], rax",
    "xor eax, eax",
    "ret",
    // Where a thread goes on whose access failed.
    ".globl ringfence_guarded_end",
    ".hidden ringfence_guarded_end",
    "ringfence_guarded_end: ret",
    ".popsection",
);

unsafe extern "C" {
    static ringfence_guarded_begin: u8;
    static ringfence_guarded_end: u8;
    fn ringfence_guarded_copy(to: *mut u8, from: *const u8, bytes_but_one: usize) -> usize;
    fn ringfence_guarded_copy_8(to: *mut u8, from: *const u8) -> usize;
    fn ringfence_guarded_copy_4(to: *mut u8, from: *const u8) -> usize;
    fn ringfence_guarded_swap(place: *mut u8, expected: u64, new: u64, found: *mut u64) -> usize;
}

/// An access failed at this address, or somewhere on its page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault(usize);

impl Fault {
    fn of(result: usize) -> Result<(), Self> {
        if result == 0 { Ok(()) } else { Err(Self(result)) }
    }

    /// Whether it may be in these bytes: memory that fails is told by pages.
    #[must_use]
    pub fn is_in(self, address: *const u8, bytes: usize) -> bool {
        const PAGE: usize = crate::shared::PAGE;
        (address.addr() & !(PAGE - 1)..address.addr() + bytes).contains(&self.0)
    }
}

/// That faults are caught in this process.
#[derive(Clone, Copy, Debug)]
pub struct Guard(());

impl Guard {
    /// Installs the handler, once for the process.
    ///
    /// # Errors
    /// What the kernel says of it.
    pub fn install() -> std::io::Result<Self> {
        static INSTALLED: OnceLock<Option<i32>> = OnceLock::new();
        let error = INSTALLED.get_or_init(|| {
            // SAFETY: all-zero is a valid `sigaction`; the handler has the signature that `SA_SIGINFO` asks for.
            let done = unsafe {
                let mut action: libc::sigaction = std::mem::zeroed();
                action.sa_sigaction = on_sigbus as *const () as usize;
                action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
                libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut())
            };
            (done != 0).then(|| std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL))
        });
        error.map_or(Ok(Self(())), |error| Err(std::io::Error::from_raw_os_error(error)))
    }
}

extern "C" fn on_sigbus(_: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    let guarded = (&raw const ringfence_guarded_begin).addr()..(&raw const ringfence_guarded_end).addr();
    // SAFETY: the kernel passes both to a handler with `SA_SIGINFO`, for it alone.
    let (info, registers) = unsafe { (&*info, &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs) };
    let (at, result) = (libc::REG_RIP as usize, libc::REG_RAX as usize);
    // What somebody sent says nothing about the instruction that it met.
    if info.si_code > 0 && guarded.contains(&(registers[at].cast_unsigned() as usize)) {
        registers[at] = guarded.end as i64;
        // SAFETY: a SIGBUS of the kernel's has an address.
        registers[result] = (unsafe { info.si_addr() }.addr() as i64).max(1);
        return;
    }
    // SAFETY: the default action needs nothing. The access is tried again, and ends the process.
    unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
}

/// Copies `bytes` bytes, the last byte last, or fails on the way. Eight or four aligned bytes move at once, as on an RNIC.
///
/// # Safety
/// Both ranges lie in mappings of this process's, which nothing takes away before the return; what may be missing are pages of
/// files. Whoever else uses the memory expects any bytes.
pub unsafe fn copy(_: Guard, to: *mut u8, from: *const u8, bytes: usize) -> Result<(), Fault> {
    let both = to.addr() | from.addr();
    // SAFETY: promised by the caller; a page that is missing makes the result.
    Fault::of(unsafe {
        match bytes {
            0 => 0,
            8 if both.is_multiple_of(8) => ringfence_guarded_copy_8(to, from),
            4 if both.is_multiple_of(4) => ringfence_guarded_copy_4(to, from),
            _ => ringfence_guarded_copy(to, from, bytes - 1),
        }
    })
}

/// Stores `new` in 8 aligned bytes if they are `expected`, at once. What they were.
///
/// # Safety
/// As for [`copy`]; and `place` is aligned.
pub unsafe fn compare_exchange(_: Guard, place: *mut u8, expected: u64, new: u64) -> Result<u64, Fault> {
    let mut found = 0;
    // SAFETY: promised by the caller; `found` is ours.
    Fault::of(unsafe { ringfence_guarded_swap(place, expected, new, &raw mut found) }).map(|()| found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shared::PAGE;
    use rustix::fd::OwnedFd;
    use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, ftruncate, memfd_create};
    use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

    fn resize(file: &OwnedFd, pages: usize) {
        ftruncate(file, (pages * PAGE) as u64).unwrap();
    }

    /// A file that can be shrunk, and a mapping of it.
    struct Shrinking {
        file: OwnedFd,
        base: *mut u8,
        bytes: usize,
    }

    impl Shrinking {
        fn new(pages: usize) -> Self {
            let file = memfd_create("test", MemfdFlags::CLOEXEC).unwrap();
            let bytes = pages * PAGE;
            ftruncate(&file, bytes as u64).unwrap();
            let protection = ProtFlags::READ | ProtFlags::WRITE;
            // SAFETY: a new mapping at an address of the kernel's choice.
            let base = unsafe { mmap(std::ptr::null_mut(), bytes, protection, MapFlags::SHARED, &file, 0) }.unwrap();
            Self { file, base: base.cast(), bytes }
        }

        fn shrink(&self, pages: usize) {
            resize(&self.file, pages);
        }

        fn copy_out(&self, offset: usize, to: &mut [u8]) -> Result<(), Fault> {
            assert!(offset + to.len() <= self.bytes);
            // SAFETY: within the mapping, as the assertion says, and within `to`.
            unsafe { copy(Guard::install().unwrap(), to.as_mut_ptr(), self.base.add(offset), to.len()) }
        }

        fn copy_in(&self, offset: usize, from: &[u8]) -> Result<(), Fault> {
            assert!(offset + from.len() <= self.bytes);
            // SAFETY: as above.
            unsafe { copy(Guard::install().unwrap(), self.base.add(offset), from.as_ptr(), from.len()) }
        }
    }

    impl Drop for Shrinking {
        fn drop(&mut self) {
            // SAFETY: made in `new`; nothing refers to it.
            unsafe { munmap(self.base.cast(), self.bytes) }.unwrap();
        }
    }

    #[test]
    fn copies_of_every_length_are_whole() {
        let memory = Shrinking::new(2);
        let data: Vec<u8> = (0..100).map(|i| i as u8 + 1).collect();
        for bytes in 0..data.len() {
            for offset in [0, 1, 4, 8, PAGE - 50] {
                memory.copy_in(offset, &vec![0; bytes + 1]).unwrap();
                memory.copy_in(offset, &data[..bytes]).unwrap();
                let mut back = vec![0xee; bytes + 1];
                memory.copy_out(offset, &mut back).unwrap();
                assert_eq!((&back[..bytes], back[bytes]), (&data[..bytes], 0), "{bytes} bytes at {offset}");
            }
        }
    }

    #[test]
    fn a_page_that_is_gone_is_an_error_that_says_where() {
        let memory = Shrinking::new(4);
        memory.shrink(2);
        let mut bytes = vec![0; 4 * PAGE];
        let to = bytes.as_ptr();
        let fault = memory.copy_out(0, &mut bytes).unwrap_err();
        // SAFETY: within the mapping.
        let (gone, there) = unsafe { (memory.base.add(2 * PAGE), memory.base) };
        assert!(fault.is_in(gone, PAGE) && !fault.is_in(there, PAGE) && !fault.is_in(to, 4 * PAGE), "{fault:?}");
        for bytes in [1, 4, 8, 9] {
            assert!(memory.copy_out(3 * PAGE, &mut vec![0; bytes]).is_err(), "{bytes} bytes out");
            assert!(memory.copy_in(3 * PAGE, &vec![0; bytes]).is_err(), "{bytes} bytes in");
        }
        // SAFETY: aligned, within the mapping.
        unsafe {
            let guard = Guard::install().unwrap();
            compare_exchange(guard, memory.base.add(2 * PAGE), 0, 1).unwrap_err();
            assert_eq!(compare_exchange(guard, memory.base, 0, 7), Ok(0));
            assert_eq!(compare_exchange(guard, memory.base, 0, 8), Ok(7));
        }
    }

    #[test]
    fn a_file_that_shrinks_and_grows_all_the_time_harms_nobody() {
        let memory = Shrinking::new(64);
        let ended = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            let relaxed = std::sync::atomic::Ordering::Relaxed;
            let (file, ending) = (&memory.file, &ended);
            scope.spawn(move || {
                while !ending.load(relaxed) {
                    resize(file, 1);
                    resize(file, 64);
                    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                    fallocate(file, flags, 0, 32 * PAGE as u64).unwrap();
                }
            });
            let mut bytes = vec![1; 64 * PAGE];
            let (mut whole, mut torn) = (0, 0);
            while whole + torn < 3000 {
                let done = if torn % 2 == 0 { memory.copy_in(0, &bytes) } else { memory.copy_out(0, &mut bytes) };
                *(if done.is_ok() { &mut whole } else { &mut torn }) += 1;
            }
            ended.store(true, relaxed);
        });
    }

    /// `cargo test --release -p ringfence-proxy guarded::tests::measure -- --ignored --nocapture`
    #[test]
    #[ignore = "a measurement"]
    fn measure() {
        let memory = Shrinking::new(512);
        for bytes in [8usize, 64, 512, 4096, 65536, 1 << 20] {
            let mut other = vec![1u8; bytes];
            memory.copy_in(0, &other).unwrap();
            let rounds = ((1 << 31) / (bytes + 4096)).min(1 << 20);
            let time = |run: &mut dyn FnMut()| {
                (0..5)
                    .map(|_| {
                        let start = std::time::Instant::now();
                        (0..rounds).for_each(|_| run());
                        start.elapsed().as_nanos() / rounds as u128
                    })
                    .min()
                    .unwrap()
            };
            let guarded = time(&mut || memory.copy_out(0, std::hint::black_box(&mut other)).unwrap());
            let plain = time(&mut || {
                // SAFETY: within the mapping and the buffer.
                unsafe { std::ptr::copy(memory.base, std::hint::black_box(&mut other).as_mut_ptr(), bytes) };
            });
            let by_kernel = time(&mut || {
                let local = libc::iovec { iov_base: other.as_mut_ptr().cast(), iov_len: bytes };
                let remote = libc::iovec { iov_base: memory.base.cast(), iov_len: bytes };
                // SAFETY: as above; the process is our own.
                let copied = unsafe { libc::process_vm_readv(libc::getpid(), &local, 1, &remote, 1, 0) };
                assert_eq!(copied, bytes as isize);
            });
            println!("{bytes} bytes: memcpy {plain} ns, guarded {guarded} ns, process_vm_readv {by_kernel} ns");
        }
    }
}
