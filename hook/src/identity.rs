//! Who a container is in its pod, as far as its engine tells in annotations.
//!
//! | | containerd (CRI) | CRI-O | podman (pods, kube play) |
//! |---|---|---|---|
//! | kind | `io.kubernetes.cri.container-type` | `io.kubernetes.cri-o.ContainerType` | as CRI-O |
//! | name | `io.kubernetes.cri.container-name` | `io.kubernetes.container.name` | - |
//! | pod | `io.kubernetes.cri.sandbox-name` | `io.kubernetes.pod.name` | - |
//! | namespace | `io.kubernetes.cri.sandbox-namespace` | `io.kubernetes.pod.namespace` | - |

use crate::state::Annotations;
use std::path::{Component, Path};

const CONTAINERD_KIND: &str = "io.kubernetes.cri.container-type";
const CONTAINERD_NAME: &str = "io.kubernetes.cri.container-name";
const CONTAINERD_POD: &str = "io.kubernetes.cri.sandbox-name";
const CONTAINERD_NAMESPACE: &str = "io.kubernetes.cri.sandbox-namespace";
const CRIO_KIND: &str = "io.kubernetes.cri-o.ContainerType";
const CRIO_NAME: &str = "io.kubernetes.container.name";
const CRIO_POD: &str = "io.kubernetes.pod.name";
const CRIO_NAMESPACE: &str = "io.kubernetes.pod.namespace";

/// What the annotations say. Any of it may be a tenant's word: where something depends on it, ask [`Namespace::of`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Identity<'a> {
    /// Whether it only holds a pod's namespaces. It carries the pod's annotations all the same.
    pub is_sandbox: bool,
    /// The container's name in its pod.
    pub container: Option<&'a str>,
    /// The pod's name.
    pub pod: Option<&'a str>,
    /// The pod's Kubernetes namespace.
    pub namespace: Option<&'a str>,
}

impl<'a> Identity<'a> {
    /// Reads it from all of a container's annotations.
    pub fn of(annotations: &'a Annotations) -> Self {
        let value = |key: &str| annotations.get(key).map(String::as_str).filter(|value| !value.is_empty());
        let either = |keys: [&str; 2]| keys.into_iter().find_map(value);
        Self {
            is_sandbox: [CONTAINERD_KIND, CRIO_KIND].iter().any(|kind| value(kind) == Some("sandbox")),
            container: either([CONTAINERD_NAME, CRIO_NAME]),
            pod: either([CONTAINERD_POD, CRIO_POD]),
            namespace: either([CONTAINERD_NAMESPACE, CRIO_NAMESPACE]),
        }
    }
}

/// The Kubernetes namespace of a container, as far as it can be believed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Namespace {
    /// It has none: it was not made through CRI.
    #[default]
    None,
    /// A CRI engine says so.
    Known(String),
    /// An annotation says so, but whoever started the container could have written it.
    Claimed(String),
}

/// Engines that serve CRI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Engine {
    Containerd,
    Crio,
}

impl Namespace {
    /// The namespace of a container with these annotations, whose bundle is the directory `bundle`.
    ///
    /// Everybody who may start a container may give it annotations (podman, docker, ctr and runc let him choose all of them),
    /// but not choose where the engine puts its bundle. containerd's CRI has a directory of its own. CRI-O's are below `/run`;
    /// podman, which shares CRI-O's layout, has them in its persistent storage. And each engine overwrites its own key only:
    /// a pod may carry the other's.
    pub fn of(annotations: &Annotations, bundle: &Path) -> Self {
        let key = match Engine::of(bundle) {
            Some(Engine::Containerd) => CONTAINERD_NAMESPACE,
            Some(Engine::Crio) => CRIO_NAMESPACE,
            None => {
                let claimed = Identity::of(annotations).namespace;
                return claimed.map_or(Self::None, |namespace| Self::Claimed(namespace.to_owned()));
            }
        };
        annotations.get(key).filter(|value| !value.is_empty()).map_or(Self::None, |value| Self::Known(value.clone()))
    }
}

