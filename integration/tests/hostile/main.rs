//! Containers that break every rule: the proxy survives, keeps serving the container's other processes, and the node's
//! other containers notice nothing.

mod adopted;
mod client;
mod descriptors;
mod holes;
mod kinds;
mod memory;
mod traffic;
mod unanswering;

use anyhow::{Context, Result, ensure};
use ringfence_integration::command::{Running, wait_until};
use ringfence_integration::direct::{DirectProxy, Node};
use ringfence_integration::raw::{Objects, REGION_BYTES, Raw, SCM_MAX_FDS, ring_bell};
use ringfence_integration::suite::{Needs, test};
use ringfence_integration::{artifacts, client as programs, suite};
use ringfence_protocol::control::{Handle, Hello, MAGIC, MAX_DATAGRAM, Op, OpenReply};
use ringfence_protocol::doorbell::{SUMMARY_OFFSET, WORDS_OFFSET};
use ringfence_protocol::layout::{RINGS_OFFSET, cq_bytes};
use ringfence_protocol::ring::SLOT_BYTES;
use ringfence_protocol::verbs::{Opcode, SendFlags as PostFlags};
use ringfence_proxy::launch::{Bytes, Limits};
use ringfence_trials::Trial;
use rustix::net::SendFlags;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};
use zerocopy::IntoBytes;

const LIMIT: Duration = Duration::from_secs(30);

type Attack = fn(&mut Scene) -> Result<()>;
/// One that brings its own proxies.
type Traffic = fn() -> Result<()>;

fn main() -> ExitCode {
    let needs = Needs { programs: &["cc", "sleep"], built: &[artifacts::proxy, artifacts::library] };
    suite::main("ringfence-hostile", &needs, trials)
}

fn trials() -> Result<Vec<Trial>> {
    let program = programs::compile("process", &["loop.c", "check.c"])?;
    let tests: [(&str, Attack); 24] = [
        ("random_datagrams", random_datagrams),
        ("random_bodies", random_bodies),
        ("too_many_descriptors", too_many_descriptors),
        ("clients_that_vanish", clients_that_vanish),
        ("clients_that_never_read", clients_that_never_read),
        ("a_crowd_of_connections", crowd),
        ("resized_memory_files", resized_files),
        ("random_ring_memory", random_ring_memory),
        ("random_work_requests", random_work_requests),
        ("a_storm_of_doorbells", doorbell_storm),
        ("regions_larger_than_what_they_register", memory::oversized_regions),
        ("more_region_files_than_regions", memory::many_regions),
        ("files_given_out_in_advance", memory::files_ahead),
        ("regions_kept_after_they_were_freed", memory::kept_regions),
        ("queues_kept_after_they_were_destroyed", memory::kept_queues),
        ("a_region_whose_lock_somebody_holds", memory::locked_region),
        ("answers_that_nobody_takes", descriptors::unread_answers),
        ("descriptors_that_linger", descriptors::lingering),
        ("descriptors_of_every_kind", descriptors::every_kind),
        ("descriptors_of_every_kind_as_memory", adopted::every_kind),
        ("memory_files_without_end", adopted::without_end),
        ("memory_files_of_other_sizes", adopted::of_other_sizes),
        ("a_bell_that_is_abused", descriptors::abused_bell),
        ("a_reader_of_events_that_stalls", descriptors::stalled_reader),
    ];
    let traffic: [(&str, Traffic); 6] = [
        ("many_small_requests_on_the_modelled_link", traffic::headers),
        ("more_fetched_than_may_leave", traffic::fetched),
        ("requests_that_nobody_asked_for", traffic::unasked),
        ("a_client_that_floods_its_server", traffic::same_server),
        ("a_peer_whose_memory_is_holes", holes::sent),
        ("a_peer_whose_granted_memory_is_holes", holes::granted),
    ];
    let mut trials: Vec<Trial> = traffic.map(|(name, run)| test(name, run)).into();
    trials.extend(tests.map(|(name, run)| {
        let program = program.clone();
        test(name, move || Scene::open(program)?.play(run))
    }));
    Ok(trials)
}

/// The attacked proxy, its neighbour on the node, and a well-behaved program.
struct Scene {
    attacked: DirectProxy,
    neighbour: DirectProxy,
    program: PathBuf,
    random: Random,
    node: Node,
}

impl Scene {
    fn open(program: PathBuf) -> Result<Self> {
        let node = Node::new(None)?;
        let limits = Limits { max_qp: 64, max_mr_bytes: Bytes(256 << 20), ..Limits::default() };
        let (attacked, neighbour) = (node.proxy(limits.clone())?, node.proxy(limits)?);
        Ok(Self { attacked, neighbour, program, random: Random(0x5eed_1234_5678_9abc), node })
    }

