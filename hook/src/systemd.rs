//! Scopes of systemd's: in its slices nobody else may make cgroups.

use crate::placement::{Cpu, Limits, USUAL_PERIOD, Weight};
use crate::units;
use std::io::{self, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Part of systemd. By its path: nothing is run that a variable could name.
const BUSCTL: &str = "/usr/bin/busctl";
/// How long systemd may take; it is asked while the proxy starts, and takes some milliseconds. A busy or emulated machine takes more
/// than a second.
const PATIENCE: Duration = Duration::from_secs(3);
/// The same, to busctl.
const TIMEOUT: &str = "--timeout=3";
/// How long systemd may take to notice by itself that a scope is empty, before it is told to end it.
const NOTICE: Duration = Duration::from_millis(100);
/// Where systemd keeps a file for each transient unit for as long as it has that loaded (`systemd.unit(5)`).
const TRANSIENT: &str = "/run/systemd/transient";

/// Whether systemd is this host's init (`sd_booted(3)`).
pub fn runs() -> bool {
    std::fs::symlink_metadata("/run/systemd/system").is_ok_and(|found| found.is_dir())
}

/// The name of the unit for the proxy of container `id`.
pub fn unit(id: &str) -> String {
    // All that ids may have but `+` is allowed in units' names.
    format!("ringfence-{}.scope", id.replace('+', "\\x2b"))
}

/// What is told of the scope for the proxy of container `id`, and by which it is known as ours.
fn description(id: &str) -> String {
    format!("RDMA proxy of container {id}")
}

/// A transient scope unit for a proxy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scope {
    pub unit: String,
    pub description: String,
    pub slice: String,
    /// The container's own scope.
    pub before: Option<String>,
}

impl Scope {
    /// The scope beside the cgroup `own` of the container `id`, in the slice `parent`.
    pub fn beside(own: &Path, parent: &Path, id: &str) -> Self {
        let name = |path: &Path| path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let before = Some(name(own)).filter(|name| name.ends_with(".scope"));
        Self { unit: unit(id), description: description(id), slice: name(parent), before }
    }

    /// The arguments of `busctl` (`org.freedesktop.systemd1(5)`, StartTransientUnit).
    fn arguments(&self, proxy: i32, limits: &Limits) -> Vec<String> {
        let mut properties: Vec<(&str, Vec<String>)> = vec![
            ("Description", vec!["s".into(), self.description.clone()]),
            ("Slice", vec!["s".into(), self.slice.clone()]),
            ("PIDs", vec!["au".into(), "1".into(), proxy.to_string()]),
            // Nothing stays listed, whatever way the proxy ends.
            ("CollectMode", vec!["s".into(), "inactive-or-failed".into()]),
            ("TasksMax", vec!["t".into(), limits.pids_max.to_string()]),
        ];
        if let Some(bytes) = limits.memory_max {
            properties.push(("MemoryMax", vec!["t".into(), bytes.to_string()]));
        }
        properties.extend(processors(&limits.cpu));
        if let Some(container) = &self.before {
            // At shutdown units stop in reverse order: the proxy after its container.
            properties.push(("Before", vec!["as".into(), "1".into(), container.clone()]));
        }
        let count = properties.len().to_string();
        let properties = properties.into_iter().flat_map(|(name, value)| std::iter::once(name.to_owned()).chain(value));
        [
            "--system",
            TIMEOUT,
            "--quiet",
            "call",
            "org.freedesktop.systemd1",
            "/org/freedesktop/systemd1",
            "org.freedesktop.systemd1.Manager",
            "StartTransientUnit",
            "ssa(sv)a(sa(sv))",
            &self.unit,
            "fail",
            &count,
        ]
        .into_iter()
        .map(str::to_owned)
        .chain(properties)
        .chain(["0".to_owned()])
        .collect()
    }

    /// Asks systemd to make the scope, with the proxy in it, and does not wait.
    pub fn request(&self, proxy: i32, limits: &Limits) -> io::Result<Request> {
        self.request_by(BUSCTL, proxy, limits)
    }

    fn request_by(&self, program: &str, proxy: i32, limits: &Limits) -> io::Result<Request> {
        let child = spawn(Command::new(program).args(self.arguments(proxy, limits)), program)?;
        Ok(Request { child, unit: self.unit.clone(), deadline: Instant::now() + PATIENCE })
    }
}

/// The arguments of `busctl` by which a scope may read and write the character device `major:minor`.
fn allow_arguments(scope: &str, major: u32, minor: u32) -> Vec<String> {
    let device = format!("/dev/char/{major}:{minor}");
    [
        "--system",
        "--timeout=10",
        "--quiet",
        "call",
        "org.freedesktop.systemd1",
        "/org/freedesktop/systemd1",
        "org.freedesktop.systemd1.Manager",
        "SetUnitProperties",
        "sba(sv)",
        scope,
        "true",
        "1",
        "DeviceAllow",
        "a(ss)",
        "1",
        &device,
        "rw",
    ]
    .into_iter()
    .map(str::to_owned)
    .collect()
}

