//! The engines, on a node that has all of them.

use super::surroundings::kills;
use anyhow::{Context, Result};
use ringfence_integration::engines::ENABLE;
use ringfence_integration::engines::cli::Cli;
use ringfence_integration::engines::docker::{Docker, docker};
use ringfence_integration::engines::podman::{User, podman};
use ringfence_integration::node::applications::{Applications, IMAGE, MUSL, PROGRAMS};
use ringfence_integration::node::{Node, Suite};
use std::cell::OnceCell;

/// Who makes the containers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// As root, under runc.
    Podman,
    /// An ordinary user's.
    Rootless,
    /// With the runtime `ringfence`.
    Docker,
}

impl Engine {
    /// Each with its default seccomp profile.
    pub const ALL: [Self; 3] = [Self::Podman, Self::Rootless, Self::Docker];

    /// What tests call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Podman => "podman",
            Self::Rootless => "podman without root",
            Self::Docker => "docker",
        }
    }

    /// The options that give a container RDMA.
    pub fn enable(self) -> [&'static str; 2] {
        match self {
            Self::Podman | Self::Rootless => ["--annotation", ENABLE],
            Self::Docker => ["--runtime", "ringfence"],
        }
    }
}

/// A node with the engines, the images and the programs. The fields drop in order: the daemon before the node.
pub struct Stage {
    _docker: Docker,
    /// The node.
    pub node: Node,
    applications: Applications,
    user: OnceCell<User>,
    loaded: [OnceCell<()>; 3],
}

impl Stage {
    /// A new node.
    pub fn make(suite: Suite) -> Result<Self> {
        let applications = Applications::make(suite)?;
        let node = Node::start(suite)?;
        applications.install(&node)?;
        let profile = node.path("/usr/share/containers/seccomp.json");
        let profile = std::fs::read(&profile).with_context(|| format!("cannot read {}", profile.display()))?;
        node.write(kills::PROFILE, kills::profile(&profile)?)?;
        node.run(&["ringfence", "configure", "--engine", "docker"])?;
        let docker = Docker::start(&node)?;
        Ok(Self { _docker: docker, node, applications, user: OnceCell::new(), loaded: Default::default() })
    }

    /// The engine's command line, with the images loaded.
    pub fn cli(&self, engine: Engine) -> Result<Cli<'_>> {
        let cli = match engine {
            Engine::Podman => podman(&self.node, "runc"),
            Engine::Rootless => self.user()?.podman(&self.node),
            Engine::Docker => docker(&self.node),
        };
        let loaded = &self.loaded[engine as usize];
        if loaded.get().is_none() {
            cli.import(IMAGE, self.applications.image()).context("cannot load the image")?;
            cli.import(MUSL, self.applications.musl_image()?).context("cannot load musl's image")?;
            loaded.set(()).ok();
        }
        Ok(cli.of_image(IMAGE))
    }

    fn user(&self) -> Result<&User> {
        if self.user.get().is_none() {
            self.user.set(User::make(&self.node)?).ok();
        }
        self.user.get().context("made above")
    }

    /// The options that every container of the tests gets: RDMA, and the programs.
    pub fn options(engine: Engine) -> Vec<String> {
        let volume = format!("{PROGRAMS}:{PROGRAMS}:ro");
        engine.enable().map(str::to_owned).into_iter().chain(["--volume".to_owned(), volume]).collect()
    }
}
