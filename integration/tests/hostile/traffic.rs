//! Containers whose traffic is meant to hurt others: on the modelled link, at a server that both use, at a proxy that never asked
//! for it. Judged by shares of what was moved at the same time, by processor time and by the kernel's counters, since the machine
//! may be busy with other things.

use super::client::{Client, Memory, Other, join, own, request};
use anyhow::{Context, Result, ensure};
use ringfence_integration::direct::{DirectProxy, Node};
use ringfence_protocol::verbs::{Opcode, WcStatus};
use ringfence_protocol::work::SendFields;
use ringfence_proxy::launch::{BitRate, Class, Limits, Weight};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// For what takes milliseconds on a machine that is not busy.
pub const SOON: Duration = Duration::from_secs(60);

/// A WRITE of no bytes: it needs no memory, and goes to the responder whatever else has been agreed.
fn empty() -> SendFields {
    SendFields { opcode: Opcode::RDMA_WRITE, ..SendFields::default() }
}

/// Keeps `qps` queue pairs full, `every` requests to each completion, until told to stop; requests that were completed.
fn keep_full(
    client: &mut Client,
    qps: &[usize],
    fields: SendFields,
    depth: u32,
    every: u32,
    stop: &AtomicBool,
) -> Result<u64> {
    for qp in qps {
        for _ in 0..depth / every {
            client.post(*qp, &fields, every)?;
        }
    }
    let mut done = 0;
    while !stop.load(Ordering::Relaxed) {
        let Some(completion) = client.poll()? else {
            std::thread::sleep(Duration::from_micros(200));
            continue;
        };
        ensure!(completion.status == WcStatus::SUCCESS, "{completion:?}");
        done += u64::from(every);
        client.post(completion.cookie as usize, &fields, every)?;
    }
    Ok(done)
}

/// An equal weight's half of the link, against many queue pairs of requests that carry next to nothing but headers.
pub fn headers() -> Result<()> {
    const LINK: u64 = 200_000_000;
    const SECONDS: u64 = 2;
    for bytes in [0, 8] {
        let node = Node::new(Some(LINK))?;
        let limits = || Limits { weight: Weight::new(100), class: Class::Bulk, ..Limits::default() };
        let (honest, hostile) = (node.proxy(limits())?, node.proxy(limits())?);
        let (mut victim, mut flood) = (Client::new(&honest.socket(), 1024)?, Client::new(&hostile.socket(), 4096)?);
        let (large, small) = (victim.memory(1 << 20)?, flood.memory(1 << 16)?);
        let mine = (0..4).map(|_| own(&mut victim, 8)).collect::<Result<Vec<_>>>()?;
        let theirs = (0..250).map(|_| own(&mut flood, 32)).collect::<Result<Vec<_>>>()?;
        let write = request(Opcode::RDMA_WRITE, 64 << 10, &large, &large);
        let tiny = if bytes == 0 { empty() } else { request(Opcode::RDMA_WRITE, bytes, &small, &small) };
        let stop = AtomicBool::new(false);
        let (got, other) = std::thread::scope(|scope| {
            let other = scope.spawn(|| keep_full(&mut flood, &theirs, tiny, 32, 32, &stop));
            std::thread::sleep(Duration::from_millis(500));
            let own = scope.spawn(|| keep_full(&mut victim, &mine, write, 8, 1, &stop));
            std::thread::sleep(Duration::from_secs(SECONDS));
            stop.store(true, Ordering::Relaxed);
            let got = own.join().expect("does not panic");
            anyhow::Ok((got?, other.join().expect("does not panic")?))
        })?;
        let bits = got * (64 << 10) * 8;
        ensure!(other > 0, "the other container sent nothing, and this shows nothing");
        // As much as the other, with its headers; a hundredth was left of it when windows did not count those.
        let others = other * u64::from(bytes + 64) * 8;
        ensure!(bits * 2 > others, "{bits} bits in {SECONDS} s, against {others} by {other} requests of {bytes} bytes");
    }
    Ok(())
}

