//! The command as its users see it.

use serde_json::Value;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A directory with a configuration of its own.
struct Node {
    directory: tempfile::TempDir,
}

struct Outcome {
    code: i32,
    out: String,
    err: String,
}

impl Node {
    fn new(config: &str) -> Self {
        let node = Self { directory: tempfile::tempdir().unwrap() };
        node.configure(config);
        node
    }

    fn configure(&self, config: &str) {
        let run_dir = self.path("run");
        std::fs::write(self.path("config.toml"), format!("run-dir = {run_dir:?}\n{config}")).unwrap();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ringfence"));
        command.args(arguments).env("RINGFENCE_CONFIG", self.path("config.toml")).stdin(Stdio::null());
        command
    }

    fn run(&self, arguments: &[&str]) -> Outcome {
        let output = self.command(arguments).output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Outcome { code: output.status.code().unwrap(), out: text(output.stdout), err: text(output.stderr) }
    }

    #[track_caller]
    fn succeed(&self, arguments: &[&str]) -> String {
        let Outcome { code, out, err } = self.run(arguments);
        assert_eq!((code, err.as_str()), (0, ""), "{arguments:?}");
        out
    }

    /// A bundle with `annotations`.
    fn bundle(&self, annotations: &Value, hooks: &Value) -> String {
        let bundle = self.path("bundle");
        let _ = std::fs::create_dir(&bundle);
        let config = serde_json::json!({"root": {"path": "rootfs"}, "annotations": annotations, "hooks": hooks});
        std::fs::write(bundle.join("config.json"), config.to_string()).unwrap();
        bundle.to_str().unwrap().to_owned()
    }
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

#[test]
fn help_of_every_subcommand_shows_examples() {
    let node = Node::new("");
    let help = node.succeed(&["--help"]);
    for (subcommand, example) in [
        ("explain", "ringfence explain --policy gold"),
        ("cdi", "ringfence cdi generate"),
        ("list", "ringfence list --failures"),
        ("info", "ringfence info --json"),
        ("gc", "ringfence gc --dry-run"),
        ("config", "ringfence config validate"),
        ("completion", "ringfence completion bash"),
    ] {
        assert!(help.contains(subcommand), "{subcommand}");
        assert!(node.succeed(&[subcommand, "--help"]).contains(example), "{subcommand}");
    }
}

#[test]
fn the_version_names_the_commit() {
    let node = Node::new("");
    let shown = json(&node.succeed(&["version", "--json"]));
    assert_eq!(shown["version"], env!("CARGO_PKG_VERSION"));
    let line = node.succeed(&["version"]);
    assert!(line.contains(shown["commit"].as_str().unwrap()), "{line}");
}

#[test]
fn explain_refuses_as_the_hook_does() {
    // Both by the default configuration: the hook takes the test's own environment.
    if Path::new("/etc/ringfence/config.toml").exists() || std::env::var_os("RINGFENCE_CONFIG").is_some() {
        println!("SKIPPED: explain_refuses_as_the_hook_does needs a machine without a configuration");
        return;
    }
    let node = Node::new("");
    for (annotation, code) in [
        (r#"{"ringfence.dev/enable":"maybe"}"#, 12),
        (r#"{"ringfence.dev/enable":"1","ringfence.dev/max-mr-bytes":"1TiB"}"#, 13),
        (r#"{"ringfence.dev/enable":"1","ringfence.dev/device":"mlx9"}"#, 14),
        (r#"{"ringfence.dev/enable":"1","bandwidth.ringfence.dev/pot":"1Gbit"}"#, 12),
        (r#"{"weight.ringfence.dev/pod":"7"}"#, 12),
    ] {
        let bundle = node.bundle(&json(annotation), &Value::Null);
        let state = serde_json::json!({"id": "c1", "pid": 2, "bundle": bundle, "annotations": json(annotation)});
        let failure = ringfence_hook::create(state.to_string().as_bytes(), None).unwrap_err();
        let found = node.run(&["explain", "--bundle", &bundle]);
        assert_eq!((found.code, found.err.as_str()), (code, ""), "{annotation}");
        assert_eq!(found.out, format!("refused: {failure}\n"));
        assert_eq!(failure.code as i32, code);
    }
}

#[test]
fn explain_tells_all_values_as_json() {
    let node =
        Node::new("[policy.profiles.gold]\nnamespaces = [\"team-*\"]\n[policy.profiles.gold.bounds]\nweight = 9");
    let wish = ["--annotation", "ringfence.dev/enable=1", "--annotation", "ringfence.dev/policy=gold"];
    let arguments = |more: &[&'static str]| [&["explain", "--json"], &wish[..], more].concat();
    let shown = json(&node.succeed(&arguments(&["--namespace", "team-a"])));
    assert_eq!((&shown["verdict"], &shown["namespace"]), (&"joined".into(), &"team-a".into()));
    let weight = shown["settings"].as_array().unwrap().iter().find(|setting| setting["key"] == "weight").unwrap();
    assert_eq!((&weight["value"], &weight["from"]), (&"9".into(), &"policy.profiles.gold.bounds".into()));
    assert_eq!(shown["mounts"][0]["destination"], "/dev/ringfence");

    let found = node.run(&arguments(&["--namespace", "others"]));
    let shown = json(&found.out);
    assert_eq!((found.code, &shown["verdict"], &shown["code"]), (13, &"refused".into(), &13.into()));
    assert!(shown["message"].as_str().unwrap().contains("team-*"), "{shown}");
    assert!(!node.path("run").exists(), "explaining makes nothing");
}

#[test]
fn explain_goes_by_the_hook_that_the_bundle_names() {
    let node = Node::new("[policy.profiles.gold.defaults]\nweight = 5");
    let entry = |arguments: Value| serde_json::json!({"createRuntime": [{"path": "/usr/bin/ringfence-hook", "args": arguments}]});
    let enabled = serde_json::json!({"ringfence.dev/enable": "true"});

    let bundle = node.bundle(&enabled, &Value::Null);
    assert!(node.succeed(&["explain", "--bundle", &bundle]).contains("does not name ringfence-hook"));
    let bundle = node.bundle(&enabled, &entry(serde_json::json!(["ringfence-hook", "createRuntime"])));
    assert!(!node.succeed(&["explain", "--bundle", &bundle]).contains("warning"));
    let by_cdi = entry(serde_json::json!(["ringfence-hook", "createRuntime", "--policy", "gold"]));
    let bundle = node.bundle(&serde_json::json!({}), &by_cdi);
    let shown = node.succeed(&["explain", "--bundle", &bundle]);
    assert!(shown.contains("enabled by the engine, with policy gold"), "{shown}");
}

#[test]
fn cdi_devices_are_the_profiles_and_go_stale() {
    let node = Node::new("[policy.profiles.gold]\n[policy.profiles.0zero]");
    let (directory, path) = (node.path("cdi"), node.path("cdi/ringfence.json"));
    let list = ["cdi", "list", "--json", "--directory", directory.to_str().unwrap()];
    assert_eq!(json(&node.succeed(&list)), serde_json::json!([]));

    node.succeed(&["cdi", "generate", "--output", path.to_str().unwrap()]);
    let spec = json(&std::fs::read_to_string(&path).unwrap());
    assert_eq!(spec, json(&node.succeed(&["cdi", "generate", "--output", "-"])));
    // A name that begins with a digit needs it.
    assert_eq!(spec["cdiVersion"], "0.5.0");
    let states = |shown: Value| {
        let devices = shown.as_array().unwrap().clone();
        let state = |device: Value| {
            let (name, state) =
                (device["device"].as_str().unwrap().to_owned(), device["state"].as_str().unwrap().to_owned());
            format!("{name} {}", state.split(':').next().unwrap())
        };
        devices.into_iter().map(state).collect::<Vec<_>>()
    };
    assert_eq!(
        states(json(&node.succeed(&list))),
        ["ringfence.dev/rdma=default current", "ringfence.dev/rdma=0zero current", "ringfence.dev/rdma=gold current"]
    );

    node.configure("[policy.profiles.gold]\n[policy.profiles.silver]");
    assert_eq!(
        states(json(&node.succeed(&list))),
        [
            "ringfence.dev/rdma=default current",
            "ringfence.dev/rdma=0zero stale",
            "ringfence.dev/rdma=gold current",
            "ringfence.dev/rdma=silver missing"
        ]
    );
    node.configure("[hook]\ntimeout = 31");
    assert_eq!(states(json(&node.succeed(&list)))[0], "ringfence.dev/rdma=default stale");
}

#[test]
fn what_is_left_behind_is_listed_and_removed() {
    let node = Node::new("");
    assert_eq!(node.succeed(&["list"]).lines().count(), 1);
    assert_eq!(node.succeed(&["gc"]), "");
    std::fs::create_dir_all(node.path("run/state")).unwrap();
    std::fs::create_dir_all(node.path("run/containers/c1/mount")).unwrap();
    // There is a process 1, but it was not started at that time.
    let record = r#"{"container":"c1","policy":"gold","init":{"pid":1,"start":1},"proxy":null,"root":"/nonexistent",
        "mount-points":[],"cgroups":[],"device":"soft0","since":1}"#;
    std::fs::write(node.path("run/state/c1.json"), record).unwrap();

    let shown = node.succeed(&["list", "--failures"]);
    let words: Vec<_> = shown.lines().nth(1).unwrap().split_whitespace().collect();
    assert_eq!((words[0], words[3], words[4], *words.last().unwrap()), ("c1", "soft0", "gold", "ended"), "{shown}");
    assert_eq!(json(&node.succeed(&["list", "--json"]))[0]["id"], "c1");
    assert!(node.succeed(&["gc", "--dry-run"]).starts_with("would remove c1: record"));
    assert!(node.path("run/containers/c1").exists());
    assert!(node.succeed(&["gc"]).starts_with("removed c1: record"));
    assert!(!node.path("run/containers/c1").exists() && !node.path("run/state/c1.json").exists());
    assert_eq!(json(&node.succeed(&["gc", "--json"])), serde_json::json!({"removed": [], "left": []}));
}

#[test]
fn the_configuration_is_shown_and_checked() {
    let node = Node::new("[policy.profiles.gold.bounds]\nbandwidth = \"40Gbit\"");
    std::fs::write(node.path("shown.toml"), node.succeed(&["config", "show"])).unwrap();
    let shown = node.path("shown.toml");
    node.succeed(&["config", "validate", shown.to_str().unwrap()]);
    assert_eq!(
        json(&node.succeed(&["config", "show", "--json"]))["policy"]["profiles"]["gold"]["bounds"]["bandwidth"],
        "40Gbit"
    );

    std::fs::write(node.path("default.toml"), node.succeed(&["config", "default"])).unwrap();
    node.succeed(&["config", "validate", node.path("default.toml").to_str().unwrap()]);

    for command in [&["config", "validate"][..], &["list"], &["info"], &["gc"], &["cdi", "list"], &["config", "show"]] {
        node.configure("nonsense = 1");
        let found = node.run(command);
        assert_eq!((found.code, found.err.lines().count()), (1, 1), "{command:?}: {}", found.err);
        assert!(found.err.starts_with("ringfence: ") && found.err.contains("line 2") && found.err.contains("nonsense"));
    }
    let missing = node.run(&["config", "validate", "/nonexistent"]);
    assert!(missing.code == 1 && missing.err.contains("/nonexistent"), "{}", missing.err);
}

#[test]
fn info_names_devices_and_policies() {
    let node = Node::new("[[device]]\nname = \"soft1\"\nkind = \"soft\"\nlink = \"25Gbit\"\n[policy.profiles.gold]");
    let shown = json(&node.succeed(&["info", "--json"]));
    assert_eq!(shown["devices"][0], "soft1 (soft, 25Gbit)");
    assert_eq!(shown["policies"], serde_json::json!(["default", "gold"]));
    assert_eq!(shown["configuration"].as_str(), node.path("config.toml").to_str());
    assert!(node.succeed(&["info"]).contains("soft1"));
}

#[test]
fn completions_and_pages_know_every_subcommand() {
    let node = Node::new("");
    let pages = node.path("man");
    std::fs::create_dir(&pages).unwrap();
    node.succeed(&["man", pages.to_str().unwrap()]);
    let subcommands = [
        "configure",
        "unconfigure",
        "doctor",
        "explain",
        "list",
        "info",
        "gc",
        "cdi",
        "config",
        "version",
        "completion",
    ];
    for shell in ["bash", "zsh", "fish"] {
        let script = node.succeed(&["completion", shell]);
        for subcommand in subcommands {
            assert!(script.contains(subcommand), "{shell} {subcommand}");
        }
    }
    for subcommand in subcommands {
        assert!(pages.join(format!("ringfence-{subcommand}.1")).exists(), "{subcommand}");
    }
    for page in ["ringfence.1", "ringfence-hook.8", "ringfence.toml.5", "ringfence-annotations.7"] {
        assert!(std::fs::read_to_string(pages.join(page)).unwrap().contains(".SH"), "{page}");
    }
}

#[test]
fn who_reads_the_output_may_stop() {
    let node = Node::new("");
    let mut child =
        node.command(&["completion", "bash"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let mut err = String::new();
    child.stderr.take().unwrap().read_to_string(&mut err).unwrap();
    assert_eq!((child.wait().unwrap().code(), err.as_str()), (Some(0), ""));
}
