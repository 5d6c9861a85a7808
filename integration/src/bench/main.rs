//! `ringfence-bench`: what Ringfence costs, each figure beside its floor and measured in the same run.

mod figure;
mod hook;
mod idle;
mod startup;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use figure::{Figure, Goal};
use ringfence_integration::direct::{DirectProxy, Node};
use ringfence_integration::{client, machine, sandbox};
use ringfence_proxy::launch::{Class, Limits};
use std::collections::HashMap;
use std::path::PathBuf;
use std::process::ExitCode;

/// Measures what Ringfence costs, each figure beside its floor in the same run.
///
/// Two cores that nobody else uses, and nothing else running: figures of latency mean little otherwise.
#[derive(Debug, Parser)]
#[command(name = "integration/bench.sh")]
struct Arguments {
    /// One JSON object a line: name, value, unit, floor, ratio, goal, met.
    #[arg(long)]
    json: bool,
    /// Only figures whose name contains this.
    #[arg(long, default_value = "")]
    only: String,
    /// How many containers of each kind the measurement `startup` starts, with Ringfence and without.
    #[arg(long, default_value_t = 21)]
    runs: usize,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if let Some(obstacle) = machine::obstacle(&["cc", "runc"]) {
        eprintln!("ringfence-bench: {obstacle}");
        return ExitCode::FAILURE;
    }
    sandbox::run("ringfence-bench", || match measure(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ringfence-bench: {error:#}");
            ExitCode::FAILURE
        }
    })
}

/// A measurement: its name, and what makes its figures.
type Measurement = (&'static str, fn(&Arguments) -> Result<Vec<Figure>>);

const MEASUREMENTS: [Measurement; 9] = [
    ("latency", |_| latency()),
    ("rate", |_| rate()),
    ("bandwidth", |_| bandwidth()),
    ("register", |_| register()),
    ("idle", |_| idle::figures()),
    ("hook", |_| hook::figures()),
    ("startup", |arguments| startup::figures(arguments.runs)),
    ("cap", |_| caps()),
    ("crowded", |_| crowded()),
];

fn measure(arguments: &Arguments) -> Result<()> {
    if !arguments.json {
        Figure::print_head();
    }
    for (name, measurement) in MEASUREMENTS {
        if !name.contains(&arguments.only) {
            continue;
        }
        if !arguments.json {
            eprint!("measuring {name} …\r");
        }
        for figure in measurement(arguments).with_context(|| format!("measuring {name}"))? {
            if arguments.json { figure.print_json()? } else { figure.print() }
        }
    }
    Ok(())
}

fn program() -> Result<PathBuf> {
    client::compile("bench", &["loop.c", "check.c"])
}

/// Runs the client under this proxy; its values by name, several of one name in order.
fn run(proxy: &DirectProxy, words: &[&str]) -> Result<HashMap<String, Vec<f64>>> {
    let output = proxy.command(&program()?)?.args(words).output()?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "bench {}: {}\n{said}{complaint}", words.join(" "), output.status);
    let mut values: HashMap<String, Vec<f64>> = HashMap::new();
    for line in said.lines() {
        let (name, value) = line.split_once(' ').with_context(|| format!("no value in {line:?}"))?;
        values.entry(name.to_owned()).or_default().push(value.parse()?);
    }
    Ok(values)
}

fn value(values: &HashMap<String, Vec<f64>>, name: &str) -> Result<f64> {
    values.get(name).and_then(|values| values.first()).copied().with_context(|| format!("the client said no {name}"))
}

fn proxy(node: &Node) -> Result<DirectProxy> {
    node.proxy(Limits::default())
}

