//! Copies that happen only while a word has a value, even if the thread is stopped in the midst of one.
//!
//! A check before a copy is worth nothing if the thread can be stopped between the two, for as long as whoever stops it likes:
//! when it goes on it writes to memory that is somebody else's by now. So each routine here is a *restartable sequence*
//! (`rseq(2)`): whatever takes the processor from the thread while it is inside, be it another thread, a signal, `SIGSTOP`, a
//! debugger or a frozen control group, the kernel has the thread go on at the routine's abort label, and the check comes again.
//! What is left is a thread that runs: it is through within microseconds.
//!
//! An instruction that is the last of its sequence has either been executed, or the sequence starts over: so an atomic is done
//! exactly once, and its result is in a register. A copy may have been made in part and is made again.
//!
//! What makes it sound: to the compiler each routine is a foreign function that takes plain numbers and addresses, may change the
//! bytes that it was given, and returns numbers. It makes no call and touches neither the stack nor a register that its caller
//! keeps.

// UNSAFETY: assembler, and memory whose address the C library keeps for each thread.
#![allow(unsafe_code)]

use crate::steps::{self, Step};
use std::arch::{asm, global_asm};
use std::marker::PhantomData;

/// `RSEQ_SIG` of x86 (`sys/rseq.h`): stands before each abort label, so that no other code can be made to be one.
const SIGNATURE: u32 = 0x5305_3053;

global_asm!(
    // From `begin` to `commit` exclusively; then what the kernel is told of it (`struct rseq_cs`, `linux/rseq.h`).
    ".macro ringfence_sequence name, begin, commit, abort",
    ".pushsection .data.rel.ro.ringfence_rseq, \"aw\", @progbits",
    ".balign 32",
    "\\name:",
    ".long 0, 0",
    ".quad \\begin, \\commit - \\begin, \\abort",
    ".popsection",
    ".endm",
    ".pushsection .text.ringfence_rseq, \"ax\", @progbits",
    // (to: rdi, from: rsi, bytes but one: rdx, word: rcx, value: r8, area: r9). The last byte goes last: who waits for a WRITE
    // polls it.
    ".globl ringfence_rseq_copy",
    ".hidden ringfence_rseq_copy",
    "ringfence_rseq_copy:",
    "lea rax, [rip + .Lringfence_copy_cs]",
    "mov qword ptr [r9 + 8], rax",
    ".Lringfence_copy_begin:",
    "cmp qword ptr [rcx], r8",
    "jne .Lringfence_gone",
    "mov rcx, rdx",
    "rep movsb",
    "mov al, byte ptr [rsi]",
    "mov byte ptr [rdi], al",
    ".Lringfence_copy_commit:",
    "xor eax, eax",
    "ret",
    "ringfence_sequence .Lringfence_copy_cs, .Lringfence_copy_begin, .Lringfence_copy_commit, .Lringfence_abort",
    // The same for 8 and 4 aligned bytes: one load and one store.
    ".globl ringfence_rseq_copy_8",
    ".hidden ringfence_rseq_copy_8",
    "ringfence_rseq_copy_8:",
    "lea rax, [rip + .Lringfence_copy_8_cs]",
    "mov qword ptr [r9 + 8], rax",
    ".Lringfence_copy_8_begin:",
    "cmp qword ptr [rcx], r8",
    "jne .Lringfence_gone",
    "mov rdx, qword ptr [rsi]",
    "xor eax, eax",
    "mov qword ptr [rdi], rdx",
    ".Lringfence_copy_8_commit:",
    "ret",
    "ringfence_sequence .Lringfence_copy_8_cs, .Lringfence_copy_8_begin, .Lringfence_copy_8_commit, .Lringfence_abort",
    ".globl ringfence_rseq_copy_4",
    ".hidden ringfence_rseq_copy_4",
    "ringfence_rseq_copy_4:",
    "lea rax, [rip + .Lringfence_copy_4_cs]",
    "mov qword ptr [r9 + 8], rax",
    ".Lringfence_copy_4_begin:",
    "cmp qword ptr [rcx], r8",
    "jne .Lringfence_gone",
    "mov edx, dword ptr [rsi]",
    "xor eax, eax",
    "mov dword ptr [rdi], edx",
    ".Lringfence_copy_4_commit:",
    "ret",
    "ringfence_sequence .Lringfence_copy_4_cs, .Lringfence_copy_4_begin, .Lringfence_copy_4_commit, .Lringfence_abort",
    // (place: rdi, addend: rsi, -, word: rcx, value: r8, area: r9): the former value in rax, what became of it in rdx.
    ".globl ringfence_rseq_add",
    ".hidden ringfence_rseq_add",
    "ringfence_rseq_add:",
    "lea rax, [rip + .Lringfence_add_cs]",
    "mov qword ptr [r9 + 8], rax",
    ".Lringfence_add_begin:",
    "cmp qword ptr [rcx], r8",
    "jne .Lringfence_gone",
    "mov rax, rsi",
    "xor edx, edx",
    "lock xadd qword ptr [rdi], rax",
    ".Lringfence_add_commit:",
    "ret",
    "ringfence_sequence .Lringfence_add_cs, .Lringfence_add_begin, .Lringfence_add_commit, .Lringfence_abort",
    // (place: rdi, expected: rsi, new: rdx, word: rcx, value: r8, area: r9): as above.
    ".globl ringfence_rseq_swap",
    ".hidden ringfence_rseq_swap",
    "ringfence_rseq_swap:",
    "lea rax, [rip + .Lringfence_swap_cs]",
    "mov qword ptr [r9 + 8], rax",
    ".Lringfence_swap_begin:",
    "cmp qword ptr [rcx], r8",
    "jne .Lringfence_gone",
    "mov rax, rsi",
    "mov r10, rdx",
    "xor edx, edx",
    "lock cmpxchg qword ptr [rdi], r10",
    ".Lringfence_swap_commit:",
    "ret",
    "ringfence_sequence .Lringfence_swap_cs, .Lringfence_swap_begin, .Lringfence_swap_commit, .Lringfence_abort",
    ".Lringfence_gone:",
    "mov eax, 1",
    "mov edx, 1",
    "ret",
    ".long {signature}",
    ".Lringfence_abort:",
    "mov eax, 2",
    "mov edx, 2",
    "ret",
    // Where the C library keeps the thread's area, from the thread pointer; and how much of it the kernel knows. Zero where it
    // has none, or no such symbols, as before glibc 2.35.
    ".weak __rseq_offset",
    ".weak __rseq_size",
    ".globl ringfence_rseq_offset",
    ".hidden ringfence_rseq_offset",
    "ringfence_rseq_offset:",
    "xor eax, eax",
    "mov rcx, qword ptr [rip + __rseq_size@GOTPCREL]",
    "test rcx, rcx",
    "je 7f",
    "cmp dword ptr [rcx], 0",
    "je 7f",
    "mov rcx, qword ptr [rip + __rseq_offset@GOTPCREL]",
    "test rcx, rcx",
    "je 7f",
    "mov rax, qword ptr [rcx]",
    "7: ret",
    ".popsection",
    signature = const SIGNATURE,
);

