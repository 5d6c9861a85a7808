//! What a container gets: the one place that asks the hook's policy.

use crate::edit::{Facts, Node, Nodes};
use ringfence_hook::card::{self, SYS};
use ringfence_hook::config::Config;
use ringfence_hook::identity::Namespace;
use ringfence_hook::policy::Grant;
use ringfence_hook::{Code, Failure, annotations, config, policy, rdma_cm};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// The nodes that a container needs in `config.json`; `None` if the container is not ours.
///
/// The administrator's configuration, which may be broken, is not looked at for containers that are not ours.
pub fn nodes(
    facts: &Facts,
    bundle: &Path,
    policy: Option<&str>,
    config: &Result<Config, config::Error>,
) -> Result<Option<Nodes>, Failure> {
    let Some(request) = annotations::wanted(&facts.annotations, policy)? else { return Ok(None) };
    let config = config.as_ref().map_err(|error| Failure::new(Code::Config, error.to_string()))?;
    let namespace = Namespace::of(&facts.annotations, bundle);
    match policy::resolve(&request, &namespace, config)?.grant {
        // The hook brings the nodes itself, with a mode of its own. To open them is for the runtime to allow, with cgroup version 2.
        Grant::Proxied(device, _) => {
            let mut allowed: Vec<_> =
                config.inject.userfaultfd().map(|host| (host.major, host.minor)).into_iter().collect();
            // Why there is none is for the hook to say.
            let manager = rdma_cm::Host::of(Path::new(SYS), device).ok().flatten();
            allowed.extend(manager.map(|host| (host.major, host.minor)));
            Ok(Some(Nodes { made: Vec::new(), allowed }))
        }
        Grant::Passthrough(device) => {
            let made = nodes_of(device.nodes.iter().map(PathBuf::as_path))?;
            Ok(Some(Nodes { made, allowed: Vec::new() }))
        }
        // Its node for verbs the hook brings, for it may be another one then; mostly it is the same.
        Grant::Exclusive(device) => {
            let made = nodes_of(device.nodes_beside_verbs())?;
            Ok(Some(Nodes { made, allowed: card::verbs_of(Path::new(SYS), &device.name).into_iter().collect() }))
        }
    }
}

fn nodes_of<'a>(paths: impl Iterator<Item = &'a Path>) -> Result<Vec<Node>, Failure> {
    let node = |path: &Path| {
        let wrong = |what: String| Failure::new(Code::Device, format!("device node {}: {what}", path.display()));
        let found = std::fs::symlink_metadata(path).map_err(|error| wrong(error.to_string()))?;
        if !found.file_type().is_char_device() {
            return Err(wrong("it is not a character device".into()));
        }
        Ok(Node {
            path: path.to_str().ok_or_else(|| wrong("its name is not UTF-8".into()))?.to_owned(),
            major: rustix::fs::major(found.rdev()),
            minor: rustix::fs::minor(found.rdev()),
            mode: found.mode() & 0o777,
            uid: found.uid(),
            gid: found.gid(),
        })
    };
    paths.map(node).collect()
}