/// What others fetch out of a container counts against its cap, by READs and by atomics.
pub fn fetched() -> Result<()> {
    for (opcode, length, cap) in [(Opcode::RDMA_READ, 64 << 10, 100_000_000), (Opcode::FETCH_AND_ADD, 8, 2_000_000)] {
        let node = Node::new(None)?;
        let capped = node.proxy(Limits { bandwidth: BitRate::new(cap), ..Limits::default() })?;
        let free = node.proxy(Limits::default())?;
        let (mut a, mut b) = (Client::new(&capped.socket(), 64)?, Client::new(&free.socket(), 64)?);
        let (from, to) = (a.memory(1 << 20)?, b.memory(1 << 20)?);
        let (_, qp) = join(&mut a, &mut b, 16)?;
        let fields = request(opcode, length, &to, &from);
        for _ in 0..8 {
            b.post(qp, &fields, 1)?;
        }
        let (start, mut moved) = (Instant::now(), 0u64);
        while start.elapsed() < Duration::from_secs(1) {
            if b.poll()?.map(|done| done.status).context("nothing").is_ok_and(|status| status == WcStatus::SUCCESS) {
                // As it is charged.
                moved += u64::from(length.max(64)) * 8;
                b.post(qp, &fields, 1)?;
            }
        }
        let rate = moved as f64 / start.elapsed().as_secs_f64();
        ensure!(moved > 0, "{opcode:?}: nothing was fetched");
        ensure!(rate < cap as f64 * 1.3, "{opcode:?}: {rate:.0} bit/s out of a container that is capped at {cap}");
    }
    Ok(())
}

/// Time that a process has had a processor for: what the kernel counts of its threads.
fn processor_time(proxy: &DirectProxy) -> Result<Duration> {
    let mut nanos = 0;
    for task in std::fs::read_dir(format!("/proc/{}/task", proxy.pid()))? {
        let line = std::fs::read_to_string(task?.path().join("schedstat"))?;
        nanos += line.split(' ').next().context("an empty line")?.parse::<u64>()?;
    }
    Ok(Duration::from_nanos(nanos))
}

/// Queue pairs that are full of requests to one that is not there, as fast as they are given up, for so long; then until all have
/// been. How many were.
fn ask_nobody(client: &mut Client, qps: &[usize], to: Other, time: Duration) -> Result<u32> {
    const DEPTH: u32 = 128;
    let (first, start) = (qps[0], Instant::now());
    for qp in qps {
        client.reset(*qp)?;
        client.connect(*qp, to)?;
        client.post(*qp, &empty(), DEPTH)?;
    }
    let mut errors = vec![0; qps.len()];
    let (mut full, mut rounds) = (qps.len(), 0);
    while full > 0 {
        ensure!(start.elapsed() < time + SOON, "{full} queue pairs are never given up");
        let Some(completion) = client.poll()? else {
            std::thread::sleep(Duration::from_millis(1));
            continue;
        };
        ensure!(completion.status != WcStatus::SUCCESS, "{completion:?}");
        let queue = completion.cookie as usize - first;
        errors[queue] += 1;
        if errors[queue] < DEPTH {
            continue;
        }
        (errors[queue], rounds) = (0, rounds + 1);
        if start.elapsed() < time {
            client.reset(qps[queue])?;
            client.connect(qps[queue], to)?;
            client.post(qps[queue], &empty(), DEPTH)?;
        } else {
            full -= 1;
        }
    }
    Ok(rounds)
}