    fn play(mut self, run: fn(&mut Self) -> Result<()>) -> Result<()> {
        self.works()?;
        let before = descriptors(self.attacked.pid())?;
        let mut stream = self.neighbour.command(&self.program)?;
        stream.arg("stream");
        let mut stream = Running::start(stream)?;
        run(&mut self)?;
        self.works()?;
        ensure!(!stream.has_ended(), "the neighbour's program has ended: {}", stream.output());
        wait_until("the attacker's descriptors to be closed", Duration::from_secs(5), || {
            descriptors(self.attacked.pid()).is_ok_and(|now| now <= before)
        })
        .with_context(|| format!("{before} before, {:?} now", descriptors(self.attacked.pid())))?;
        let resident = resident_bytes(self.attacked.pid())?;
        ensure!(resident < 64 << 20, "the proxy has grown to {resident} bytes");
        Ok(())
    }

    /// Both proxies serve a well-behaved program.
    fn works(&mut self) -> Result<()> {
        for (name, proxy) in [("attacked", &mut self.attacked), ("neighbour", &mut self.neighbour)] {
            ensure!(!proxy.has_ended(), "the {name} proxy has ended");
            let mut command = proxy.command(&self.program)?;
            command.arg("once");
            Running::start(command)?
                .wait(LIMIT)
                .and_then(ringfence_integration::command::Ended::success)
                .with_context(|| format!("a well-behaved program at the {name} proxy"))?;
        }
        Ok(())
    }

    fn socket(&self) -> PathBuf {
        self.attacked.socket()
    }
}

fn descriptors(pid: i32) -> Result<usize> {
    Ok(std::fs::read_dir(Path::new("/proc").join(pid.to_string()).join("fd"))?.count())
}

fn resident_bytes(pid: i32) -> Result<u64> {
    let statm = std::fs::read_to_string(format!("/proc/{pid}/statm"))?;
    let pages: u64 = statm.split(' ').nth(1).context("statm has a second field")?.parse()?;
    Ok(pages * 4096)
}

/// Marsaglia's xorshift: the same every time, so that a failure comes again.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.next().to_le_bytes()[3]).collect()
    }
}

fn random_datagrams(scene: &mut Scene) -> Result<()> {
    for _ in 0..2000 {
        let raw = Raw::connect(&scene.socket())?;
        let length = 1 + scene.random.below(2 * MAX_DATAGRAM);
        // The proxy may have closed already: both are fine.
        raw.send(&scene.random.bytes(length), &[], SendFlags::empty()).ok();
    }
    let raw = Raw::connect(&scene.socket())?;
    raw.send(&scene.random.bytes(100), &[], SendFlags::empty()).ok();
    ensure!(matches!(raw.receive(), Ok(None)), "the connection of a client that speaks nonsense stays open");
    Ok(())
}

/// Requests that start well. The session may end at any of them; then another begins.
fn random_bodies(scene: &mut Scene) -> Result<()> {
    let mut sessions = 0;
    for _ in 0..300 {
        let (raw, _fds) = Raw::greet(&scene.socket())?;
        sessions += 1;
        for _ in 0..20 {
            let op = Op(scene.random.below(40) as u32);
            // Lengths that occur, and others; words that occur (handles, small numbers), and others.
            let words = [0, 1, 2, 3, 4, 5, 6, 7, 10, 14, 16, 32][scene.random.below(12)];
            let mut body = Vec::new();
            for _ in 0..words {
                let word = match scene.random.below(4) {
                    0 => 0,
                    1 => scene.random.next() & 0xff,
                    2 => scene.random.next() & 0xff_0000_00ff,
                    _ => scene.random.next(),
                };
                body.extend(word.to_le_bytes());
            }
            if raw.send(&Raw::request(op, 1, &body), &[], SendFlags::empty()).is_err() {
                break;
            }
            match raw.receive() {
                Ok(Some(_)) => {}
                Ok(None) => break,
                Err(error) => anyhow::bail!("{op:?} with {words} words: no answer: {error}"),
            }
        }
    }
    ensure!(sessions == 300);
    Ok(())
}

