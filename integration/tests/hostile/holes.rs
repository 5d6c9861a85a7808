//! A peer whose memory is all holes, and goes on being punched: its pages are its own to make, and nobody waits for the punching.

use super::client::{Client, Memory, join, own, request};
use super::traffic::{SOON, median};
use anyhow::{Context, Result, ensure};
use ringfence_integration::direct::{DirectProxy, Node};
use ringfence_protocol::verbs::{Opcode, WcStatus};
use ringfence_proxy::launch::Limits;
use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// What is moved in a turn.
const BYTES: u64 = 64 << 20;
/// Of one request.
const PIECE: u32 = 64 << 10;
/// Requests that are under way.
const DEPTH: u32 = 4;
const TURNS: usize = 9;

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

/// What a turn found.
#[derive(Debug)]
struct Looks {
    /// How long each of the victim's own requests took, in order of time.
    own: Vec<Duration>,
    /// Looks at its worker, and how often it was found waiting in the kernel.
    looks: u32,
    waits: u32,
    /// How often nothing could be punched, because a neighbour reads or writes the file.
    refused: u32,
    /// Faults of the victim's proxy.
    faults: u64,
}

impl Looks {
    /// The time that this part of the requests in a hundred does not exceed.
    fn within(&self, hundredths: usize) -> Duration {
        self.own[(self.own.len() - 1) * hundredths / 100]
    }
}

/// By which the peer's memory is reached.
#[derive(Clone, Copy)]
enum Way {
    /// The peer sends out of it, and the victim's proxy reads it.
    Sent,
    /// The victim's proxy writes to it.
    Written,
}

/// A victim and its peer, whose memory has no pages yet.
struct Pair {
    v: Client,
    h: Client,
    /// The victim's, whose pages are there.
    piece: Memory,
    /// The peer's.
    memory: Memory,
    /// A queue pair of the victim's that is connected to itself.
    loopback: usize,
    /// Two that are connected to each other.
    qv: usize,
    qh: usize,
}

impl Pair {
    fn new(victim: &DirectProxy, hostile: &DirectProxy) -> Result<Self> {
        let (mut v, mut h) = (Client::new(&victim.socket(), 1024)?, Client::new(&hostile.socket(), 1024)?);
        let piece = v.memory(u64::from(PIECE))?;
        fallocate(&piece.file, FallocateFlags::empty(), 0, u64::from(PIECE))?;
        let loopback = own(&mut v, 8)?;
        let (qh, qv) = join(&mut h, &mut v, 32)?;
        let memory = h.memory(BYTES)?;
        Ok(Self { v, h, piece, memory, loopback, qv, qh })
    }

    /// Begins to move a piece to or from this place of the peer's memory; how many requests of the peer's that takes.
    fn begin(&mut self, way: Way, at: u64) -> Result<u32> {
        match way {
            Way::Sent => {
                let mut send = request(Opcode::SEND, PIECE, &self.memory, &self.memory);
                send.sge.addr += at;
                self.v.receive(self.qv, &self.piece, PIECE)?;
                self.h.post(self.qh, &send, 1)?;
                Ok(1)
            }
            Way::Written => {
                let mut write = request(Opcode::RDMA_WRITE, PIECE, &self.piece, &self.memory);
                write.remote_addr += at;
                self.v.post(self.qv, &write, 1)?;
                Ok(0)
            }
        }
    }

    /// Moves all of the peer's memory, as fast as it goes, while the victim asks something of itself, again and again. How long each of
    /// these requests took.
    fn run(&mut self, way: Way) -> Result<Vec<Duration>> {
        let small = request(Opcode::RDMA_WRITE, 8, &self.piece, &self.piece);
        let (mut own, mut posted) = (Vec::new(), Instant::now());
        self.v.post(self.loopback, &small, 1)?;
        let (mut next, mut outstanding, mut unanswered) = (0, 0, 0);
        let end = Instant::now() + SOON;
        while next < BYTES || outstanding + unanswered > 0 {
            ensure!(Instant::now() < end, "{outstanding} requests before byte {next} are not completed");
            while next < BYTES && outstanding < DEPTH && unanswered < DEPTH {
                unanswered += self.begin(way, next)?;
                (next, outstanding) = (next + u64::from(PIECE), outstanding + 1);
            }
            if let Some(done) = self.h.poll()? {
                ensure!(done.status == WcStatus::SUCCESS, "{done:?} at the peer, before byte {next}");
                unanswered -= 1;
            }
            let Some(done) = self.v.poll()? else { continue };
            ensure!(done.status == WcStatus::SUCCESS, "{done:?}, before byte {next}");
            if done.cookie as usize == self.loopback {
                own.push(posted.elapsed());
                posted = Instant::now();
                self.v.post(self.loopback, &small, 1)?;
            } else {
                outstanding -= 1;
            }
        }
        // The last one of its own is among them, however long it takes.
        self.v.success(SOON)?;
        own.push(posted.elapsed());
        own.sort_unstable();
        Ok(own)
    }
}