/// Has systemd know that the container of the scope `scope` may read and write the character device `major:minor`: it applies what it
/// knows whenever it reads its units anew.
pub fn allow_device(scope: &str, major: u32, minor: u32) -> io::Result<()> {
    let mut command = Command::new(BUSCTL);
    command.args(allow_arguments(scope, major, minor)).env_clear().current_dir("/").stdin(Stdio::null());
    let output = command.output().map_err(|error| io::Error::new(error.kind(), format!("{BUSCTL}: {error}")))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).lines().next().unwrap_or("").trim().to_owned();
    Err(io::Error::other(format!("systemd does not allow it for {scope}: {said}")))
}

/// Sees that nothing is left of the scope of container `id`, whose proxy has ended, and waits for that.
///
/// systemd ends a scope when its last process does. Of a process that ended before it was moved, by the time that systemd had agreed
/// to, it never hears: the scope stays, and with it, by `Before`, the container's own scope, so that no container of this name starts
/// again.
///
/// Without `patience` systemd is asked, and nothing waited for. It is not asked if `is_meant` says that the scope is another's by now.
///
/// # Errors
/// If the scope is still there, with what systemd says.
pub fn end_scope(id: &str, patience: Duration, is_meant: impl FnOnce() -> bool) -> io::Result<()> {
    end_scope_by(BUSCTL, Path::new(TRANSIENT), id, patience, is_meant)
}

fn end_scope_by(
    program: &str,
    transient: &Path,
    id: &str,
    patience: Duration,
    is_meant: impl FnOnce() -> bool,
) -> io::Result<()> {
    let unit = &unit(id);
    let file = transient.join(unit);
    if is_gone_within(NOTICE.min(patience), &file, id) || !is_meant() {
        return Ok(());
    }
    let call = ["--system", TIMEOUT, "--quiet", "call", "org.freedesktop.systemd1", "/org/freedesktop/systemd1"];
    let mut command = Command::new(program);
    command.args(call).args(["org.freedesktop.systemd1.Manager", "StopUnit", "ss", unit, "replace"]);
    let mut child = spawn(&mut command, program)?;
    if patience.is_zero() {
        return Ok(());
    }
    // Not for longer, whatever becomes of the bus.
    let is_gone = is_gone_within(PATIENCE.min(patience), &file, id);
    let _ = child.kill();
    let said = first_line(&mut child);
    let _ = child.wait();
    if is_gone {
        return Ok(());
    }
    let said = if said.is_empty() { String::new() } else { format!(" ({said})") };
    Err(io::Error::other(format!("systemd keeps {unit}, which is empty{said}: systemctl stop {unit}")))
}

/// Starts a program of systemd's that may complain.
fn spawn(command: &mut Command, program: &str) -> io::Result<Child> {
    let command =
        command.env_clear().current_dir("/").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    command.spawn().map_err(|error| io::Error::new(error.kind(), format!("{program}: {error}")))
}

/// Of what a program that has ended complained of.
fn first_line(child: &mut Child) -> String {
    let mut text = String::new();
    let stderr = child.stderr.take().map(|stderr| stderr.take(1024));
    let _ = stderr.map(|mut stderr| stderr.read_to_string(&mut text));
    text.lines().next().unwrap_or("").trim().to_owned()
}

