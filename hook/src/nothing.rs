//! A shared object for 32-bit programs with nothing in it.
//!
//! The dynamic linker reads one `/etc/ld.so.preload` for the programs of all architectures, and says for each start of an i386
//! program that ours is of the wrong class. So in images with its loader the line has `$PLATFORM` in it, which leads that one
//! here.

/// A part of the file: one segment is all of it, readable and writable, since the linker writes into dynamic sections.
const HEADER: u32 = 52;
const PROGRAM_HEADERS: u32 = 3;
const DYNAMIC: u32 = HEADER + PROGRAM_HEADERS * 32;
const DYNAMIC_LENGTH: u32 = 7 * 8;
const HASH: u32 = DYNAMIC + DYNAMIC_LENGTH;
const SYMBOLS: u32 = HASH + 4 * 4;
const STRINGS: u32 = SYMBOLS + 16;
/// Not libibverbs.so.1, which programs would be content with.
const TEXT: &[u8] = b"\0ringfence-nothing.so\0";
const END: u32 = STRINGS + TEXT.len() as u32;

/// The file.
pub fn i386() -> Vec<u8> {
    // ELF for 32 bits, little endian, version 1; a shared object for i386.
    let mut file = b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0\x03\0\x03\0".to_vec();
    let words = |file: &mut Vec<u8>, words: &[u32]| file.extend(words.iter().flat_map(|word| word.to_le_bytes()));
    // Version, entry, program headers, sections, flags.
    words(&mut file, &[1, 0, HEADER, 0, 0]);
    // Sizes and numbers of headers: its own, of programs, of sections.
    for half in [HEADER as u16, 32, PROGRAM_HEADERS as u16, 40, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    // Type, offset, address twice, length twice, flags (4 to read, 2 to write), alignment: loaded; dynamic; the stack, which need
    // not be executable.
    words(&mut file, &[1, 0, 0, 0, END, END, 6, 0x1000]);
    words(&mut file, &[2, DYNAMIC, DYNAMIC, DYNAMIC, DYNAMIC_LENGTH, DYNAMIC_LENGTH, 6, 4]);
    words(&mut file, &[0x6474_e551, 0, 0, 0, 0, 0, 6, 16]);
    // Name, hash table, strings, symbols, length of the strings, of a symbol.
    words(&mut file, &[14, 1, 4, HASH, 5, STRINGS, 6, SYMBOLS, 10, TEXT.len() as u32, 11, 16, 0, 0]);
    // One bucket, one chain, both empty; the symbol that is none.
    words(&mut file, &[1, 1, 0, 0]);
    words(&mut file, &[0; 4]);
    file.extend(TEXT);
    file
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn it_is_as_it_says() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), i386()).unwrap();
        assert_eq!(i386().len(), END as usize);
        let output = Command::new("readelf").args(["--wide", "--all"]).arg(file.path()).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert_eq!(String::from_utf8_lossy(&output.stderr), "");
        for expected in
            ["ELF32", "DYN (Shared object file)", "Intel 80386", "soname: [ringfence-nothing.so]", "GNU_STACK"]
        {
            assert!(text.contains(expected), "{expected}: {text}");
        }
    }
}