/// Says that it is enough, when it is dropped.
struct Stops<'a>(&'a AtomicBool);

impl Drop for Stops<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// One turn. With `holes` nothing is there yet of the peer's memory, which the peer goes on punching; else all of it is, and the peer
/// punches another file of that size.
fn turn(way: Way, holes: bool) -> Result<Looks> {
    let node = Node::new(None)?;
    let (victim, hostile) = (node.proxy(Limits::default())?, node.proxy(Limits::default())?);
    let mut pair = Pair::new(&victim, &hostile)?;
    let punched = if holes {
        pair.memory.file.try_clone()?
    } else {
        fallocate(&pair.memory.file, FallocateFlags::empty(), 0, BYTES)?;
        pair.h.memory(BYTES)?.file
    };
    let before = faults(&victim)?;
    let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // Also where something fails: the scope ends with its threads.
        let stops = Stops(&stop);
        let puncher = scope.spawn(|| {
            let mut refused = 0u32;
            while !stop.load(Ordering::Relaxed) {
                // So that there is something to be punched, which takes its time.
                let _ = fallocate(&punched, FallocateFlags::empty(), BYTES / 4 * 3, BYTES / 4);
                refused += u32::from(fallocate(&punched, mode, 0, BYTES) == Err(Errno::PERM));
                std::thread::sleep(Duration::from_millis(1));
            }
            refused
        });
        let mover = scope.spawn(|| pair.run(way));
        let (mut looks, mut waits) = (0u32, 0u32);
        while !mover.is_finished() {
            looks += 1;
            waits += u32::from(state_of_worker(&victim)? == 'D');
            std::thread::sleep(Duration::from_micros(500));
        }
        drop(stops);
        let refused = puncher.join().expect("does not panic");
        let own = mover.join().expect("does not panic")?;
        Ok(Looks { own, looks, waits, refused, faults: faults(&victim)? - before })
    })
}

/// Times the victim's own requests beside holes and beside the same memory with its pages, by turns: those turns with holes.
fn compare(way: Way) -> Result<Vec<Looks>> {
    let (mut with, mut without) = (Vec::new(), Vec::new());
    for _ in 0..TURNS {
        with.push(turn(way, true)?);
        without.push(turn(way, false)?);
    }
    // Of each turn the request in the middle, a slow one, to which a time slice or two may happen, and the longest; of the turns the one in
    // the middle. By how threads share the processors a turn's request in the middle takes 5 µs or 200, with holes or without; and the
    // victim makes the pages that it writes to itself, which is work of its own. A punch, of which there is one at any time, takes longer
    // than everything else here.
    for (what, hundredths, times, more) in [
        ("the middle one", 50, 4, Duration::from_millis(1)),
        ("one in a hundred", 99, 2, Duration::from_millis(10)),
        ("the longest", 100, 2, Duration::from_millis(50)),
    ] {
        let of = |turns: &[Looks]| median(turns.iter().map(|turn| turn.within(hundredths)).collect());
        let (beside, without) = (of(&with), of(&without));
        let said = format!("own requests, {what}: {beside:?} beside holes, {without:?} without");
        println!("{said}");
        ensure!(beside <= without * times + more, "{said}");
    }
    let sum = |of: fn(&Looks) -> u32| with.iter().map(of).sum::<u32>();
    let (looks, waits, refused) = (sum(|turn| turn.looks), sum(|turn| turn.waits), sum(|turn| turn.refused));
    ensure!(waits * 5 < looks + 50, "the victim's worker waited in the kernel at {waits} of {looks} looks");
    ensure!(refused > 0, "nothing of it was to be reached by a neighbour, or what was can be punched");
    Ok(with)
}

/// A peer that sends out of holes: it makes their pages before the victim's proxy looks at them.
pub fn sent() -> Result<()> {
    let turns = compare(Way::Sent)?;
    let (made, pages) = (turns.iter().map(|turn| turn.faults).sum::<u64>(), BYTES / 4096 * TURNS as u64);
    println!("the victim's proxy had {made} faults for {pages} pages of its peer's");
    // One by one if it makes them; else the kernel maps those around, 16 at a time.
    ensure!(made < pages / 4, "the victim's proxy had {made} faults for {pages} pages of its peer's");
    Ok(())
}

/// A victim that writes to holes that it was granted: what is not there it has to make, and nobody else is waited for.
pub fn granted() -> Result<()> {
    compare(Way::Written).map(drop)
}
