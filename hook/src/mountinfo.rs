//! `/proc/self/mountinfo`.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// The mounts of the namespace that it was read in.
pub struct Mountinfo(Vec<u8>);

impl Mountinfo {
    /// Reads it.
    pub fn read() -> io::Result<Self> {
        std::fs::read("/proc/self/mountinfo").map(Self)
    }

    fn lines(&self) -> impl Iterator<Item = Vec<&[u8]>> {
        self.0.split(|b| *b == b'\n').map(|line| line.split(|b| *b == b' ').collect())
    }

    /// Whether mounts on the mount `id` propagate to others; also if there is no such mount.
    pub fn is_shared(&self, id: u64) -> bool {
        let id = id.to_string();
        let mount = self.lines().find(|fields| fields[0] == id.as_bytes());
        // Optional fields stand between the sixth and a lone hyphen.
        mount.is_none_or(|fields| {
            fields.iter().skip(6).take_while(|field| **field != b"-").any(|field| field.starts_with(b"shared:"))
        })
    }

    /// Where the namespace is mounted that the kernel calls `name`, such as `net:[4026531840]`.
    pub fn of_namespace(&self, name: &str) -> Vec<PathBuf> {
        let is_it = |fields: &Vec<&[u8]>| {
            let kind = fields.iter().skip_while(|field| **field != b"-").nth(1);
            fields.get(3) == Some(&name.as_bytes()) && kind == Some(&&b"nsfs"[..])
        };
        self.lines().filter(is_it).filter_map(|fields| Some(unescape(fields.get(4)?).into())).collect()
    }

    /// What is mounted below `directory`, relative to it and without what is mounted below that.
    pub fn below(&self, directory: &Path) -> Vec<PathBuf> {
        let mut found: Vec<PathBuf> = Vec::new();
        for fields in self.lines() {
            let Some(path) = fields.get(4).map(|field| unescape(field)) else { continue };
            let Ok(path) = Path::new(&path).strip_prefix(directory) else { continue };
            if !path.as_os_str().is_empty() && !found.iter().any(|outer| path.starts_with(outer)) {
                found.push(path.to_owned());
            }
        }
        found
    }
}

/// Undoes the octal escapes of space, tab, newline and backslash.
fn unescape(field: &[u8]) -> OsString {
    let mut path = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, tail @ ..] = rest {
        let octal = tail.get(..3).filter(|_| *first == b'\\').and_then(|digits| std::str::from_utf8(digits).ok());
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                path.push(byte);
                rest = &tail[3..];
            }
            None => {
                path.push(*first);
                rest = tail;
            }
        }
    }
    OsString::from_vec(path)
}

/// Names what `descriptor` stands for where the kernel wants a path; never resolved again, whatever its own path is now.
pub fn descriptor_path(descriptor: &OwnedFd) -> PathBuf {
    format!("/proc/self/fd/{}", descriptor.as_raw_fd()).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
23 22 0:5 / /root\\040fs rw master:1 - ext4 x rw
24 23 0:6 / /root\\040fs/etc rw,relatime - ext4 x rw
25 24 0:6 /h /root\\040fs/etc/hosts ro - ext4 x rw
26 24 0:6 /d /root\\040fs/etc/d rw shared:7 master:2 - ext4 x rw
27 26 0:6 /e /root\\040fs/etc/d/e rw - ext4 x rw
28 22 0:6 / /root\\040fs/etcetera rw - ext4 x rw
";

    #[test]
    fn shared_mounts_are_told_apart() {
        let mounts = Mountinfo(TEXT.into());
        let shared: Vec<u64> = (22..=29).filter(|id| mounts.is_shared(*id)).collect();
        // 29 does not exist.
        assert_eq!(shared, [22, 26, 29]);
    }

    #[test]
    fn namespaces_are_found_where_they_are_mounted() {
        let text = "\
29 22 0:4 net:[4026532001] /run/netns/a\\040b rw shared:9 - nsfs nsfs rw
30 22 0:4 net:[4026532002] /run/netns/c rw - nsfs nsfs rw
31 22 0:6 net:[4026532001] /tmp/no rw - ext4 x rw
";
        let mounts = Mountinfo(text.into());
        assert_eq!(mounts.of_namespace("net:[4026532001]"), [PathBuf::from("/run/netns/a b")]);
        assert_eq!(mounts.of_namespace("net:[4026532003]"), Vec::<PathBuf>::new());
    }

    #[test]
    fn only_the_outermost_mounts_below_are_listed() {
        let below = Mountinfo(TEXT.into()).below(Path::new("/root fs/etc"));
        assert_eq!(below, [PathBuf::from("hosts"), PathBuf::from("d")]);
    }

    #[test]
    fn escapes() {
        for (field, expected) in
            [("a\\040b", "a b"), ("a\\134040", "a\\040"), ("a\\", "a\\"), ("\\012", "\n"), ("\\9", "\\9")]
        {
            assert_eq!(unescape(field.as_bytes()), expected);
        }
    }
}
