//! A verbs proxy that its container has taken over, under every engine: what it reaches is the table of
//! verbs-proxy/README.md, and nothing else.
//!
//! The proxy is a test build that makes whatever system calls its container names. A victim with an ordinary proxy runs
//! beside it and exchanges data with it.

use anyhow::{Context, Result, bail, ensure};
use ringfence_integration::command::{Running, wait_until};
use ringfence_integration::config::Config;
use ringfence_integration::container::Builder;
use ringfence_integration::direct;
use ringfence_integration::engines::docker::{self, Docker, docker};
use ringfence_integration::engines::podman::{self, User, podman};
use ringfence_integration::engines::{ENABLE, cli};
use ringfence_integration::node::{Node, Suite};
use ringfence_integration::perftest::Peer;
use ringfence_integration::raw::Raw;
use ringfence_integration::rootfs::Image;
use ringfence_integration::suite::{Needs, test};
use ringfence_integration::takeover::exchange::INSIDE;
use ringfence_integration::takeover::wire::OBEY;
use ringfence_integration::takeover::{Hands, Setting, Target, markdown, rows};
use ringfence_integration::{artifacts, sandbox, suite};
use ringfence_proxy::launch::Limits;
use ringfence_trials::Skipped;
use rustix::io::Errno;
use rustix::net::SendFlags;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

/// The program of `integration/src/takeover`.
const TAKEN: &str = env!("CARGO_BIN_EXE_ringfence-taken");
/// Where containers have it.
const INSIDE_TAKEN: &str = "/taken";
/// What the test build of the proxy contains, and no other.
const MARK: &str = "THIS TEST BUILD OBEYS ITS CONTAINER";
/// How long an attack may take.
const LIMIT: Duration = Duration::from_secs(120);
/// What the canary says.
const CANARY: &str = "only its owner writes or reads this\n";
/// The release that the nodes have.
const SUITE: Suite = Suite::Trixie;
/// Where the test build is on a node, and the file that has containers get it.
const NODE_PROXY: &str = "/opt/obedient/ringfence-proxy";
const NODE_CONFIG: &str = "/etc/ringfence/conf.d/takeover.toml";

/// A test on a node.
type OnNode = fn(&Node) -> Result<()>;

fn main() -> ExitCode {
    let needs = Needs {
        programs: &["runc", "mmdebstrap", "ip", "unshare", "nsenter"],
        built: &[artifacts::proxy, artifacts::hook, artifacts::library, artifacts::package, artifacts::obedient_proxy],
    };
    suite::main("ringfence-takeover", &needs, || {
        let mut trials = vec![
            test("no release build obeys", release_builds),
            test("the README's table is the one that is tested", readme),
            test("the attempts succeed where nothing confines them", unconfined),
            test("runc", || under_runc(false)),
            test("runc, with a user namespace", || under_runc(true)),
        ];
        let on_nodes: [(&str, OnNode); 3] = [
            ("podman", under_podman),
            ("podman without root", without_root),
            ("docker with userns-remap", under_docker),
        ];
        for (name, run) in on_nodes {
            trials.push(test(name, move || {
                if let Some(reason) = Node::obstacle(SUITE) {
                    bail!(Skipped(reason.lines().last().unwrap_or_default().to_owned()));
                }
                let node = Node::start(SUITE)?;
                run(&node)?;
                node.is_clean()
            }));
        }
        Ok(trials)
    })
}

fn contains_mark(program: &Path) -> Result<bool> {
    let bytes = std::fs::read(program).with_context(|| format!("cannot read {}", program.display()))?;
    Ok(bytes.windows(MARK.len()).any(|window| window == MARK.as_bytes()))
}

fn release_builds() -> Result<()> {
    ensure!(contains_mark(&artifacts::obedient_proxy()?)?, "the test build has no mark by which it is told apart");
    ensure!(!contains_mark(&artifacts::proxy()?)?, "the release build obeys its container");
    let node = direct::Node::new(None)?;
    let proxy = node.proxy(Limits::default())?;
    ensure!(Hands::of_proxy(&proxy.socket()).is_err(), "the release build obeys its container");
    for greeted in [false, true] {
        let raw = if greeted { Raw::greet(&proxy.socket())?.0 } else { Raw::connect(&proxy.socket())? };
        raw.send(&Raw::request(OBEY, 1, &[0; 16]), &[], SendFlags::empty())?;
        ensure!(matches!(raw.receive(), Ok(None)), "OBEY does not end the connection; greeted: {greeted}");
    }
    Ok(())
}

