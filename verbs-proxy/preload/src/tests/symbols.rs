//! Does the library have every symbol of the stock one, in the same version nodes?

use super::library;
use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

const STOCK: &str = "/usr/lib/x86_64-linux-gnu/libibverbs.so.1";

/// `kind name@node`, or `name@@node` where it is the default, of everything that a library defines.
fn symbols(library: &Path) -> BTreeSet<String> {
    let output = Command::new("readelf").args(["--wide", "--dyn-syms"]).arg(library).output().unwrap();
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    let mut found = BTreeSet::new();
    for line in text.lines() {
        // Num: Value Size Type Bind Vis Ndx Name
        if let [_, _, _, kind, "GLOBAL" | "WEAK", _, place, name, ..] = line.split_whitespace().collect::<Vec<_>>()[..]
            && place != "UND"
        {
            found.insert(format!("{kind} {name}"));
        }
    }
    found
}

#[test]
fn nothing_of_the_stock_library_is_missing() {
    let stock = symbols(Path::new(STOCK));
    assert!(stock.len() > 180, "{STOCK} has {} symbols", stock.len());
    let missing: Vec<_> = stock.difference(&symbols(library())).cloned().collect();
    assert!(missing.is_empty(), "{missing:#?}");
}

#[test]
fn newer_and_older_releases_find_their_nodes() {
    let ours = symbols(library());
    for expected in [
        "FUNC ibv_alloc_dmah@@IBVERBS_1.15",
        "FUNC ibv_query_port_speed@@IBVERBS_1.16",
        "FUNC ibv_alloc_buf@@IBVERBS_1.17",
        "FUNC ibv_create_comp_cntr@@IBVERBS_1.18",
        "FUNC verbs_register_driver_25@IBVERBS_PRIVATE_25",
        "FUNC verbs_register_driver_59@IBVERBS_PRIVATE_59",
        "FUNC ibv_query_gid_type@IBVERBS_PRIVATE_65",
        "OBJECT verbs_allow_disassociate_destroy@IBVERBS_PRIVATE_25",
    ] {
        assert!(ours.contains(expected), "{expected}");
    }
}

#[test]
fn nothing_but_verbs_is_exported() {
    let foreign: Vec<_> = symbols(library())
        .into_iter()
        .filter(|symbol| !symbol.contains("IBVERBS_") && symbol != "OBJECT RINGFENCE")
        .collect();
    // Without versions: see `libibverbs.map`.
    assert_eq!(foreign, ["FUNC madvise", "FUNC mremap"]);
}
