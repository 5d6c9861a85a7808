//! Containers of podman without root, for a user who is made for the test.

mod common;

use common::{HOOK, succeeded};
use ringfence_trials::{needs_root, skip, tests};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use serde_json::{Value, json};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Output};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

fn main() -> ExitCode {
    ringfence_trials::main(tests![
        a_user_has_rdma_without_root,
        containers_of_one_user_meet,
        what_needs_root_is_refused,
        without_a_directory_of_the_users_own_it_says_so,
        where_run_is_ours_it_is_as_on_a_host,
    ])
}

const IMAGE: &str = "localhost/ringfence-test:1";
const PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";

/// A user, and what he needs; all of it is removed in the end.
struct User {
    directory: tempfile::TempDir,
    name: String,
    uid: u32,
    /// Whether the proxy and the library are the real ones.
    real: bool,
    /// useradd and userdel do not wait for each other.
    _alone: MutexGuard<'static, ()>,
}

/// Runs `test` as a user, if one can be made here.
#[track_caller]
fn with_user(test: impl FnOnce(&User)) {
    static ALONE: Mutex<()> = Mutex::new(());
    needs_root("it makes a user");
    for program in ["podman", "newuidmap", "useradd", "setpriv", "runc"] {
        if !PATH.split(':').any(|directory| Path::new(directory).join(program).exists()) {
            skip(format!("{program} is not installed"));
        }
    }
    let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    match User::make(alone) {
        Ok(user) => test(&user),
        Err(reason) => skip(reason),
    }
}

