//! What an image has that our library meets: its own libibverbs, and dynamic linkers of other kinds.

use crate::elf::Offers;
use crate::rootfs::{Kind, Place};
use std::collections::HashSet;

/// The library's name to dynamic linkers.
pub const NAME: &str = "libibverbs.so.1";
/// How the names of all its files begin: the library's, and the link's that compilers and `dlopen` use.
const BEGIN: &str = "libibverbs.so";

/// Where libraries for x86-64 are: Debian's directories, those of others, and what administrators add.
const DIRECTORIES: [&str; 9] = [
    "lib/x86_64-linux-gnu",
    "usr/lib/x86_64-linux-gnu",
    "lib64",
    "usr/lib64",
    "lib",
    "usr/lib",
    "usr/local/lib",
    "usr/local/lib64",
    "usr/local/lib/x86_64-linux-gnu",
];
/// Below each of them, libraries for processors that can do more.
const BETTER: [&str; 4] = ["", "/glibc-hwcaps/x86-64-v2", "/glibc-hwcaps/x86-64-v3", "/glibc-hwcaps/x86-64-v4"];
/// What glibc's linker goes by for all other directories.
const CACHE: &str = "etc/ld.so.cache";
const MAX_CACHE: usize = 8 << 20;
/// The most directories that the cache or the container's `LD_LIBRARY_PATH` may add, each.
const MAX_DIRECTORIES: usize = 64;
/// The most entries of a directory that are looked at.
const MAX_ENTRIES: usize = 1 << 15;
/// The largest libibverbs; with all that debuggers want it has some megabytes.
pub const MAX_LIBRARY: usize = 16 << 20;
/// The most files that are looked at for libraries to replace.
const MAX_LIBRARIES: usize = 16;

/// glibc's dynamic linker for i386, wherever the rest of it is.
const I386: &str = "lib/ld-linux.so.2";
/// musl's, which is also its C library.
const MUSL: &str = "lib/ld-musl-x86_64.so.1";
/// What musl searches if nothing says otherwise, as the text stands in it.
const MUSL_DEFAULT: &[u8] = b"/lib:/usr/local/lib:/usr/lib";
const MAX_MUSL: usize = 16 << 20;

/// A libibverbs of the image's own.
pub struct Library {
    /// The file itself, behind all links.
    pub place: Place,
    /// What programs may want of it.
    pub offers: Offers,
}

/// The image's libraries for x86-64 that are called [`NAME`]: in the directories that are searched without a word, in those of
/// `ld.so.cache`, and in `more`.
pub fn libraries(root: &Place, more: &[String]) -> Vec<Library> {
    let mut directories: Vec<String> =
        DIRECTORIES.iter().flat_map(|directory| BETTER.map(|better| format!("{directory}{better}"))).collect();
    directories.extend(cached(root));
    directories.extend(more.iter().take(MAX_DIRECTORIES).cloned());
    let (mut seen, mut libraries) = (HashSet::new(), Vec::new());
    for directory in directories {
        for place in files(root, &directory) {
            // Those that are none count as well: an image could be full of large ones.
            if seen.len() < MAX_LIBRARIES
                && place.inode().is_ok_and(|inode| seen.insert(inode))
                && let Ok(bytes) = place.read(MAX_LIBRARY)
                && let Some(offers) = Offers::of(&bytes).filter(|offers| offers.name == NAME)
            {
                libraries.push(Library { place, offers });
            }
        }
    }
    libraries
}

/// The files in `directory` that the library's names lead to; its other versions too, if there are any.
fn files(root: &Place, directory: &str) -> Vec<Place> {
    let find = |name: &str| root.follow(&format!("{directory}/{name}"), Kind::File);
    let mut files: Vec<_> = [NAME, BEGIN].into_iter().filter_map(find).collect();
    if !files.is_empty() {
        let names = root.follow(directory, Kind::Directory).and_then(|directory| directory.names(MAX_ENTRIES).ok());
        let versions = names.unwrap_or_default().into_iter().filter(|name| name.starts_with(NAME) && name != NAME);
        files.extend(versions.take(MAX_LIBRARIES).filter_map(|name| find(&name)));
    }
    files
}

/// The directories in which `ld.so.cache` has the library. All its formats name files by absolute paths, each with a zero
/// behind it, and a path that is not there does no harm; so nothing else of it need be understood.
fn cached(root: &Place) -> Vec<String> {
    let Some(bytes) = root.follow(CACHE, Kind::File).and_then(|cache| cache.read(MAX_CACHE).ok()) else {
        return Vec::new();
    };
    let paths = bytes.split(|byte| *byte == 0).filter_map(|text| {
        let (directory, name) =
            std::str::from_utf8(text.get(text.iter().position(|byte| *byte == b'/')?..)?).ok()?.rsplit_once('/')?;
        name.starts_with(BEGIN).then(|| directory.trim_start_matches('/').to_owned())
    });
    let mut directories: Vec<String> = Vec::new();
    for directory in paths.filter(|directory| !directory.is_empty()) {
        if directories.len() < MAX_DIRECTORIES && !directories.contains(&directory) {
            directories.push(directory);
        }
    }
    directories
}

/// Whether i386 programs may run here that are linked dynamically.
pub fn has_i386(root: &Place) -> bool {
    root.follow(I386, Kind::File).is_some()
}

/// The directories that the image's musl searches for libraries without a file that names others; `None` if there is no musl.
pub fn musl_search_path(root: &Place) -> Option<Result<&'static [u8], &'static str>> {
    let loader = root.follow(MUSL, Kind::File)?;
    Some(match loader.read(MAX_MUSL) {
        Ok(bytes) if bytes.split(|byte| *byte == 0).any(|text| text == MUSL_DEFAULT) => Ok(MUSL_DEFAULT),
        Ok(_) => Err("its search path is not musl's own"),
        Err(_) => Err("it cannot be read"),
    })
}

#[cfg(test)]
mod tests;
