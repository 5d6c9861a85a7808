//! The command, with a configuration of its own.

use serde_json::Value;
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// A directory with a configuration of its own.
pub struct Node {
    directory: tempfile::TempDir,
}

pub struct Outcome {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Node {
    pub fn new(config: &str) -> Self {
        let node = Self { directory: tempfile::tempdir().unwrap() };
        node.configure(config);
        node
    }

    pub fn configure(&self, config: &str) {
        let run_dir = self.path("run");
        std::fs::write(self.path("config.toml"), format!("run-dir = {run_dir:?}\n{config}")).unwrap();
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ringfence"));
        command.args(arguments).env("RINGFENCE_CONFIG", self.path("config.toml")).stdin(Stdio::null());
        command
    }

    pub fn run(&self, arguments: &[&str]) -> Outcome {
        let output = self.command(arguments).output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Outcome { code: output.status.code().unwrap(), out: text(output.stdout), err: text(output.stderr) }
    }

    #[track_caller]
    pub fn succeed(&self, arguments: &[&str]) -> String {
        let Outcome { code, out, err } = self.run(arguments);
        assert_eq!((code, err.as_str()), (0, ""), "{arguments:?}");
        out
    }

    /// A bundle with `annotations`.
    pub fn bundle(&self, annotations: &Value, hooks: &Value) -> String {
        let bundle = self.path("bundle");
        let _ = std::fs::create_dir(&bundle);
        let config = serde_json::json!({"root": {"path": "rootfs"}, "annotations": annotations, "hooks": hooks});
        std::fs::write(bundle.join("config.json"), config.to_string()).unwrap();
        bundle.to_str().unwrap().to_owned()
    }
}

pub fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}
