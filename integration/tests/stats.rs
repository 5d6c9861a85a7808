//! What proxies count: exactly what their containers did, on both sides; and what they say of their own troubles.

#[path = "stats/command.rs"]
mod command;

use anyhow::{Context, Result, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use ringfence_integration::command::{Running, wait_until};
use ringfence_integration::direct::{DirectProxy, Node};
use ringfence_integration::suite::{Needs, test};
use ringfence_integration::{artifacts, client, suite};
use ringfence_launch::counters::{FILE, Page, QUOTAS, STATUSES, Work};
use ringfence_proxy::launch::{BitRate, Limits};
use ringfence_trials::Trial;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

/// More than anything here takes by far.
const LIMIT: Duration = Duration::from_secs(60);

/// A test with a program that drives both sides, in one container or in two.
type Counted = fn(&Path, bool) -> Result<()>;

fn main() -> ExitCode {
    let needs = Needs { programs: &["cc", "sleep"], built: &[artifacts::proxy, artifacts::library] };
    suite::main("ringfence-stats", &needs, trials)
}

fn trials() -> Result<Vec<Trial>> {
    let program = client::compile("counted", &["sides.c", "pairs.c", "check.c"])?;
    let mut trials = Vec::new();
    for two in [false, true] {
        let sides = if two { "two" } else { "one" };
        for (name, run) in [("work", work as Counted), ("granted", granted), ("faults", faults)] {
            let program = program.clone();
            trials.push(test(format!("{name}_is_counted_exactly::{sides}"), move || run(&program, two)));
        }
    }
    let traffic = program.clone();
    trials.push(test("the_command_shows_what_a_container_does", move || command::shows(&traffic)));
    trials.push(test("what_is_held_back_is_timed", move || held(&program)));
    trials.push(test("the_page_is_out_of_the_proxys_reach", reach));
    trials.push(test("the_journal_hears_of_a_flood_once_in_a_while", flood));
    trials.push(test("the_journal_hears_of_a_proxy_that_was_killed", killed));
    trials.push(test("without_a_journal_lines_are_in_the_run_dir", without_journal));
    Ok(trials)
}

fn page(proxy: &DirectProxy) -> Result<Page> {
    Ok(Page::read(&std::fs::read(proxy.dir().join(FILE))?)?)
}

/// Two proxies, and a program whose near side uses the first.
struct Scene {
    near: DirectProxy,
    far: DirectProxy,
    two: bool,
    _node: Node,
}

impl Scene {
    fn new(two: bool, limits: Limits) -> Result<Self> {
        let node = Node::new(None)?;
        Ok(Self { near: node.proxy(limits.clone())?, far: node.proxy(limits)?, two, _node: node })
    }

    /// Runs a case of the program and looks at the pages of both sides while it keeps what it has. Afterwards nothing is held.
    fn run(&self, program: &Path, case: &str, look: impl Fn(&Page, &Page) -> Result<()>) -> Result<()> {
        let (input, keep) = std::io::pipe()?;
        let mut command = self.near.command(program)?;
        command.args([case, if self.two { "two" } else { "one" }]).env("PEER_SOCKET", self.far.socket());
        let mut running = Running::start_reading(command, Stdio::from(input))?;
        wait_until("the program to be done", LIMIT, || running.output().contains("done") || running.has_ended())?;
        if !running.has_ended() {
            // Counters are not waited for: what is completed has been counted. Only a responder that takes no part in what its
            // neighbour does counts that within some tenths of a second.
            let near = page(&self.near)?;
            let mut said = Ok(());
            let agrees = || {
                let far = if self.two { page(&self.far) } else { page(&self.near) };
                said = far.and_then(|far| look(&near, &far));
                said.is_ok()
            };
            let waited =
                wait_until("both sides to say the same", if self.two { LIMIT / 4 } else { Duration::ZERO }, agrees);
            said.and(waited)?;
        }
        drop(keep);
        running.wait(LIMIT)?.success()?;
        for proxy in [&self.near, &self.far] {
            let held = || page(proxy).is_ok_and(|page| page.quotas.iter().any(|quota| quota.used > 0));
            wait_until("everything to be given back", LIMIT, || !held())
                .with_context(|| format!("{:?}", page(proxy).map(|page| page.quotas)))?;
        }
        Ok(())
    }
}

fn work(program: &Path, two: bool) -> Result<()> {
    const LARGE: u64 = 1 << 20;
    let expected =
        [(5 + 1 + 8, 13 * 8 + LARGE), (2, 2 * 16), (3 + 1, 300), (2, 100), (4 + 1, 4 * 4096 + LARGE), (1, 8), (6, 48)]
            .map(|(operations, bytes)| Work { operations, bytes });
    Scene::new(two, Limits::default())?.run(program, "work", |near, far| {
        ensure!(near.sent[..7] == expected, "sent: {:?}", near.sent);
        ensure!(far.received[..7] == expected, "received: {:?}", far.received);
        let others = [near.sent[7..].iter(), far.received[7..].iter()].into_iter().flatten();
        ensure!(others.into_iter().all(|work| *work == Work::default()), "opcodes that there are not");
        let operations: u64 = expected.iter().map(|work| work.operations).sum();
        ensure!(near.delays.iter().sum::<u64>() == operations, "{:?} for {operations} requests", near.delays);
        ensure!(near.failed() + far.failed() == 0, "{:?} {:?}", near.errors, far.errors);
        // Where nobody runs for a while there may be timeouts, whose requests count once all the same.
        ensure!((near.throttled_ns, near.completions_lost) == (0, 0), "{near:?}");
        if two {
            ensure!(far.sent.iter().chain(&near.received).all(|work| *work == Work::default()), "the other way");
            for page in [near, far] {
                // Two, if both proxies made one at the same time.
                let links = (1..=2).contains(&page.links) && page.links_made >= page.links && page.links_failed == 0;
                ensure!(links, "{} links of {}, {} failed", page.links, page.links_made, page.links_failed);
            }
        }
        let sides = if two { 1 } else { 2 };
        for (name, used, limit) in [
            ("queue-pairs", sides, 256),
            ("completion-queues", 2 * sides, 256),
            ("memory-regions", sides, 4096),
            ("memory-region-bytes", sides * (2 << 20), 16 << 30),
        ] {
            let place = QUOTAS.iter().position(|quota| *quota == name).context("no such quota")?;
            for page in [near, far] {
                let found = page.quotas[place];
                ensure!((found.used, found.limit) == (used, limit), "{name}: {found:?}");
            }
        }
        Ok(())
    })
}

fn granted(program: &Path, two: bool) -> Result<()> {
    let mut expected = [Work::default(); 7];
    for (place, bytes) in [(0, 8), (4, 4096), (5, 8), (6, 8)] {
        expected[place] = Work { operations: 300, bytes: 300 * bytes };
    }
    Scene::new(two, Limits::default())?.run(program, "granted", |near, far| {
        ensure!(near.sent[..7] == expected, "sent: {:?}", near.sent);
        ensure!(far.received[..7] == expected, "received: {:?}", far.received);
        ensure!(near.delays.iter().sum::<u64>() == 1200, "{:?}", near.delays);
        ensure!(near.failed() + far.failed() + near.completions_lost == 0, "{:?} {:?}", near.errors, far.errors);
        Ok(())
    })
}

fn faults(program: &Path, two: bool) -> Result<()> {
    Scene::new(two, Limits::default())?.run(program, "faults", |near, far| {
        let both = |name: &str| -> Result<(u64, u64)> {
            let place = STATUSES.iter().position(|status| *status == name).context("no such status")?;
            Ok((near.errors[place], far.errors[place]))
        };
        // One proxy counts what happened to both sides.
        let (own, flushed) = if two { (0, (2, 2)) } else { (1, (4, 4)) };
        for (name, expected) in [
            ("rem-access-err", (1, own)),
            ("wr-flush-err", flushed),
            ("loc-prot-err", (1, own)),
            ("rnr-retry-exc-err", (1, own)),
            ("retry-exc-err", (1, own)),
        ] {
            ensure!(both(name)? == expected, "{name}: {:?} instead of {expected:?}", both(name)?);
        }
        let failed = (4 + flushed.0, 4 * own + flushed.1);
        ensure!((near.failed(), far.failed()) == failed, "{:?} {:?}", near.errors, far.errors);
        ensure!(near.rnr_received == 3 && far.rnr_sent == 3, "{} {}", near.rnr_received, far.rnr_sent);
        // And others where nobody runs for a while.
        ensure!(near.timeouts >= 2, "{} timeouts", near.timeouts);
        ensure!(near.operations() == 0 && far.operations_received() == 0, "nothing was carried out");
        Ok(())
    })
}

fn held(program: &Path) -> Result<()> {
    let began = Instant::now();
    // 4 MiB at 10 MB/s.
    let limits = Limits { bandwidth: BitRate::new(80_000_000), ..Limits::default() };
    Scene::new(false, limits)?.run(program, "held", |page, _| {
        let elapsed = began.elapsed();
        ensure!(page.sent[0] == Work { operations: 64, bytes: 4 << 20 }, "{:?}", page.sent[0]);
        let throttled = Duration::from_nanos(page.throttled_ns);
        ensure!(throttled > Duration::from_millis(200) && throttled < elapsed, "{throttled:?} of {elapsed:?}");
        ensure!(page.delays.iter().sum::<u64>() == 64, "{:?}", page.delays);
        let held = page.delays[1..].iter().sum::<u64>();
        // Most of them; fewer where the worker is late, and makes good what the rate would have let go.
        ensure!(held >= 8, "only {held} of 64 requests waited");
        // A request waits for at most what those before it have taken: some 7 ms, and longer where nobody runs.
        let longest = page.delay_quantile(1.0).context("no delays")?;
        ensure!(longest > 1 << 20 && Duration::from_nanos(longest / 2) < elapsed, "{longest} ns");
        Ok(())
    })
}

/// The proxy has no descriptor of its page, and the file has the mode and length that readers insist on.
fn reach() -> Result<()> {
    let scene = Scene::new(false, Limits::default())?;
    let path = scene.near.dir().join(FILE);
    let found = std::fs::metadata(&path)?;
    ensure!((found.len(), found.mode() & 0o7777, found.uid()) == (4096, 0o600, 0), "{found:?}");
    for entry in std::fs::read_dir(format!("/proc/{}/fd", scene.near.pid()))?.flatten() {
        let Ok(open) = std::fs::metadata(entry.path()) else { continue };
        ensure!((open.dev(), open.ino()) != (found.dev(), found.ino()), "{:?} is the page", entry.path());
    }
    Ok(())
}

/// A /run of the test's own, with a journal in it if so desired. Unmounted when dropped.
struct Run {
    journal: Option<UnixDatagram>,
}

impl Run {
    fn mount(with_journal: bool) -> Result<Self> {
        mount(Some("run"), "/run", Some("tmpfs"), MsFlags::empty(), None::<&str>).context("cannot mount on /run")?;
        let mut run = Self { journal: None };
        if with_journal {
            let directory = Path::new("/run/systemd/journal");
            std::fs::create_dir_all(directory)?;
            let socket = UnixDatagram::bind(directory.join("socket"))?;
            socket.set_read_timeout(Some(Duration::from_millis(20)))?;
            run.journal = Some(socket);
        }
        Ok(run)
    }

    /// The next line, if it comes soon.
    fn line(&self) -> Option<String> {
        let mut buffer = vec![0; 16 << 10];
        let length = self.journal.as_ref()?.recv(&mut buffer).ok()?;
        Some(String::from_utf8_lossy(&buffer[..length]).into_owned())
    }

    /// The line with `words`.
    fn await_line(&self, words: &str) -> Result<String> {
        let mut found = None;
        wait_until("a line in the journal", LIMIT, || {
            found = self.line().filter(|line| line.contains(words));
            found.is_some()
        })?;
        found.context("it was there")
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        // The sandbox's mounts end with it in any case.
        umount2("/run", MntFlags::MNT_DETACH).ok();
    }
}

/// So many faults of neighbours of the first proxy of `node`, each by another process: of one that breaks the protocol nothing
/// more is taken.
fn babble(node: &Node, count: usize) -> Result<()> {
    let program = client::compile("babble", &["check.c"])?;
    let socket = node.dir().join("fabric/soft0/sockets/1");
    let mut command = Command::new(program);
    command.arg(socket).arg(count.to_string());
    Running::start(command)?.wait(LIMIT)?.success().map(drop)
}

fn flood() -> Result<()> {
    let run = Run::mount(true)?;
    let node = Node::new(None)?;
    let proxy = node.proxy(Limits::default())?;
    let container = proxy.dir().file_name().context("a name")?.to_string_lossy().into_owned();
    let began = Instant::now();
    babble(&node, 1)?;
    let line = run.await_line("another proxy ends")?;
    for field in ["PRIORITY=4", "SYSLOG_IDENTIFIER=ringfence-proxy", &format!("CONTAINER_ID={container}")] {
        ensure!(line.lines().any(|found| found == field), "{field} is not in {line}");
    }
    let (mut faults, mut lines) = (1, 1);
    // Also where hundreds of processes take a while, these are more than may be logged.
    while page(&proxy)?.lines_unlogged < 100 {
        ensure!(began.elapsed() < LIMIT, "{faults} faults, of which all are logged");
        babble(&node, 20)?;
        faults += 20;
        lines += std::iter::from_fn(|| run.line()).count();
    }
    wait_until("word of what was not logged", LIMIT, || {
        run.line().inspect(|_| lines += 1).is_some_and(|line| line.contains("not logged"))
    })?;
    let most = 20 + began.elapsed().as_secs() / 3 + 1;
    ensure!(lines as u64 <= most, "{lines} lines of {faults} faults in {:?}", began.elapsed());
    let page = page(&proxy)?;
    ensure!(page.lines == faults && page.lines_unlogged < page.lines, "{} {}", page.lines, page.lines_unlogged);
    Ok(())
}

fn killed() -> Result<()> {
    let run = Run::mount(true)?;
    let node = Node::new(None)?;
    let mut ended = node.proxy(Limits::default())?;
    let killed = node.proxy(Limits::default())?;
    let name = killed.dir().file_name().context("a name")?.to_string_lossy().into_owned();
    // One that ends with its container is not worth a word.
    ended.end_init()?;
    wait_until("the proxy to end", LIMIT, || ended.has_ended())?;
    let pid = rustix::process::Pid::from_raw(killed.pid()).context("a pid")?;
    rustix::process::kill_process(pid, rustix::process::Signal::KILL)?;
    let line = run.await_line("before its container")?;
    ensure!(line.contains(&format!("CONTAINER_ID={name}\n")), "{line}");
    ensure!(run.line().is_none(), "one line is enough");
    Ok(())
}

fn without_journal() -> Result<()> {
    let _run = Run::mount(false)?;
    if std::os::unix::net::UnixDatagram::unbound()?.connect("/dev/log").is_ok() {
        ringfence_trials::skip("this machine's syslog listens at /dev/log, and would get the line");
    }
    let node = Node::new(None)?;
    let proxy = node.proxy(Limits::default())?;
    let path = node.dir().join("proxies.jsonl");
    ensure!(!path.exists(), "nothing has been said yet");
    babble(&node, 1)?;
    wait_until("the file", LIMIT, || std::fs::read_to_string(&path).is_ok_and(|text| text.ends_with('\n')))?;
    let entry: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(&path)?)?;
    let name = proxy.dir().file_name().context("a name")?.to_string_lossy().into_owned();
    ensure!(
        entry["container"] == name && entry["message"].as_str().is_some_and(|text| text.contains("ends")),
        "{entry}"
    );
    ensure!(std::fs::metadata(&path)?.mode() & 0o7777 == 0o600, "who may read it");
    Ok(())
}
