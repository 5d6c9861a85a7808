//! This process's threads, as the kernel lists them.

// UNSAFETY: system calls.
#![allow(unsafe_code)]

use super::kept::Kept;
use super::sys;

/// `/proc/self/stat`, for a process that cannot reach paths any more. No directory, by which it could leave its own.
static STAT: Kept = Kept::new(|| sys::open(c"/proc/self/stat", libc::O_RDONLY | libc::O_CLOEXEC).ok());

/// Opens what is kept.
pub fn open() {
    let _ = STAT.get();
}

/// Closes it, in a forked child.
pub fn close() {
    STAT.close();
}

/// How many threads this process has. Where there is no answer there may be many.
pub fn count() -> u32 {
    sys::threads().or_else(|| count_in(STAT.get()?)).unwrap_or(u32::MAX)
}

fn count_in(stat: i32) -> Option<u32> {
    let mut buffer = [0; 512];
    let length = sys::read_at_start(stat, &mut buffer).ok()?;
    counted(&buffer[..length])
}

/// The twentieth field. The second is a name in parentheses, which may contain anything.
fn counted(stat: &[u8]) -> Option<u32> {
    let after = stat.iter().rposition(|&byte| byte == b')')?;
    let field = stat[after + 1..].split(|&byte| byte == b' ').nth(18)?;
    let digit = |value: u32, &byte: &u8| byte.is_ascii_digit().then(|| value.wrapping_mul(10) + u32::from(byte - b'0'));
    field.iter().try_fold(0, digit).filter(|&count| count > 0)
}

/// The list, to be closed by the caller.
pub fn tasks() -> Result<i32, i32> {
    sys::open(c"/proc/self/task", libc::O_RDONLY | libc::O_DIRECTORY | libc::O_CLOEXEC)
}

/// Calls `each` with the number of each thread.
pub fn list(tasks: i32, mut each: impl FnMut(u32)) -> Result<(), i32> {
    #[repr(C, align(8))]
    struct Entries([u8; 4096]);
    let mut entries = Entries([0; 4096]);
    // SAFETY: moves the position of a descriptor of ours.
    unsafe { sys::call(libc::SYS_lseek, [tasks as usize, 0, 0, 0, 0, 0])? };
    loop {
        let arguments = [tasks as usize, entries.0.as_mut_ptr() as usize, entries.0.len(), 0, 0, 0];
        // SAFETY: writes into the buffer.
        let filled = unsafe { sys::call(libc::SYS_getdents64, arguments)? };
        if filled == 0 {
            return Ok(());
        }
        let mut at = 0;
        // struct linux_dirent64: inode and offset, 8 bytes each; length, 2; type, 1; the name.
        while at + 19 < filled {
            let length = usize::from(u16::from_le_bytes([entries.0[at + 16], entries.0[at + 17]]));
            let name = &entries.0[at + 19..filled.min(at + length)];
            let digits = name.iter().take_while(|byte| byte.is_ascii_digit());
            let id = digits.fold(0u32, |id, digit| id.wrapping_mul(10).wrapping_add(u32::from(digit - b'0')));
            if id != 0 {
                each(id);
            }
            at += length.max(19);
        }
    }
}

/// Reads a file of a thread's directory.
fn read_of<'a>(tasks: i32, id: u32, name: &[u8], buffer: &'a mut [u8]) -> &'a [u8] {
    let mut path = [0u8; 32];
    let mut digits = [0u8; 10];
    let mut at = digits.len();
    let mut rest = id;
    while rest > 0 || at == digits.len() {
        at -= 1;
        digits[at] = b'0' + (rest % 10) as u8;
        rest /= 10;
    }
    let length = digits.len() - at;
    path[..length].copy_from_slice(&digits[at..]);
    path[length..length + name.len()].copy_from_slice(name);
    let flags = libc::O_RDONLY | libc::O_CLOEXEC;
    // SAFETY: reads a path, which ends with a zero.
    let file =
        unsafe { sys::call(libc::SYS_openat, [tasks as usize, path.as_ptr() as usize, flags as usize, 0, 0, 0]) };
    let Ok(file) = file else { return &[] };
    let length = sys::read(file as i32, buffer).unwrap_or(0);
    sys::close(file as i32);
    &buffer[..length]
}

/// Whether a thread that cannot be traced has ended: the first one stays on the list until the last has.
pub fn has_ended(tasks: i32, id: u32) -> bool {
    let mut buffer = [0; 512];
    let status = read_of(tasks, id, b"/stat", &mut buffer);
    // pid (name) state; the name may contain anything.
    let after = status.iter().rposition(|&byte| byte == b')').map_or(&[][..], |at| &status[at..]);
    matches!(after, [b')', b' ', b'Z' | b'X', ..] | [])
}

/// Whether no thread of this process blocks the signal for longer than the C library does at a thread's start, or around a
/// system call.
pub fn nobody_blocks(signal: i32) -> bool {
    const TURNS: u32 = 50;
    (0..TURNS).any(|turn| {
        if turn > 0 {
            sys::sleep(2_000_000);
        }
        nobody_blocks_now(signal)
    })
}

fn nobody_blocks_now(signal: i32) -> bool {
    let Ok(tasks) = tasks() else { return false };
    let mut blocked = false;
    let listed = list(tasks, |id| {
        let mut buffer = [0; 4096];
        let status = read_of(tasks, id, b"/status", &mut buffer);
        let line = b"\nSigBlk:\t";
        let Some(at) = status.windows(line.len()).position(|part| part == line) else { return };
        let digits = status[at + line.len()..].iter().map_while(|&byte| (byte as char).to_digit(16));
        let mask = digits.fold(0u64, |mask, digit| mask << 4 | u64::from(digit));
        blocked |= mask & 1 << (signal - 1) != 0;
    });
    sys::close(tasks);
    listed.is_ok() && !blocked
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_count_is_found_behind_any_name() {
        let rest = "S 1 2 2 0 -1 4194304 100 0 0 0 1 2 0 0 20 0 37 0 5000 1 1";
        for name in ["sh", "a b", ") S 1 2 2 0 -1 4194304 100 0 0 0 1 2 0 0 20 0 9 0"] {
            assert_eq!(counted(format!("2 ({name}) {rest}").as_bytes()), Some(37), "{name}");
        }
        for stat in ["", "2 (sh", "2 (sh) S 1", "2 (sh) S 1 2 2 0 -1 4194304 100 0 0 0 1 2 0 0 20 0 x 0"] {
            assert_eq!(counted(stat.as_bytes()), None, "{stat}");
        }
    }

    #[test]
    fn both_ways_to_count_agree() {
        // Threads of other tests come and go.
        let agree = || sys::threads() == STAT.get().and_then(count_in);
        assert!((0..1000).any(|_| agree()));
    }
}
