//! What the kubelet does: a client of the Container Runtime Interface (cri-api, `runtime.v1`).

mod messages;

use super::{Member, containerd};
use crate::command::wait_until;
use crate::node::{IMAGE, Node};
use anyhow::{Context, Result, anyhow};
use hyper_util::rt::TokioIo;
use messages::*;
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use tonic::client::Grpc;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic_prost::ProstCodec;

static NEXT: AtomicU32 = AtomicU32::new(0);

/// containerd's namespace for CRI.
pub const NAMESPACE: &str = "k8s.io";

/// Where containerd listens.
pub const SOCKET: &str = "/run/containerd/containerd.sock";

/// The interface's enumeration NamespaceMode: the node's.
const NODE: i32 = 2;

/// A connection to containerd's CRI plugin.
#[derive(Debug)]
pub struct Cri {
    runtime: tokio::runtime::Runtime,
    channel: Channel,
}

/// A pod: its sandbox. Stopped and removed when dropped.
#[derive(Debug)]
pub struct Pod<'c> {
    cri: &'c Cri,
    id: String,
    config: PodSandboxConfig,
}

/// What differs from container to container.
#[derive(Clone, Debug, Default)]
pub struct Options<'o> {
    /// The program, if not the image's.
    pub program: &'o [&'o str],
    /// Annotations of the container's own, as a device plugin adds them.
    pub annotations: &'o [(&'o str, &'o str)],
    /// Bytes of memory; 0 is no limit.
    pub memory: i64,
    /// How often it has been restarted.
    pub attempt: u32,
}

impl Cri {
    /// Connects to a node's containerd.
    pub fn connect(node: &Node) -> Result<Self> {
        Self::open(node.path(SOCKET))
    }

    /// Connects to the containerd that listens at `path`.
    pub fn open(path: PathBuf) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let connect = move |_: Uri| {
            let path = path.clone();
            async move { Ok::<_, std::io::Error>(TokioIo::new(tokio::net::UnixStream::connect(path).await?)) }
        };
        // The address is of no meaning to a Unix socket.
        let endpoint = Endpoint::from_static("http://localhost").timeout(Duration::from_secs(60));
        let channel = runtime.block_on(endpoint.connect_with_connector(tower::service_fn(connect)))?;
        Ok(Self { runtime, channel })
    }

    fn call<Q, A>(&self, method: &'static str, request: Q) -> Result<A>
    where
        Q: prost::Message + Send + Sync + 'static,
        A: prost::Message + Default + Send + Sync + 'static,
    {
        let path = format!("/runtime.v1.RuntimeService/{method}");
        self.runtime.block_on(async {
            let mut client = Grpc::new(self.channel.clone());
            client.ready().await.context("the CRI plugin is not ready")?;
            let answer = client.unary(tonic::Request::new(request), path.parse()?, ProstCodec::default()).await;
            answer.map(tonic::Response::into_inner).map_err(|status| anyhow!("{method}: {}", status.message()))
        })
    }

    /// Waits until the plugin answers: after a restart of containerd the first call fails with the old connection.
    pub fn wait(&self) -> Result<()> {
        let mut last = None;
        wait_until("the CRI plugin to answer", Duration::from_secs(15), || {
            let answer = self.call("Version", Empty {});
            let ready = answer.is_ok();
            last = answer.map(|Empty {}| ()).err();
            ready
        })
        .with_context(|| last.map(|error| format!("{error:#}")).unwrap_or_default())
    }

    /// Runs a pod's sandbox in the node's network namespace, by a RuntimeClass's handler; empty is containerd's default.
    pub fn pod(&self, handler: &str, annotations: &[(&str, &str)]) -> Result<Pod<'_>> {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        self.pod_in(&format!("/kubepods/pod{number}"), handler, annotations)
    }

    /// The same in a control group of the kubelet's: a path, or with systemd's driver the path of a slice.
    pub fn pod_in(&self, cgroup_parent: &str, handler: &str, annotations: &[(&str, &str)]) -> Result<Pod<'_>> {
        // Others may have left theirs.
        let name = format!("pod{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let config = PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                uid: format!("uid-{name}"),
                name,
                namespace: "team-a".into(),
                attempt: 0,
            }),
            annotations: map(annotations),
            linux: Some(LinuxPodSandboxConfig {
                cgroup_parent: cgroup_parent.to_owned(),
                security_context: Some(LinuxSandboxSecurityContext {
                    namespace_options: Some(NamespaceOption { network: NODE, pid: 1, ipc: 0 }),
                }),
            }),
            ..PodSandboxConfig::default()
        };
        let request = || RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: handler.into() };
        let answer = match self.call("RunPodSandbox", request()) {
            // Now and then runc loses its first process before it has called any hook; the kubelet tries again, too.
            Err(error) if format!("{error:#}").contains("read init-p: connection reset by peer") => {
                eprintln!("once more: {error:#}");
                self.call("RunPodSandbox", request())
            }
            answer => answer,
        };
        let RunPodSandboxResponse { pod_sandbox_id: id } = answer?;
        Ok(Pod { cri: self, id, config })
    }

    /// Stops the pod of this sandbox with all its containers and removes them; again, as the kubelet does, while containerd has
    /// yet to hear of a container's end.
    pub fn remove(&self, pod: &str) -> Result<()> {
        let mut last = Ok(());
        wait_until("the pod to be removed", Duration::from_secs(10), || {
            last = self.end(pod);
            last.is_ok()
        })
        .with_context(|| last.err().map(|error| format!("{error:#}")).unwrap_or_default())
    }

    fn end(&self, pod: &str) -> Result<()> {
        let request = || SandboxRequest { pod_sandbox_id: pod.into() };
        let Empty {} = self.call("StopPodSandbox", request())?;
        self.call("RemovePodSandbox", request()).map(|Empty {}| ())
    }
}

