//! Registrations on hosts of plain files.

use super::*;
use crate::engines::Options;
use std::os::unix::fs::PermissionsExt;

struct Root(tempfile::TempDir);

impl Root {
    fn new() -> Self {
        let root = Self(tempfile::tempdir().unwrap());
        for program in ["ringfence-hook", "ringfence-runtime"] {
            root.write(&format!("usr/bin/{program}"), "");
            let path = root.0.path().join("usr/bin").join(program);
            std::fs::set_permissions(path, PermissionsExt::from_mode(0o755)).unwrap();
        }
        root
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.0.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    fn edit(&self, path: &str, from: &str, to: &str) {
        let text = std::fs::read_to_string(self.0.path().join(path)).unwrap();
        assert!(text.contains(from), "{text}");
        self.write(path, &text.replace(from, to));
    }

    fn host(&self) -> Host {
        Host::new(Some(self.0.path()), false).unwrap()
    }

    fn configure(&self, engine: Engine) {
        engine.configure(&self.host(), &Options::default()).unwrap().apply().unwrap();
    }

    /// What is said of `engine` that is not "ok".
    fn complaints(&self, engine: Engine) -> Vec<Check> {
        let (mut report, host, config) = (Report::default(), self.host(), Config::default());
        match engine {
            Engine::Containerd => containerd::check(&mut report, &host, &config),
            Engine::Docker => registrations::docker(&mut report, &host, &config),
            Engine::Podman => registrations::podman(&mut report, &host, &config),
            Engine::Crio => registrations::crio(&mut report, &host, &config),
        }
        report.checks.into_iter().filter(|check| check.status != Status::Ok).collect()
    }

    #[track_caller]
    fn expect(&self, engine: Engine, status: Status, message: &str, fix: &str) {
        let complaints = self.complaints(engine);
        let found = |check: &Check| {
            let fits = check.fix.as_ref().is_some_and(|text| text.contains(fix));
            check.status == status && check.message.contains(message) && fits
        };
        assert!(complaints.iter().any(found), "{complaints:?}");
    }
}

const CONTAINERD: &str = "etc/containerd/config.toml";
const HOOK: &str = "usr/share/containers/oci/hooks.d/50-ringfence-createruntime.json";

#[test]
fn an_engine_is_fine_once_it_is_configured() {
    for engine in Engine::ALL {
        let root = Root::new();
        root.expect(engine, Status::Warning, "registered", &format!("ringfence configure --engine {}", engine.name()));
        root.configure(engine);
        assert_eq!(root.complaints(engine), [], "{engine:?}");
    }
}

#[test]
fn a_default_runtime_that_is_named_twice_is_told() {
    let root = Root::new();
    root.configure(Engine::Docker);
    root.write("lib/systemd/system/docker.service", "[Service]\nExecStart=/usr/bin/dockerd --default-runtime=nvidia\n");
    assert_eq!(root.complaints(Engine::Docker), []);
    root.edit("etc/docker/daemon.json", "{", "{\"default-runtime\": \"runc\",");
    root.expect(Engine::Docker, Status::Problem, "dockerd does not start", "/lib/systemd/system/docker.service");
}

#[test]
fn registrations_that_containerd_would_not_serve_are_told() {
    let root = Root::new();
    root.configure(Engine::Containerd);
    root.edit(CONTAINERD, "\"ringfence.dev/*\"", "\"ringfence.dev*\"");
    root.expect(Engine::Containerd, Status::Problem, "add \"ringfence.dev/*\"", "ringfence configure");
    root.edit(CONTAINERD, "/usr/bin/ringfence-runtime", "/opt/gone");
    root.expect(Engine::Containerd, Status::Problem, "BinaryName is \"/opt/gone\"", "ringfence configure");

    // On 1.x the imported section replaces the one with our runtime.
    let root = Root::new();
    root.configure(Engine::Containerd);
    root.edit(CONTAINERD, "version = 2", "imports = [\"/etc/more.toml\"]\nversion = 2");
    root.write("etc/more.toml", "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\"]\nsandbox_image = \"x\"\n");
    root.expect(Engine::Containerd, Status::Problem, "/etc/more.toml replaces that section", "ringfence configure");

    let section = "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".containerd]\n";
    root.write(CONTAINERD, &format!("{section}default_runtime_name = \"ringfence\"\n"));
    root.expect(Engine::Containerd, Status::Problem, "no pod starts", "ringfence configure");
    root.write(CONTAINERD, "version = 2\n[");
    root.expect(Engine::Containerd, Status::Problem, "line 2", "correct that file");
}

#[test]
fn options_of_our_shim_s_own_type_are_told() {
    let root = Root::new();
    root.configure(Engine::Containerd);
    let table = "[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.rdma";
    let text = format!(
        "version = 2\n{table}]\nruntime_type = \"io.containerd.ringfence.v2\"\n{table}.options]\nSystemdCgroup = true\n"
    );
    root.edit(CONTAINERD, "version = 2", "# two\nversion = 2");
    let ours = std::fs::read_to_string(root.0.path().join(CONTAINERD)).unwrap();
    root.write(CONTAINERD, &format!("{ours}\n{}", text.replace("version = 2\n", "")));
    root.expect(
        Engine::Containerd,
        Status::Problem,
        "runtime rdma: its runtime_type",
        "remove the options of runtime rdma",
    );
}

#[test]
fn hooks_that_stop_every_container_are_told() {
    let root = Root::new();
    root.configure(Engine::Podman);
    std::fs::remove_file(root.0.path().join("usr/bin/ringfence-hook")).unwrap();
    root.expect(Engine::Podman, Status::Problem, "\"/usr/bin/ringfence-hook\", which does not exist", "rm /usr/share");

    let root = Root::new();
    root.configure(Engine::Crio);
    root.write("usr/share/containers/oci/hooks.d/other.json", "{");
    root.expect(Engine::Crio, Status::Problem, "other.json is broken", "rm ");
    root.edit(HOOK, "\"createRuntime\"\n  ]", "\"precreate\"\n  ]");
    root.expect(Engine::Crio, Status::Problem, "precreate, with which CRI-O does not start", "move ");
}

#[test]
fn hooks_that_the_engine_does_not_read_are_told() {
    let root = Root::new();
    root.configure(Engine::Podman);
    root.write("etc/containers/containers.conf.d/99-mine.conf", "[engine]\nhooks_dir = [\"/srv/hooks\"]\n");
    root.expect(
        Engine::Podman,
        Status::Problem,
        "hooks_dir names [\"/srv/hooks\"]",
        "ringfence configure --engine podman",
    );
    root.edit(HOOK, "30", "5");
    root.expect(Engine::Podman, Status::Warning, "not up to date", "ringfence configure --engine podman");
}

#[test]
fn docker_s_runtime_must_be_ours() {
    let root = Root::new();
    root.configure(Engine::Docker);
    root.edit("etc/docker/daemon.json", "/usr/bin/ringfence-runtime", "/old/ringfence-runtime");
    root.expect(Engine::Docker, Status::Problem, "is /old/ringfence-runtime", "systemctl reload docker");
    root.edit("etc/docker/daemon.json", "/old/ringfence-runtime", "/usr/bin/ringfence-runtime-default");
    root.expect(Engine::Docker, Status::Problem, "which is missing", "systemctl reload docker");
    root.write("etc/docker/daemon.json", "{");
    root.expect(Engine::Docker, Status::Problem, "JSON is broken", "correct that file");
}
