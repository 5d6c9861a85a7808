//! `/etc/ld.so.preload`: our line in front of the image's own.

/// The largest file of an image that is taken over.
pub const MAX_BYTES: usize = 64 * 1024;

/// The file with `library` first, followed by what the image had.
///
/// The image's text is kept byte for byte: glibc reads names separated by white space or colons, and comments, and what it
/// makes of odder input is the image's business. Ours stands first, so nothing in there can hide it.
pub fn merge(library: &str, image: &[u8]) -> Vec<u8> {
    let mut merged = Vec::with_capacity(library.len() + 1 + image.len());
    merged.extend_from_slice(library.as_bytes());
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
        assert_eq!(merge("/dev/ringfence/libibverbs.so.1", b""), b"/dev/ringfence/libibverbs.so.1\n");
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
