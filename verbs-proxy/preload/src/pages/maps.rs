//! What is mapped where.
//!
//! Linux 6.11 and later tell of one mapping at a time, by a descriptor that is kept; before, `/proc/self/maps` is read.

// UNSAFETY: asks the kernel by a structure of its own.
#![allow(unsafe_code)]

use super::PAGE;
use super::array::Array;
use super::kept::Kept;
use super::sys::{self, Identity};
use core::mem::MaybeUninit;
use core::ops::{ControlFlow, Range};

/// A mapping of this process, or the part of one that was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    pub start: usize,
    pub end: usize,
    /// `PROT_*`.
    pub protection: i32,
    pub shared: bool,
    /// Byte in the file where it starts.
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
    /// The file that it shows.
    pub fn identity(&self) -> Identity {
        Identity { device: self.device, inode: self.inode }
    }

    /// The part inside `range`, if there is one.
    pub fn clip(mut self, range: &Range<usize>) -> Option<Self> {
        let start = self.start.max(range.start);
        let end = self.end.min(range.end);
        if start >= end {
            return None;
        }
        self.offset += (start - self.start) as u64;
        (self.start, self.end) = (start, end);
        Some(self)
    }

    /// Its addresses.
    pub fn range(&self) -> Range<usize> {
        self.start..self.end
    }

    /// Bytes.
    pub fn length(&self) -> usize {
        self.end - self.start
    }
}

/// Puts the mappings inside `range` (addresses) into `mappings`, by address.
pub fn read(range: &Range<usize>, mappings: &mut Array<Mapping>) -> Result<(), i32> {
    visit(range, true, |mapping| {
        if let Some(mapping) = mapping.clip(range) {
            mappings.push(mapping);
        }
        ControlFlow::Continue(())
    })
}

/// Shows `each` the mappings that reach into `range`, whole, by address. What becomes one with what was shown already, as
/// mappings may while this goes on, is not shown twice. Without `names` they are [`Kind::Plain`] or
/// [`Kind::Huge`], which is cheaper where the kernel is asked. Allocates nothing, and opens nothing but what is kept.
pub fn visit(range: &Range<usize>, names: bool, mut each: impl FnMut(Mapping) -> ControlFlow<()>) -> Result<(), i32> {
    if let Some(file) = MAPS.get() {
        return ask(file, range, names, &mut each);
    }
    let file = sys::open(c"/proc/self/maps", libc::O_RDONLY | libc::O_CLOEXEC)?;
    let mut shown = 0;
    let result = for_each_line(file, |line| {
        let Some(mapping) = parse(line) else { return false };
        if mapping.start >= range.end {
            return true;
        }
        let Some(mapping) = mapping.clip(&(shown..usize::MAX)).filter(|mapping| range.start < mapping.end) else {
            return false;
        };
        shown = mapping.end;
        each(mapping).is_break()
    });
    sys::close(file);
    result
}

/// `/proc/self/maps`, if it can be asked.
pub static MAPS: Kept = Kept::new(|| {
    #[cfg(test)]
    if WITHOUT_QUERY.load(core::sync::atomic::Ordering::Relaxed) {
        return None;
    }
    let file = sys::open(c"/proc/self/maps", libc::O_RDONLY | libc::O_CLOEXEC).ok()?;
    let mut query = Query { size: size_of::<Query>() as u64, flags: QUERY_OR_NEXT, ..Query::default() };
    if query.ask(file).is_err() {
        sys::close(file);
        return None;
    }
    Some(file)
});

/// Opens what is kept.
pub fn open() {
    let _ = MAPS.get();
}

/// Closes it, in a forked child.
pub fn close() {
    MAPS.close();
}

#[cfg(test)]
pub static WITHOUT_QUERY: core::sync::atomic::AtomicBool = core::sync::atomic::AtomicBool::new(false);

/// In tests: with `without`, maps are read as text from now on.
#[cfg(test)]
pub fn without_query(without: bool) {
    WITHOUT_QUERY.store(without, core::sync::atomic::Ordering::Relaxed);
    if without {
        MAPS.refuse();
    } else {
        MAPS.allow();
    }
}