impl User {
    fn make(alone: MutexGuard<'static, ()>) -> Result<Self, String> {
        let directory = tempfile::Builder::new().prefix("ringfence-rootless-").tempdir().unwrap();
        std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        let name = format!("rf{}", std::process::id());
        let mut add = Command::new("useradd");
        add.args(["--create-home", "--shell", "/bin/sh", "--home-dir"]).arg(directory.path().join("home")).arg(&name);
        let added = add.output().unwrap();
        if !added.status.success() {
            return Err(format!("no user can be made: {}", String::from_utf8_lossy(&added.stderr).trim()));
        }
        let uid = std::fs::metadata(directory.path().join("home")).unwrap().uid();
        let mut user = Self { directory, name, uid, real: false, _alone: alone };
        if !std::fs::read_to_string("/etc/subuid").is_ok_and(|text| text.contains(&format!("{}:", user.name))) {
            return Err("useradd gives no subordinate ids (SUB_UID_COUNT of /etc/login.defs)".into());
        }
        user.make_session();
        user.install();
        let imported = user.podman(&["import", user.path("image.tar").to_str().unwrap(), IMAGE]);
        if !imported.status.success() {
            return Err(format!("podman does not work: {}", String::from_utf8_lossy(&imported.stderr).trim()));
        }
        Ok(user)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// What a login would make.
    fn session(&self) -> PathBuf {
        format!("/run/user/{}", self.uid).into()
    }

    fn make_session(&self) {
        let session = self.session();
        std::fs::create_dir_all(&session).unwrap();
        chown(&session, Some(self.uid), Some(self.uid)).unwrap();
        std::fs::set_permissions(&session, std::fs::Permissions::from_mode(0o700)).unwrap();
    }

    /// The hook, a proxy, configurations and an image.
    fn install(&mut self) {
        let target = Path::new(HOOK).parent().unwrap();
        let proxy = target.join("../release/ringfence-proxy");
        let library = target.join("../../preload/libibverbs.so.1");
        self.real = proxy.exists() && library.exists();
        let (proxy, library) = match self.real {
            true => (proxy, library),
            false => (target.join("examples/fake-proxy"), "/lib/x86_64-linux-gnu/libanl.so.1".into()),
        };
        for (from, to) in [(Path::new(HOOK), "hook"), (&proxy, "ready"), (&library, "library.so")] {
            std::fs::copy(from, self.path(to)).unwrap_or_else(|error| panic!("{}: {error}", from.display()));
        }
        let here = self.directory.path().display();
        self.configure("");
        std::fs::write(
            self.path("containers.conf"),
            "[containers]\ndefault_ulimits = [\"nofile=1024:1024\", \"nproc=1024:1024\"]\n",
        )
        .unwrap();
        std::fs::create_dir(self.path("hooks.d")).unwrap();
        for stage in ["createRuntime", "poststop"] {
            let hook = json!({
                "version": "1.0.0",
                "hook": {
                    "path": format!("{here}/hook"),
                    "args": ["ringfence-hook", stage],
                    "env": [format!("RINGFENCE_CONFIG={here}/config.toml")],
                    "timeout": 30,
                },
                "when": {"annotations": {"^ringfence\\.dev/enable$": "^true$"}},
                "stages": [stage],
            });
            std::fs::write(self.path("hooks.d").join(format!("{stage}.json")), hook.to_string()).unwrap();
        }
        let bin = self.path("rootfs/bin");
        std::fs::create_dir_all(&bin).unwrap();
        std::fs::copy("/bin/busybox", bin.join("busybox")).unwrap();
        for applet in ["sh", "ls", "cat", "sleep"] {
            symlink("busybox", bin.join(applet)).unwrap();
        }
        if self.shows_devices() {
            self.copy_with_libraries("/usr/bin/ibv_devices");
        }
        let mut tar = Command::new("tar");
        succeeded(
            &tar.arg("-C").arg(self.path("rootfs")).arg("-cf").arg(self.path("image.tar")).arg(".").output().unwrap(),
        );
    }

    /// Whether containers have `ibv_devices` and it can work.
    fn shows_devices(&self) -> bool {
        self.real && Path::new("/usr/bin/ibv_devices").exists()
    }

    fn copy_with_libraries(&self, program: &str) {
        let listed = succeeded(&Command::new("ldd").arg(program).output().unwrap());
        let libraries = listed.split_whitespace().filter(|word| word.starts_with('/'));
        for file in libraries.chain([program]) {
            let to = self.path("rootfs").join(file.trim_start_matches('/'));
            std::fs::create_dir_all(to.parent().unwrap()).unwrap();
            std::fs::copy(file, to).unwrap();
        }
    }

    fn configure(&self, more: &str) {
        let here = self.directory.path().display();
        let text = format!(
            "[inject]\nlibrary = \"{here}/library.so\"\n[proxy]\npath = \"{here}/ready\"\ncgroup = \"sibling\"\n"
        );
        std::fs::write(self.path("config.toml"), text + more).unwrap();
    }

    fn podman(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new("setpriv");
        command.args(["--reuid", &self.name, "--regid", &self.name, "--init-groups", "podman"]);
        command.args([
            "--storage-driver=overlay",
            "--cgroup-manager=cgroupfs",
            "--events-backend=none",
            "--runtime=runc",
        ]);
        command.arg(format!("--hooks-dir={}", self.path("hooks.d").display())).args(arguments);
        command.env_clear().env("PATH", PATH).env("HOME", self.path("home"));
        command.env("XDG_RUNTIME_DIR", self.session()).env("CONTAINERS_CONF", self.path("containers.conf"));
        command.current_dir("/").output().unwrap()
    }

    /// A running container that is to be joined, with `more` options: its id and init.
    fn start(&self, more: &[&str]) -> (String, i32) {
        let network = if more.contains(&"--network=host") { None } else { Some("--network=none") };
        let run = ["run", "--detach", "--annotation=ringfence.dev/enable=true"];
        let output = self.podman(&[&run, network.as_slice(), more, &[IMAGE, "/bin/sleep", "100"]].concat());
        let id = succeeded(&output).trim().to_owned();
        let pid = succeeded(&self.podman(&["inspect", "--format={{.State.Pid}}", &id]));
        (id, pid.trim().parse().unwrap())
    }

    /// A container must not start, with `code` and `message`.
    #[track_caller]
    fn refused(&self, more: &[&str], code: u8, message: &str) {
        let run = ["run", "--rm", "--annotation=ringfence.dev/enable=true"];
        let output = self.podman(&[&run, more, &[IMAGE, "/bin/ls"]].concat());
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{text}");
        for expected in [format!("exit status {code}"), format!("ringfence-hook: E{code} {message}")] {
            assert!(text.contains(&expected), "{expected}\nis not in\n{text}");
        }
    }

    /// The user's processes whose program is `program`.
    fn processes(&self, program: &Path) -> Vec<i32> {
        let pids = self.all_processes().into_iter();
        pids.filter(|pid| std::fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe == program)).collect()
    }

    /// The user's processes that have not ended.
    fn all_processes(&self) -> Vec<i32> {
        let entries = std::fs::read_dir("/proc").unwrap();
        let pids = entries.filter_map(|entry| entry.unwrap().file_name().to_str()?.parse::<i32>().ok());
        pids.filter(|pid| {
            let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or("").trim();
            field("Uid:").split('\t').next() == Some(&self.uid.to_string()) && !field("State:").starts_with('Z')
        })
        .collect()
    }

    fn run_dir(&self) -> PathBuf {
        self.session().join("ringfence")
    }

    fn listing(&self, directory: &str) -> Vec<String> {
        let entries = std::fs::read_dir(self.run_dir().join(directory)).into_iter().flatten();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }
}