fn readme() -> Result<()> {
    let path = artifacts::repository().join("verbs-proxy/README.md");
    let text = std::fs::read_to_string(&path)?;
    ensure!(text.contains(&markdown()), "{} should have this table:\n\n{}", path.display(), markdown());
    Ok(())
}

/// What there is on a node for a taken-over proxy to reach. Ends when dropped.
struct Surroundings {
    /// As this process sees it.
    dir: PathBuf,
    /// As the node's processes do.
    inside: PathBuf,
    owner: u32,
    _daemon: Running,
}

const ABSTRACT: &str = "ringfence-daemon";

impl Surroundings {
    /// Makes the directory `dir`, which the node's processes call `inside`; `owner` owns all of it. `start` starts a program.
    fn make(dir: PathBuf, inside: PathBuf, owner: u32, start: impl FnOnce(&[&str]) -> Result<Running>) -> Result<Self> {
        std::fs::create_dir_all(&dir)?;
        let [daemon, datagram] = ["daemon", "datagram"].map(|name| inside.join(name).display().to_string());
        let daemon = start(&["daemon", &daemon, &datagram, ABSTRACT])?;
        wait_until("the daemon to listen", Duration::from_secs(10), || daemon.output().contains("listening"))
            .with_context(|| daemon.output())?;
        let made = Self { dir, inside, owner, _daemon: daemon };
        made.reset()?;
        Ok(made)
    }

    /// Makes again what an attempt may have destroyed.
    fn reset(&self) -> Result<()> {
        for entry in std::fs::read_dir(&self.dir)?.flatten() {
            let kind = entry.file_type()?;
            if kind.is_dir() {
                nix::mount::umount2(&entry.path(), nix::mount::MntFlags::MNT_DETACH).ok();
                std::fs::remove_dir(entry.path())?;
            } else if !["daemon", "datagram"].iter().any(|name| entry.file_name() == *name) {
                std::fs::remove_file(entry.path())?;
            }
        }
        std::fs::create_dir(self.dir.join("directory"))?;
        std::fs::write(self.dir.join("canary"), CANARY)?;
        std::fs::set_permissions(self.dir.join("canary"), std::fs::Permissions::from_mode(0o600))?;
        for name in ["", "canary", "directory", "daemon", "datagram"] {
            chown(self.dir.join(name), Some(self.owner), Some(self.owner))?;
        }
        Ok(())
    }

    /// Fails unless everything is as it was made.
    fn is_untouched(&self) -> Result<()> {
        let mut names: Vec<_> = std::fs::read_dir(&self.dir)?.flatten().map(|entry| entry.file_name()).collect();
        names.sort();
        ensure!(names == ["canary", "daemon", "datagram", "directory"], "the host's directory has {names:?}");
        let found = std::fs::metadata(self.dir.join("canary"))?;
        ensure!(found.mode() & 0o7777 == 0o600 && found.uid() == self.owner, "the canary's mode or owner has changed");
        ensure!(std::fs::read_to_string(self.dir.join("canary"))? == CANARY, "the canary has been written");
        Ok(())
    }

    /// What an attacker is told whose own proxy is `own`.
    fn target(&self, victim: i32, own: i32, proc: &Path, fabric: PathBuf) -> Result<Target> {
        let maps = |pid: i32| std::fs::read_to_string(proc.join(pid.to_string()).join("maps"));
        let at = |line: &str| line.split('-').next().and_then(|start| u64::from_str_radix(start, 16).ok());
        let own = maps(own)?;
        let mapped = |file: &str, rights: &str| {
            own.lines().find(|line| line.ends_with(file) && line.contains(rights)).and_then(at).unwrap_or(0)
        };
        Ok(Target {
            canary: self.inside.join("canary"),
            daemon: self.inside.join("daemon"),
            datagram: self.inside.join("datagram"),
            abstract_name: ABSTRACT.to_owned(),
            victim,
            address: maps(victim)?.lines().next().and_then(at).context("a process has mappings")?,
            victim_lid: 0,
            fabric,
            identities: mapped("/identities", " r--s "),
            pages: mapped("/gids", " r--s "),
            own_page: mapped("/gids", " rw-s "),
        })
    }
}