/// The median of several runs of the client: single runs of a few hundred milliseconds differ.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn latency() -> Result<Vec<Figure>> {
    const RUNS: usize = 5;
    let node = Node::new(None)?;
    let (proxy, shaped) = (proxy(&node)?, node.proxy(unbinding())?);
    let mut columns = vec![Vec::new(); 6];
    for _ in 0..RUNS {
        // Floor and figure take turns, so that a change of the machine's mood meets both.
        let floor = run(&proxy, &["cache-line"])?;
        let write = run(&proxy, &["latency"])?;
        let inline = run(&proxy, &["latency", "inline"])?;
        let capped = run(&shaped, &["latency"])?;
        for (column, value) in columns.iter_mut().zip([
            value(&floor, "p50")?,
            value(&write, "p50")?,
            value(&write, "p99")?,
            value(&inline, "p50")?,
            value(&inline, "p99")?,
            value(&capped, "p50")?,
        ]) {
            column.push(value);
        }
    }
    let [floor, p50, p99, inline_p50, inline_p99, capped]: [f64; 6] =
        columns.into_iter().map(median).collect::<Vec<_>>().try_into().map_err(|_| anyhow::anyhow!("six columns"))?;
    let figure = |name: &str, value, goal| Figure::new(name, value, "ns").beside(floor).goal(Goal::RatioAtMost(goal));
    Ok(vec![
        Figure::new("cache line, round trip between two cores, median", floor, "ns"),
        figure("WRITE 8 B, post to polled completion, median", p50, 2.5),
        figure("WRITE 8 B, post to polled completion, p99", p99, 4.0),
        figure("WRITE 8 B inline, median", inline_p50, 2.5),
        figure("WRITE 8 B inline, p99", inline_p99, 4.0),
        Figure::new("WRITE 8 B with bandwidth 1Tbit, ops 1G and a class, median", capped, "ns")
            .beside(p50)
            .goal(Goal::RatioAtMost(1.15)),
    ])
}

/// Rates that never bind: what a policy costs.
fn unbinding() -> Limits {
    Limits { bandwidth: Some(1_000_000_000_000), ops: Some(1_000_000_000), class: Class::Bulk, ..Limits::default() }
}

fn rate() -> Result<Vec<Figure>> {
    let node = Node::new(None)?;
    let (plain, shaped) = (proxy(&node)?, node.proxy(unbinding())?);
    let mut columns = [Vec::new(), Vec::new()];
    for _ in 0..5 {
        // They take turns, so that a change of the machine's mood meets both.
        for (column, proxy) in columns.iter_mut().zip([&plain, &shaped]) {
            column.push(value(&run(proxy, &["rate"])?, "rate")? / 1e6);
        }
    }
    let [plain, shaped] = columns.map(median);
    Ok(vec![
        Figure::new("WRITE 8 B, batches of 32, one worker", plain, "M/s").goal(Goal::AtLeast(15.0)),
        Figure::new("the same with bandwidth 1Tbit, ops 1G and a class", shaped, "M/s")
            .beside(plain)
            .goal(Goal::RatioAtLeast(0.9)),
    ])
}

fn bandwidth() -> Result<Vec<Figure>> {
    let node = Node::new(None)?;
    let proxy = proxy(&node)?;
    let mut figures = Vec::new();
    for (bytes, name, goal) in [
        ("4096", "WRITE 4 KiB over 64 MiB", 0.5),
        ("65536", "WRITE 64 KiB over 64 MiB", 0.85),
        ("262144", "WRITE 256 KiB over 64 MiB", 0.85),
        ("1048576", "WRITE 1 MiB over 64 MiB", 0.85),
    ] {
        let values = run(&proxy, &["bandwidth", bytes])?;
        let (write, memcpy) = (value(&values, "write")? / 1e9, value(&values, "memcpy")? / 1e9);
        figures.push(Figure::new(name, write, "GB/s").beside(memcpy).goal(Goal::RatioAtLeast(goal)));
    }
    Ok(figures)
}

fn register() -> Result<Vec<Figure>> {
    let node = Node::new(None)?;
    let proxy = proxy(&node)?;
    let mut figures = Vec::new();
    for (bytes, name) in [("4096", "reg_mr 4 KiB"), ("1048576", "reg_mr 1 MiB"), ("1073741824", "reg_mr 1 GiB")] {
        let values = run(&proxy, &["register", bytes])?;
        let floor = value(&values, "pwrite")? / 1e3;
        figures.push(Figure::new(name, value(&values, "register")? / 1e3, "µs").beside(floor));
    }
    for (bytes, size) in [("4096", "4 KiB"), ("65536", "64 KiB"), ("1048576", "1 MiB")] {
        for (buffers, which) in [("1", "the same buffer"), ("16", "16 buffers in turn")] {
            let runs = (0..5).map(|_| run(&proxy, &["again", bytes, buffers])).collect::<Result<Vec<_>>>()?;
            let of = |name| Ok(median(runs.iter().map(|run| value(run, name)).collect::<Result<_>>()?) / 1e3);
            let name = format!("register, WRITE {size}, deregister, {which}");
            let floor: Result<f64> = of("pwrite");
            figures.push(Figure::new(&name, of("again")?, "µs").beside(floor?).goal(Goal::RatioAtMost(5.0)));
        }
    }
    let values = run(&proxy, &["rounds", "100000"])?;
    for (name, figure, unit, most) in [
        ("mappings", "more mappings after 100,000 such rounds", "", 8.0),
        ("kib", "more memory after 100,000 such rounds", "KiB", 256.0),
    ] {
        figures.push(Figure::new(figure, value(&values, name)?, unit).goal(Goal::AtMost(most)));
    }
    Ok(figures)
}

