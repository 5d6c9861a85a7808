//! What programs of all kinds notice of the library: those with verbs have it, the others nothing.

mod common;

use common::{Lab, succeeded, with_lab};
use ringfence_trials::{skip, tests};
use serde_json::json;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Output};

fn main() -> ExitCode {
    ringfence_trials::main(tests![
        by_whatever_name_it_is_one_library,
        a_read_only_root_has_it_over_its_own_library_too,
        a_copy_under_another_name_sees_no_device_and_lives,
        an_image_with_more_symbols_keeps_its_library_and_starts,
        sanitizers_start,
        clang_s_sanitizers_start,
        programs_for_i386_say_nothing,
        programs_by_musl_find_it,
        musl_without_a_search_path_of_its_own_keeps_its_default,
        a_musl_that_is_not_understood_is_left_alone,
        chroots_and_private_devices_say_nothing,
        static_and_setuid_programs,
    ])
}

const MULTIARCH: &str = "lib/x86_64-linux-gnu";

/// A lab in which the real library is injected.
#[track_caller]
fn with_library(test: impl FnOnce(&mut Lab)) {
    let library = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/preload/libibverbs.so.1");
    if !library.exists() {
        skip("target/preload/libibverbs.so.1 is not there: run verbs-proxy/preload/link.sh");
    }
    with_lab(|lab| {
        inject(lab, &library.canonicalize().unwrap());
        if let Some(proxy) = real_proxy() {
            std::fs::copy(proxy, lab.path("ready")).unwrap();
        }
        test(lab);
    });
}

/// The real proxy, if it is built for release: with the stand-in there is no device.
fn real_proxy() -> Option<PathBuf> {
    let proxy = Path::new(common::HOOK).with_file_name("../release/ringfence-proxy");
    proxy.exists().then_some(proxy)
}

/// How many devices a program has.
fn devices() -> usize {
    usize::from(real_proxy().is_some())
}