/// Requests that nobody asked for cost the proxy that they go to next to nothing more than while nobody asks, by turns: a stranger's
/// 4 % of a processor (1 % on a quiet machine). Over a link, which their sender has because a queue pair of the victim's is connected to one of its own, each
/// is read before it is dropped: 10 % (2 on a quiet machine, 6 on a busy one).
pub fn unasked() -> Result<()> {
    const TURNS: usize = 5;
    const TIME: Duration = Duration::from_millis(700);
    for (linked, most) in [(false, 0.04), (true, 0.1)] {
        let node = Node::new(None)?;
        let (victim, hostile) = (node.proxy(Limits::default())?, node.proxy(Limits::default())?);
        let (mut v, mut h) = (Client::new(&victim.socket(), 64)?, Client::new(&hostile.socket(), 1 << 15)?);
        if linked {
            let (qv, qh) = join(&mut v, &mut h, 16)?;
            h.post(qh, &empty(), 1)?;
            h.success(SOON)?;
            v.post(qv, &empty(), 1)?;
            v.success(SOON)?;
        }
        // A number that no queue pair of the victim's has.
        let to = Other { lid: v.lid, qp_num: u32::from(v.lid) << 14 | 0x1fff, timeout: 1 };
        let qps = (0..200).map(|_| h.qp(128)).collect::<Result<Vec<_>>>()?;
        let (mut shares, mut rounds) = ([Vec::new(), Vec::new()], 0);
        for turn in 0..2 * TURNS {
            let (before, start) = (processor_time(&victim)?, Instant::now());
            if turn % 2 == 0 {
                rounds += ask_nobody(&mut h, &qps, to, TIME)?;
            } else {
                std::thread::sleep(TIME);
            }
            let used = processor_time(&victim)?.saturating_sub(before);
            shares[turn % 2].push(used.as_secs_f64() / start.elapsed().as_secs_f64());
        }
        shares.iter_mut().for_each(|shares| shares.sort_unstable_by(f64::total_cmp));
        let [asked, left] = [&shares[0], &shares[1]];
        let name = if linked { "with a link to the flood" } else { "a stranger" };
        let said = format!(
            "an idle proxy ({name}) had {:.2} % of a processor, and {:.2} % while nobody asked; {rounds} queue pairs were given up",
            asked[TURNS / 2] * 100.0,
            left[TURNS / 2] * 100.0
        );
        println!("{said}");
        ensure!(rounds as usize > TURNS * qps.len(), "{said}: there was no flood");
        // A quarter of a processor when what was dropped was repeated at once.
        ensure!(asked[TURNS / 2] - left[TURNS / 2] < most, "{said}; of all turns: {asked:.4?}, {left:.4?}");
    }
    Ok(())
}

/// A client that keeps a server busy with messages of 1 MiB (`bad`), and the server's program that receives them (`flood`).
struct Crowd<'a> {
    bad: &'a mut Client,
    flood: &'a mut Client,
    memory: (&'a Memory, &'a Memory),
    queues: &'a [usize],
}

impl Crowd<'_> {
    const MESSAGE: u32 = 1 << 20;
    const DEPTH: u32 = 4;

    /// Sends until told to stop, and takes what is sent.
    fn run(&mut self, stop: &AtomicBool) -> Result<()> {
        let send = request(Opcode::SEND, Self::MESSAGE, self.memory.0, self.memory.0);
        let mut outstanding = 0;
        for bad in self.queues {
            for _ in 0..Self::DEPTH {
                self.bad.post(*bad, &send, 1)?;
                outstanding += 1;
            }
        }
        let end = Instant::now() + SOON;
        while outstanding > 0 {
            ensure!(Instant::now() < end, "{outstanding} messages were never completed");
            let mut any = false;
            while let Some(received) = self.flood.poll()? {
                any = true;
                ensure!(received.status == WcStatus::SUCCESS, "{received:?}");
                self.flood.receive(received.cookie as usize, self.memory.1, Self::MESSAGE)?;
            }
            while let Some(sent) = self.bad.poll()? {
                any = true;
                ensure!(sent.status == WcStatus::SUCCESS, "{sent:?}");
                outstanding -= 1;
                if !stop.load(Ordering::Relaxed) {
                    self.bad.post(sent.cookie as usize, &send, 1)?;
                    outstanding += 1;
                }
            }
            if !any {
                std::thread::sleep(Duration::from_micros(100));
            }
        }
        Ok(())
    }
}

