use super::*;
use crate::elf::tests::compile;
use std::os::unix::fs::symlink;
use std::sync::OnceLock;

/// A root file system in a directory.
struct Root(tempfile::TempDir);

impl Root {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn write(&self, path: &str, content: &[u8]) -> &Self {
        let path = self.0.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
        self
    }

    fn link(&self, path: &str, target: &str) -> &Self {
        let path = self.0.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        symlink(target, path).unwrap();
        self
    }

    fn place(&self) -> Place {
        Place::root(self.0.path()).unwrap()
    }

    fn found(&self, more: &[&str]) -> Vec<String> {
        let more: Vec<_> = more.iter().map(|directory| (*directory).to_owned()).collect();
        let mut paths: Vec<_> = libraries(&self.place(), &more).into_iter().map(|found| found.place.path).collect();
        paths.sort();
        paths
    }
}

/// Of the right kind.
fn library() -> &'static [u8] {
    static LIBRARY: OnceLock<Vec<u8>> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        compile("int a(void) { return 1; }", "IBVERBS_1.1 { global: a; local: *; };", &["-Wl,-soname,libibverbs.so.1"])
    })
}

#[test]
fn each_file_is_found_once_by_whatever_links_lead_to_it() {
    let root = Root::new();
    root.link("lib", "usr/lib").write("usr/lib/x86_64-linux-gnu/libibverbs.so.1.14.44.0", library());
    root.link("usr/lib/x86_64-linux-gnu/libibverbs.so.1", "libibverbs.so.1.14.44.0");
    root.link("usr/lib/x86_64-linux-gnu/libibverbs.so", "/usr/lib/x86_64-linux-gnu/libibverbs.so.1");
    assert_eq!(root.found(&[]), ["lib/x86_64-linux-gnu/libibverbs.so.1"]);
    root.write("usr/lib/x86_64-linux-gnu/libibverbs.so.1.1.16", library());
    root.write("usr/lib/x86_64-linux-gnu/glibc-hwcaps/x86-64-v3/libibverbs.so.1", library());
    root.write("usr/local/lib/libibverbs.so", library());
    assert_eq!(
        root.found(&[]),
        [
            "lib/x86_64-linux-gnu/glibc-hwcaps/x86-64-v3/libibverbs.so.1",
            "lib/x86_64-linux-gnu/libibverbs.so.1",
            "lib/x86_64-linux-gnu/libibverbs.so.1.1.16",
            "usr/local/lib/libibverbs.so",
        ]
    );
}

#[test]
fn other_directories_are_those_of_the_cache_and_of_the_container_s_environment() {
    let root = Root::new();
    root.write("opt/ofed/lib/libibverbs.so.1", library()).write("opt/conda/lib/libibverbs.so.1", library());
    assert_eq!(root.found(&[]), [""; 0]);
    assert_eq!(root.found(&["opt/conda/lib", "nowhere", "", "../.."]), ["opt/conda/lib/libibverbs.so.1"]);
    root.write(
        "etc/ld.so.cache",
        b"glibc-ld.so.cache1.1\x01\0\0\0x\0libibverbs.so.1\0/opt/ofed/lib/libibverbs.so.1\0/x\0",
    );
    assert_eq!(root.found(&[]), ["opt/ofed/lib/libibverbs.so.1"]);
    root.write("etc/ld.so.cache", &[b"/libibverbs.so\0".repeat(100_000), b"/".repeat(5000)].concat());
    assert_eq!(root.found(&[]), [""; 0]);
}

#[test]
fn what_only_has_the_name_is_left_alone() {
    let mut i386 = library().to_vec();
    (i386[4], i386[18]) = (1, 3);
    let mut arm = library().to_vec();
    arm[18] = 183;
    let other = compile("int a(void) { return 1; }", "X { global: a; local: *; };", &["-Wl,-soname,libother.so.1"]);
    for content in [&i386[..], &arm, &other, b"", b"INPUT(-lx)", &library()[..library().len() / 4]] {
        let root = Root::new();
        root.write("usr/lib/libibverbs.so.1", content);
        assert_eq!(root.found(&[]), [""; 0]);
    }
}

#[test]
fn links_do_not_lead_out() {
    let outside = Root::new();
    outside.write("libibverbs.so.1", library());
    let outside = outside.0.path();
    let root = Root::new();
    let up = format!("{}{}", "../".repeat(20), outside.display());
    root.link("usr/lib/libibverbs.so.1", outside.join("libibverbs.so.1").to_str().unwrap());
    root.link("usr/lib64", outside.to_str().unwrap()).link("usr/local/lib", &up).link("lib64", "lib64");
    root.link("usr/lib/x86_64-linux-gnu/libibverbs.so.1", "/proc/self/exe");
    assert_eq!(root.found(&[outside.to_str().unwrap().trim_start_matches('/'), &up]), [""; 0]);
    // The same links lead to what is there in the root.
    root.write(&outside.join("libibverbs.so.1").to_str().unwrap()[1..], library());
    assert_eq!(root.found(&[]).len(), 1);
}

#[test]
fn odd_files_are_not_waited_for() {
    let root = Root::new();
    root.write("usr/lib/x", b"");
    let path = |name: &str| root.0.path().join("usr/lib").join(name);
    let mode = rustix::fs::Mode::RWXU;
    rustix::fs::mknodat(rustix::fs::CWD, path("libibverbs.so.1"), rustix::fs::FileType::Fifo, mode, 0).unwrap();
    let huge = std::fs::File::create(path("libibverbs.so")).unwrap();
    huge.set_len(1 << 40).unwrap();
    std::fs::create_dir(path("libibverbs.so.1.2")).unwrap();
    assert_eq!(root.found(&[]), [""; 0]);
}

#[test]
fn other_linkers_are_seen() {
    let root = Root::new();
    assert!(!has_i386(&root.place()) && musl_search_path(&root.place()).is_none());
    root.write("lib32/ld-linux.so.2", b"x").link("lib/ld-linux.so.2", "/lib32/ld-linux.so.2");
    assert!(has_i386(&root.place()));
    root.write("lib/ld-musl-x86_64.so.1", b"\x7fELF\0/lib:/usr/local/lib:/usr/lib:/more\0");
    assert!(musl_search_path(&root.place()).unwrap().is_err());
    root.write("lib/ld-musl-x86_64.so.1", b"\x7fELF\0/lib:/usr/local/lib:/usr/lib\0");
    assert_eq!(musl_search_path(&root.place()), Some(Ok(&b"/lib:/usr/local/lib:/usr/lib"[..])));
}
