//! The command line of an OCI runtime, as far as it concerns us.
//!
//! runc parses it as Go's `flag` and urfave/cli do (`--flag value`, `--flag=value`, `-flag value`), crun by glibc's argp
//! (also unambiguous beginnings of names, and clusters such as `-db DIR`). Nothing is refused here: what we do not know is
//! for the real runtime to judge.

use ringfence_hook::{Code, Failure};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// Our only flag, before the verb; the real runtime does not see it.
pub const POLICY_FLAG: &str = "ringfence-policy";
/// Links to us whose names begin so end in the profile that they stand for, where the flag names none. For docker, which
/// wraps a runtime that has arguments in a shell script: a shell more for each of the four calls of a container's life.
pub const POLICY_LINK: &str = "ringfence-runtime-";

/// A flag's name, and whether a value follows it.
type Flag = (&'static str, bool);

/// Before the verb: of runc 1.0 to 1.5 and crun.
const GLOBAL: [Flag; 15] = [
    ("root", true),
    ("log", true),
    ("log-format", true),
    ("log-level", true),
    ("criu", true),
    ("rootless", true),
    ("cgroup-manager", true),
    (POLICY_FLAG, true),
    ("systemd-cgroup", false),
    ("debug", false),
    ("version", false),
    ("help", false),
    ("v", false),
    ("V", false),
    ("h", false),
];

/// After `create`, `run` and `restore`: of runc 1.0 to 1.5 and crun.
const LOCAL: [Flag; 29] = [
    ("bundle", true),
    ("b", true),
    ("config", true),
    ("f", true),
    ("console-socket", true),
    ("pid-file", true),
    ("pidfd-socket", true),
    ("preserve-fds", true),
    ("image-path", true),
    ("work-path", true),
    ("manage-cgroups-mode", true),
    ("empty-ns", true),
    ("lsm-profile", true),
    ("lsm-mount-context", true),
    ("detach", false),
    ("d", false),
    ("keep", false),
    ("no-pivot", false),
    ("no-new-keyring", false),
    ("no-subreaper", false),
    ("tcp-established", false),
    ("tcp-close", false),
    ("ext-unix-sk", false),
    ("shell-job", false),
    ("file-locks", false),
    ("auto-dedup", false),
    ("lazy-pages", false),
    ("help", false),
    ("h", false),
];

/// What OCI runtimes can be asked for; tells a verb from the value of a flag that we do not know.
const VERBS: [&str; 19] = [
    "checkpoint",
    "create",
    "delete",
    "events",
    "exec",
    "features",
    "help",
    "kill",
    "list",
    "mounts",
    "pause",
    "ps",
    "restore",
    "resume",
    "run",
    "spec",
    "start",
    "state",
    "update",
];

/// What the runtime is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// `create` or `run`: makes a container from a bundle.
    Make,
    /// `restore`: makes one from a checkpoint.
    Restore,
    /// Anything else, or nothing: no concern of ours.
    Other,
}

/// The runtime's own log, which engines build their users' error text from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Log {
    /// The file; `None` for standard error, and for crun's journald and syslog.
    pub path: Option<PathBuf>,
    /// Whether its lines are JSON; otherwise they are logfmt.
    pub json: bool,
}

/// A command line.
#[derive(Debug, PartialEq, Eq)]
pub struct Invocation {
    /// What is asked for.
    pub verb: Verb,
    /// The bundle's configuration, as the runtime would find it from its working directory.
    pub config: PathBuf,
    /// The runtime's log.
    pub log: Log,
    /// Whether the engine says how cgroups are managed.
    pub manages_cgroups: bool,
    /// The profile that [`POLICY_FLAG`] names, or our own name by [`POLICY_LINK`].
    pub policy: Result<Option<String>, Failure>,
    /// All arguments but the program's name and [`POLICY_FLAG`].
    pub arguments: Vec<OsString>,
    /// Where in `arguments` the verb is, or would be.
    verb_at: usize,
}

impl Invocation {
    /// Reads the arguments after the program's name `called`, which may be a path.
    pub fn parse(called: &OsStr, given: impl IntoIterator<Item = OsString>) -> Self {
        let mut rest = given.into_iter().peekable();
        let mut invocation = Self {
            verb: Verb::Other,
            config: "config.json".into(),
            log: Log::default(),
            manages_cgroups: false,
            policy: Ok(policy_of_link(called)),
            arguments: Vec::new(),
            verb_at: 0,
        };
        while let Some(argument) = rest.next_if(|argument| is_flag(argument)) {
            if argument == "--" {
                invocation.arguments.push(argument);
                break;
            }
            let (name, inline) = split(&argument);
            let known = lookup(&GLOBAL, name, argument.as_bytes().starts_with(b"--"));
            let takes_next = inline.is_none()
                && match known {
                    Some((_, takes_value)) => takes_value,
                    None => rest.peek().is_some_and(|next| !is_flag(next) && !is_verb(next)),
                };
            let next = if takes_next { rest.next() } else { None };
            let value = inline.or(next.as_deref());
            let name = known.map(|(name, _)| name);
            if name == Some(POLICY_FLAG) {
                invocation.policy = policy(value);
                continue;
            }
            invocation.global(name, value);
            invocation.arguments.push(argument);
            invocation.arguments.extend(next);
        }
        invocation.verb_at = invocation.arguments.len();
        invocation.arguments.extend(rest);
        invocation.read_verb();
        invocation
    }