fn too_many_descriptors(scene: &mut Scene) -> Result<()> {
    let file = File::open("/dev/null")?;
    let hello = Raw::request(Op::HELLO, 1, Hello { version: ringfence_protocol::VERSION, reserved: 0 }.as_bytes());
    for count in [1, 2, 3, 16, SCM_MAX_FDS] {
        for _ in 0..20 {
            let raw = Raw::connect(&scene.socket())?;
            match raw.send(&hello, &vec![file.as_fd(); count], SendFlags::empty()) {
                // Refused by the kernel, since Linux 6.16.
                Err(rustix::io::Errno::PERM) => continue,
                sent => sent?,
            }
            ensure!(matches!(raw.receive(), Ok(None)), "{count} descriptors where none is expected were taken");
        }
    }
    Ok(())
}

fn clients_that_vanish(scene: &mut Scene) -> Result<()> {
    for _ in 0..200 {
        // Without a word; after half a header; after hello, without reading the answer; with objects.
        drop(Raw::connect(&scene.socket())?);
        let raw = Raw::connect(&scene.socket())?;
        raw.send(MAGIC.as_bytes(), &[], SendFlags::empty()).ok();
        drop(raw);
        let raw = Raw::connect(&scene.socket())?;
        let hello = Hello { version: ringfence_protocol::VERSION, reserved: 0 };
        raw.send(&Raw::request(Op::HELLO, 1, hello.as_bytes()), &[], SendFlags::empty()).ok();
        drop(raw);
        let objects = Objects::make(&scene.socket())?;
        post_random_requests(&objects, &mut scene.random, 0)?;
        drop(objects);
    }
    Ok(())
}

