//! libFuzzer's program with all targets; `RINGFENCE_FUZZ` says which of them runs.

#![no_main]

use libfuzzer_sys::fuzz_target;
use std::sync::LazyLock;

type Target = fn(&[u8]);

static TARGET: LazyLock<Target> = LazyLock::new(|| {
    let wanted = std::env::var("RINGFENCE_FUZZ").unwrap_or_default();
    let all = ringfence_proxy::fuzzing::TARGETS.iter().chain(&ringfence_hook::fuzzing::TARGETS);
    let mut all = all.chain(&ringfence_shim_wrapper::fuzzing::TARGETS);
    all.find(|(name, _)| *name == wanted).unwrap_or_else(|| panic!("RINGFENCE_FUZZ={wanted:?} names no target")).1
});

fuzz_target!(|data: &[u8]| TARGET(data));