/// Whether the scope of container `id` that `file` describes goes; one of this name that somebody else made is none of ours.
fn is_gone_within(patience: Duration, file: &Path, id: &str) -> bool {
    let deadline = Instant::now() + patience;
    let ours = format!("Description={}", description(id));
    while std::fs::read_to_string(file).is_ok_and(|text| text.lines().any(|line| line == ours)) {
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    true
}

/// The properties of `cpu` (`systemd.resource-control(5)`).
///
/// A quota holds from the proxy's start on, other than in directories: to set it later, another request would be waited for.
/// It is shorter than that start, of some milliseconds, only where the container's own start is held up for far longer.
fn processors(cpu: &Cpu) -> Vec<(&'static str, Vec<String>)> {
    let number = |value: u64| vec!["t".to_owned(), value.to_string()];
    let mut properties = Vec::new();
    if let Some(time) = cpu.time {
        // In whole percents: systemd writes them into the unit's file, and reads that when it is reloaded.
        let percents = (u128::from(time.quota) * 100).div_ceil(u128::from(time.period.max(1)));
        let per_second = u64::try_from(percents * 10_000).unwrap_or(u64::MAX);
        properties.push(("CPUQuotaPerSecUSec", number(per_second)));
        if time.period != USUAL_PERIOD {
            properties.push(("CPUQuotaPeriodUSec", number(time.period)));
        }
    }
    properties.extend(cpu.weight.map(|weight| match weight {
        Weight::Shares(shares) => ("CPUShares", number(shares)),
        Weight::Points(weight) => ("CPUWeight", number(weight)),
        Weight::Idle => ("CPUWeight", number(0)),
    }));
    for (name, list) in [("AllowedCPUs", &cpu.cpus), ("AllowedMemoryNodes", &cpu.mems)] {
        properties.extend(list.as_deref().and_then(mask).map(|mask| (name, mask)));
    }
    properties
}

/// A list of CPUs or memory nodes as an array of bytes, the first of which is for the first eight.
fn mask(list: &str) -> Option<Vec<String>> {
    let ranges = units::cpu_list(list)?;
    let mut bytes = Vec::new();
    for number in ranges.into_iter().flatten() {
        let (byte, bit) = (number as usize / 8, number % 8);
        bytes.resize(bytes.len().max(byte + 1), 0u8);
        bytes[byte] |= 1 << bit;
    }
    let words = ["ay".to_owned(), bytes.len().to_string()];
    Some(words.into_iter().chain(bytes.iter().map(u8::to_string)).collect())
}

/// A request under way. When dropped, systemd has answered it or had its time: of a scope that comes later nobody would know.
#[derive(Debug)]
pub struct Request {
    child: Child,
    unit: String,
    deadline: Instant,
}

impl Request {
    /// Waits until `proxy` is in the scope, but not for long; otherwise says why not.
    pub fn wait(mut self, proxy: i32) -> Result<(), String> {
        // systemd answers before it has done it.
        while !is_in(proxy, &self.unit) {
            if let Ok(Some(status)) = self.child.try_wait()
                && !status.success()
            {
                let line = first_line(&mut self.child);
                return Err(if line.is_empty() { format!("busctl: {status}") } else { line });
            }
            if Instant::now() >= self.deadline {
                return Err(format!("no answer within {} ms", PATIENCE.as_millis()));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        self.deadline = Instant::now();
        Ok(())
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < self.deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn is_in(proxy: i32, unit: &str) -> bool {
    let cgroup = std::fs::read_to_string(format!("/proc/{proxy}/cgroup")).unwrap_or_default();
    cgroup.lines().any(|line| line.rsplit('/').next() == Some(unit))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::placement::Time;

    fn scope() -> Scope {
        let own = Path::new("/cg/kube.slice/kube-pod1.slice/cri-containerd-c+1.scope");
        Scope::beside(own, own.parent().unwrap(), "c+1")
    }

    #[test]
    fn systemd_is_told_everything() {
        let limits = Limits { memory_max: Some(1 << 30), pids_max: 64, ..Limits::default() };
        let arguments = scope().arguments(4242, &limits);
        let expected = "--system --timeout=3 --quiet call org.freedesktop.systemd1 /org/freedesktop/systemd1 \
            org.freedesktop.systemd1.Manager StartTransientUnit ssa(sv)a(sa(sv)) ringfence-c\\x2b1.scope fail 7 \
            Description s RDMA proxy of container c+1 Slice s kube-pod1.slice PIDs au 1 4242 \
            CollectMode s inactive-or-failed TasksMax t 64 MemoryMax t 1073741824 \
            Before as 1 cri-containerd-c+1.scope 0";
        assert_eq!(arguments.join(" "), expected);
        let bare = Scope { before: None, ..scope() }.arguments(1, &Limits::default());
        assert!(bare.contains(&"5".to_owned()) && !bare.contains(&"MemoryMax".to_owned()), "{bare:?}");
    }

    #[test]
    fn devices_are_allowed_by_their_numbers() {
        let expected = "--system --timeout=10 --quiet call org.freedesktop.systemd1 /org/freedesktop/systemd1 \
            org.freedesktop.systemd1.Manager SetUnitProperties sba(sv) rf-c1.scope true 1 DeviceAllow a(ss) 1 /dev/char/10:59 rw";
        assert_eq!(allow_arguments("rf-c1.scope", 10, 59).join(" "), expected);
    }

    #[test]
    fn processors_are_properties() {
        let of = |cpu: &Cpu| {
            let limits = Limits { cpu: cpu.clone(), ..Limits::default() };
            let arguments = Scope { before: None, ..scope() }.arguments(1, &limits).join(" ");
            arguments.split_once("TasksMax t 0 ").unwrap().1.to_owned()
        };
        let cpu = Cpu {
            time: Some(Time { quota: 10_500, period: 100_000 }),
            weight: Some(Weight::Points(50)),
            cpus: Some("1,8-9".into()),
            mems: Some("0".into()),
        };
        let expected = "CPUQuotaPerSecUSec t 110000 CPUWeight t 50 AllowedCPUs ay 2 2 3 AllowedMemoryNodes ay 1 1 0";
        assert_eq!(of(&cpu), expected);
        let cpu = Cpu {
            time: Some(Time { quota: 150_000, period: 50_000 }),
            weight: Some(Weight::Shares(512)),
            ..Cpu::default()
        };
        assert_eq!(of(&cpu), "CPUQuotaPerSecUSec t 3000000 CPUQuotaPeriodUSec t 50000 CPUShares t 512 0");
        assert_eq!(of(&Cpu { weight: Some(Weight::Idle), ..Cpu::default() }), "CPUWeight t 0 0");
        assert_eq!(of(&Cpu { cpus: Some("7:1/2".into()), ..Cpu::default() }), "0");
    }

    #[test]
    fn a_refusal_is_told_in_one_line() {
        let me = std::process::id() as i32;
        let missing = scope().request_by("/nonexistent/busctl", me, &Limits::default()).unwrap_err();
        assert!(missing.to_string().starts_with("/nonexistent/busctl: No such file"), "{missing}");
        let refused = scope().request_by("/bin/false", me, &Limits::default()).unwrap().wait(me);
        assert_eq!(refused, Err("busctl: exit status: 1".into()));
        // `ls` takes none of these options, and says so in several lines.
        let said = scope().request_by("/bin/ls", me, &Limits::default()).unwrap().wait(me).unwrap_err();
        assert!(said.starts_with("/bin/ls: ") && !said.contains('\n'), "{said}");
    }

    #[test]
    fn a_scope_that_stays_is_stopped() {
        let transient = tempfile::tempdir().unwrap();
        let (file, busctl) = (transient.path().join("ringfence-c1.scope"), transient.path().join("busctl"));
        let end = |program: &str, patience, is_meant| {
            end_scope_by(program, transient.path(), "c1", patience, || is_meant).map_err(|error| error.to_string())
        };
        end("/nonexistent/busctl", PATIENCE, true).unwrap();
        // Somebody else's.
        std::fs::write(&file, "[Unit]\nDescription=sleep 60\n").unwrap();
        end("/nonexistent/busctl", PATIENCE, true).unwrap();
        let ours = || std::fs::write(&file, "[Scope]\n[Unit]\nDescription=RDMA proxy of container c1\n").unwrap();
        ours();
        end("/nonexistent/busctl", PATIENCE, false).unwrap();
        // As systemd would, at the right call alone. Written by a process that has ended: a file that is open for writing anywhere
        // is not executed.
        let script =
            "case \"$*\" in *' StopUnit ss ringfence-c1.scope replace') rm \"${0%/*}/ringfence-c1.scope\" ;; esac";
        let write = "printf '#!/bin/sh\\n%s\\n' \"$1\" >\"$2\" && chmod 755 \"$2\"";
        let written = Command::new("/bin/sh").args(["-c", write, "sh", script]).arg(&busctl).status().unwrap();
        assert!(written.success());
        let busctl = busctl.to_str().unwrap();
        end(busctl, Duration::from_secs(30), true).unwrap();
        assert!(!file.exists());
        ours();
        end(busctl, Duration::ZERO, true).unwrap();
        assert!(is_gone_within(Duration::from_secs(10), &file, "c1"));
        ours();
        let kept = end("/bin/true", PATIENCE, true).unwrap_err();
        assert_eq!(kept, "systemd keeps ringfence-c1.scope, which is empty: systemctl stop ringfence-c1.scope");
        let kept = end("/bin/ls", PATIENCE, true).unwrap_err();
        assert!(kept.contains("which is empty (/bin/ls: unrecognized option"), "{kept}");
    }

    #[test]
    fn a_bus_that_hangs_is_not_waited_for() {
        let transient = tempfile::tempdir().unwrap();
        std::fs::write(transient.path().join("ringfence-c1.scope"), "Description=RDMA proxy of container c1\n")
            .unwrap();
        let begin = Instant::now();
        let hang = transient.path().join("hang");
        let write = "printf '#!/bin/sh\\nexec sleep 60\\n' >\"$1\" && chmod 755 \"$1\"";
        assert!(Command::new("/bin/sh").args(["-c", write, "sh"]).arg(&hang).status().unwrap().success());
        end_scope_by(hang.to_str().unwrap(), transient.path(), "c1", PATIENCE, || true).unwrap_err();
        assert!(begin.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn silence_is_not_waited_for() {
        let begin = Instant::now();
        let me = std::process::id() as i32;
        let answer = scope().request_by("/bin/true", me, &Limits::default()).unwrap().wait(me);
        assert_eq!(answer, Err("no answer within 3000 ms".into()));
        assert!(begin.elapsed() < Duration::from_secs(10));
    }
}
