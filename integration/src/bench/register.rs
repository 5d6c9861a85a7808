//! What registering memory costs.

use crate::figure::{Figure, Goal};
use crate::moving::{self, unbinding};
use crate::programs::{self, Effort};
use anyhow::Result;
use ringfence_integration::direct::Node;
use ringfence_proxy::launch::Limits;

/// The first time, and over and over.
pub fn figures(effort: Effort) -> Result<Vec<Figure>> {
    let node = Node::new(None)?;
    let proxy = node.proxy(Limits::default())?;
    let program = programs::alone()?;
    let run = |words: &[&str]| programs::run(&proxy, &program, words, effort);
    let mut figures = Vec::new();
    let largest = if effort.quick { ("16777216", "16 MiB") } else { ("1073741824", "1 GiB") };
    for (bytes, size) in [("4096", "4 KiB"), ("1048576", "1 MiB"), largest] {
        let said = run(&["register", bytes])?;
        let figure = Figure::new(&format!("reg_mr {size}, the first time"), said.one("register")? / 1e3, "µs");
        let figure = figure.beside(said.one("pwrite")? / 1e3);
        figures.push(if bytes == "4096" { figure.goal(Goal::RatioAtMost(5.0)) } else { figure });
    }
    for (bytes, size) in [("4096", "4 KiB"), ("65536", "64 KiB"), ("1048576", "1 MiB")] {
        for (buffers, which) in [("1", "the same buffer"), ("16", "16 buffers in turn")] {
            let said = run(&["again", bytes, buffers])?;
            let name = format!("register, WRITE {size}, deregister, {which}");
            let figure = Figure::new(&name, said.one("again")? / 1e3, "µs").beside(said.one("pwrite")? / 1e3);
            figures.push(figure.goal(Goal::RatioAtMost(5.0)));
        }
    }
    let shaped = node.proxy(unbinding())?;
    for (name, words, said) in [
        ("reg_mr 4 KiB, the first time", &["register", "4096"][..], "register"),
        ("register, WRITE 4 KiB, deregister, the same buffer", &["again", "4096", "1"], "again"),
        ("register, WRITE 64 KiB, deregister, the same buffer", &["again", "65536", "1"], "again"),
        ("register, WRITE 1 MiB, deregister, the same buffer", &["again", "1048576", "1"], "again"),
    ] {
        let turns = moving::in_turns(effort, || run(words), || programs::run(&shaped, &program, words, effort))?;
        let figure = turns.second(&moving::under_policy(name), said, (1e3, "µs"))?;
        figures.push(figure.goal(Goal::RatioAtMost(1.15)));
    }
    let said = run(&["rounds", "100000"])?;
    for (name, figure, unit, most) in [
        ("mappings", "more mappings after 100,000 such rounds", "", 8.0),
        ("kib", "more memory after 100,000 such rounds", "KiB", 256.0),
    ] {
        figures.push(Figure::new(figure, said.one(name)?, unit).goal(Goal::AtMost(most)));
    }
    Ok(figures)
}