impl Drop for User {
    fn drop(&mut self) {
        self.podman(&["rm", "--all", "--force", "--time=0"]);
        // The one that keeps podman's namespaces; it is nobody's child.
        let deadline = Instant::now() + Duration::from_secs(5);
        while !self.all_processes().is_empty() && Instant::now() < deadline {
            for pid in self.all_processes().into_iter().filter_map(rustix::process::Pid::from_raw) {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        let _ = std::fs::remove_dir_all(self.session());
        // It complains that there is no mail.
        let _ = Command::new("userdel").args(["--force", "--remove", &self.name]).output();
    }
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(5);
    while !done() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Connects as the container's processes would.
fn connect(init: i32) {
    let path = format!("/proc/{init}/root/dev/ringfence/verbs.sock");
    let socket =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    rustix::net::connect(&socket, &SocketAddrUnix::new(path).unwrap()).unwrap();
}

fn a_user_has_rdma_without_root() {
    with_user(|user| {
        for more in [&[][..], &["--read-only"], &["--userns=keep-id"], &["--userns=auto"], &["--network=host"]] {
            let (id, init) = user.start(more);
            assert_eq!(user.processes(&user.path("ready")).len(), 1, "{more:?}");
            assert_eq!(user.listing("state"), [format!("{id}.json")], "{more:?}");
            connect(init);
            let seen = succeeded(&user.podman(&["exec", &id, "/bin/cat", "/etc/ld.so.preload"]));
            assert_eq!(seen, "/etc/ld.so.ringfence/preload-like-libasan.so\n", "{more:?}");
            if user.shows_devices() {
                let devices = succeeded(&user.podman(&["exec", &id, "/usr/bin/ibv_devices"]));
                assert!(devices.contains("soft0"), "{devices}");
            }
            succeeded(&user.podman(&["kill", &id]));
            until("the proxy ends with its container", || user.processes(&user.path("ready")).is_empty());
            succeeded(&user.podman(&["rm", &id]));
            for directory in ["containers", "state"] {
                assert_eq!(user.listing(directory), [""; 0], "{more:?} {directory}");
            }
        }
        if !user.shows_devices() {
            skip(
                "only that ibv_devices lists the device: ibverbs-utils or the real proxy (release) or library are missing",
            );
        }
    });
}

fn containers_of_one_user_meet() {
    with_user(|user| {
        let ids = [user.start(&[]).0, user.start(&[]).0];
        let run_dirs = ids.map(|id| {
            let launch = user.run_dir().join("containers").join(id).join("launch.json");
            serde_json::from_slice::<Value>(&std::fs::read(launch).unwrap()).unwrap()["run_dir"].clone()
        });
        let expected = json!(user.run_dir());
        assert_eq!(run_dirs, [expected.clone(), expected]);
        assert_eq!(std::fs::metadata(user.run_dir()).unwrap().permissions().mode() & 0o7777, 0o700);
    });
}

fn what_needs_root_is_refused() {
    with_user(|user| {
        user.configure(
            "[[device]]\nname = \"mlx5_0\"\nkind = \"ibverbs\"\nnodes = [\"/dev/null\"]\n[policy.bounds]\nmodes = [\"passthrough\"]\n",
        );
        user.refused(&["--network=none"], 18, "ringfence.dev/mode=passthrough needs root's say over device cgroups");
        user.configure("[[device]]\nname = \"mlx5_0\"\nkind = \"ibverbs\"\n[policy.bounds]\nmodes = [\"exclusive\"]\n");
        user.refused(&["--network=none"], 18, "ringfence.dev/mode=exclusive moves a card between network namespaces");
        let entries = ringfence_hook::failures::read(&user.run_dir()).unwrap();
        assert_eq!(entries.iter().map(|entry| entry.code).collect::<Vec<_>>(), [18, 18]);
        for directory in ["containers", "state"] {
            assert_eq!(user.listing(directory), [""; 0]);
        }
    });
}

/// Calls the hook for a container that is gone, as root of the user's namespace, after `prepare`.
fn hook_after(user: &User, prepare: &str) -> String {
    let here = user.directory.path().display();
    std::fs::write(user.path("config.json"), "{\"root\":{\"path\":\"rootfs\"}}").unwrap();
    let state = json!({
        "id": "gone", "pid": i32::MAX, "bundle": here.to_string(), "annotations": {"ringfence.dev/enable": "true"},
    });
    std::fs::write(user.path("state.json"), state.to_string()).unwrap();
    let hook = format!("RINGFENCE_CONFIG={here}/config.toml {here}/hook createRuntime <{here}/state.json");
    let output =
        user.podman(&["unshare", "sh", "-c", &format!("{prepare} && {hook}; cat /run/ringfence/failures.jsonl")]);
    format!("{}{}", String::from_utf8_lossy(&output.stderr), String::from_utf8_lossy(&output.stdout))
}

fn without_a_directory_of_the_users_own_it_says_so() {
    with_user(|user| {
        // podman itself does not start without one, so it vanishes afterwards.
        let text = hook_after(user, "mount -t tmpfs none /run/user");
        let expected = format!(
            "ringfence-hook: E18 without root the run-dir is in the own directory of the user, whose uid is {}, \
             but /run/user/{0}: No such file or directory",
            user.uid
        );
        assert!(text.contains(&expected), "{text}");
    });
}

fn where_run_is_ours_it_is_as_on_a_host() {
    with_user(|user| {
        let text = hook_after(user, "mount -t tmpfs none /run");
        let message = format!("the container state's pid {} is no running process", i32::MAX);
        assert!(text.contains(&format!("ringfence-hook: E10 {message}\n")), "{text}");
        assert!(text.contains(&format!(r#""container":"gone","code":10,"message":"{message}""#)), "{text}");
    });
}
