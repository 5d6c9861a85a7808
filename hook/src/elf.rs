//! What a shared library offers to others: its name, and its symbols with the versions that they have.
//!
//! The files are an image's. Every offset in them is checked, every list ends, and what is not understood is no library. Only
//! what the dynamic linker goes by is read (segments and the dynamic section): sections may be stripped, or lie.

use std::collections::{BTreeSet, HashMap};

/// The most symbols that a library may have; libibverbs has some hundreds.
const MAX_SYMBOLS: usize = 1 << 14;
/// The most names that all of them may take together, so that a file cannot have one name counted ever again.
const MAX_TEXT: usize = 1 << 20;

const HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
const DYNAMIC_ENTRY: usize = 16;
const SYMBOL: usize = 24;

/// `DT_*` of `<elf.h>`.
mod tag {
    pub const NULL: u64 = 0;
    pub const HASH: u64 = 4;
    pub const STRTAB: u64 = 5;
    pub const SYMTAB: u64 = 6;
    pub const STRSZ: u64 = 10;
    pub const SONAME: u64 = 14;
    pub const GNU_HASH: u64 = 0x6fff_fef5;
    pub const VERSYM: u64 = 0x6fff_fff0;
    pub const VERDEF: u64 = 0x6fff_fffc;
    pub const VERDEFNUM: u64 = 0x6fff_fffd;
    /// `DT_CHECKSUM`, of which the dynamic linkers take no notice.
    pub const CHECKSUM: u64 = 0x6fff_fdf8;
}

/// What others can bind to.
#[derive(Debug, PartialEq, Eq)]
pub struct Offers {
    /// The name that dependencies give it, and by which it is known once it is loaded.
    pub name: String,
    /// Defined symbols and their version nodes, `name@node`; nodes by themselves, `@node`.
    pub symbols: BTreeSet<String>,
}

impl Offers {
    /// What the file `bytes` offers; `None` if it is not a shared library for x86-64 with a name.
    pub fn of(bytes: &[u8]) -> Option<Self> {
        Library::parse(bytes)?.offers()
    }
}

/// Takes its name from the library `bytes`: the dynamic linker then knows it by its path only, and who depends on a library of
/// that name gets another. `None` if it has none.
pub fn take_name(bytes: &mut [u8]) -> Option<()> {
    let (at, _) = Library::parse(bytes)?.entries().find(|(_, (tag, _))| *tag == tag::SONAME)?;
    bytes.get_mut(at..at + 8)?.copy_from_slice(&tag::CHECKSUM.to_le_bytes());
    Some(())
}

/// A file that may be one.
struct Library<'a> {
    bytes: &'a [u8],
    /// Address, offset in the file and length there of what is loaded.
    segments: Vec<(u64, u64, u64)>,
    /// Offset of the dynamic section, and its length.
    dynamic: (usize, usize),
}

impl<'a> Library<'a> {
    fn parse(bytes: &'a [u8]) -> Option<Self> {
        // 64 bits, little endian; a shared object; x86-64.
        let is_ours = bytes.len() >= HEADER
            && bytes.starts_with(b"\x7fELF\x02\x01")
            && (u16_at(bytes, 16)?, u16_at(bytes, 18)?) == (3, 62)
            && usize::from(u16_at(bytes, 54)?) == PROGRAM_HEADER;
        if !is_ours {
            return None;
        }
        let headers = bytes.get(usize::try_from(u64_at(bytes, 32)?).ok()?..)?;
        let (mut segments, mut dynamic) = (Vec::new(), None);
        for header in headers.chunks_exact(PROGRAM_HEADER).take(u16_at(bytes, 56)?.into()) {
            let (offset, address, length) = (u64_at(header, 8)?, u64_at(header, 16)?, u64_at(header, 32)?);
            match u32_at(header, 0)? {
                1 => segments.push((address, offset, length)),
                2 => dynamic = Some((usize::try_from(offset).ok()?, usize::try_from(length).ok()?)),
                _ => {}
            }
        }
        Some(Self { bytes, segments, dynamic: dynamic? })
    }

