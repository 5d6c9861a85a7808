//! What the proxy gives up before it listens to a container.

use rustix::process::{Resource, getrlimit, setrlimit};

/// Descriptors cost a container up to three each; the soft limit that the engine happened to have must not decide.
pub fn raise_file_limit() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    // With the old limit the proxy works as well, only for fewer objects.
    let _ = setrlimit(Resource::Nofile, limit);
}
