//! What a shared library offers to others: its name, and its symbols with the versions that they have.
//!
//! The files are an image's. Every offset in them is checked, every list ends, and what is not understood is no library. Only
//! what the dynamic linker goes by is read (segments and the dynamic section): sections may be stripped, or lie.

use object::LittleEndian as Little;
use object::elf::{self, Dyn64, FileHeader64, ProgramHeader64, Sym64, Verdaux, Verdef, Versym};
use object::pod::{from_bytes, slice_from_bytes};
use object::read::StringTable;
use object::read::elf::{Dyn, FileHeader, GnuHashTable, HashTable, ProgramHeader, Sym};
use std::collections::{BTreeSet, HashMap};

/// The most symbols that a library may have; libibverbs has some hundreds.
const MAX_SYMBOLS: usize = 1 << 14;
/// The most names that all of them may take together, so that a file cannot have one name counted ever again.
const MAX_TEXT: usize = 1 << 20;
/// More entries of the dynamic section, or version nodes, are in no library, and would only be repetitions.
const MAX_ENTRIES: usize = 512;
const MAX_NODES: usize = 1 << 12;
/// No name is longer.
const MAX_NAME: usize = 255;
/// `DT_CHECKSUM`, of which the dynamic linkers take no notice.
const CHECKSUM: u64 = 0x6fff_fdf8;

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
    let library = Library::parse(bytes)?;
    let index = library.entries().position(|(tag, _)| tag == u64::from(elf::DT_SONAME))?;
    let at = library.dynamic_at.checked_add(index.checked_mul(size_of::<Dyn64<Little>>())?)?;
    bytes.get_mut(at..at.checked_add(8)?)?.copy_from_slice(&CHECKSUM.to_le_bytes());
    Some(())
}

/// A file that may be one.
struct Library<'a> {
    bytes: &'a [u8],
    segments: &'a [ProgramHeader64<Little>],
    dynamic: &'a [Dyn64<Little>],
    /// Where that is in the file.
    dynamic_at: usize,
}

impl<'a> Library<'a> {
    fn parse(bytes: &'a [u8]) -> Option<Self> {
        let header = FileHeader64::<Little>::parse(bytes).ok()?;
        header.endian().ok()?;
        if (header.e_type(Little), header.e_machine(Little)) != (elf::ET_DYN, elf::EM_X86_64) {
            return None;
        }
        let segments = header.program_headers(Little, bytes).ok()?;
        let dynamic = segments.iter().find(|segment| segment.p_type(Little) == elf::PT_DYNAMIC)?;
        let dynamic_at = usize::try_from(dynamic.p_offset(Little)).ok()?;
        Some(Self { bytes, segments, dynamic: dynamic.dynamic(Little, bytes).ok()??, dynamic_at })
    }

    /// The dynamic section's entries, tag and value.
    fn entries(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let entries = self.dynamic.iter().map(|entry| (entry.d_tag(Little), entry.d_val(Little)));
        entries.take_while(|(tag, _)| *tag != u64::from(elf::DT_NULL)).take(MAX_ENTRIES)
    }