    /// The dynamic section's entries, tag and value, each with its place in the file.
    fn entries(&self) -> impl Iterator<Item = (usize, (u64, u64))> + '_ {
        let (start, length) = self.dynamic;
        let section = self.bytes.get(start..).unwrap_or_default();
        let entries = section[..length.min(section.len())].chunks_exact(DYNAMIC_ENTRY).enumerate();
        let entries = entries.map_while(move |(i, entry)| {
            let entry = (u64_at(entry, 0)?, u64_at(entry, 8)?);
            (entry.0 != tag::NULL).then_some((start + i * DYNAMIC_ENTRY, entry))
        });
        // More are in no library, and would only be repetitions.
        entries.take(512)
    }

    /// What is loaded at `address`, to the end of its segment.
    fn at(&self, address: u64) -> Option<&'a [u8]> {
        let (start, offset, length) = *self
            .segments
            .iter()
            .find(|(start, _, length)| address.checked_sub(*start).is_some_and(|o| o < *length))?;
        let begin = usize::try_from(offset.checked_add(address - start)?).ok()?;
        let end = usize::try_from(offset.checked_add(length)?).ok()?;
        self.bytes.get(begin..end.min(self.bytes.len()))
    }

    fn offers(&self) -> Option<Offers> {
        let dynamic: HashMap<u64, u64> = self.entries().map(|(_, entry)| entry).collect();
        let table = |tag: u64| dynamic.get(&tag).and_then(|address| self.at(*address));
        let strings = table(tag::STRTAB)?;
        let strings = strings.get(..usize::try_from(*dynamic.get(&tag::STRSZ)?).ok()?)?;
        let name = text_at(strings, *dynamic.get(&tag::SONAME)?)?.to_owned();

        let count = match (table(tag::HASH), table(tag::GNU_HASH)) {
            (Some(hash), _) => u32_at(hash, 4)? as usize,
            (None, Some(hash)) => count_by_gnu_hash(hash)?,
            (None, None) => return None,
        };
        if count > MAX_SYMBOLS {
            return None;
        }
        let nodes = match table(tag::VERDEF) {
            Some(definitions) => nodes(definitions, *dynamic.get(&tag::VERDEFNUM)?, strings)?,
            None => HashMap::new(),
        };
        let versions = table(tag::VERSYM);
        let mut symbols: BTreeSet<String> = nodes.values().map(|node| format!("@{node}")).collect();
        let (table, mut text) = (table(tag::SYMTAB)?, 0);
        for i in 1..count {
            let symbol = table.get(i * SYMBOL..(i + 1) * SYMBOL)?;
            let (name, binding, section) = (u32_at(symbol, 0)?, symbol[4] >> 4, u16_at(symbol, 6)?);
            // Global, weak and unique ones that are defined here.
            if !matches!(binding, 1 | 2 | 10) || section == 0 {
                continue;
            }
            let name = text_at(strings, name.into())?;
            let version = versions.map_or(Some(1), |versions| u16_at(versions, i * 2))? & 0x7fff;
            let node = nodes.get(&version).copied().unwrap_or_default();
            // What linkers put there by themselves, and the nodes again, as absolute symbols.
            if name != node && !matches!(name, "_init" | "_fini" | "_edata" | "_end" | "__bss_start") {
                text += name.len() + node.len();
                if text > MAX_TEXT {
                    return None;
                }
                symbols.insert(format!("{name}@{node}"));
            }
        }
        Some(Offers { name, symbols })
    }
}

/// The number of symbols: one more than the last one's in any chain.
fn count_by_gnu_hash(hash: &[u8]) -> Option<usize> {
    let word = |at: usize| u32_at(hash, at).map(|word| word as usize);
    let (buckets, first, blooms) = (word(0)?, word(4)?, word(8)?);
    let start = blooms.checked_mul(8)?.checked_add(16)?;
    let chains = buckets.checked_mul(4)?.checked_add(start)?;
    let last = hash.get(start..chains)?.chunks_exact(4).filter_map(|word| u32_at(word, 0)).max().unwrap_or(0) as usize;
    if last < first {
        return Some(first);
    }
    let chain = hash.get((last - first).checked_mul(4)?.checked_add(chains)?..)?;
    let rest = chain.chunks_exact(4).position(|word| word[0] & 1 == 1)?;
    last.checked_add(rest)?.checked_add(1)
}

/// The names of version definitions by their numbers, without the library's own.
fn nodes<'a>(definitions: &[u8], count: u64, strings: &'a [u8]) -> Option<HashMap<u16, &'a str>> {
    let (mut nodes, mut at) = (HashMap::new(), 0_usize);
    for _ in 0..count.min(1 << 12) {
        let definition = definitions.get(at..)?;
        let (flags, number, name) = (u16_at(definition, 2)?, u16_at(definition, 4)?, u32_at(definition, 12)?);
        if flags & 1 == 0 {
            let name = definition.get(usize::try_from(name).ok()?..).and_then(|auxiliary| u32_at(auxiliary, 0))?;
            nodes.insert(number & 0x7fff, text_at(strings, name.into())?);
        }
        match u32_at(definition, 16)? {
            0 => break,
            next => at = at.checked_add(next as usize)?,
        }
    }
    Some(nodes)
}

/// The string that begins at `at`; none has more than 255 bytes.
fn text_at(strings: &[u8], at: u64) -> Option<&str> {
    let rest = strings.get(usize::try_from(at).ok()?..)?;
    let end = rest.iter().take(256).position(|byte| *byte == 0)?;
    std::str::from_utf8(&rest[..end]).ok()
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..at.checked_add(2)?).map(|bytes| u16::from_le_bytes(bytes.try_into().expect("two bytes")))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at.checked_add(4)?).map(|bytes| u32::from_le_bytes(bytes.try_into().expect("four bytes")))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..at.checked_add(8)?).map(|bytes| u64::from_le_bytes(bytes.try_into().expect("eight bytes")))
}

#[cfg(test)]
pub(crate) mod tests;