/// The largest error of a window of 100 ms against each cap.
fn caps() -> Result<Vec<Figure>> {
    let out = |rate| Limits { bandwidth: Some(rate), ..Limits::default() };
    let fetched = |rate| Limits { bandwidth_rx: Some(rate), ..Limits::default() };
    let ops = |rate| Limits { ops: Some(rate), ..Limits::default() };
    let mut figures = Vec::new();
    // Bytes of a request, and bytes per second that may be found.
    for (name, limits, bytes, read, target, goal) in [
        ("bandwidth 100 Mbit/s", out(100_000_000), "4096", false, 12.5e6, 2.0),
        ("bandwidth 1 Gbit/s", out(1_000_000_000), "16384", false, 125e6, 2.0),
        ("bandwidth 10 Gbit/s", out(10_000_000_000), "65536", false, 1.25e9, 2.0),
        ("bandwidth-rx 100 Mbit/s", fetched(100_000_000), "4096", true, 12.5e6, 2.0),
        ("bandwidth-rx 1 Gbit/s", fetched(1_000_000_000), "16384", true, 125e6, 2.0),
        ("bandwidth-rx 10 Gbit/s", fetched(10_000_000_000), "65536", true, 1.25e9, 2.0),
        ("ops 10 k/s", ops(10_000), "8", false, 80e3, 3.0),
        ("ops 1 M/s", ops(1_000_000), "8", false, 8e6, 3.0),
    ] {
        let node = Node::new(None)?;
        let proxy = node.proxy(limits)?;
        let words = ["cap", bytes, "3", "read"];
        let values = run(&proxy, if read { &words } else { &words[..3] })?;
        let windows = values.get("window").context("the client said no window")?;
        let target = target / 10.0;
        let worst = windows.iter().map(|window| (window - target) / target * 100.0);
        let worst = worst.max_by(|a, b| a.abs().total_cmp(&b.abs())).context("no windows")?;
        figures.push(Figure::new(&format!("cap: {name}, worst window of 100 ms"), worst, "%").goal(Goal::Within(goal)));
    }
    Ok(figures)
}

/// Two applications that spin and two workers, on two cores: a WRITE's round trip between two proxies.
fn crowded() -> Result<Vec<Figure>> {
    let node = Node::new(None)?;
    let (server, client) = (proxy(&node)?, proxy(&node)?);
    let tool = PathBuf::from("/usr/bin/ib_write_lat");
    if !tool.exists() {
        eprintln!("SKIPPED: crowded: ib_write_lat is not installed (package perftest)");
        return Ok(Vec::new());
    }
    let arguments = ["-n", "5000", "-x", "0", "-p", "18777"];
    let mut serving = server.command(&tool)?.args(arguments).stdout(std::process::Stdio::null()).spawn()?;
    let mut output = None;
    for _ in 0..50 {
        std::thread::sleep(std::time::Duration::from_millis(100));
        let tried = client.command(&tool)?.args(arguments).arg("127.0.0.1").output()?;
        if tried.status.success() {
            output = Some(tried);
            break;
        }
        if serving.try_wait()?.is_some() {
            break;
        }
    }
    serving.kill().ok();
    serving.wait()?;
    let output = output.context("ib_write_lat did not come to an end")?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let fields = said
        .lines()
        .map(|line| line.split_whitespace().filter_map(|field| field.parse::<f64>().ok()).collect::<Vec<_>>())
        .find(|fields| fields.len() >= 8)
        .with_context(|| format!("no figures in:\n{said}"))?;
    Ok(vec![
        Figure::new("ib_write_lat, 4 spinning parties on 2 cores, typical", fields[4], "µs"),
        Figure::new("ib_write_lat, 4 spinning parties on 2 cores, p99", fields[7], "µs"),
    ])
}
