//! `ringfence configure` and `unconfigure` on hosts of plain files.

use ringfence_trials::{skip, tests};
use std::collections::BTreeMap;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

fn main() -> ExitCode {
    ringfence_trials::main(tests![
        each_engine_is_registered_once_and_taken_out_again,
        all_engines_that_are_there_are_registered,
        programs_that_are_missing_are_not_registered,
        broken_files_stay_as_they_are,
        the_import_that_owns_the_cri_section_is_edited,
        a_symbolic_link_stays_one_and_modes_stay,
        k3s_gets_a_drop_in_or_advice,
        docker_has_a_runtime_per_profile,
        docker_s_flags_are_looked_at,
        hooks_are_such_that_podman_and_crio_take_them,
        an_administrator_s_hooks_dir_is_kept,
        an_engine_that_is_not_there_is_told,
        containerd_sees_the_runtime_and_everything_else,
    ])
}

/// A host's root file system with Ringfence installed.
struct Host(tempfile::TempDir);

impl Host {
    fn new() -> Self {
        let host = Self(tempfile::tempdir().unwrap());
        for program in ["ringfence-hook", "ringfence-runtime"] {
            host.program(&format!("/usr/bin/{program}"));
        }
        host
    }

    fn path(&self, path: &str) -> PathBuf {
        self.0.path().join(path.trim_start_matches('/'))
    }

    fn write(&self, path: &str, text: &str) {
        std::fs::create_dir_all(self.path(path).parent().unwrap()).unwrap();
        std::fs::write(self.path(path), text).unwrap();
    }

    fn program(&self, path: &str) {
        self.write(path, "#!/bin/sh\n");
        std::fs::set_permissions(self.path(path), PermissionsExt::from_mode(0o755)).unwrap();
    }

    fn read(&self, path: &str) -> String {
        std::fs::read_to_string(self.path(path)).unwrap()
    }

    /// All files with their content.
    fn files(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        let mut files = BTreeMap::new();
        let mut pending = vec![self.0.path().to_owned()];
        while let Some(directory) = pending.pop() {
            for entry in std::fs::read_dir(directory).unwrap().map(Result::unwrap) {
                if entry.file_type().unwrap().is_dir() {
                    pending.push(entry.path());
                } else {
                    files.insert(entry.path(), std::fs::read(entry.path()).unwrap_or_default());
                }
            }
        }
        files
    }

    fn run(&self, arguments: &str) -> (i32, String) {
        let mut arguments: Vec<_> = arguments.split_whitespace().collect();
        arguments.extend(["--root", self.0.path().to_str().unwrap()]);
        run(&arguments, &[])
    }

    #[track_caller]
    fn succeed(&self, arguments: &str) -> String {
        let (code, text) = self.run(arguments);
        assert_eq!(code, 0, "{arguments}: {text}");
        text
    }

    /// Refused with one line that has `expected`, and nothing is changed.
    #[track_caller]
    fn refuse(&self, arguments: &str, expected: &str) {
        let before = self.files();
        let (code, text) = self.run(arguments);
        assert_eq!(code, 1, "{arguments}: {text}");
        assert!(text.contains(expected) && text.lines().count() == 1, "{arguments}: {text}");
        assert_eq!(self.files(), before, "{arguments}");
    }
}

fn run(arguments: &[&str], environment: &[(&str, &Path)]) -> (i32, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ringfence"));
    command.args(arguments).env_remove("RINGFENCE_CONFIG").env_remove("CONTAINERS_CONF");
    let output = command.envs(environment.iter().copied()).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap() + &String::from_utf8(output.stderr).unwrap();
    (output.status.code().unwrap(), text)
}

const CONTAINERD: &str = "/etc/containerd/config.toml";
const KUBERNETES: &str = include_str!("containerd/kubernetes-systemd.toml");
const CREATE_RUNTIME: &str = "/usr/share/containers/oci/hooks.d/50-ringfence-createruntime.json";