/// What a routine returns in two registers.
#[repr(C)]
struct Pair {
    former: u64,
    result: u64,
}

unsafe extern "C" {
    fn ringfence_rseq_copy(
        to: *mut u8,
        from: *const u8,
        but_one: usize,
        word: *const u64,
        value: u64,
        area: *mut u8,
    ) -> u64;
    fn ringfence_rseq_copy_8(
        to: *mut u8,
        from: *const u8,
        _: usize,
        word: *const u64,
        value: u64,
        area: *mut u8,
    ) -> u64;
    fn ringfence_rseq_copy_4(
        to: *mut u8,
        from: *const u8,
        _: usize,
        word: *const u64,
        value: u64,
        area: *mut u8,
    ) -> u64;
    fn ringfence_rseq_add(place: *mut u8, addend: u64, _: u64, word: *const u64, value: u64, area: *mut u8) -> Pair;
    fn ringfence_rseq_swap(
        place: *mut u8,
        expected: u64,
        new: u64,
        word: *const u64,
        value: u64,
        area: *mut u8,
    ) -> Pair;
    fn ringfence_rseq_offset() -> isize;
}

/// Bytes of one sequence: a few microseconds of copying, so that one that is interrupted has lost little.
pub const LONGEST: usize = 16 << 10;
/// How often a sequence that was interrupted is begun again. A thread that does not come through so often is being looked at step
/// by step, and must not be kept from its other work.
const TRIES: u32 = 64;

/// Why something was not done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Undone {
    /// The word has another value.
    Gone,
    /// It was interrupted each time.
    Interrupted,
}

/// Where the calling thread says which sequence it is in.
#[derive(Clone, Copy, Debug)]
pub struct Thread {
    area: *mut u8,
    /// An area belongs to a thread.
    _not_send: PhantomData<*mut u8>,
}

