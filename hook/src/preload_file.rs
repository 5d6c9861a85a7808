//! Files of dynamic linkers, `/etc/ld.so.preload` of glibc's and `/etc/ld-musl-x86_64.path` of musl's: our line in front of the
//! image's own.

/// The directory of `/etc` in which the library is. Whoever sees `ld.so.preload` sees it: a chroot that has the same `/etc`, a
/// service with a `/dev` of its own.
pub const DIRECTORY: &str = "ld.so.ringfence";

/// The name by which the library is preloaded. A program with a shared AddressSanitizer wants that to be the first of its
/// libraries, and ends when it is not; it takes the first one's name for it, as the linker was told it. One with a static
/// AddressSanitizer ends when it finds such a name among the files that are mapped, whose own names those are: so a link has the
/// name, and the file has not.
pub const NAME: &str = "preload-like-libasan.so";

/// What `$PLATFORM` stands for in glibc's linker for x86-64, ever since 2.17, and in that for i386.
pub const PLATFORMS: [&str; 3] = ["x86_64", "haswell", "xeon_phi"];
/// See [`PLATFORMS`].
pub const PLATFORMS_I386: [&str; 4] = ["i686", "i586", "i486", "i386"];

/// The largest file of an image that is taken over.
pub const MAX_BYTES: usize = 64 * 1024;

/// Our line in `/etc/ld.so.preload`, of an image with i386 programs or without.
pub fn line(has_i386: bool) -> String {
    let platform = if has_i386 { "$PLATFORM/" } else { "" };
    format!("/etc/{DIRECTORY}/{platform}{NAME}")
}

/// The file with `line` first, followed by what the image had.
///
/// The image's text is kept byte for byte: glibc reads names separated by white space or colons, and comments, and what it
/// makes of odder input is the image's business. Ours stands first, so nothing in there can hide it.
pub fn merge(line: &str, image: &[u8]) -> Vec<u8> {
    let mut merged = Vec::with_capacity(line.len() + 1 + image.len());
    merged.extend_from_slice(line.as_bytes());
    merged.push(b'\n');
    merged.extend_from_slice(image);
    merged
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// As `do_preload` in glibc's rtld.c: comments out, then names between white space and colons.
    fn names(file: &[u8]) -> Vec<Vec<u8>> {
        file.split(|b| *b == b'\n')
            .flat_map(|line| {
                let end = line.iter().position(|b| *b == b'#').unwrap_or(line.len());
                line[..end].split(|b| b" \t:".contains(b))
            })
            .filter(|name| !name.is_empty())
            .map(<[u8]>::to_vec)
            .collect()
    }

    #[test]
    fn ours_is_alone_without_a_file() {
        assert_eq!(merge(&line(false), b""), b"/etc/ld.so.ringfence/preload-like-libasan.so\n");
        assert_eq!(merge(&line(true), b""), b"/etc/ld.so.ringfence/$PLATFORM/preload-like-libasan.so\n");
    }

    #[test]
    fn a_comment_without_newline_hides_nothing() {
        assert_eq!(names(&merge("/a", b"# x")), [b"/a".to_vec()]);
    }

    proptest! {
        #[test]
        fn ours_first_then_the_images(image in proptest::collection::vec(prop_oneof![Just(b' '), Just(b'\n'), Just(b':'), Just(b'#'), any::<u8>()], 0..200)) {
            let mut expected = vec![b"/a".to_vec()];
            expected.extend(names(&image));
            prop_assert_eq!(names(&merge("/a", &image)), expected);
        }
    }
}