fn each_engine_is_registered_once_and_taken_out_again() {
    for engine in ["containerd", "docker", "podman", "crio"] {
        let host = Host::new();
        host.write(CONTAINERD, KUBERNETES);
        host.write("/etc/docker/daemon.json", "{\n  \"debug\": true\n}\n");
        let before = host.files();

        let text = host.succeed(&format!("configure --engine {engine} --dry-run"));
        assert!(text.contains("\n+") && text.contains("@@ "), "{engine}: {text}");
        assert_eq!(host.files(), before, "{engine}: a dry run");

        let text = host.succeed(&format!("configure --engine {engine} --set-as-default"));
        assert_eq!(text.contains("now run on the host: systemctl"), engine != "podman", "{engine}: {text}");
        let configured = host.files();
        assert_ne!(configured, before);

        let text = host.succeed(&format!("configure --engine {engine} --set-as-default"));
        assert!(text.contains("already configured") && !text.contains("now run"), "{engine}: {text}");
        assert_eq!(host.files(), configured, "{engine}: a second time");

        host.succeed(&format!("unconfigure --engine {engine}"));
        assert_eq!(host.files(), before, "{engine}: unconfigured");
        let text = host.succeed(&format!("unconfigure --engine {engine}"));
        assert_eq!(text, format!("{engine}: not configured\n"));
    }
}

fn all_engines_that_are_there_are_registered() {
    let host = Host::new();
    host.refuse("configure --engine all", "no engine is installed");
    host.program("/usr/bin/containerd");
    host.program("/usr/bin/podman");
    let before = host.files();
    let text = host.succeed("configure --engine all");
    assert!(text.contains("containerd: ") && text.contains("podman: ") && !text.contains("docker: "), "{text}");
    // Whether or not they are still there.
    std::fs::remove_file(host.path("/usr/bin/podman")).unwrap();
    host.succeed("unconfigure --engine all");
    let mut after = host.files();
    after.insert(host.path("/usr/bin/podman"), b"#!/bin/sh\n".to_vec());
    assert_eq!(after, before);
}

fn programs_that_are_missing_are_not_registered() {
    let host = Host::new();
    std::fs::remove_file(host.path("/usr/bin/ringfence-hook")).unwrap();
    host.refuse("configure --engine podman", "/usr/bin/ringfence-hook is missing");
    host.refuse("configure --engine crio", "/usr/bin/ringfence-hook is missing");
    std::fs::remove_file(host.path("/usr/bin/ringfence-runtime")).unwrap();
    host.refuse("configure --engine containerd", "/usr/bin/ringfence-runtime is missing");
    host.refuse("configure --engine docker", "/usr/bin/ringfence-runtime is missing");
}

fn broken_files_stay_as_they_are() {
    let host = Host::new();
    host.write(CONTAINERD, "version = 2\n[plugins\n");
    host.refuse("configure --engine containerd", "/etc/containerd/config.toml: line 2");
    host.write(CONTAINERD, "imports = [\"/nowhere.toml\"]\nversion = 2\n");
    host.refuse("configure --engine containerd", "imports /nowhere.toml, which does not exist");
    host.write(CONTAINERD, "disabled_plugins = [\"cri\"]\n");
    host.refuse("configure --engine containerd", "disables containerd's CRI plugin");
    host.write("/etc/docker/daemon.json", "{\n  \"debug\": yes\n}\n");
    host.refuse("configure --engine docker", "line 2 column");
    host.write("/etc/containers/containers.conf", "[engine]\nhooks_dir = [\n");
    host.refuse("configure --engine podman", "/etc/containers/containers.conf: line");
    host.write("/etc/crio/crio.conf.d/50-ringfence.conf", "# mine\n[crio]\n");
    host.refuse("configure --engine crio", "is not written by `ringfence configure`");
    std::fs::write(host.path("/etc/docker/daemon.json"), b"\xff").unwrap();
    host.refuse("configure --engine docker", "is not UTF-8");
    std::fs::remove_file(host.path("/etc/docker/daemon.json")).unwrap();
    std::fs::create_dir(host.path("/etc/docker/daemon.json")).unwrap();
    host.refuse("configure --engine docker", "cannot read");
    // What is broken but not by us does not keep the package from being removed.
    host.write(CONTAINERD, "version = 2\n[plugins\n");
    host.succeed("unconfigure --engine containerd");
    // A configuration of ours that is broken is told.
    host.write("/etc/ringfence/config.toml", "run-dir = 1\n");
    host.refuse("configure --engine podman", "/etc/ringfence/config.toml: line 1");
}