    fn global(&mut self, name: Option<&str>, value: Option<&OsStr>) {
        match (name, value) {
            (Some("log"), Some(value)) => self.log.path = log_path(value),
            (Some("log-format"), Some(value)) => self.log.json = value == "json",
            (Some("systemd-cgroup" | "cgroup-manager"), _) => self.manages_cgroups = true,
            _ => {}
        }
    }

    fn read_verb(&mut self) {
        let Some(verb) = self.arguments.get(self.verb_at) else { return };
        let verb = match verb.to_str() {
            Some("create" | "run") => Verb::Make,
            Some("restore") => Verb::Restore,
            _ => return,
        };
        let local = Local::parse(&self.arguments[self.verb_at + 1..]);
        if !local.help {
            self.verb = verb;
            self.config = local.bundle.join(local.config);
        }
    }

    /// Adds a global flag, just before the verb.
    pub fn add_global(&mut self, flag: &str) {
        self.arguments.insert(self.verb_at, flag.into());
    }
}

/// What the arguments of `create`, `run` and `restore` say.
struct Local<'a> {
    bundle: &'a Path,
    config: &'a Path,
    help: bool,
}

impl<'a> Local<'a> {
    fn parse(arguments: &'a [OsString]) -> Self {
        let mut local = Self { bundle: Path::new(""), config: Path::new("config.json"), help: false };
        let mut rest = arguments.iter();
        while let Some(argument) = rest.next() {
            if argument == "--" {
                break;
            }
            if !is_flag(argument) {
                continue;
            }
            let (name, inline) = split(argument);
            let double = argument.as_bytes().starts_with(b"--");
            if let Some((name, takes_value)) = lookup(&LOCAL, name, double) {
                let value = match (inline, takes_value) {
                    (None, true) => rest.next().map(OsString::as_os_str),
                    (inline, _) => inline,
                };
                local.set(name, value);
            } else if !double {
                local.cluster(&argument.as_bytes()[1..], &mut rest);
            }
        }
        local
    }

    /// Short flags in one argument, as argp has them.
    fn cluster(&mut self, letters: &'a [u8], rest: &mut std::slice::Iter<'a, OsString>) {
        for (i, letter) in letters.iter().enumerate() {
            match letter {
                b'd' => {}
                b'b' | b'f' => {
                    let attached = Some(&letters[i + 1..]).filter(|value| !value.is_empty()).map(OsStr::from_bytes);
                    let value = attached.or_else(|| rest.next().map(OsString::as_os_str));
                    return self.set(if *letter == b'b' { "b" } else { "f" }, value);
                }
                _ => return,
            }
        }
    }

    fn set(&mut self, name: &str, value: Option<&'a OsStr>) {
        match (name, value) {
            ("bundle" | "b", Some(value)) => self.bundle = Path::new(value),
            ("config" | "f", Some(value)) => self.config = Path::new(value),
            ("help" | "h", _) => self.help = true,
            _ => {}
        }
    }
}

/// `-` alone is an operand to all parsers.
fn is_flag(argument: &OsStr) -> bool {
    argument.len() > 1 && argument.as_bytes()[0] == b'-'
}

fn is_verb(argument: &OsStr) -> bool {
    argument.to_str().is_some_and(|argument| VERBS.contains(&argument))
}

/// A flag's name without dashes, and the value that follows `=`.
fn split(argument: &OsStr) -> (&OsStr, Option<&OsStr>) {
    let bytes = argument.as_bytes();
    let bytes = bytes.strip_prefix(b"--").unwrap_or(&bytes[1..]);
    match bytes.iter().position(|byte| *byte == b'=') {
        Some(at) => (OsStr::from_bytes(&bytes[..at]), Some(OsStr::from_bytes(&bytes[at + 1..]))),
        None => (OsStr::from_bytes(bytes), None),
    }
}

/// The flag of this name or, with two dashes, the only one whose name begins so; argp takes it for that.
fn lookup(flags: &[Flag], name: &OsStr, may_be_short: bool) -> Option<Flag> {
    let name = name.to_str()?;
    let exact = flags.iter().find(|flag| flag.0 == name);
    let mut beginning =
        flags.iter().filter(|flag| may_be_short && !name.is_empty() && flag.0.len() > 1 && flag.0.starts_with(name));
    exact.or_else(|| beginning.next().filter(|_| beginning.next().is_none())).copied()
}

/// crun has `file:PATH`, `journald:ID` and `syslog:ID`, too.
fn log_path(value: &OsStr) -> Option<PathBuf> {
    let bytes = value.as_bytes();
    let bytes = bytes.strip_prefix(b"file:").unwrap_or(bytes);
    let elsewhere = [&b"journald:"[..], b"syslog:"].iter().any(|prefix| bytes.starts_with(prefix));
    let standard_error = bytes.is_empty() || bytes == b"/dev/stderr";
    (!elsewhere && !standard_error).then(|| OsString::from_vec(bytes.to_vec()).into())
}

fn policy(value: Option<&OsStr>) -> Result<Option<String>, Failure> {
    match value.and_then(OsStr::to_str).filter(|name| !name.is_empty()) {
        Some(name) => Ok(Some(name.to_owned())),
        None => Err(Failure::new(
            Code::Usage,
            format!(
                "--{POLICY_FLAG} {} is no profile's name; give it one of the administrator's profiles, or default",
                value.map(|value| format!("{value:?}")).unwrap_or_default()
            ),
        )),
    }
}

fn policy_of_link(called: &OsStr) -> Option<String> {
    let name = Path::new(called).file_name()?.to_str()?.strip_prefix(POLICY_LINK)?;
    (!name.is_empty()).then(|| name.to_owned())
}

#[cfg(test)]
mod tests;
