//! A seccomp profile that kills whoever makes a system call that it does not allow, instead of denying the call.

use anyhow::{Context, Result};
use serde_json::Value;

/// Where it is on a node.
pub const PROFILE: &str = "/etc/seccomp-kills.json";

/// Made of the engines' own list: whatever it denies with an errno ends the process. But calls that it denies only with certain
/// arguments, and calls that the C library makes to learn whether they exist, are denied as before.
pub fn profile(list: &[u8]) -> Result<Vec<u8>> {
    /// glibc and bash go on without them.
    const PROBED: [&str; 3] = ["clone3", "rseq", "sysfs"];
    let mut profile: Value = serde_json::from_slice(list).context("the engine's seccomp profile is not JSON")?;
    let top = profile.as_object_mut().context("the engine's seccomp profile is not an object")?;
    top.insert("defaultAction".into(), "SCMP_ACT_KILL_PROCESS".into());
    for key in ["defaultErrnoRet", "defaultErrno"] {
        top.remove(key);
    }
    let rules = top.get_mut("syscalls").and_then(Value::as_array_mut).context("it has no list of system calls")?;
    rules.retain(|rule| {
        let is = |key: &str, value: &str| rule.get(key).and_then(Value::as_str) == Some(value);
        let has_arguments = rule.get("args").and_then(Value::as_array).is_some_and(|args| !args.is_empty());
        let names = rule.get("names").and_then(Value::as_array);
        let is_probed =
            names.is_some_and(|names| names.iter().any(|n| n.as_str().is_some_and(|n| PROBED.contains(&n))));
        !is("action", "SCMP_ACT_ERRNO") || has_arguments || (is_probed && names.is_some_and(|names| names.len() < 4))
    });
    Ok(serde_json::to_vec_pretty(&profile)?)
}
