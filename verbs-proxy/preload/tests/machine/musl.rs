//! The shared library in a program of another C library.

use ringfence_trials::skip;
use std::path::Path;
use std::process::Command;

/// All symbols are bound when it is loaded, so none may be glibc's alone.
pub fn musl_loads_it_too() {
    const CODE: &str = r#"
        #include <dlfcn.h>
        #include <stdio.h>
        int main(int count, char **path) {
            void *library = dlopen(path[1], RTLD_NOW);
            if (!library) { puts(dlerror()); return 1; }
            void **(*list)(int *) = (void **(*)(int *))dlsym(library, "ibv_get_device_list");
            int devices = -1;
            list(&devices);
            return devices;
        }"#;
    if Command::new("musl-gcc").arg("--version").output().is_err() {
        skip("musl-tools is not installed");
    }
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let directory = here.join("../../target/preload-musl");
    let output = Command::new("sh").arg(here.join("link.sh")).arg(&directory).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let (source, made) = (directory.join("musl.c"), directory.join("musl"));
    std::fs::write(&source, CODE).unwrap();
    assert!(Command::new("musl-gcc").arg("-o").arg(&made).arg(&source).status().unwrap().success());
    let mut program = Command::new(&made);
    program.arg(directory.join("libibverbs.so.1")).env("RINGFENCE_SOCKET", "/nonexistent/verbs.sock");
    let output = program.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}