    /// What is loaded at `address`, to the end of its segment.
    fn at(&self, address: u64) -> Option<&'a [u8]> {
        let loaded = self.segments.iter().filter(|segment| segment.p_type(Little) == elf::PT_LOAD);
        let within = |segment: &&ProgramHeader64<Little>| {
            address.checked_sub(segment.p_vaddr(Little)).is_some_and(|ahead| ahead < segment.p_filesz(Little))
        };
        let segment = loaded.into_iter().find(within)?;
        let ahead = usize::try_from(address - segment.p_vaddr(Little)).ok()?;
        // One that ends beyond the file is as long as that.
        let begin = usize::try_from(segment.p_offset(Little)).ok()?;
        let end = begin.saturating_add(usize::try_from(segment.p_filesz(Little)).ok()?).min(self.bytes.len());
        self.bytes.get(begin..end)?.get(ahead..)
    }

    fn offers(&self) -> Option<Offers> {
        let dynamic: HashMap<u64, u64> = self.entries().collect();
        let value = |tag: u32| dynamic.get(&tag.into()).copied();
        let table = |tag: u32| value(tag).and_then(|address| self.at(address));
        let strings = table(elf::DT_STRTAB)?.get(..usize::try_from(value(elf::DT_STRSZ)?).ok()?)?;
        let strings = StringTable::new(strings, 0, strings.len() as u64);
        let text = |at: u32| {
            let name = std::str::from_utf8(strings.get(at).ok()?).ok()?;
            (name.len() <= MAX_NAME).then_some(name)
        };
        let name = text(u32::try_from(value(elf::DT_SONAME)?).ok()?)?.to_owned();
        let count = match (table(elf::DT_HASH), table(elf::DT_GNU_HASH)) {
            (Some(hash), _) => HashTable::<FileHeader64<Little>>::parse(Little, hash).ok()?.symbol_table_length(),
            (None, Some(hash)) => count_by_gnu_hash(hash)?,
            (None, None) => return None,
        };
        let count = usize::try_from(count).ok().filter(|count| *count <= MAX_SYMBOLS)?;
        let mut nodes = HashMap::new();
        if let Some(definitions) = table(elf::DT_VERDEF) {
            let mut at = 0_usize;
            for _ in 0..value(elf::DT_VERDEFNUM)?.min(MAX_NODES as u64) {
                let (definition, _) = from_bytes::<Verdef<Little>>(definitions.get(at..)?).ok()?;
                // Not the library's own.
                if definition.vd_flags.get(Little) & elf::VER_FLG_BASE == 0 {
                    let first = at.checked_add(definition.vd_aux.get(Little) as usize)?;
                    let (named, _) = from_bytes::<Verdaux<Little>>(definitions.get(first..)?).ok()?;
                    nodes
                        .insert(definition.vd_ndx.get(Little) & elf::VERSYM_VERSION, text(named.vda_name.get(Little))?);
                }
                match definition.vd_next.get(Little) {
                    0 => break,
                    next => at = at.checked_add(next as usize)?,
                }
            }
        }
        let versions = match table(elf::DT_VERSYM) {
            Some(versions) => slice_from_bytes::<Versym<Little>>(versions, count).ok()?.0,
            None => &[],
        };
        let (listed, _) = slice_from_bytes::<Sym64<Little>>(table(elf::DT_SYMTAB)?, count).ok()?;
        let mut symbols: BTreeSet<String> = nodes.values().map(|node| format!("@{node}")).collect();
        let mut length = 0;
        for (i, symbol) in listed.iter().enumerate().skip(1) {
            // Global, weak and unique ones that are defined here.
            let bound = matches!(symbol.st_bind(), elf::STB_GLOBAL | elf::STB_WEAK | elf::STB_GNU_UNIQUE);
            if !bound || symbol.is_undefined(Little) {
                continue;
            }
            let name = text(symbol.st_name(Little))?;
            let version = versions.get(i).map_or(1, |version| version.0.get(Little) & elf::VERSYM_VERSION);
            let node = nodes.get(&version).copied().unwrap_or_default();
            // What linkers put there by themselves, and the nodes again, as absolute symbols.
            if name != node && !matches!(name, "_init" | "_fini" | "_edata" | "_end" | "__bss_start") {
                length += name.len() + node.len();
                if length > MAX_TEXT {
                    return None;
                }
                symbols.insert(format!("{name}@{node}"));
            }
        }
        Some(Offers { name, symbols })
    }
}

/// The number of symbols: one more than the last one's in any chain.
fn count_by_gnu_hash(hash: &[u8]) -> Option<u32> {
    let hash = GnuHashTable::<FileHeader64<Little>>::parse(Little, hash).ok()?;
    // Where there are none, those before the first that is hashed.
    Some(hash.symbol_table_length(Little).unwrap_or_else(|| hash.symbol_base()))
}

#[cfg(test)]
pub(crate) mod tests;