fn the_import_that_owns_the_cri_section_is_edited() {
    let host = Host::new();
    host.write(CONTAINERD, &format!("imports = [\"conf.d/*.toml\", \"/etc/other.toml\"]\n{}", KUBERNETES));
    host.write("/etc/containerd/conf.d/a.toml", include_str!("containerd/imported.toml"));
    host.write("/etc/other.toml", "version = 2\noom_score = -999\n");
    let before = host.files();
    host.succeed("configure --engine containerd");
    let changed: Vec<_> = host.files().into_iter().filter(|file| before.get(&file.0) != Some(&file.1)).collect();
    assert_eq!(changed.len(), 1);
    assert_eq!(changed[0].0, host.path("/etc/containerd/conf.d/a.toml"));
    host.succeed("unconfigure --engine containerd");
    assert_eq!(host.files(), before);
}

fn a_symbolic_link_stays_one_and_modes_stay() {
    let host = Host::new();
    host.write("/srv/containerd.toml", KUBERNETES);
    std::fs::set_permissions(host.path("/srv/containerd.toml"), PermissionsExt::from_mode(0o640)).unwrap();
    std::fs::create_dir_all(host.path("/etc/containerd")).unwrap();
    symlink("/srv/containerd.toml", host.path(CONTAINERD)).unwrap();
    host.succeed("configure --engine containerd");
    assert!(host.path(CONTAINERD).is_symlink());
    assert!(host.read("/srv/containerd.toml").contains("runtimes.ringfence"));
    let mode = host.path("/srv/containerd.toml").metadata().unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o640);
}

fn k3s_gets_a_drop_in_or_advice() {
    let host = Host::new();
    let directory = "/var/lib/rancher/k3s/agent/etc/containerd";
    host.write(&format!("{directory}/config.toml"), "version = 2\n");
    host.refuse("configure --engine containerd", "config.toml.tmpl");
    host.succeed("unconfigure --engine containerd");
    let main = format!("version = 3\nimports = [\"{directory}/config-v3.toml.d/*.toml\"]\n");
    host.write(&format!("{directory}/config.toml"), &main);
    let text = host.succeed("configure --engine containerd");
    assert!(text.contains("systemctl restart k3s"), "{text}");
    let drop_in = host.read(&format!("{directory}/config-v3.toml.d/ringfence.toml"));
    assert!(drop_in.contains("version = 3") && drop_in.contains("io.containerd.cri.v1.runtime"), "{drop_in}");
    host.succeed("unconfigure --engine containerd");
    assert!(!host.path(&format!("{directory}/config-v3.toml.d/ringfence.toml")).exists());
}

fn docker_has_a_runtime_per_profile() {
    let host = Host::new();
    let text = host.succeed("configure --engine docker --policy gold");
    assert!(text.contains("docker run --runtime ringfence-gold"), "{text}");
    let json: serde_json::Value = serde_json::from_str(&host.read("/etc/docker/daemon.json")).unwrap();
    let arguments =
        serde_json::json!({"path": "/usr/bin/ringfence-runtime", "runtimeArgs": ["--ringfence-policy", "gold"]});
    assert_eq!(json["runtimes"]["ringfence-gold"], arguments);
    host.program("/usr/bin/ringfence-runtime-gold");
    host.succeed("configure --engine docker --policy gold");
    let json: serde_json::Value = serde_json::from_str(&host.read("/etc/docker/daemon.json")).unwrap();
    assert_eq!(json["runtimes"]["ringfence-gold"], serde_json::json!({"path": "/usr/bin/ringfence-runtime-gold"}));
    host.refuse("configure --engine docker --policy ../x", "--policy \"../x\"");
    host.refuse("configure --engine podman --policy gold", "--policy is for --engine docker");
}

