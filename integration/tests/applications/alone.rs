//! Cases that need a container of their own: limits, other images, privileges.

use super::engine::{Engine, Stage};
use anyhow::{Context, Result, bail, ensure};
use ringfence_integration::command::{Ended, Running, wait_until};
use ringfence_integration::node::Node;
use ringfence_integration::node::applications::{MUSL, PROGRAMS};
use ringfence_trials::Skipped;
use std::time::{Duration, Instant};

/// A test, and its name.
type Alone = (&'static str, fn(&Stage, Engine) -> Result<()>);

/// All of them.
pub const ALL: [Alone; 6] = [
    ("resources: 180 MiB are deregistered in a container with 300 MiB", within_memory),
    ("burn: the proxy stays within the container's processors", burn),
    ("a chroot with the container's /etc", chroot),
    ("a private /dev", private_dev),
    ("musl: programs without verbs", musl_hello),
    ("musl: verbs by linking and by loading", musl_verbs),
];

const LIMIT: Duration = Duration::from_secs(120);

/// Runs a program in a container with RDMA and further options.
fn once(stage: &Stage, engine: Engine, more: &[&str], program: &[&str]) -> Result<Ended> {
    once_of(stage, engine, None, more, program)
}

fn once_of(
    stage: &Stage,
    engine: Engine,
    image: Option<&'static str>,
    more: &[&str],
    program: &[&str],
) -> Result<Ended> {
    let cli = stage.cli(engine)?;
    let cli = match image {
        Some(image) => cli.of_image(image),
        None => cli,
    };
    let options = Stage::options(engine);
    let options: Vec<&str> = options.iter().map(String::as_str).chain(more.iter().copied()).collect();
    Running::start(cli.once_command(&options, program))?.wait(LIMIT)
}

/// An ordinary user has limits only where control groups are delegated to him, which version 1 cannot do.
fn needs_limits(engine: Engine) -> Result<()> {
    if engine == Engine::Rootless {
        return Err(Skipped("a user's podman has no limits here: it needs control groups of version 2".into()).into());
    }
    Ok(())
}

fn within_memory(stage: &Stage, engine: Engine) -> Result<()> {
    needs_limits(engine)?;
    let program = [&format!("{PROGRAMS}/resources"), "large_deregistered"];
    let options = ["--memory=300m", "--memory-swap=300m"];
    once(stage, engine, &options, &program)?.success().map(drop)
}

/// A tenth of a processor, and not the first one.
fn burn(stage: &Stage, engine: Engine) -> Result<()> {
    needs_limits(engine)?;
    if std::thread::available_parallelism()?.get() < 2 {
        return Err(Skipped("needs two processors".into()).into());
    }
    let cli = stage.cli(engine)?;
    let options = Stage::options(engine);
    let limits = ["--cpus=0.1", "--cpuset-cpus=1"];
    let options: Vec<&str> = options.iter().map(String::as_str).chain(limits).collect();
    let container = cli.start(&options, &[&format!("{PROGRAMS}/burn"), "60"])?;
    let logs = || container.act(&["logs"]).unwrap_or_default();
    wait_until("the program to burn", Duration::from_secs(60), || logs().contains("burning"))
        .with_context(|| format!("it said:\n{}", logs()))?;
    let proxies = stage.node.pids("ringfence-proxy")?;
    let &[proxy] = proxies.as_slice() else { bail!("proxies: {proxies:?}") };
    let (began, before) = (Instant::now(), processor_time(&stage.node, proxy)?);
    std::thread::sleep(Duration::from_secs(5));
    let used = processor_time(&stage.node, proxy)?.saturating_sub(before).as_secs_f64();
    let share = used / began.elapsed().as_secs_f64();
    // Half of a processor would be five times the limit, and without one it takes all of one.
    ensure!(share < 0.3, "the proxy used {share:.2} of a processor, and the container may have 0.1");
    let status = std::fs::read_to_string(stage.node.path(&format!("/proc/{proxy}/status")))?;
    let allowed = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap_or_default().trim();
    ensure!(allowed == "1", "the proxy may run on processors {allowed}, the container on 1");
    container.remove()
}

/// User and system time of a process of the node.
fn processor_time(node: &Node, pid: i32) -> Result<Duration> {
    let stat = std::fs::read_to_string(node.path(&format!("/proc/{pid}/stat")))?;
    let fields: Vec<&str> = stat.rsplit(") ").next().unwrap_or_default().split(' ').collect();
    let ticks = |field: usize| fields.get(field).context("a short line")?.parse::<u64>().context("not a number");
    Ok(Duration::from_millis((ticks(11)? + ticks(12)?) * 10))
}

/// A program that is run by another, in a root or with a /dev of its own: all that it says is `hello`.
fn says_hello(stage: &Stage, engine: Engine, script: &str) -> Result<()> {
    let ended = once(stage, engine, &["--cap-add=SYS_ADMIN"], &["sh", "-euc", script])?;
    let output = ended.success()?;
    ensure!(output.trim() == "hello", "it said:\n{output}");
    Ok(())
}

/// As DNS servers and build tools make one.
fn chroot(stage: &Stage, engine: Engine) -> Result<()> {
    let script = format!(
        "mkdir /jail && cd /jail && mkdir etc usr dev
         mount --rbind /etc etc && mount --bind /usr usr
         for link in bin lib lib64; do ln -s usr/$link $link; done
         mkdir opt && cp {PROGRAMS}/hello opt/
         exec chroot /jail /opt/hello"
    );
    says_hello(stage, engine, &script)
}

/// As systemd makes for services with PrivateDevices=yes.
fn private_dev(stage: &Stage, engine: Engine) -> Result<()> {
    let script = format!("mount -t tmpfs -o mode=755 dev /dev && exec {PROGRAMS}/hello");
    says_hello(stage, engine, &script)
}

fn musl_hello(stage: &Stage, engine: Engine) -> Result<()> {
    let output = once_of(stage, engine, Some(MUSL), &[], &["/bin/musl-hello"])?.success()?;
    ensure!(output.trim() == "hello", "it said:\n{output}");
    Ok(())
}

fn musl_verbs(stage: &Stage, engine: Engine) -> Result<()> {
    for program in ["/bin/musl-linked", "/bin/musl-load"] {
        let output = once_of(stage, engine, Some(MUSL), &[], &[program])?.success()?;
        ensure!(output.trim() == "1 devices\nregistered and deregistered", "{program} said:\n{output}");
    }
    Ok(())
}