/// A word, and the value that it must have.
#[derive(Clone, Copy, Debug)]
pub struct While {
    /// In a live mapping.
    pub word: *const u64,
    /// The value.
    pub is: u64,
}

impl Thread {
    /// The calling thread's; `None` where the kernel (before Linux 4.18) or the C library has no restartable sequences.
    #[inline]
    #[must_use]
    pub fn current() -> Option<Self> {
        // SAFETY: it reads constants of the C library's.
        let offset = unsafe { ringfence_rseq_offset() };
        if offset == 0 {
            return None;
        }
        let pointer: *mut u8;
        // SAFETY: on x86-64 the first word at the thread pointer is the thread pointer (System V ABI, thread-local storage).
        unsafe { asm!("mov {}, qword ptr fs:[0]", out(reg) pointer, options(nostack, readonly, preserves_flags)) };
        let area = pointer.wrapping_offset(offset);
        // SAFETY: the C library has `struct rseq` there for each thread; `cpu_id`, at 4, is negative if it is not registered.
        let registered = unsafe { area.add(4).cast::<i32>().read_volatile() } >= 0;
        registered.then_some(Self { area, _not_send: PhantomData })
    }

    /// Copies `bytes` bytes while the word has its value, the last byte last; eight or four aligned bytes at once. What was
    /// not done is undone in part only: some bytes may have been copied.
    ///
    /// # Safety
    /// Both ranges and the word lie in mappings of this process's that nothing takes away before the return and that no access
    /// can fault in. Whoever else uses the memory expects any bytes.
    #[inline(always)]
    pub unsafe fn copy(self, to: *mut u8, from: *const u8, bytes: usize, condition: While) -> Result<(), Undone> {
        let both = to.addr() | from.addr();
        let While { word, is } = condition;
        for _ in 0..TRIES {
            // SAFETY: promised by the caller; the area is this thread's.
            let result = unsafe {
                match bytes {
                    8 if both.is_multiple_of(8) => ringfence_rseq_copy_8(to, from, 0, word, is, self.area),
                    4 if both.is_multiple_of(4) => ringfence_rseq_copy_4(to, from, 0, word, is, self.area),
                    0..=LONGEST => {
                        if bytes == 0 {
                            return Ok(());
                        }
                        ringfence_rseq_copy(to, from, bytes - 1, word, is, self.area)
                    }
                    _ => return self.copy_long(to, from, bytes, condition),
                }
            };
            match result {
                0 => return Ok(()),
                1 => return Err(Undone::Gone),
                _ => {}
            }
        }
        Err(Undone::Interrupted)
    }

    /// # Safety
    /// As [`Self::copy`].
    unsafe fn copy_long(self, to: *mut u8, from: *const u8, bytes: usize, condition: While) -> Result<(), Undone> {
        let mut at = 0;
        while at < bytes {
            let part = (bytes - at).min(LONGEST);
            // SAFETY: within the ranges that the caller promises.
            unsafe { self.copy(to.add(at), from.add(at), part, condition)? };
            at += part;
            if at < bytes {
                steps::at(Step::PartCopied);
            }
        }
        Ok(())
    }

    /// Adds to 8 aligned bytes while the word has its value: what they were.
    ///
    /// # Safety
    /// As [`Self::copy`]; and `place` is aligned.
    pub unsafe fn add(self, place: *mut u8, addend: u64, condition: While) -> Result<u64, Undone> {
        // SAFETY: promised by the caller; the area is this thread's.
        exactly_once(|| unsafe { ringfence_rseq_add(place, addend, 0, condition.word, condition.is, self.area) })
    }

    /// Stores `new` in 8 aligned bytes if they are `expected`, while the word has its value: what they were.
    ///
    /// # Safety
    /// As [`Self::copy`]; and `place` is aligned.
    pub unsafe fn compare_exchange(
        self,
        place: *mut u8,
        expected: u64,
        new: u64,
        condition: While,
    ) -> Result<u64, Undone> {
        // SAFETY: as above.
        exactly_once(|| unsafe { ringfence_rseq_swap(place, expected, new, condition.word, condition.is, self.area) })
    }
}

/// The operation is the last instruction of its sequence: one that was interrupted has not been executed.
fn exactly_once(run: impl Fn() -> Pair) -> Result<u64, Undone> {
    for _ in 0..TRIES {
        let Pair { former, result } = run();
        match result {
            0 => return Ok(former),
            1 => return Err(Undone::Gone),
            _ => {}
        }
    }
    Err(Undone::Interrupted)
}

#[cfg(test)]
mod tests;