/// The answers pile up in the socket until it is full; that must stop nobody else.
fn clients_that_never_read(scene: &mut Scene) -> Result<()> {
    let mut clients = Vec::new();
    for _ in 0..4 {
        let (raw, _fds) = Raw::greet(&scene.socket())?;
        let request = Raw::request(Op::DEVICE, 1, &[0; 8]);
        let start = Instant::now();
        while start.elapsed() < Duration::from_millis(300) {
            if raw.send(&request, &[], SendFlags::DONTWAIT).is_err() {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        clients.push(raw);
    }
    scene.works().context("while four clients do not read their answers")
}

fn crowd(scene: &mut Scene) -> Result<()> {
    let mut crowd = Vec::new();
    for _ in 0..3000 {
        match Raw::connect(&scene.socket()) {
            Ok(raw) => crowd.push(raw),
            Err(_) => break,
        }
        if crowd.len() % 100 == 0 {
            ensure!(!scene.attacked.has_ended(), "the proxy ended at {} connections", crowd.len());
        }
    }
    ensure!(crowd.len() >= 100, "only {} connections", crowd.len());
    drop(crowd);
    wait_until("the proxy to serve again", Duration::from_secs(5), || Raw::greet(&scene.socket()).is_ok())
}

/// A file that shrinks would kill the proxy with SIGBUS.
fn resized_files(scene: &mut Scene) -> Result<()> {
    let objects = Objects::make(&scene.socket())?;
    for (name, file) in files(&objects) {
        for length in [0, 1, 1 << 30] {
            ensure!(file.set_len(length).is_err(), "{name} could be resized to {length} bytes");
        }
    }
    Ok(())
}

fn files(objects: &Objects) -> Vec<(&'static str, &File)> {
    let mut files = vec![("the doorbells' file", &objects.doorbells), ("a completion queue's file", &objects.cq)];
    files.extend(objects.qps.iter().map(|(file, _)| ("a queue pair's file", file)));
    files
}

fn random_ring_memory(scene: &mut Scene) -> Result<()> {
    for _ in 0..20 {
        let objects = Objects::make(&scene.socket())?;
        for _ in 0..300 {
            for (_, file) in files(&objects) {
                let words = file.metadata()?.len() / 8;
                let at = scene.random.next() % words * 8;
                let count = 8 * (1 + scene.random.below(64)).min((words - at / 8) as usize);
                file.write_all_at(&scene.random.bytes(count), at)?;
            }
            ring_bell(&objects.wake)?;
        }
        // The words of the headers, one by one.
        for (_, file) in files(&objects) {
            for at in (0..512).step_by(4) {
                file.write_all_at(&(scene.random.next() as u32).to_le_bytes(), at)?;
            }
        }
        ensure!(!scene.attacked.has_ended(), "the proxy has ended");
    }
    Ok(())
}

/// Fills both rings of each queue pair with requests that carry the right stamps, the rest half plausible, half random.
fn post_random_requests(objects: &Objects, random: &mut Random, lap: u64) -> Result<()> {
    for (file, reply) in &objects.qps {
        for slot in 0..reply.send_slots + reply.receive_slots {
            let mut words = [0u64; 8];
            for word in &mut words {
                *word = random.next();
            }
            if random.below(4) > 0 {
                // A plausible request: known opcode, few SGEs, the real keys, an address nearby.
                let opcode = random.next() % 11;
                let flags = random.next() & 0xf;
                let sges = random.next() % 6;
                let inline = random.next() % 200;
                words[1] = (opcode << 16) | (flags << 24) | (sges << 32) | (inline << 40);
                words[2] = objects.iova.wrapping_add(random.next() % (2 * REGION_BYTES)).wrapping_sub(REGION_BYTES / 2);
                words[3] = u64::from(objects.mr.rkey) | random.next() << 32;
                words[4] = objects.iova.wrapping_add(random.next() % (2 * REGION_BYTES)).wrapping_sub(REGION_BYTES / 2);
                words[5] = (random.next() % (2 * REGION_BYTES)) | u64::from(objects.mr.lkey) << 32;
            }
            words[1] = (words[1] & !0xffff) | (lap + 1);
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            file.write_all_at(&bytes, (RINGS_OFFSET + slot as usize * SLOT_BYTES) as u64)?;
        }
        ring(objects, reply.queue)?;
    }
    Ok(())
}

/// Posts empty WRITEs that complete, from the slot `first` of the first queue pair's send ring on, in its first lap.
fn post_writes(objects: &Objects, first: u32, count: u32) -> Result<()> {
    let (file, reply) = &objects.qps[0];
    for slot in first..first + count {
        let mut words = [0u64; 8];
        words[1] = 1 | u64::from(Opcode::RDMA_WRITE.0) << 16 | u64::from(PostFlags::SIGNALED.0) << 24;
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        file.write_all_at(&bytes, (RINGS_OFFSET + slot as usize * SLOT_BYTES) as u64)?;
    }
    ring(objects, reply.queue)
}

/// Sets the queue's doorbell bit and wakes the worker, as a producer does.
fn ring(objects: &Objects, queue: u32) -> Result<()> {
    let word = queue / 64 % 64;
    objects.doorbells.write_all_at(&(1u64 << (queue % 64)).to_le_bytes(), WORDS_OFFSET + u64::from(word) * 8)?;
    objects.doorbells.write_all_at(&(1u64 << word).to_le_bytes(), SUMMARY_OFFSET)?;
    ring_bell(&objects.wake)?;
    Ok(())
}

fn random_work_requests(scene: &mut Scene) -> Result<()> {
    let mut completions = 0;
    for _ in 0..100 {
        let objects = Objects::make(&scene.socket())?;
        for lap in 0..10 {
            post_random_requests(&objects, &mut scene.random, lap)?;
            std::thread::sleep(Duration::from_millis(1));
        }
        completions += completions_in(&objects)?;
        ensure!(!scene.attacked.has_ended(), "the proxy has ended");
    }
    ensure!(completions > 0, "the proxy has not even looked at the requests");
    Ok(())
}

/// Slots of the completion ring that have been written.
fn completions_in(objects: &Objects) -> Result<usize> {
    let mut bytes = vec![0; objects.cq.metadata()?.len() as usize];
    objects.cq.read_exact_at(&mut bytes, 0)?;
    ensure!(bytes.len() >= cq_bytes(2), "a completion queue's file of {} bytes", bytes.len());
    Ok(bytes[RINGS_OFFSET..].chunks(SLOT_BYTES).filter(|slot| slot.iter().any(|byte| *byte != 0)).count())
}

/// All bells of all queues, existing or not, as fast as one process can.
fn doorbell_storm(scene: &mut Scene) -> Result<()> {
    let objects = Objects::make(&scene.socket())?;
    let all = [0xff; 8 * 64];
    let end = Instant::now() + Duration::from_millis(500);
    while Instant::now() < end {
        objects.doorbells.write_all_at(&all, WORDS_OFFSET)?;
        objects.doorbells.write_all_at(&[0xff; 8], SUMMARY_OFFSET)?;
        ring_bell(&objects.wake)?;
    }
    scene.works().context("right after the storm")
}

fn domain(scene: &Scene) -> Result<(Raw, u32, u32)> {
    let (mut raw, _fds) = Raw::greet(&scene.socket())?;
    let (open, _events): (OpenReply, _) = raw.call(Op::OPEN, &[0; 8])?;
    let (pd, _): (Handle, _) = raw.call(Op::ALLOC_PD, Handle { handle: open.context, reserved: 0 }.as_bytes())?;
    Ok((raw, open.context, pd.handle))
}