impl Engine {
    fn of(bundle: &Path) -> Option<Self> {
        let mut components = bundle.components();
        let mut previous = || match components.next_back() {
            Some(Component::Normal(name)) => name.to_str(),
            _ => None,
        };
        let (last, second, third) = (previous()?, previous()?, previous()?);
        if second == "k8s.io" && third == "io.containerd.runtime.v2.task" {
            return Some(Self::Containerd);
        }
        let of_crio = last == "userdata" && third.ends_with("-containers") && bundle.starts_with("/run");
        of_crio.then_some(Self::Crio)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn annotations(pairs: &[(&str, &str)]) -> Annotations {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn engines_say_who_a_container_is() {
        let containerd = [
            (CONTAINERD_KIND, "container"),
            (CONTAINERD_NAME, "app"),
            (CONTAINERD_POD, "p1"),
            (CONTAINERD_NAMESPACE, "team-a"),
        ];
        let crio = [(CRIO_KIND, "container"), (CRIO_NAME, "app"), (CRIO_POD, "p1"), (CRIO_NAMESPACE, "team-a")];
        let expected =
            Identity { is_sandbox: false, container: Some("app"), pod: Some("p1"), namespace: Some("team-a") };
        for pairs in [containerd, crio] {
            assert_eq!(Identity::of(&annotations(&pairs)), expected, "{pairs:?}");
        }
        let podman = annotations(&[("io.container.manager", "libpod"), (CRIO_KIND, "container")]);
        assert_eq!(Identity::of(&podman), Identity::default());
        for kind in [CONTAINERD_KIND, CRIO_KIND] {
            assert!(Identity::of(&annotations(&[(kind, "sandbox")])).is_sandbox);
        }
        assert_eq!(Identity::of(&annotations(&[(CONTAINERD_NAME, "")])).container, None);
    }

    #[test]
    fn a_namespace_is_believed_by_the_bundle() {
        const ID: &str = "4f1c";
        let known = |name: &str| Namespace::Known(name.into());
        let claimed = |name: &str| Namespace::Claimed(name.into());
        let containerd = (CONTAINERD_NAMESPACE, "team-a");
        let crio = (CRIO_NAMESPACE, "team-b");
        for (bundle, pairs, expected) in [
            ("/run/containerd/io.containerd.runtime.v2.task/k8s.io/", vec![containerd], known("team-a")),
            ("/run/k3s/containerd/io.containerd.runtime.v2.task/k8s.io/", vec![containerd], known("team-a")),
            // The other engine's key is the pod's own word.
            ("/run/containerd/io.containerd.runtime.v2.task/k8s.io/", vec![containerd, crio], known("team-a")),
            ("/run/containerd/io.containerd.runtime.v2.task/k8s.io/", vec![crio], Namespace::None),
            ("/run/containers/storage/overlay-containers/{}/userdata", vec![crio], known("team-b")),
            ("/run/containers/storage/overlay-containers/{}/userdata", vec![containerd, crio], known("team-b")),
            ("/run/containers/storage/overlay-containers/{}/userdata", vec![containerd], Namespace::None),
            // ctr, docker, podman, runc.
            ("/run/containerd/io.containerd.runtime.v2.task/default/", vec![containerd], claimed("team-a")),
            ("/run/containerd/io.containerd.runtime.v2.task/moby/", vec![crio], claimed("team-b")),
            ("/var/lib/containers/storage/overlay-containers/{}/userdata", vec![crio], claimed("team-b")),
            ("/root/bundle", vec![containerd], claimed("team-a")),
            ("/k8s.io/", vec![containerd], claimed("team-a")),
            ("/", vec![containerd], claimed("team-a")),
            ("/root/bundle", vec![], Namespace::None),
        ] {
            let path = if bundle.contains("{}") { bundle.replace("{}", ID) } else { format!("{bundle}{ID}") };
            assert_eq!(Namespace::of(&annotations(&pairs), Path::new(&path)), expected, "{path} {pairs:?}");
        }
    }
}
