//! Tests that some machines cannot run, for want of a kernel's or a system's part, and which are then counted as ignored.
//!
//! They look into the library's own modules, which are compiled into this program.

// What tests of other programs need of these modules is not needed here.
#![allow(dead_code, unused_imports)]

extern crate alloc;

#[path = "../src/adopt/mod.rs"]
mod adopt;
#[path = "../src/atfork.rs"]
mod atfork;
#[path = "../src/descriptor.rs"]
mod descriptor;
#[path = "../src/pages/mod.rs"]
mod pages;
#[path = "../src/sys.rs"]
mod sys;

#[path = "machine/files.rs"]
mod files;
#[path = "machine/maps.rs"]
mod maps;
#[path = "machine/musl.rs"]
mod musl;
#[path = "machine/userfaultfd.rs"]
mod userfaultfd;

fn main() -> std::process::ExitCode {
    ringfence_trials::main(ringfence_trials::tests![
        files::huge_pages_are_registered_as_they_are,
        files::what_a_disk_has_is_not_registered,
        maps::answers_and_text_agree,
        musl::musl_loads_it_too,
        userfaultfd::no_increment_is_lost,
        userfaultfd::what_the_program_provides_on_demand_is_registered_as_it_provides_it,
    ])
}
