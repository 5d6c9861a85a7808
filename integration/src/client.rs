//! Small verbs programs in C, compiled against the distribution's headers, as users' programs are.

use crate::command::{command, run};
use crate::{artifacts, sandbox};
use anyhow::{Context, Result};
use std::path::PathBuf;

/// Compiles `<name>.c` and the files `with` of integration/clients into a program of the sandbox, once. Where there is no compiler,
/// RINGFENCE_CLIENTS in the environment names the directory where the programs are.
pub fn compile(name: &str, with: &[&str]) -> Result<PathBuf> {
    if let Some(directory) = std::env::var_os("RINGFENCE_CLIENTS") {
        return Ok(PathBuf::from(directory).join(name));
    }
    let program = sandbox::work_dir().join("clients").join(name);
    if program.exists() {
        return Ok(program);
    }
    std::fs::create_dir_all(program.parent().context("has a parent")?)?;
    let target = program.to_str().context("/tmp is not UTF-8")?.to_owned();
    let mut words: Vec<String> =
        ["cc", "-std=gnu11", "-D_GNU_SOURCE", "-O2", "-g", "-Wall", "-Wextra", "-Werror", "-pthread", "-o", &target]
            .map(str::to_owned)
            .to_vec();
    for source in
        std::iter::once(&format!("{name}.c")).chain(with.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>().iter())
    {
        words.push(artifacts::client_source(source).to_string_lossy().into_owned());
    }
    words.push("-libverbs".into());
    run(command(&words.iter().map(String::as_str).collect::<Vec<_>>()))?;
    Ok(program)
}

/// Compiles the card that is not there: libibverbs' interface, behind which requests are carried out in memory. The name of a file in
/// a directory where nothing else is.
pub fn provider() -> Result<PathBuf> {
    let library = sandbox::work_dir().join("provider/libibverbs.so.1");
    if library.exists() {
        return Ok(library);
    }
    std::fs::create_dir_all(library.parent().context("has a parent")?)?;
    let source = |name: &str| artifacts::repository().join("verbs-proxy/ibverbs/tests").join(name);
    let (target, source, map) = (&library, source("provider.c"), source("provider.map"));
    let map = format!("-Wl,-soname,libibverbs.so.1,--version-script,{}", map.display());
    let flags =
        ["-std=gnu11", "-D_GNU_SOURCE", "-O2", "-g", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", "-pthread"];
    let mut compiler = command(&[&["cc"], &flags[..], &[&map]].concat());
    compiler.arg("-o").arg(target).arg(source);
    run(compiler)?;
    Ok(library)
}