// include/uapi/linux/fs.h
const PROCMAP_QUERY: u64 = 0xc068_6611;
const QUERY_READABLE: u64 = 1 << 0;
const QUERY_WRITABLE: u64 = 1 << 1;
const QUERY_EXECUTABLE: u64 = 1 << 2;
const QUERY_SHARED: u64 = 1 << 3;
const QUERY_OR_NEXT: u64 = 1 << 4;

/// `struct procmap_query`.
#[repr(C)]
#[derive(Default)]
struct Query {
    size: u64,
    flags: u64,
    address: u64,
    start: u64,
    end: u64,
    permissions: u64,
    page_size: u64,
    offset: u64,
    inode: u64,
    major: u32,
    minor: u32,
    name_size: u32,
    build_id_size: u32,
    name: u64,
    build_id: u64,
}

const _: () = assert!(size_of::<Query>() == 0x68);

impl Query {
    fn ask(&mut self, file: i32) -> Result<(), i32> {
        // SAFETY: a `struct procmap_query` of the size that it names; the name's buffer, if any, is the caller's.
        unsafe { sys::ioctl(file, PROCMAP_QUERY, core::ptr::from_mut(self) as usize) }.map(drop)
    }
}

fn ask(
    file: i32,
    range: &Range<usize>,
    names: bool,
    each: &mut impl FnMut(Mapping) -> ControlFlow<()>,
) -> Result<(), i32> {
    let (mut shown, mut next) = (0, range.start);
    while next < range.end {
        let size = size_of::<Query>() as u64;
        let mut query = Query { size, flags: QUERY_OR_NEXT, address: next as u64, ..Query::default() };
        match query.ask(file) {
            Err(libc::ENOENT) => break,
            result => result?,
        }
        if query.start >= range.end as u64 {
            break;
        }
        let mut protection = libc::PROT_NONE;
        for (flag, bit) in
            [(QUERY_READABLE, libc::PROT_READ), (QUERY_WRITABLE, libc::PROT_WRITE), (QUERY_EXECUTABLE, libc::PROT_EXEC)]
        {
            if query.permissions & flag != 0 {
                protection |= bit;
            }
        }
        let kind = match query.page_size > PAGE as u64 {
            true => Kind::Huge,
            false if names && query.inode == 0 => name(file, query.start),
            false => Kind::Plain,
        };
        let mapping = Mapping {
            start: query.start as usize,
            end: query.end as usize,
            protection,
            shared: query.permissions & QUERY_SHARED != 0,
            offset: query.offset,
            device: (query.major, query.minor),
            inode: query.inode,
            kind,
        };
        let mapping = mapping.clip(&(shown..usize::MAX));
        (shown, next) = (query.end as usize, query.end as usize);
        if mapping.is_some_and(|mapping| each(mapping).is_break()) {
            break;
        }
    }
    Ok(())
}

/// What the name of the mapping at `address` tells. One that is longer than the buffer tells nothing.
fn name(file: i32, address: u64) -> Kind {
    let mut buffer = [MaybeUninit::<u8>::uninit(); 32];
    let mut query = Query {
        size: size_of::<Query>() as u64,
        address,
        name_size: buffer.len() as u32,
        name: buffer.as_mut_ptr() as u64,
        ..Query::default()
    };
    if query.ask(file).is_err() || query.name_size == 0 || query.name_size as usize > buffer.len() {
        return Kind::Plain;
    }
    // SAFETY: the kernel wrote so many bytes, the last of which ends the string.
    let name = unsafe { core::slice::from_raw_parts(buffer.as_ptr().cast::<u8>(), query.name_size as usize - 1) };
    kind(name)
}

fn kind(name: &[u8]) -> Kind {
    match name {
        b"[stack]" => Kind::Stack,
        _ if name.starts_with(b"/anon_hugepage") => Kind::Huge,
        _ if name.starts_with(b"[v") => Kind::Kernel,
        _ => Kind::Plain,
    }
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
    Some(Mapping {
        start: range.0 as usize,
        end: range.1 as usize,
        protection,
        shared: share == b's',
        offset,
        device: (device.0 as u32, device.1 as u32),
        inode,
        kind: kind(name),
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
        assert_eq!(stack.range(), 0x7ffd_1c00_0000..0x7ffd_1c02_1000);
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
        let mut mappings = Array::new();
        read(&(page..page + 8192), &mut mappings).unwrap();
        assert_eq!(mappings.len(), 1);
        assert_eq!(mappings[0].range(), page..page + 8192);
    }
}
