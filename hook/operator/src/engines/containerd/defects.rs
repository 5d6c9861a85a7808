//! Registrations that do not work.

use super::{ANNOTATIONS, RUNTIME_TYPE};
use toml_edit::{Item, TableLike, Value};

/// Our shim's runtime type.
const SHIM_TYPE: &str = "io.containerd.ringfence.v2";

/// What is wrong with a registration for `binary`, or for the shim `shim`; nothing if it works.
pub fn defects(runtime: &dyn TableLike, binary: &str, shim: Option<&str>) -> Vec<String> {
    let mut defects = Vec::new();
    let text = |key| runtime.get(key).and_then(Item::as_str).unwrap_or("");
    let options = runtime.get("options").and_then(Item::as_table_like);
    let kind = text("runtime_type");
    if kind != RUNTIME_TYPE && options.is_some_and(|options| !options.is_empty()) {
        defects.push(format!("its runtime_type = {kind:?} cannot have options; use {RUNTIME_TYPE:?}"));
    }
    let name = options.and_then(|options| options.get("BinaryName")).and_then(Item::as_str).unwrap_or("");
    let by_shim = shim.is_some_and(|shim| text("runtime_path") == shim) || kind == SHIM_TYPE;
    if name != binary && !by_shim {
        defects.push(format!("its options.BinaryName is {name:?} and not {binary:?}"));
    }
    for (example, pattern) in [("ringfence.dev/enable", ANNOTATIONS[0]), ("enable.ringfence.dev/pod", ANNOTATIONS[1])] {
        let patterns = runtime.get("pod_annotations").and_then(Item::as_array);
        let passes = patterns.into_iter().flatten().filter_map(Value::as_str).any(|pattern| matches(pattern, example));
        if !passes {
            let hint = "an asterisk does not match a slash";
            defects.push(format!("its pod_annotations keep {example} from containers; add {pattern:?} ({hint})"));
        }
    }
    defects
}

/// What is wrong with a runtime of our shim's type, if it is one.
pub fn misuses_shim(runtime: &dyn TableLike) -> Option<String> {
    let options = runtime.get("options").and_then(Item::as_table_like).is_some_and(|options| !options.is_empty());
    let is_shims = runtime.get("runtime_type").and_then(Item::as_str) == Some(SHIM_TYPE);
    (is_shims && options).then(|| format!("its runtime_type = {SHIM_TYPE:?} cannot have options; use {RUNTIME_TYPE:?}"))
}

/// Go's `path.Match`, as far as annotations need it.
fn matches(pattern: &str, key: &str) -> bool {
    let options = glob::MatchOptions { require_literal_separator: true, ..Default::default() };
    glob::Pattern::new(pattern).is_ok_and(|pattern| pattern.matches_with(key, options))
}
