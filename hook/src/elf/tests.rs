use super::*;
use proptest::prelude::*;
use std::process::Command;

/// Any shared library of Debian's with several version nodes.
const SOME: &str = "/lib/x86_64-linux-gnu/libanl.so.1";

/// A library called libx.so.1, of C source `code`, with version nodes of `map`.
pub fn compile(code: &str, map: &str, more: &[&str]) -> Vec<u8> {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    std::fs::write(path("x.c"), code).unwrap();
    std::fs::write(path("x.map"), map).unwrap();
    let mut cc = Command::new("cc");
    cc.current_dir(directory.path()).args([
        "-shared",
        "-fPIC",
        "-nostdlib",
        "-o",
        "x.so",
        "x.c",
        "-Wl,-soname,libx.so.1",
    ]);
    let status = cc.arg("-Wl,--version-script=x.map").args(more).status().expect("cc is installed");
    assert!(status.success());
    std::fs::read(path("x.so")).unwrap()
}

const CODE: &str =
    "int old(void) { return 1; } int new(void) { return 2; } int data = 3; static int own(void) { return 4; }
    int (*pointer)(void) = own; extern int elsewhere(void); int calls(void) { return elsewhere(); }
    __asm__(\".symver new, renewed@@X_2\"); __asm__(\".symver old, renewed@X_1\");";
const MAP: &str = "OWN { local: *; }; X_1 { global: data; }; X_2 { global: calls; } X_1; X_PRIVATE { };";

#[test]
fn all_that_is_offered_is_found() {
    for hash in ["-Wl,--hash-style=gnu", "-Wl,--hash-style=sysv", "-Wl,--hash-style=both"] {
        for strip in [&[][..], &["-s"]] {
            let offers = Offers::of(&compile(CODE, MAP, &[&[hash], strip].concat())).unwrap();
            assert_eq!(offers.name, "libx.so.1");
            let symbols: Vec<_> = offers.symbols.iter().map(String::as_str).collect();
            let expected =
                ["@OWN", "@X_1", "@X_2", "@X_PRIVATE", "calls@X_2", "data@X_1", "renewed@X_1", "renewed@X_2"];
            assert_eq!(symbols, expected, "{hash} {strip:?}");
        }
    }
}

#[test]
fn a_library_without_versions_has_symbols_too() {
    let offers = Offers::of(&compile("int a(void) { return 1; }", "{ global: a; local: *; };", &[])).unwrap();
    assert_eq!(offers.symbols.into_iter().collect::<Vec<_>>(), ["a@"]);
}

#[test]
fn without_its_name_it_is_still_a_library_with_all_else() {
    let mut bytes = compile(CODE, MAP, &[]);
    take_name(&mut bytes).unwrap();
    assert_eq!(Offers::of(&bytes), None, "it has a name");
    assert_eq!(take_name(&mut bytes), None, "it is taken once");
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("x.so"), bytes).unwrap();
    let mut readelf = Command::new("readelf");
    readelf.args(["--wide", "--dynamic", "--dyn-syms", "x.so"]).current_dir(directory.path());
    let shown = String::from_utf8(readelf.output().unwrap().stdout).unwrap();
    assert!(!shown.contains("SONAME") && shown.contains("renewed@@X_2"), "{shown}");
}

#[test]
fn other_files_are_no_libraries() {
    let good = std::fs::read(SOME).unwrap();
    assert!(Offers::of(&good).is_some());
    for (at, byte, what) in
        [(0, b'x', "no ELF"), (4, 1, "32 bits"), (5, 2, "big endian"), (16, 2, "a program"), (18, 3, "i386")]
    {
        let mut bad = good.clone();
        bad[at] = byte;
        assert_eq!(Offers::of(&bad), None, "{what}");
    }
    for other in [&b""[..], b"\x7fELF", &[0; 4096]] {
        assert_eq!(Offers::of(other), None);
    }
}

proptest! {
    /// Whatever a file says of itself.
    #[test]
    fn nothing_panics(changes in proptest::collection::vec((0..8192_usize, any::<u8>()), 1..40), length in 0..40_000_usize) {
        let mut bytes = std::fs::read(SOME).unwrap();
        for (at, byte) in changes {
            if let Some(place) = bytes.get_mut(at) {
                *place = byte;
            }
        }
        bytes.truncate(length.max(64));
        let _ = Offers::of(&bytes);
        let _ = take_name(&mut bytes);
    }
}