fn docker_s_flags_are_looked_at() {
    const DROP_IN: &str = "/etc/systemd/system/docker.service.d/nvidia.conf";
    let host = Host::new();
    host.write("/lib/systemd/system/docker.service", "[Service]\nExecStart=/usr/bin/dockerd -H fd://\n");
    host.write(DROP_IN, "[Service]\nExecStart=\nExecStart=/usr/bin/dockerd -H fd:// --default-runtime=nvidia\n");
    host.refuse(
        "configure --engine docker --set-as-default",
        "--default-runtime=nvidia in /etc/systemd/system/docker.service.d/nvidia.conf",
    );
    host.succeed("configure --engine docker");
    host.succeed("unconfigure --engine docker");

    host.write(DROP_IN, "[Service]\nExecStart=\nExecStart=/usr/bin/dockerd --default-runtime ringfence\n");
    let text = host.succeed("configure --engine docker --set-as-default");
    assert!(text.contains("the default already"), "{text}");
    assert!(!host.read("/etc/docker/daemon.json").contains("default-runtime"));
    host.refuse("unconfigure --engine docker", "take the flag out first");
    host.write(DROP_IN, "");
    host.succeed("unconfigure --engine docker");

    host.write(DROP_IN, "[Service]\nExecStart=\nExecStart=/usr/bin/dockerd --config-file=/etc/other.json\n");
    host.succeed("configure --engine docker --set-as-default");
    assert!(host.read("/etc/other.json").contains("\"default-runtime\""));
    host.succeed("unconfigure --engine docker");
}

fn hooks_are_such_that_podman_and_crio_take_them() {
    let host = Host::new();
    host.succeed("configure --engine podman");
    for (name, stage) in [("createruntime", "createRuntime"), ("poststop", "poststop")] {
        let path = format!("/usr/share/containers/oci/hooks.d/50-ringfence-{name}.json");
        let json: serde_json::Value = serde_json::from_str(&host.read(&path)).unwrap();
        assert_eq!(json["stages"], serde_json::json!([stage]));
        assert_eq!(json["hook"]["args"], serde_json::json!(["ringfence-hook", stage]));
        assert!(!json["hook"]["env"].as_array().unwrap().is_empty());
        assert_eq!(
            json["when"]["annotations"].as_object().unwrap().keys().next().unwrap(),
            "^([^/]*\\.)?ringfence\\.dev/"
        );
    }
    // CRI-O uses the same files, and keeps them.
    host.succeed("configure --engine crio");
    let text = host.succeed("unconfigure --engine podman");
    assert!(text.contains("CRI-O uses it"), "{text}");
    assert!(host.path(CREATE_RUNTIME).exists());
    host.succeed("unconfigure --engine crio");
    assert!(!host.path(CREATE_RUNTIME).exists());
}

