//! Does the library load where it must, and stay out of the way where it must?

use super::{library, preloaded};
use std::path::{Path, PathBuf};
use std::process::Command;

#[track_caller]
fn loads_into(program: &str, arguments: &[&str], expected: &str) {
    let (_, text) = preloaded(program, arguments);
    assert!(text.contains(expected), "{program}: {text}");
    for complaint in ["ERROR: ld.so", "symbol lookup error", "no version information", "undefined symbol"] {
        assert!(!text.contains(complaint), "{program}: {text}");
    }
}

#[test]
fn programs_of_every_kind_start() {
    loads_into("/bin/true", &[], "");
    loads_into("ibv_devices", &[], "node GUID");
    loads_into("ibv_devinfo", &[], "No IB devices found");
    loads_into("ib_write_bw", &["--help"], "Usage:");
    loads_into("ib_send_lat", &["--help"], "Usage:");
}

#[test]
fn dlopen_by_soname_gets_ours() {
    let python = "import ctypes\nctypes.CDLL('libibverbs.so.1').ringfence_zero\n";
    let (_, text) = preloaded("python3", &["-c", python]);
    assert!(text.contains("undefined symbol: ringfence_zero"), "helpers are not exported: {text}");
    let python = "import ctypes\nctypes.CDLL('libibverbs.so.1').ibv_fork_init()\n\
                  print(sorted({line.split()[-1] for line in open('/proc/self/maps') if 'libibverbs' in line}))\n";
    let (ok, text) = preloaded("python3", &["-c", python]);
    assert!(ok, "{text}");
    assert_eq!(text.trim(), format!("['{}']", library().display()));
}

#[test]
fn versions_are_found_as_nccl_looks_for_them() {
    let python = "import ctypes\n\
        libc = ctypes.CDLL(None)\n\
        libc.dlvsym.restype = ctypes.c_void_p\n\
        libc.dlvsym.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p]\n\
        handle = ctypes.CDLL('libibverbs.so.1')._handle\n\
        wanted = [('ibv_get_device_list', '1.1'), ('ibv_reg_mr_iova2', '1.8'), ('ibv_query_ece', '1.10'),\
            ('ibv_reg_dmabuf_mr', '1.12'), ('ibv_create_comp_cntr', '1.18')]\n\
        assert all(libc.dlvsym(handle, name.encode(), b'IBVERBS_' + node.encode()) for name, node in wanted)\n";
    let (ok, text) = preloaded("python3", &["-c", python]);
    assert!(ok, "{text}");
}

/// The C library's functions that we define have no version, and are found whatever version is asked for.
#[test]
fn a_program_finds_our_madvise_and_it_works() {
    let python = "import mmap\nmemory = mmap.mmap(-1, 8192, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)\n\
        memory[0] = 7\nmemory.madvise(mmap.MADV_DONTNEED)\nassert memory[0] == 0\n\
        try: memory.madvise(12345)\nexcept OSError as error: assert error.errno == 22\n";
    let output = Command::new("python3")
        .args(["-c", python])
        .env("LD_PRELOAD", library())
        .env("LD_DEBUG", "bindings")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}");
    let wanted = format!("{} [0]: normal symbol `madvise' [GLIBC_2.2.5]", library().display());
    assert!(text.contains(&wanted), "nothing is bound to {wanted}");
}

#[test]
fn starting_a_program_makes_no_system_call_of_ours() {
    let output = Command::new("strace")
        .args(["-qq", "-e", "trace=socket,connect,madvise,futex,getpid", "-E"])
        .arg(format!("LD_PRELOAD={}", library().display()))
        .arg("/bin/true")
        .output()
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
}

#[test]
fn it_needs_nothing_that_old_images_lack() {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("check-needs.sh");
    let output = Command::new("sh").arg(&script).arg(library()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn the_check_of_needs_notices_what_is_too_new() {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("check-needs.sh");
    // The stock library is built for this system: a newer glibc, libnl.
    let output = Command::new("sh").arg(&script).arg("/usr/lib/x86_64-linux-gnu/libibverbs.so.1").output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success());
    assert!(text.contains("needs GLIBC_2.3") && text.contains("needs libnl-3.so.200"), "{text}");
}

/// A file of a test's own.
fn scratch(name: &str) -> PathBuf {
    library().with_file_name(name)
}

#[test]
fn the_check_of_needs_notices_variables_that_cannot_be_written() {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("check-needs.sh");
    for (code, expected) in [("int variable;", true), ("const int variable = 1;", false)] {
        let (source, made) = (scratch("variables.c"), scratch("variables.so"));
        std::fs::write(&source, code).unwrap();
        let mut cc = Command::new("cc");
        cc.args(["-shared", "-fPIC", "-nostdlib", "-o"]).arg(&made).arg(&source);
        assert!(cc.status().unwrap().success());
        let output = Command::new("sh").arg(&script).arg(&made).output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.success(), expected, "{code}: {text}");
        assert_eq!(text.contains("which cannot be written"), !expected, "{code}: {text}");
    }
}