impl Pod<'_> {
    /// Its sandbox's id.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Creates a container and starts it; its id.
    pub fn start(&self, name: &str, options: &Options<'_>) -> Result<String> {
        let id = self.create(name, options)?;
        let _: Empty = self.cri.call("StartContainer", ContainerRequest { container_id: id.clone() })?;
        Ok(id)
    }

    /// Creates a container; its id.
    pub fn create(&self, name: &str, options: &Options<'_>) -> Result<String> {
        let config = ContainerConfig {
            metadata: Some(ContainerMetadata { name: name.into(), attempt: options.attempt }),
            image: Some(ImageSpec { image: IMAGE.into() }),
            command: options.program.iter().map(|word| (*word).to_owned()).collect(),
            annotations: map(options.annotations),
            linux: Some(LinuxContainerConfig {
                resources: Some(LinuxContainerResources { memory_limit_in_bytes: options.memory }),
                security_context: Some(LinuxContainerSecurityContext {
                    namespace_options: Some(NamespaceOption { network: NODE, pid: 1, ipc: 0 }),
                }),
            }),
        };
        let request = CreateContainerRequest {
            pod_sandbox_id: self.id.clone(),
            config: Some(config),
            sandbox_config: Some(self.config.clone()),
        };
        let answer: CreateContainerResponse = self.cri.call("CreateContainer", request)?;
        Ok(answer.container_id)
    }

    /// Stops a container, with SIGTERM for `grace` seconds.
    pub fn stop(&self, id: &str, grace: i64) -> Result<()> {
        let request = StopContainerRequest { container_id: id.into(), timeout: grace };
        self.cri.call("StopContainer", request).map(|Empty {}| ())
    }

    /// Removes a container that has ended.
    pub fn remove_container(&self, id: &str) -> Result<()> {
        self.cri.call("RemoveContainer", ContainerRequest { container_id: id.into() }).map(|Empty {}| ())
    }

    /// How a container is.
    pub fn status(&self, id: &str) -> Result<ContainerStatus> {
        let request = ContainerStatusRequest { container_id: id.into(), verbose: false };
        let answer: ContainerStatusResponse = self.cri.call("ContainerStatus", request)?;
        answer.status.context("no status")
    }

    /// What programs can be run in.
    #[must_use]
    pub fn member<'a>(&self, node: &'a Node, id: &str) -> Member<'a> {
        containerd::member(node, NAMESPACE, id)
    }

    /// What a readiness probe does; standard output.
    pub fn exec_sync(&self, id: &str, words: &[&str]) -> Result<String> {
        let cmd = words.iter().map(|word| (*word).to_owned()).collect();
        let request = ExecSyncRequest { container_id: id.into(), cmd, timeout: 30 };
        let answer: ExecSyncResponse = self.cri.call("ExecSync", request)?;
        let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        anyhow::ensure!(answer.exit_code == 0, "status {}: {}", answer.exit_code, said(&answer.stderr));
        Ok(said(&answer.stdout))
    }

    /// Stops it with all its containers and removes them.
    pub fn remove(self) -> Result<()> {
        self.cri.remove(&self.id)
    }

    /// Leaves it running; its sandbox's id.
    #[must_use]
    pub fn leave(self) -> String {
        let id = self.id.clone();
        std::mem::forget(self);
        id
    }
}

impl Drop for Pod<'_> {
    fn drop(&mut self) {
        // Both steps succeed for a sandbox that is gone.
        self.cri.end(&self.id).ok();
    }
}

fn map(pairs: &[(&str, &str)]) -> HashMap<String, String> {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}