/// Without this the rest would show nothing: a mistake in an attempt looks like a refusal.
fn unconfined() -> Result<()> {
    let dir = sandbox::work_dir().join("unconfined");
    let start = |words: &[&str]| {
        let mut command = Command::new(TAKEN);
        command.args(words);
        Running::start(command)
    };
    let surroundings = Surroundings::make(dir.clone(), dir, 0, start)?;
    let mut sleep = Command::new("sleep");
    sleep.arg("infinity");
    let victim = Running::start(sleep)?;
    // Until the program runs, its mappings are this one's.
    std::thread::sleep(Duration::from_millis(50));
    let words = surroundings.target(victim.pid(), victim.pid(), Path::new("/proc"), PathBuf::from("/run"))?.words();
    let mut wrong = Vec::new();
    for attempt in rows().iter().flat_map(|row| &row.attempts).filter(|attempt| attempt.control) {
        surroundings.reset()?;
        let mut command = Command::new(TAKEN);
        command.args(["control", attempt.name]).args(&words);
        let said = Running::start(command)?.wait(LIMIT)?.output;
        // Where the kernel does not have it, nobody gets there.
        if !said.contains("\treached\t") && !said.contains(&Errno::NOSYS.to_string()) {
            wrong.push(format!("{}: {}", attempt.name, said.trim()));
        }
    }
    ensure!(wrong.is_empty(), "these did not succeed:\n{}", wrong.join("\n"));
    Ok(())
}

/// Compares what the attacker's program printed with what is expected.
fn compare(setting: Setting, said: &str) -> Result<()> {
    let mut wrong = Vec::new();
    for row in rows() {
        for attempt in &row.attempts {
            let line = said.lines().find_map(|line| line.strip_prefix(attempt.name)?.strip_prefix('\t'));
            let fits = match line.and_then(|line| line.split('\t').next()) {
                Some("reached") => row.expected(setting).allows(true),
                Some("refused" | "nothing") => row.expected(setting).allows(false),
                _ => false,
            };
            if !fits {
                wrong.push(format!("{}: {}: {:?}", row.what, attempt.name, line.unwrap_or("not tried")));
            }
        }
    }
    if std::env::var_os("RINGFENCE_SHOW_ATTEMPTS").is_some() {
        println!("{said}");
    }
    ensure!(wrong.is_empty(), "under {setting:?} these do not fit the table:\n{}\nof\n{said}", wrong.join("\n"));
    Ok(())
}

/// Plays it: the victim is there already, the attacker comes when it is told.
fn play(
    setting: Setting,
    surroundings: &Surroundings,
    exchange: &Path,
    target: &Target,
    victim: &impl Peer,
    [attacker, accomplice]: [&impl Peer; 2],
    lives: impl Fn() -> bool,
) -> Result<()> {
    let guard = victim.spawn(&[INSIDE_TAKEN, "victim"])?;
    let accomplice = accomplice.spawn(&[INSIDE_TAKEN, "accomplice"])?;
    let words = target.words();
    let words: Vec<&str> = [INSIDE_TAKEN, "attack"].into_iter().chain(words.iter().map(String::as_str)).collect();
    let attack = attacker.spawn(&words)?.wait(LIMIT);
    std::fs::write(exchange.join("stop"), "")?;
    let guarded = guard.wait(Duration::from_secs(20))?;
    let said = || format!("the victim said {}\nits accomplice {}", guarded.output, accomplice.output());
    let attack = attack.with_context(said)?;
    let outcome = compare(setting, &attack.output);
    ensure!(attack.status.success(), "the attacker's program failed: {}\n{:?}", attack.output, outcome);
    outcome.with_context(said)?;
    surroundings.is_untouched()?;
    ensure!(guarded.output.contains("unharmed"), "the victim: {}", guarded.output);
    ensure!(lives(), "the victim's proxy has ended");
    Ok(())
}

fn make_exchange(dir: &Path) -> Result<()> {
    std::fs::create_dir_all(dir)?;
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o777))?;
    Ok(())
}

fn under_runc(user_namespace: bool) -> Result<()> {
    let image = Image::debian()?;
    let config = Config::new("")?;
    let dir = sandbox::work_dir().join(format!("runc-{user_namespace}"));
    let exchange = dir.join("exchange");
    make_exchange(&exchange)?;
    let surroundings = Surroundings::make(dir.join("host"), dir.join("host"), 0, |words| {
        let mut command = Command::new(TAKEN);
        command.args(words);
        Running::start(command)
    })?;
    let container = || {
        // Networks of their own: a user namespace may enter no other.
        let builder = Builder::default().hooked(&config).annotation("enable", "true");
        let builder = builder.mount(TAKEN.as_ref(), INSIDE_TAKEN).share(&exchange, INSIDE);
        if user_namespace { builder.in_user_namespace() } else { builder }.start(&image)
    };
    let victim = container()?;
    let [proxy] = proxies(Path::new("/proc"))?[..] else { bail!("not one proxy: {:?}", proxies(Path::new("/proc"))?) };
    config.set_proxy(&artifacts::obedient_proxy()?)?;
    let attacker = container()?;
    let own = other(Path::new("/proc"), proxy)?;
    let accomplice = container()?;
    let target = surroundings.target(proxy, own, Path::new("/proc"), config.run_dir().join("fabric"))?;
    ensure!(target.identities != 0 && target.pages != 0 && target.own_page != 0, "not mapped: {target:?}");
    let lives = || Path::new(&format!("/proc/{proxy}")).exists();
    let setting = if user_namespace { Setting::Mapped } else { Setting::Root };
    play(setting, &surroundings, &exchange, &target, &victim, [&attacker, &accomplice], lives)
}