fn inject(lab: &Lab, library: &Path) {
    let path = lab.path("config.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    let line = text.lines().find(|line| line.starts_with("library = ")).unwrap();
    std::fs::write(&path, text.replace(line, &format!("library = {library:?}"))).unwrap();
}

/// Compiles the C source `code` with `compiler`, as `target` in the container's root, with all libraries that it needs.
fn compile(lab: &Lab, compiler: &str, code: &str, target: &str, options: &[&str]) {
    if Command::new(compiler).arg("--version").output().is_err() {
        skip(format!("{compiler} is not installed"));
    }
    std::fs::write(lab.path("program.c"), code).unwrap();
    let target = lab.path("rootfs").join(target);
    let mut command = Command::new(compiler);
    command.arg("-o").arg(&target).arg(lab.path("program.c")).args(options);
    succeeded(&command.output().unwrap());
    bring_libraries(lab, &target);
}

/// Copies what `program` needs to where it has it on the host.
fn bring_libraries(lab: &Lab, program: &Path) {
    // It fails for a static one, which needs none.
    let output = Command::new("ldd").arg(program).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    for path in text.split_whitespace().filter(|word| word.starts_with('/') && !word.ends_with([':', ')'])) {
        bring(lab, path);
    }
}

/// Copies the host's file `path`.
fn bring(lab: &Lab, path: &str) {
    let target = lab.path("rootfs").join(path.trim_start_matches('/'));
    std::fs::create_dir_all(target.parent().unwrap()).unwrap();
    if !target.exists() {
        std::fs::copy(path, &target).unwrap_or_else(|error| panic!("{path}: {error}"));
    }
}

/// Debian's own libibverbs with its links, as an image has it, at `rootfs/<directory>`.
fn bring_libibverbs(lab: &Lab) {
    let hosts = Path::new("/usr/lib/x86_64-linux-gnu/libibverbs.so.1");
    let Ok(file) = hosts.canonicalize() else { skip("libibverbs1 is not installed") };
    let directory = lab.path("rootfs").join(MULTIARCH);
    let name = file.file_name().unwrap();
    std::fs::copy(&file, directory.join(name)).unwrap();
    symlink(name, directory.join("libibverbs.so.1")).unwrap();
    symlink("libibverbs.so.1", directory.join("libibverbs.so")).unwrap();
    bring_libraries(lab, &file);
    // The C library asks for it by its name alone when it is loaded once more.
    bring(lab, "/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2");
}

/// Opens the library by each argument, in a name space of its own for those that begin with `+`, lists devices, and says in the
/// end how many files of that name are mapped.
const OPEN: &str = r#"
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>
int main(int count, char **names) {
    for (int i = 1; i < count; i++) {
        void *library = *names[i] == '+' ? dlmopen(LM_ID_NEWLM, names[i] + 1, RTLD_NOW) : dlopen(names[i], RTLD_NOW);
        if (!library) { printf("%s: %s\n", names[i], dlerror()); continue; }
        void **(*list)(int *) = (void **(*)(int *))dlsym(library, "ibv_get_device_list");
        int devices = -1;
        list(&devices);
        printf("%s: %d\n", names[i], devices);
    }
    char line[4096], seen[16][64], inode[64]; int files = 0;
    FILE *maps = fopen("/proc/self/maps", "r");
    while (fgets(line, sizeof line, maps)) {
        if (!strstr(line, "libibverbs") || sscanf(line, "%*s %*s %*s %*s %63s", inode) != 1) continue;
        int i = 0;
        while (i < files && strcmp(seen[i], inode)) i++;
        if (i == files && files < 16) strcpy(seen[files++], inode);
    }
    printf("%d files\n", files);
    return 0;
}
"#;
const NAMES: [&str; 5] = [
    "libibverbs.so.1",
    "libibverbs.so",
    "/lib/x86_64-linux-gnu/libibverbs.so.1",
    "/etc/ld.so.ringfence/libibverbs.so.1",
    "+libibverbs.so.1",
];

fn all_of(names: &[&str]) -> String {
    names.iter().map(|name| format!("{name}: {}\n", devices())).collect()
}

fn by_whatever_name_it_is_one_library() {
    with_library(|lab| {
        bring_libibverbs(lab);
        compile(lab, "gcc", OPEN, "bin/open", &["-ldl"]);
        lab.expect_rootfs_as_is();
        lab.script(&format!("/bin/open {}", NAMES.join(" ")));
        assert_eq!(lab.output(), format!("{}1 files\n", all_of(&NAMES)));
        assert_eq!(succeeded(&lab.crun(&["run", &lab.id])), format!("{}1 files\n", all_of(&NAMES)));
    });
}

fn a_read_only_root_has_it_over_its_own_library_too() {
    with_library(|lab| {
        bring_libibverbs(lab);
        compile(lab, "gcc", OPEN, "bin/open", &["-ldl"]);
        std::fs::create_dir(lab.path("rootfs/etc")).unwrap();
        lab.expect_rootfs_as_is();
        lab.script(&format!("/bin/open {}", NAMES.join(" ")));
        let output = lab.run_after("mount --bind rootfs rootfs && mount -o remount,bind,ro rootfs");
        assert_eq!(succeeded(&output), format!("{}1 files\n", all_of(&NAMES)));
    });
}

/// As a wheel brings it.
fn a_copy_under_another_name_sees_no_device_and_lives() {
    with_library(|lab| {
        bring_libibverbs(lab);
        let hosts = std::fs::read("/usr/lib/x86_64-linux-gnu/libibverbs.so.1").unwrap();
        let (old, new) = (b"\0libibverbs.so.1\0", b"\0libibver-1a.so.\0");
        let mut copy = hosts.clone();
        let at = copy.windows(old.len()).position(|text| text == old).unwrap();
        copy[at..at + old.len()].copy_from_slice(new);
        std::fs::create_dir_all(lab.path("rootfs/opt/wheel.libs")).unwrap();
        std::fs::write(lab.path("rootfs/opt/wheel.libs/libibverbs-1a2b.so.1"), copy).unwrap();
        compile(lab, "gcc", OPEN, "bin/open", &["-ldl"]);
        lab.expect_rootfs_as_is();
        let names = ["/opt/wheel.libs/libibverbs-1a2b.so.1", "libibverbs.so.1"];
        // It has a variable of its own written at once.
        lab.script(&format!("RDMAV_ALLOW_DISASSOC_DESTROY=1 /bin/open {}", names.join(" ")));
        assert_eq!(lab.output(), format!("{}: 0\n{}2 files\n", names[0], all_of(&names[1..])));
    });
}

/// As a release of rdma-core that is newer than ours has it, with a provider library that needs it.
fn an_image_with_more_symbols_keeps_its_library_and_starts() {
    const NEWER: &str =
        "int verbs_register_driver_99(void) { return 99; } void *ibv_get_device_list(int *n) { *n = 77; return 0; }";
    const MAP: &str = "IBVERBS_1.1 { global: ibv_get_device_list; local: *; };
        IBVERBS_PRIVATE_99 { global: verbs_register_driver_99; };";
    const PROGRAM: &str = "#include <stdio.h>
        extern int verbs_register_driver_99(void); extern void *ibv_get_device_list(int *);
        int main(void) { int n = -1; ibv_get_device_list(&n); printf(\"%d %d\\n\", verbs_register_driver_99(), n); return 0; }";
    with_library(|lab| {
        std::fs::write(lab.path("newer.map"), MAP).unwrap();
        let (map, target) = (
            format!("-Wl,--version-script={}", lab.path("newer.map").display()),
            format!("{MULTIARCH}/libibverbs.so.1"),
        );
        compile(lab, "gcc", NEWER, &target, &["-shared", "-fPIC", "-Wl,-soname,libibverbs.so.1", &map]);
        let library = lab.path("rootfs").join(&target);
        compile(lab, "gcc", PROGRAM, "bin/program", &[library.to_str().unwrap()]);
        compile(lab, "gcc", OPEN, "bin/open", &["-ldl"]);
        lab.expect_rootfs_as_is();
        // The verbs are ours, and what only the other has is the other's.
        lab.script("/bin/program; /bin/open libibverbs.so.1; sleep 60");
        lab.create();
        let warnings = lab.record(&lab.id)["warnings"].to_string();
        assert!(warnings.contains("/lib/x86_64-linux-gnu/libibverbs.so.1 in the image is left alone"), "{warnings}");
        assert!(
            warnings.contains("verbs_register_driver_99@IBVERBS_PRIVATE_99")
                || warnings.contains("@IBVERBS_PRIVATE_99"),
            "{warnings}"
        );
        succeeded(&lab.runc(&["delete", "-f", &lab.id]));
        lab.script("/bin/program; /bin/open libibverbs.so.1");
        assert_eq!(lab.output(), format!("99 {}\nlibibverbs.so.1: 77\n2 files\n", devices()));
    });
}

const HELLO: &str = "#include <stdio.h>\nint main(void) { puts(\"hello\"); return 0; }";

/// `program` says hello, and nothing else says anything.
#[track_caller]
fn says_hello(lab: &mut Lab, program: &str) {
    lab.expect_rootfs_as_is();
    lab.script(&format!("exec {program}"));
    is_hello(&lab.run(), program);
}

#[track_caller]
fn is_hello(output: &Output, what: &str) {
    let shown = |text: &[u8]| String::from_utf8_lossy(text).into_owned();
    assert_eq!((shown(&output.stdout), shown(&output.stderr)), ("hello\n".into(), String::new()), "{what}");
}

fn sanitizers_start() {
    with_library(|lab| {
        for options in [
            &["-fsanitize=address"][..],
            &["-fsanitize=address", "-static-libasan"],
            &["-fsanitize=undefined"],
            &["-fsanitize=undefined", "-static-libubsan"],
            &["-fsanitize=thread"],
            &["-fsanitize=thread", "-static-libtsan"],
            &["-fsanitize=leak"],
        ] {
            compile(lab, "gcc", HELLO, "bin/hello", options);
            // The container's init cannot be traced, which looking for leaks wants.
            says_hello(lab, "/bin/sh -c 'LSAN_OPTIONS=detect_leaks=0 ASAN_OPTIONS=detect_leaks=0 /bin/hello'");
        }
    });
}

fn clang_s_sanitizers_start() {
    let clang =
        ["clang", "clang-19", "clang-14"].into_iter().find(|name| Command::new(name).arg("--version").output().is_ok());
    let Some(clang) = clang else { skip("clang is not installed") };
    with_library(|lab| {
        let runtime = |name: &str| {
            let output =
                Command::new(clang).arg(format!("-print-file-name=libclang_rt.{name}-x86_64.so")).output().unwrap();
            PathBuf::from(String::from_utf8(output.stdout).unwrap().trim())
        };
        let shared = runtime("asan");
        if !shared.is_absolute() {
            skip("clang's runtime libraries are not installed");
        }
        let path = format!("-Wl,-rpath,{}", shared.parent().unwrap().display());
        for options in [
            &["-fsanitize=address"][..],
            &["-fsanitize=address", "-shared-libasan", &path],
            &["-fsanitize=memory"],
            &["-fsanitize=thread"],
            &["-fsanitize=undefined"],
        ] {
            compile(lab, clang, HELLO, "bin/hello", options);
            says_hello(lab, "/bin/sh -c 'ASAN_OPTIONS=detect_leaks=0 /bin/hello'");
        }
    });
}

fn programs_for_i386_say_nothing() {
    const LINKER: &str = "/lib/ld-linux.so.2";
    const LIBRARY: &str = "/lib32/libc.so.6";
    with_library(|lab| {
        if !Path::new(LINKER).exists() || !Path::new(LIBRARY).exists() {
            skip("libc6-i386 is not installed");
        }
        bring(lab, "/lib32/ld-linux.so.2");
        bring(lab, LIBRARY);
        symlink("/lib32/ld-linux.so.2", lab.path("rootfs/lib/ld-linux.so.2")).unwrap();
        compile(lab, "gcc", HELLO, "bin/hello", &["-fsanitize=address"]);
        compile(lab, "gcc", OPEN, "bin/open", &["-ldl"]);
        lab.expect_rootfs_as_is();
        // That library is a program, too, which says its version.
        lab.script(&format!("{LIBRARY} | head -n 1; ASAN_OPTIONS=detect_leaks=0 /bin/hello; /bin/open libibverbs.so.1; cat /etc/ld.so.preload"));
        let output = lab.run();
        let text = succeeded(&output);
        assert_eq!(String::from_utf8_lossy(&output.stderr), "");
        let lines: Vec<_> = text.lines().collect();
        assert!(lines[0].starts_with("GNU C Library"), "{text}");
        assert_eq!(
            lines[1..],
            [
                "hello",
                all_of(&["libibverbs.so.1"]).trim(),
                "1 files",
                "/etc/ld.so.ringfence/$PLATFORM/preload-like-libasan.so"
            ]
        );
    });
}

/// The host's musl, with a program that opens the library.
fn bring_musl(lab: &Lab) {
    compile(
        lab,
        "musl-gcc",
        OPEN.replace("dlmopen(LM_ID_NEWLM, names[i] + 1, RTLD_NOW)", "0").as_str(),
        "bin/open",
        &[],
    );
    bring(lab, "/lib/ld-musl-x86_64.so.1");
    std::fs::create_dir_all(lab.path("rootfs/etc")).unwrap();
}

fn programs_by_musl_find_it() {
    with_library(|lab| {
        bring_musl(lab);
        std::fs::write(lab.path("rootfs/etc/ld-musl-x86_64.path"), "/opt/theirs\n").unwrap();
        compile(lab, "musl-gcc", HELLO, "bin/hello", &[]);
        lab.expect_rootfs_as_is();
        lab.script("/bin/open libibverbs.so.1 libibverbs.so; cat /etc/ld-musl-x86_64.path; /bin/hello");
        let opened = all_of(&["libibverbs.so.1", "libibverbs.so"]);
        let expected = format!("{opened}1 files\n/etc/ld.so.ringfence\n/opt/theirs\nhello\n");
        assert_eq!(lab.output(), expected);
        assert_eq!(
            succeeded(&lab.run_after("mount --bind rootfs rootfs && mount -o remount,bind,ro rootfs")),
            expected
        );
        let kept = std::fs::read_to_string(lab.path("rootfs/etc/ld-musl-x86_64.path")).unwrap();
        assert_eq!(kept, "/opt/theirs\n");
    });
}

fn musl_without_a_search_path_of_its_own_keeps_its_default() {
    with_library(|lab| {
        bring_musl(lab);
        lab.expect_rootfs_as_is();
        lab.script("/bin/open libibverbs.so.1; cat /etc/ld-musl-x86_64.path");
        let opened = all_of(&["libibverbs.so.1"]);
        let expected = format!("{opened}1 files\n/etc/ld.so.ringfence\n/lib:/usr/local/lib:/usr/lib");
        assert_eq!(lab.output(), expected);
    });
}

fn a_musl_that_is_not_understood_is_left_alone() {
    with_lab(|lab| {
        std::fs::write(lab.path("rootfs/lib/ld-musl-x86_64.so.1"), "/other/lib\0").unwrap();
        lab.expect_rootfs_as_is();
        lab.script("ls /etc/ld-musl-x86_64.path 2>/dev/null; sleep 60");
        lab.create();
        let warnings = lab.record(&lab.id)["warnings"].to_string();
        assert!(warnings.contains("programs by musl see no device"), "{warnings}");
        succeeded(&lab.runc(&["delete", "-f", &lab.id]));
    });
}

/// With /etc of the container bound into a chroot, with mounts or without, and with a /dev of its own.
fn chroots_and_private_devices_say_nothing() {
    with_library(|lab| {
        std::fs::create_dir_all(lab.path("rootfs/chroot")).unwrap();
        std::fs::create_dir_all(lab.path("rootfs/etc")).unwrap();
        std::fs::write(lab.path("rootfs/etc/x"), "hello\n").unwrap();
        lab.expect_rootfs_as_is();
        lab.edit(|config| {
            let capabilities = json!(["CAP_SYS_ADMIN", "CAP_SYS_CHROOT", "CAP_DAC_OVERRIDE"]);
            config["process"]["capabilities"] =
                json!({"bounding": capabilities, "effective": capabilities, "permitted": capabilities});
            let tmpfs = json!({"destination": "/chroot", "type": "tmpfs", "source": "tmpfs"});
            config["mounts"].as_array_mut().unwrap().push(tmpfs);
        });
        for bind in ["bind", "rbind"] {
            let script = format!(
                "set -e; B=/bin/busybox; cd /chroot; $B mkdir bin lib lib64 etc dev proc; \
                 for d in bin lib lib64; do $B mount -o bind /$d $d; done; $B mount -o {bind} /etc etc; \
                 $B chroot . /bin/cat /etc/x"
            );
            lab.script(&script);
            is_hello(&lab.run(), bind);
        }
        lab.script("set -e; /bin/busybox mount -t tmpfs tmpfs /dev; /bin/cat /etc/x; /bin/cat /proc/self/maps | grep -q ibverbs");
        is_hello(&lab.run(), "a private /dev");
    });
}

fn static_and_setuid_programs() {
    with_library(|lab| {
        compile(lab, "gcc", HELLO, "bin/hello", &["-static"]);
        says_hello(lab, "/bin/hello");
        compile(lab, "gcc", HELLO, "bin/hello", &[]);
        std::fs::set_permissions(lab.path("rootfs/bin/hello"), PermissionsExt::from_mode(0o4755)).unwrap();
        lab.edit(|config| config["process"]["user"] = json!({"uid": 1000, "gid": 1000}));
        lab.edit(|config| config["process"]["noNewPrivileges"] = json!(false));
        says_hello(lab, "/bin/hello");
    });
}