/// How long an empty WRITE of an honest client takes on average, one after the other.
fn round_trip(client: &mut Client, qp: usize) -> Result<Duration> {
    let (start, mut done) = (Instant::now(), 0);
    while done < 25 || start.elapsed() < Duration::from_millis(200) {
        client.post(qp, &empty(), 1)?;
        client.success(SOON)?;
        done += 1;
    }
    Ok(start.elapsed() / done)
}

/// A flooding client costs a server's other clients at most as much again as the same flood at another server does.
pub fn same_server() -> Result<()> {
    const QPS: usize = 4;
    const TURNS: usize = 15;
    // Where so many do not show it, which on a busy machine may be so.
    const MOST_TURNS: usize = 45;
    let is_within = |taken: &[Vec<Duration>; 2]| {
        let [other, same] = taken.clone().map(median);
        same <= 2 * other
    };
    let node = Node::new(None)?;
    let start = |_| node.proxy(Limits::default());
    let [server, elsewhere, good, bad] = <[DirectProxy; 4]>::try_from((0..4).map(start).collect::<Result<Vec<_>>>()?)
        .map_err(|_| anyhow::anyhow!("four proxies"))?;
    let mut honest = Client::new(&good.socket(), 64)?;
    let mut served = Client::new(&server.socket(), 64)?;
    let (_, qp) = join(&mut served, &mut honest, 8)?;
    round_trip(&mut honest, qp)?;
    // A client of its own at each server: what it receives is nobody else's to poll.
    let mut sides = Vec::new();
    for proxy in [&elsewhere, &server] {
        let (mut flood, mut client) = (Client::new(&proxy.socket(), 256)?, Client::new(&bad.socket(), 256)?);
        let memory = (client.memory(1 << 20)?, flood.memory(1 << 20)?);
        let mut queues = Vec::new();
        for _ in 0..QPS {
            let (there, here) = join(&mut flood, &mut client, 2 * Crowd::DEPTH)?;
            // Each that is used is replaced.
            (0..Crowd::DEPTH).try_for_each(|_| flood.receive(there, &memory.1, Crowd::MESSAGE))?;
            queues.push(here);
        }
        sides.push((flood, client, memory, queues));
    }
    // By turns, so that whatever else the machine does meets both; a processor that is taken away meets a turn or two, and so not the
    // one in the middle. Of a turn it is the average: what is held up for once is to count.
    let mut taken = [Vec::new(), Vec::new()];
    for turn in 0..2 * MOST_TURNS {
        if turn == 2 * TURNS && is_within(&taken) {
            break;
        }
        let side = turn % 2;
        let (flood, bad, memory, queues) = &mut sides[side];
        let mut crowd = Crowd { bad, flood, memory: (&memory.0, &memory.1), queues };
        let stop = AtomicBool::new(false);
        taken[side].push(std::thread::scope(|scope| {
            let crowd = scope.spawn(|| crowd.run(&stop));
            std::thread::sleep(Duration::from_millis(50));
            let taken = round_trip(&mut honest, qp);
            stop.store(true, Ordering::Relaxed);
            let crowd = crowd.join().expect("does not panic");
            taken.context("the honest client").and_then(|taken| crowd.map(|()| taken).context("the other one"))
        })?);
    }
    let [other, same] = taken.clone().map(median);
    let said = format!("{same:?} beside a flood at the same server, {other:?} beside one at another");
    println!("{said}");
    // A hundred times as long when a link's turn was 16 MiB.
    ensure!(is_within(&taken), "{said}; all turns, those at another first: {taken:?}");
    Ok(())
}

/// The median of some times.
pub fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}