/// The proxies of a node, without their wardens.
fn proxies(proc: &Path) -> Result<Vec<i32>> {
    const NAME: &str = "ringfence-proxy";
    let mut found = Vec::new();
    for entry in std::fs::read_dir(proc)?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        // A process may end while it is looked at.
        let [line, name] =
            ["cmdline", "comm"].map(|file| std::fs::read_to_string(entry.path().join(file)).unwrap_or_default());
        if line.starts_with(NAME) && name.trim_end() == NAME {
            found.push(pid);
        }
    }
    Ok(found)
}

/// The second proxy.
fn other(proc: &Path, first: i32) -> Result<i32> {
    let found = proxies(proc)?;
    found.iter().copied().find(|pid| *pid != first).with_context(|| format!("no second proxy among {found:?}"))
}

/// The directory on a node that the tests use.
const NODE_DIR: &str = "/srv/takeover";

fn under_podman(node: &Node) -> Result<()> {
    podman::load(node)?;
    let podman = podman(node, "runc");
    attack_on(node, Setting::Root, 0, "/run/ringfence", &podman, &["--annotation", ENABLE])
}

fn without_root(node: &Node) -> Result<()> {
    let user = User::make(node)?;
    let run_dir = format!("{}/ringfence", user.session);
    attack_on(node, Setting::Rootless, 1000, &run_dir, &user.podman(node), &["--annotation", ENABLE])
}

fn under_docker(node: &Node) -> Result<()> {
    let daemon = node.path("/etc/docker/daemon.json");
    let text = std::fs::read_to_string(&daemon)?;
    std::fs::write(&daemon, text.replacen('{', "{ \"userns-remap\": \"default\",", 1))?;
    node.run(&["ringfence", "configure", "--engine", "docker"])?;
    let _daemon = Docker::start(node)?;
    docker::load(node)?;
    attack_on(node, Setting::Mapped, 0, "/run/ringfence", &docker(node), &["--runtime=ringfence"])
}

fn attack_on(
    node: &Node,
    setting: Setting,
    owner: u32,
    run_dir: &str,
    cli: &cli::Cli<'_>,
    options: &[&str],
) -> Result<()> {
    let taken = format!("{NODE_DIR}/taken");
    std::fs::create_dir_all(node.path(NODE_DIR))?;
    std::fs::copy(TAKEN, node.path(&taken))?;
    std::fs::create_dir_all(node.path(NODE_PROXY).parent().context("it has a parent")?)?;
    std::fs::copy(artifacts::obedient_proxy()?, node.path(NODE_PROXY))?;
    let exchange = format!("{NODE_DIR}/exchange");
    make_exchange(&node.path(&exchange))?;
    let host = format!("{NODE_DIR}/host");
    let surroundings = Surroundings::make(node.path(&host), host.into(), owner, |words| {
        node.spawn(&[&[taken.as_str()], words].concat())
    })?;
    let volumes = [format!("--volume={taken}:{INSIDE_TAKEN}:ro"), format!("--volume={exchange}:{INSIDE}")];
    let options: Vec<&str> = options.iter().copied().chain(volumes.iter().map(String::as_str)).collect();
    let victim = cli.start_in("none", &options, &[])?;
    let proc = node.path("/proc");
    let [proxy] = proxies(&proc)?[..] else { bail!("not one proxy: {:?}", node.processes()?) };
    node.write(NODE_CONFIG, format!("[proxy]\npath = {NODE_PROXY:?}\n"))?;
    let attacker = cli.start_in("none", &options, &[])?;
    let own = other(&proc, proxy)?;
    let accomplice = cli.start_in("none", &options, &[])?;
    let target = surroundings.target(proxy, own, &proc, Path::new(run_dir).join("fabric"))?;
    ensure!(target.identities != 0 && target.pages != 0 && target.own_page != 0, "not mapped: {target:?}");
    let lives = || node.path(&format!("/proc/{proxy}")).exists();
    play(
        setting,
        &surroundings,
        &node.path(&exchange),
        &target,
        &victim.member(),
        [&attacker.member(), &accomplice.member()],
        lives,
    )
}
