//! How a failure of ours reaches the user: one line on standard error, and one in the runtime's log.

use crate::arguments::Log;
use crate::json::quote;
use ringfence_hook::Failure;
use std::fs::OpenOptions;
use std::io::Write;
use std::time::SystemTime;

/// Says that `ringfence-runtime` failed. There is nobody to tell if even that fails.
pub fn report(failure: &Failure, log: &Log) {
    let message = format!("ringfence-runtime: {failure}");
    let _ = std::io::stderr().write_all(format!("{message}\n").as_bytes());
    let Some(path) = &log.path else { return };
    // As runc opens it.
    if let Ok(mut file) = OpenOptions::new().append(true).create(true).open(path) {
        let _ = file.write_all(line(&message, SystemTime::now(), log.json).as_bytes());
    }
}

/// A line as runc's own, of which containerd, docker and podman take the message.
fn line(message: &str, now: SystemTime, json: bool) -> String {
    let (message, time) = (quote(message), humantime::format_rfc3339_seconds(now));
    match json {
        true => format!("{{\"level\":\"error\",\"msg\":{message},\"time\":\"{time}\"}}\n"),
        false => format!("time=\"{time}\" level=error msg={message}\n"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn lines_are_as_runc_writes_them() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_767_225_600);
        assert_eq!(
            line("a \"b\"", now, true),
            "{\"level\":\"error\",\"msg\":\"a \\\"b\\\"\",\"time\":\"2026-01-01T00:00:00Z\"}\n"
        );
        assert_eq!(line("a \"b\"", now, false), "time=\"2026-01-01T00:00:00Z\" level=error msg=\"a \\\"b\\\"\"\n");
    }
}