fn an_administrator_s_hooks_dir_is_kept() {
    let host = Host::new();
    host.write("/etc/containers/containers.conf", "[engine]\nhooks_dir = [\"/srv/hooks\"]\n");
    host.write("/etc/crio/crio.conf", "[crio.runtime]\nhooks_dir = [\"/srv/crio-hooks\"]\n");
    host.succeed("configure --engine podman");
    host.succeed("configure --engine crio");
    let podman = host.read("/etc/containers/containers.conf.d/50-ringfence.conf");
    assert!(podman.contains("hooks_dir = [\"/srv/hooks\", \"/usr/share/containers/oci/hooks.d\"]"), "{podman}");
    let crio = host.read("/etc/crio/crio.conf.d/50-ringfence.conf");
    assert!(crio.contains("hooks_dir = [\"/srv/crio-hooks\", \"/usr/share/containers/oci/hooks.d\"]"), "{crio}");
    // Where the default holds, it is not frozen.
    host.write("/etc/containers/containers.conf", "");
    host.succeed("configure --engine podman");
    assert!(!host.read("/etc/containers/containers.conf.d/50-ringfence.conf").contains("hooks_dir"));
    // As podman 5 writes it.
    host.write("/etc/containers/containers.conf", "[engine]\nhooks_dir = [\"/srv/hooks\", {append = true}]\n");
    host.succeed("configure --engine podman");
    assert!(!host.read("/etc/containers/containers.conf.d/50-ringfence.conf").contains("hooks_dir"));
}

fn an_engine_that_is_not_there_is_told() {
    let (code, text) = run(&["configure", "--engine", "crio"], &[]);
    if Path::new("/usr/bin/crio").exists() {
        skip("this machine has CRI-O");
    }
    assert_eq!((code, text.as_str()), (1, "ringfence: crio is not installed here; nothing to configure\n"));
}

/// What containerd itself makes of our files; and that we ask it.
fn containerd_sees_the_runtime_and_everything_else() {
    if !Path::new("/usr/bin/containerd").exists() {
        skip("no /usr/bin/containerd");
    }
    let host = Host::new();
    let own = host.path("/own.toml");
    let (runtime, hook) = (host.path("/usr/bin/ringfence-runtime"), host.path("/usr/bin/ringfence-hook"));
    host.write("/own.toml", &format!("[runtime]\npath = {runtime:?}\n[hook]\npath = {hook:?}\n"));
    let files = [
        ("debian", include_str!("containerd/debian.toml")),
        ("kubernetes-systemd", KUBERNETES),
        ("mirrors", include_str!("containerd/mirrors.toml")),
        ("nvidia", include_str!("containerd/nvidia.toml")),
        ("kata-only", include_str!("containerd/kata-only.toml")),
        ("empty", ""),
    ];
    let main = host.path("/main.toml");
    for (name, text) in files {
        host.write("/main.toml", text);
        let arguments = ["configure", "--engine", "containerd", "--config", main.to_str().unwrap()];
        let (code, said) = run(&arguments, &[("RINGFENCE_CONFIG", &own)]);
        assert_eq!(code, 0, "{name}: {said}");
        let dump = Command::new("containerd").arg("--config").arg(&main).args(["config", "dump"]).output().unwrap();
        let dump: toml::Table = toml::from_str(&String::from_utf8(dump.stdout).unwrap()).unwrap();
        let find = |path: &[&str]| path.iter().try_fold(&dump["plugins"], |value, key| value.get(key)).cloned();
        let key = if find(&["io.containerd.cri.v1.runtime"]).is_some() {
            "io.containerd.cri.v1.runtime"
        } else {
            "io.containerd.grpc.v1.cri"
        };
        let runtimes = find(&[key, "containerd", "runtimes"]).unwrap();
        assert_eq!(runtimes["ringfence"]["options"]["BinaryName"].as_str(), runtime.to_str(), "{name}");
        assert_eq!(runtimes.get("runc").is_some() || key.ends_with("cri.v1.runtime"), name != "kata-only", "{name}");
    }
    // A file that this containerd would not understand is not installed.
    if String::from_utf8(Command::new("containerd").arg("--version").output().unwrap().stdout).unwrap().contains(" 1.")
    {
        host.write("/main.toml", "version = 3\n");
        let arguments = ["configure", "--engine", "containerd", "--config", main.to_str().unwrap()];
        let (code, said) = run(&arguments, &[("RINGFENCE_CONFIG", &own)]);
        assert_eq!(code, 1, "{said}");
        assert!(said.contains("nothing was changed") || said.contains("refuses"), "{said}");
        assert_eq!(host.read("/main.toml"), "version = 3\n");
    }
}
