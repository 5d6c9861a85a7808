//! Engines that run without root: then the hook is root in their user's own user namespace only.

use crate::config::Kind;
use crate::config::{DEFAULT_RUN_DIR, Error};
use crate::failure::{Code, Failure};
use crate::policy::Grant;
use crate::sys;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// The directories that users have for what lives as long as their sessions.
const USERS: &str = "/run/user";

/// The user, outside, whom our root is; `None` in the host's user namespace.
pub fn user() -> Option<u32> {
    // Without /proc nothing else would work either.
    std::fs::read_to_string("/proc/self/uid_map").ok().and_then(|map| outer_root(&map))
}

/// The user whose containers are asked for: in the host's user namespace, where no engine without root runs its hooks, whoever
/// calls and is not root.
fn caller() -> Option<u32> {
    let caller = rustix::process::geteuid();
    (user().is_none() && !caller.is_root()).then(|| caller.as_raw())
}

/// What uid 0 of a `uid_map` is outside; `None` if all ids are the same there.
fn outer_root(map: &str) -> Option<u32> {
    let lines = map.lines().map(|line| line.split_ascii_whitespace().map(str::parse).collect::<Result<Vec<u32>, _>>());
    let ranges: Vec<_> = lines.collect::<Result<_, _>>().ok()?;
    match &ranges[..] {
        // uid 4294967295 is nobody's.
        [range] if range[..] == [0, 0, u32::MAX] => None,
        ranges => ranges.iter().find_map(|range| match range[..] {
            [0, outside, _] => Some(outside),
            _ => None,
        }),
    }
}

/// The run-dir for a configuration that says `configured`. Without root it cannot be the default one, unless `/run` is ours,
/// as in a container that is a whole system; then it is in the user's own directory, where only he has access. All
/// containers of one user have it in common. A user who looks from outside, as by `ringfence list`, finds his own there.
pub fn run_dir(configured: PathBuf) -> Result<PathBuf, Error> {
    let of = |user: u32| Path::new(USERS).join(user.to_string());
    if let Some(caller) = caller().filter(|_| configured == Path::new(DEFAULT_RUN_DIR)) {
        // Whether it is there or not: without it he has no containers.
        return Ok(of(caller).join("ringfence"));
    }
    let ours = |path: &Path| path.metadata().map(|found| found.uid() == rustix::process::geteuid().as_raw());
    match user() {
        Some(user) if configured == Path::new(DEFAULT_RUN_DIR) && !ours("/run".as_ref()).unwrap_or(false) => {
            let directory = of(user);
            match ours(&directory) {
                Ok(true) => Ok(directory.join("ringfence")),
                Ok(false) => Err(Error::NoUserDir { reason: format!("{} is not his", directory.display()), user }),
                Err(error) => Err(Error::NoUserDir { reason: format!("{}: {error}", directory.display()), user }),
            }
        }
        _ => Ok(configured),
    }
}

/// Refuses what an engine without root cannot give a container in the network namespace `network`.
pub fn check(grant: &Grant<'_>, network: BorrowedFd<'_>) -> Result<(), Failure> {
    let message = match grant {
        _ if user().is_none() => return Ok(()),
        Grant::Passthrough(_) => {
            "ringfence.dev/mode=passthrough needs root's say over device cgroups, which an engine without root does not have; \
             use mode=proxied"
        }
        Grant::Exclusive(_) => {
            "ringfence.dev/mode=exclusive moves a card between network namespaces, which an engine without root may not; use a device of \
             kind soft"
        }
        // Its proxy opens the card's node from a root of its own, where it has to make it.
        Grant::Proxied(device, _) if device.kind == Kind::Ibverbs => {
            "an RDMA card (kind = \"ibverbs\") needs root, which an engine without root does not have; use a device of kind soft"
        }
        // The proxy's GIDs are its addresses.
        Grant::Proxied(..) if !is_own(network) && sys::owner_of_namespace(network).is_err() => {
            "the container is in a network namespace that is neither its user's nor the engine's, where a proxy without root \
             may not look; start it with another --network"
        }
        Grant::Proxied(..) => return Ok(()),
    };
    Err(Failure::new(Code::Privilege, message))
}

/// Whether the network namespace `network` is the one that we are in, as with `--network=host`.
pub fn is_own(network: BorrowedFd<'_>) -> bool {
    let inode = |found: rustix::fs::Stat| (found.st_dev, found.st_ino);
    let own = rustix::fs::stat("/proc/self/ns/net").map(inode);
    own.is_ok() && own == rustix::fs::fstat(network).map(inode)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps() {
        for (map, expected) in [
            ("         0          0 4294967295\n", None),
            ("         0       1000          1\n         1     100000      65536\n", Some(1000)),
            ("         1     100000      65536\n         0       1000          1\n", Some(1000)),
            ("0 100000 65536\n", Some(100_000)),
            ("0 0 65536\n", Some(0)),
            // No root at all, and nonsense.
            ("1000 1000 1\n", None),
            ("", None),
            ("0 x 1\n", None),
        ] {
            assert_eq!(outer_root(map), expected, "{map:?}");
        }
    }

    #[test]
    fn on_the_host_all_is_as_configured() {
        if user().is_none() {
            for path in ["/run/ringfence", "/run/x"] {
                assert_eq!(run_dir(path.into()).unwrap(), Path::new(path));
            }
        }
    }
}
