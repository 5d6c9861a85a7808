//! What the runtime sees when the hook fails: one line and an exit code.

use crate::config::{self, Config};
use crate::policy::Refusal;
use crate::{annotations, failures, journal, session, state};
use std::fmt;

/// Exit codes. crun and podman show nothing else of a failed hook, so each cause has its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Code {
    /// A fault of ours or of the host.
    Internal = 1,
    /// Wrong arguments.
    Usage = 2,
    /// The state on standard input, or the bundle that it names, cannot be used.
    State = 10,
    /// The administrator's configuration cannot be used.
    Config = 11,
    /// An annotation is unknown or malformed.
    Annotation = 12,
    /// An annotation asks for more than the administrator allows.
    Denied = 13,
    /// There is no such device.
    Device = 14,
    /// The library, the socket or a device node could not be put into the container.
    Injection = 15,
    /// The proxy was not ready in time.
    NotReady = 16,
    /// The proxy could not be started or ended at once.
    ProxyDied = 17,
    /// The hook lacks a privilege.
    Privilege = 18,
}

/// Why a container may not start.
#[derive(Debug, PartialEq, Eq)]
pub struct Failure {
    /// The exit code.
    pub code: Code,
    /// What was wrong, with which value, and what to do.
    pub message: String,
    /// Its id, if the runtime got so far as to say it.
    pub container: Option<String>,
}

impl Failure {
    /// A failure with `code`.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), container: None }
    }

    /// This failure, of `container`.
    pub(crate) fn of(self, container: &str) -> Self {
        Self { container: Some(container.to_owned()), ..self }
    }

    /// Tells the administrator, as far as possible: most runtimes show nothing of a failed hook but its exit code.
    pub fn report(&self) {
        journal::log(self);
        let config = match Config::load() {
            Ok(config) => config,
            // Without the variable, whoever looks for our failures looks there.
            Err(_) if Config::named().is_none() => Config::default(),
            Err(_) => return,
        };
        // There is nobody left to tell if this fails, too.
        if let Ok(run_dir) = session::make_run_dir(&config.run_dir) {
            let _ = failures::append(&run_dir, &failures::Entry::now(self));
        }
    }
}

impl fmt::Display for Failure {
    /// Always one line: messages carry values from containers and proxies.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "E{} ", self.code as u8)?;
        self.message
            .chars()
            .map(|c| if c.is_control() { ' ' } else { c })
            .try_for_each(|c| fmt::Write::write_char(f, c))
    }
}

impl std::error::Error for Failure {}

/// Names what was being done when a system call failed.
pub(crate) trait During<T> {
    /// Turns the error into a [`Failure`] with `code`, or with [`Code::Privilege`] if it was one of permission.
    fn during(self, code: Code, what: impl FnOnce() -> String) -> Result<T, Failure>;
}

impl<T, E: Into<std::io::Error>> During<T> for Result<T, E> {
    fn during(self, code: Code, what: impl FnOnce() -> String) -> Result<T, Failure> {
        self.map_err(|error| {
            let error = error.into();
            match error.raw_os_error() {
                Some(libc::EPERM | libc::EACCES) => Failure::new(
                    Code::Privilege,
                    format!("{}: {error}; the hook needs root in the host's user namespace", what()),
                ),
                _ => Failure::new(code, format!("{}: {error}", what())),
            }
        })
    }
}

impl From<state::Error> for Failure {
    fn from(error: state::Error) -> Self {
        Failure::new(Code::State, error.to_string())
    }
}

impl From<annotations::Error> for Failure {
    fn from(error: annotations::Error) -> Self {
        Failure::new(Code::Annotation, error.to_string())
    }
}

impl From<config::Error> for Failure {
    fn from(error: config::Error) -> Self {
        let code = match error {
            config::Error::NoUserDir { .. } => Code::Privilege,
            _ => Code::Config,
        };
        Failure::new(code, error.to_string())
    }
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        let code = match refusal {
            Refusal::Beyond { .. } | Refusal::NotDefault { .. } | Refusal::Namespace { .. } => Code::Denied,
            Refusal::NoPolicyOfEngine { .. } => Code::Config,
            Refusal::NoPolicy { .. } => Code::Annotation,
            Refusal::NoDevice { .. } | Refusal::NoNodes { .. } | Refusal::NoCard { .. } => Code::Device,
            Refusal::Unenforceable { .. } | Refusal::NoEffect { .. } | Refusal::NoQuantity { .. } => Code::Annotation,
        };
        Failure::new(code, refusal.to_string())
    }
}
