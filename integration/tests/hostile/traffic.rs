//! Containers whose traffic is meant to hurt others: on the modelled link, at a server that both use, at a proxy that never asked
//! for it. Judged by shares of what was moved at the same time, by processor time and by the kernel's counters, since the machine
//! may be busy with other things.

use super::client::{Client, Memory, Other, join, own, request};
use anyhow::{Context, Result, ensure};
use ringfence_integration::direct::{DirectProxy, Node};
use ringfence_protocol::verbs::{Opcode, WcStatus};
use ringfence_protocol::work::SendFields;
use ringfence_proxy::launch::{BitRate, Class, Limits, Weight};
use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// For what takes milliseconds on a machine that is not busy.
const SOON: Duration = Duration::from_secs(60);

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

/// How a proxy's worker is found asleep: in the kernel's way of saying it.
fn state_of_worker(proxy: &DirectProxy) -> Result<char> {
    for task in std::fs::read_dir(format!("/proc/{}/task", proxy.pid()))?.flatten() {
        let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
        if let Some((head, fields)) = stat.rsplit_once(") ")
            && head.ends_with("(worker")
        {
            return fields.chars().next().context("a thread without a state");
        }
    }
    anyhow::bail!("the proxy has no worker")
}

/// Faults of a process that needed no disk.
fn faults(proxy: &DirectProxy) -> Result<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", proxy.pid()))?;
    let fields = stat.rsplit_once(") ").context("a stat without a name")?.1;
    Ok(fields.split(' ').nth(7).context("a short line")?.parse()?)
}

