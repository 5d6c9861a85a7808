//! Reads `/proc/self/maps`.

use super::sys;
use alloc::vec::Vec;
use core::ops::Range;

/// A mapping of this process, or the part of one that was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    pub range: Range<usize>,
    /// `PROT_*`.
    pub protection: i32,
    pub shared: bool,
    /// Byte in the file where `range` starts.
    pub offset: u64,
    pub device: (u32, u32),
    pub inode: u64,
    pub kind: Kind,
}

/// What the mapping's name tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// No file, or one like any other.
    Plain,
    /// The stack of the first thread, which the kernel extends downwards.
    Stack,
    /// Pages of `MAP_HUGETLB`.
    Huge,
    /// The kernel's own (`[vdso]`, `[vvar]`).
    Kernel,
}

impl Mapping {
    /// The part inside `range`, if there is one.
    pub fn clip(mut self, range: &Range<usize>) -> Option<Self> {
        let start = self.range.start.max(range.start);
        let end = self.range.end.min(range.end);
        if start >= end {
            return None;
        }
        self.offset += (start - self.range.start) as u64;
        self.range = start..end;
        Some(self)
    }
}

/// The mappings inside `range` (addresses), by address.
pub fn read(range: Range<usize>) -> Result<Vec<Mapping>, i32> {
    let mut mappings = Vec::new();
    let file = sys::open(c"/proc/self/maps", libc::O_RDONLY | libc::O_CLOEXEC)?;
    let result = for_each_line(file, |line| {
        let Some(mapping) = parse(line) else { return false };
        let beyond = mapping.range.start >= range.end;
        mappings.extend(mapping.clip(&range));
        beyond
    });
    sys::close(file);
    result.map(|()| mappings)
}

/// Lines until `each` says that it has seen enough. A line longer than the buffer (its path) is cut.
fn for_each_line(file: i32, mut each: impl FnMut(&[u8]) -> bool) -> Result<(), i32> {
    let mut buffer = [0u8; 4096];
    let mut filled = 0;
    loop {
        let read = sys::read(file, &mut buffer[filled..])?;
        filled += read;
        let mut start = 0;
        while let Some(length) = buffer[start..filled].iter().position(|&byte| byte == b'\n') {
            if each(&buffer[start..start + length]) {
                return Ok(());
            }
            start += length + 1;
        }
        if read == 0 {
            return Ok(());
        }
        buffer.copy_within(start..filled, 0);
        filled -= start;
        if filled == buffer.len() {
            filled = buffer.len() / 2;
        }
    }
}

/// `start-end perms offset major:minor inode  path`
fn parse(line: &[u8]) -> Option<Mapping> {
    let mut fields = line.splitn(6, |&byte| byte == b' ');
    let range = pair(fields.next()?, b'-')?;
    let permissions = fields.next()?;
    let offset = hexadecimal(fields.next()?)?;
    let device = pair(fields.next()?, b':')?;
    let inode = fields.next()?.iter().try_fold(0u64, |value, &byte| {
        byte.is_ascii_digit().then(|| value.wrapping_mul(10).wrapping_add(u64::from(byte - b'0')))
    })?;
    let name = fields.next().unwrap_or_default().trim_ascii_start();
    let &[r, w, x, share, ..] = permissions else { return None };
    let mut protection = libc::PROT_NONE;
    for (letter, set, bit) in [(r, b'r', libc::PROT_READ), (w, b'w', libc::PROT_WRITE), (x, b'x', libc::PROT_EXEC)] {
        if letter == set {
            protection |= bit;
        }
    }
    let kind = match name {
        b"[stack]" => Kind::Stack,
        _ if name.starts_with(b"/anon_hugepage") => Kind::Huge,
        _ if name.starts_with(b"[v") => Kind::Kernel,
        _ => Kind::Plain,
    };
    Some(Mapping {
        range: range.0 as usize..range.1 as usize,
        protection,
        shared: share == b's',
        offset,
        device: (device.0 as u32, device.1 as u32),
        inode,
        kind,
    })
}

fn pair(text: &[u8], separator: u8) -> Option<(u64, u64)> {
    let at = text.iter().position(|&byte| byte == separator)?;
    Some((hexadecimal(&text[..at])?, hexadecimal(&text[at + 1..])?))
}

fn hexadecimal(text: &[u8]) -> Option<u64> {
    if text.is_empty() || text.len() > 16 {
        return None;
    }
    text.iter().try_fold(0u64, |value, &byte| Some(value << 4 | u64::from((byte as char).to_digit(16)?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_become_mappings() {
        let stack = parse(b"7ffd1c000000-7ffd1c021000 rw-p 00000000 00:00 0                          [stack]").unwrap();
        assert_eq!(stack.range, 0x7ffd_1c00_0000..0x7ffd_1c02_1000);
        assert_eq!(stack.protection, libc::PROT_READ | libc::PROT_WRITE);
        assert_eq!((stack.shared, stack.inode, stack.kind), (false, 0, Kind::Stack));
        let file = parse(b"00400000-00452000 r-xs 00001000 fd:1f 173521 /tmp/a file [stack]").unwrap();
        assert_eq!(file.protection, libc::PROT_READ | libc::PROT_EXEC);
        assert_eq!((file.device, file.inode, file.offset), ((0xfd, 0x1f), 173_521, 0x1000));
        assert_eq!((file.shared, file.kind), (true, Kind::Plain));
        assert_eq!(
            parse(b"00400000-00600000 rw-p 00000000 00:10 5 /anon_hugepage (deleted)").unwrap().kind,
            Kind::Huge
        );
        assert_eq!(
            parse(b"ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0 [vsyscall]").unwrap().kind,
            Kind::Kernel
        );
    }

    #[test]
    fn other_text_is_refused() {
        for line in
            [&b""[..], b"x-y rw-p 0 0:0 0", b"1000 rw-p 0 0:0 0", b"1000-2000 rw 0 0:0 0", b"1000-2000 rw-p 0 0:0 z"]
        {
            assert_eq!(parse(line), None, "{}", String::from_utf8_lossy(line));
        }
    }

    #[test]
    fn own_memory_is_found_and_clipped() {
        let memory = vec![1u8; 1 << 20];
        let page = (memory.as_ptr() as usize).next_multiple_of(4096);
        let mappings = read(page..page + 8192).unwrap();
        assert_eq!(mappings.len(), 1);
        assert_eq!(mappings[0].range, page..page + 8192);
    }
}