/// A peer whose memory is all holes, and goes on being punched: its pages are its own to make, and nobody waits for the punching.
pub fn holes() -> Result<()> {
    const BYTES: u64 = 256 << 20;
    const PIECE: u32 = 1 << 20;
    let node = Node::new(None)?;
    let (victim, hostile) = (node.proxy(Limits::default())?, node.proxy(Limits::default())?);
    let (mut v, mut h) = (Client::new(&victim.socket(), 64)?, Client::new(&hostile.socket(), 1024)?);
    let target = v.memory(u64::from(PIECE))?;
    // The victim's own pages are there.
    fallocate(&target.file, FallocateFlags::empty(), 0, u64::from(PIECE))?;
    let (qv, qh) = join(&mut v, &mut h, 32)?;
    let source = h.memory(BYTES)?;
    let (before, pages) = (faults(&victim)?, BYTES / 4096);
    let stop = AtomicBool::new(false);
    let (looks, waits) = std::thread::scope(|scope| {
        let puncher = scope.spawn(|| {
            let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            while !stop.load(Ordering::Relaxed) {
                // Refused from the moment on at which a neighbour may read the file.
                let _ = fallocate(&source.file, FallocateFlags::empty(), 0, BYTES / 4);
                let _ = fallocate(&source.file, mode, 0, BYTES);
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        let sender = scope.spawn(|| {
            for at in (0..BYTES).step_by(PIECE as usize) {
                let mut send = request(Opcode::SEND, PIECE, &source, &source);
                send.sge.addr += at;
                v.receive(qv, &target, PIECE)?;
                h.post(qh, &send, 1)?;
                h.success(SOON)?;
                v.success(SOON)?;
            }
            anyhow::Ok(())
        });
        let (mut looks, mut waits) = (0u32, 0u32);
        while !sender.is_finished() {
            looks += 1;
            waits += u32::from(state_of_worker(&victim)? == 'D');
            std::thread::sleep(Duration::from_micros(500));
        }
        stop.store(true, Ordering::Relaxed);
        puncher.join().expect("does not panic");
        sender.join().expect("does not panic").map(|()| (looks, waits))
    })?;
    ensure!(waits * 5 < looks + 50, "the victim's worker waited in the kernel at {waits} of {looks} looks");
    let made = faults(&victim)? - before;
    // One by one if it makes them; else the kernel maps those around, 16 at a time.
    ensure!(made < pages / 4, "the victim's proxy had {made} faults for {pages} pages of its peer's");
    Ok(())
}

/// What a turn of [`granted_holes`] found.
#[derive(Debug)]
struct Looks {
    /// How long each of the victim's own requests took, in order of time.
    own: Vec<Duration>,
    /// Looks at its worker, and how often it was found waiting in the kernel.
    looks: u32,
    waits: u32,
    /// How often nothing could be punched, because a neighbour writes to the file.
    refused: u32,
}

impl Looks {
    /// The time that this part of the requests in a hundred does not exceed.
    fn within(&self, hundredths: usize) -> Duration {
        self.own[(self.own.len() - 1) * hundredths / 100]
    }
}

/// A victim that writes 64 MiB to a peer's memory, as fast as it goes, and asks something of itself meanwhile, again and again. With
/// `holes` nothing is there yet of the peer's memory, which the peer goes on punching; else all of it is, and the peer punches another file
/// of that size.
fn writes_to_peer(holes: bool) -> Result<Looks> {
    const BYTES: u64 = 64 << 20;
    const PIECE: u32 = 64 << 10;
    const DEPTH: u32 = 4;
    let node = Node::new(None)?;
    let (victim, hostile) = (node.proxy(Limits::default())?, node.proxy(Limits::default())?);
    let (mut v, mut h) = (Client::new(&victim.socket(), 1024)?, Client::new(&hostile.socket(), 64)?);
    let source = v.memory(u64::from(PIECE))?;
    fallocate(&source.file, FallocateFlags::empty(), 0, u64::from(PIECE))?;
    let loopback = own(&mut v, 8)?;
    let (_, qp) = join(&mut h, &mut v, 32)?;
    let (target, other) = (h.memory(BYTES)?, h.memory(BYTES)?);
    if !holes {
        fallocate(&target.file, FallocateFlags::empty(), 0, BYTES)?;
    }
    let punched = if holes { &target.file } else { &other.file };
    let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    let write = request(Opcode::RDMA_WRITE, PIECE, &source, &target);
    let small = request(Opcode::RDMA_WRITE, 8, &source, &source);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let puncher = scope.spawn(|| {
            let mut refused = 0u32;
            while !stop.load(Ordering::Relaxed) {
                // So that there is something to be punched, which takes its time.
                let _ = fallocate(punched, FallocateFlags::empty(), BYTES / 4 * 3, BYTES / 4);
                refused += u32::from(fallocate(punched, mode, 0, BYTES) == Err(Errno::PERM));
                std::thread::sleep(Duration::from_millis(1));
            }
            refused
        });
        let sender = scope.spawn(|| {
            let (mut own, mut posted) = (Vec::new(), Instant::now());
            let (mut next, mut outstanding) = (0, 0);
            v.post(loopback, &small, 1)?;
            let end = Instant::now() + SOON;
            while next < BYTES || outstanding > 0 {
                ensure!(Instant::now() < end, "{outstanding} WRITEs before byte {next} have no answer");
                while next < BYTES && outstanding < DEPTH {
                    let mut write = write;
                    write.remote_addr += next;
                    v.post(qp, &write, 1)?;
                    (next, outstanding) = (next + u64::from(PIECE), outstanding + 1);
                }
                let Some(done) = v.poll()? else { continue };
                ensure!(done.status == WcStatus::SUCCESS, "{done:?}, before byte {next}");
                if done.cookie as usize == loopback {
                    own.push(posted.elapsed());
                    posted = Instant::now();
                    v.post(loopback, &small, 1)?;
                } else {
                    outstanding -= 1;
                }
            }
            // The last one of its own is among them, however long it takes.
            v.success(SOON)?;
            own.push(posted.elapsed());
            own.sort_unstable();
            anyhow::Ok(own)
        });
        let (mut looks, mut waits) = (0u32, 0u32);
        while !sender.is_finished() {
            looks += 1;
            waits += u32::from(state_of_worker(&victim)? == 'D');
            std::thread::sleep(Duration::from_micros(500));
        }
        stop.store(true, Ordering::Relaxed);
        let refused = puncher.join().expect("does not panic");
        let own = sender.join().expect("does not panic")?;
        Ok(Looks { own, looks, waits, refused })
    })
}

/// The median of some times.
fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

/// The same, where the victim writes to what it was granted: what is not there it has to make, and nobody else is waited for. Its own
/// requests are timed beside writes to holes, and beside the same writes to memory that is there, by turns.
pub fn granted_holes() -> Result<()> {
    const TURNS: usize = 9;
    let (mut with, mut without) = (Vec::new(), Vec::new());
    for _ in 0..TURNS {
        with.push(writes_to_peer(true)?);
        without.push(writes_to_peer(false)?);
    }
    // Of each turn the request in the middle and a slow one, to which a time slice or two may happen; of the turns the one in the middle. It makes the pages itself, which is
    // work of its own; a punch, of which there is one at any time, takes longer than everything else here.
    for (what, hundredths, halves, more) in
        [("the middle one", 50, 8, Duration::ZERO), ("one in a hundred", 99, 4, Duration::from_millis(10))]
    {
        let of = |turns: &[Looks]| median(turns.iter().map(|turn| turn.within(hundredths)).collect());
        let (beside, without) = (of(&with), of(&without));
        let said = format!("own requests, {what}: {beside:?} beside holes, {without:?} without");
        println!("{said}");
        ensure!(beside <= without * halves / 2 + more, "{said}");
    }
    let sum = |of: fn(&Looks) -> u32| with.iter().map(of).sum::<u32>();
    let (looks, waits, refused) = (sum(|turn| turn.looks), sum(|turn| turn.waits), sum(|turn| turn.refused));
    ensure!(waits * 5 < looks + 50, "the victim's worker waited in the kernel at {waits} of {looks} looks");
    ensure!(refused > 0, "nothing was granted, or what was can be punched");
    Ok(())
}
