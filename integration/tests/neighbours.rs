//! Hostile neighbours, and containers that are hostile to neighbours: a proxy takes nothing from a port that nothing of its
//! own is connected to, keeps room for its own container and for other neighbours, and waits for nobody.

// UNSAFETY: one system call that makes a kind of descriptor and touches no memory.
#![allow(unsafe_code)]

#[path = "neighbours/client.rs"]
mod client;
#[path = "neighbours/hostile.rs"]
mod hostile;
#[path = "neighbours/kinds.rs"]
mod kinds;

use anyhow::{Context, Result, ensure};
use client::{Client, RUNS_PER_MESSAGE};
use hostile::Neighbour;
use ringfence_integration::command::{Running, wait_until};
use ringfence_integration::direct::{DirectProxy, Node};
use ringfence_integration::stalled::StalledPage;
use ringfence_integration::suite::{Needs, test};
use ringfence_integration::{artifacts, client as programs, suite};
use ringfence_protocol::verbs::{Opcode, WcStatus};
use ringfence_protocol::work::SendFields;
use ringfence_proxy::device::soft::grants::BYTES as GRANTS_BYTES;
use ringfence_proxy::launch::Limits;
use ringfence_proxy::shared::{PAGE, SealedFile};
use ringfence_trials::Trial;
use rustix::fs::{FallocateFlags, Mode, OFlags, SealFlags, fallocate, fcntl_add_seals, ftruncate, open};
use rustix::io::Errno;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// For what takes milliseconds on a machine that is not busy.
const SOON: Duration = Duration::from_secs(10);

type Attack = fn(&mut Scene) -> Result<()>;

fn main() -> ExitCode {
    let needs = Needs { programs: &["cc", "sleep"], built: &[artifacts::proxy, artifacts::library] };
    suite::main("ringfence-neighbours", &needs, trials)
}

fn trials() -> Result<Vec<Trial>> {
    let program = programs::compile("process", &["loop.c", "check.c"])?;
    let tests: [(&str, Attack); 18] = [
        ("strangers_share_nothing", strangers),
        ("a_neighbour_that_shares_all_it_may", greedy),
        ("a_neighbour_that_does_not_read", deaf),
        ("a_neighbour_that_talks_without_end", talkative),
        ("links_that_nothing_is_connected_to", uninvited),
        ("more_links_than_two", many_links),
        ("connections_that_say_nothing", silent),
        ("bells_that_are_full_and_block", full_bells),
        ("memory_that_is_never_confirmed", unconfirmed),
        ("receivers_that_are_never_ready", never_ready),
        ("links_come_up_in_every_order", orders),
        ("a_link_that_ended_is_made_again", again),
        ("an_answer_to_no_offer_ends_a_link", unasked),
        ("grants_that_make_no_sense_end_a_link", senseless),
        ("what_a_neighbour_can_do_with_memory_that_it_was_granted", granted),
        ("memory_that_was_never_touched", untouched),
        ("a_hole_that_waits_for_a_lock", queued_hole),
        ("a_proxy_that_cannot_end_gives_its_port_back", stuck),
    ];
    let mut trials: Vec<Trial> = tests
        .map(|(name, run)| {
            let program = program.clone();
            test(name, move || Scene::open(program)?.play(run))
        })
        .into();
    for place in hostile::Place::ALL {
        let program = program.clone();
        let name = format!("descriptors_of_every_kind_{}", place.name());
        trials.push(test(name, move || every_kind(&program, place)));
    }
    Ok(trials)
}

/// The victim's proxy, and a neighbour that obeys the test.
struct Scene {
    victim: DirectProxy,
    program: PathBuf,
    node: Node,
}

impl Scene {
    fn open(program: PathBuf) -> Result<Self> {
        let node = Node::new(None)?;
        let victim = node.proxy(Limits::default())?;
        Ok(Self { victim, program, node })
    }

    fn play(mut self, run: Attack) -> Result<()> {
        self.works()?;
        let before = descriptors(self.victim.pid())?;
        run(&mut self)?;
        self.works()?;
        wait_until("the victim to close what it was sent", SOON, || {
            descriptors(self.victim.pid()).is_ok_and(|now| now <= before)
        })
        .with_context(|| format!("{before} descriptors before, {:?} now", descriptors(self.victim.pid())))?;
        self.ends()
    }

    /// A well-behaved program of the victim's container is served.
    fn works(&mut self) -> Result<()> {
        ensure!(!self.victim.has_ended(), "the victim's proxy has ended");
        let mut command = self.victim.command(&self.program)?;
        command.arg("once");
        Running::start(command)?.wait(Duration::from_secs(30))?.success().context("the victim's own program").map(drop)
    }

    fn ends(&mut self) -> Result<()> {
        self.victim.end_init()?;
        wait_until("the victim's proxy to end with its container", SOON, || self.victim.has_ended())
    }

    fn client(&self) -> Result<Client> {
        Client::new(&self.victim.socket())
    }

    /// A neighbour with a port of its own.
    fn neighbour(&self) -> Result<Neighbour> {
        Neighbour::new(&self.victim)
    }

    /// A client of the victim's with a queue pair that is connected to the neighbour's port, and its number there.
    fn connected(&self, neighbour: &Neighbour) -> Result<(Client, usize)> {
        let mut client = self.client()?;
        let qp = client.qp()?;
        client.connect(qp, neighbour.lid(), 5)?;
        Ok((client, qp))
    }
}

fn descriptors(pid: i32) -> Result<usize> {
    Ok(std::fs::read_dir(format!("/proc/{pid}/fd"))?.count())
}

fn mappings(pid: i32) -> Result<usize> {
    Ok(std::fs::read_to_string(format!("/proc/{pid}/maps"))?.lines().count())
}

/// Threads of this process that are in an uninterruptible sleep.
fn waiting_in_kernel(pid: i32) -> Result<usize> {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task"))?.flatten();
    let states = threads.filter_map(|thread| std::fs::read_to_string(thread.path().join("stat")).ok());
    Ok(states.filter(|stat| stat.rsplit(") ").next().is_some_and(|fields| fields.starts_with('D'))).count())
}

/// Containers that write to a queue pair which does not exist: their regions must not become the stranger's mappings.
fn strangers(scene: &mut Scene) -> Result<()> {
    let mut own = scene.client()?;
    let before = mappings(scene.victim.pid())?;
    let mut attackers = Vec::new();
    for _ in 0..3 {
        let proxy = scene.node.proxy(Limits::default())?;
        let mut client = Client::new(&proxy.socket())?;
        let region = client.region(2 * RUNS_PER_MESSAGE)?;
        for _ in 0..16 {
            let key = client.register_runs(region, RUNS_PER_MESSAGE)?;
            let qp = client.qp()?;
            client.connect(qp, own.lid, u32::from(own.lid) << 14 | 5)?;
            client.post(qp, &client.write(key))?;
        }
        for _ in 0..16 {
            ensure!(client.completion(SOON)?.status == WcStatus::RETRY_EXC_ERR, "a WRITE to nobody has succeeded");
        }
        attackers.push((proxy, client));
    }
    let now = mappings(scene.victim.pid())?;
    ensure!(now <= before + 64, "{before} mappings before, {now} now");
    let region = own.region(2)?;
    own.register_runs(region, 2).context("the victim's own region")?;
    own.qp().map(drop)
}

/// One that the victim is connected to gets its part of the mappings, and is told when it asks for more.
fn greedy(scene: &mut Scene) -> Result<()> {
    let mut neighbour = scene.neighbour()?;
    let (mut client, qp) = scene.connected(&neighbour)?;
    let before = mappings(scene.victim.pid())?;
    let mut link = neighbour.hello()?;
    ensure!(link.is_welcome(), "a link is not taken though a queue pair is connected");
    let mut shared = 0;
    while link.share(shared, 200)? {
        shared += 1;
        ensure!(shared < 100, "{} mappings are no limit", 200 * shared);
    }
    ensure!(shared > 5, "only {} mappings", 200 * shared);
    let now = mappings(scene.victim.pid())?;
    ensure!(now < before + 5000, "{before} mappings before, {now} now");
    let region = client.region(2 * RUNS_PER_MESSAGE)?;
    for _ in 0..50 {
        client.register_runs(region, RUNS_PER_MESSAGE).context("the victim's own region")?;
        client.qp().context("the victim's own queue pair")?;
    }
    // What was granted keeps no memory whose name is other memory's by now.
    for freed in [2, 3] {
        link.unshare(freed)?;
    }
    let full = mappings(scene.victim.pid())?;
    for slot in 0..64 {
        link.grant_reading(slot, client.number(qp), 1)?;
        link.share(1, 200)?;
    }
    let now = mappings(scene.victim.pid())?;
    ensure!(now < full + 500, "{full} mappings before, {now} with what was granted of each");
    // What is given back can be taken again; what is not connected any more takes nothing.
    link.unshare(0)?;
    ensure!(link.share(shared, 200)?, "no room after a region was given back");
    link.unshare(1)?;
    client.reset(0)?;
    ensure!(!link.share(shared + 1, 200)?, "a region was taken for nothing that is connected");
    Ok(())
}

/// Answers pile up only as far as they are read.
fn deaf(scene: &mut Scene) -> Result<()> {
    let mut neighbour = scene.neighbour()?;
    let (_client, _) = scene.connected(&neighbour)?;
    let mut link = neighbour.hello()?;
    ensure!(link.is_welcome());
    let end = Instant::now() + SOON;
    while link.offer(1, 1).is_ok() {
        ensure!(Instant::now() < end, "answers that nobody reads are no reason to end a link");
    }
    Ok(())
}

/// Messages, each of which stops the data plane's thread for a moment, are taken at a rate, and a program of the container is served
/// meanwhile. Another link is no way round it.
fn talkative(scene: &mut Scene) -> Result<()> {
    const WITHIN: Duration = Duration::from_millis(500);
    let mut neighbour = scene.neighbour()?;
    let (_client, _) = scene.connected(&neighbour)?;
    let start = Instant::now();
    let mut said = 0u64;
    for round in 1..=2 {
        let mut link = neighbour.hello()?;
        ensure!(link.is_welcome(), "link {round}");
        while start.elapsed() < WITHIN * round {
            if link.says(r#"{"unshare":{"share":77}}"#)? {
                said += 1;
            } else {
                std::thread::yield_now();
            }
        }
    }
    // 16 a millisecond, some at once, and what the sockets have room for.
    let most = 16 * start.elapsed().as_millis() as u64 + 2000;
    ensure!(said < most, "{said} messages were taken, of {most} at most");
    ensure!(said > 1000, "only {said} messages were taken");
    scene.works()
}

fn uninvited(scene: &mut Scene) -> Result<()> {
    let mut neighbour = scene.neighbour()?;
    for round in 0..100 {
        let mut link = neighbour.hello()?;
        ensure!(!link.is_welcome(), "hello {round} of a port that nothing is connected to is welcome");
    }
    Ok(())
}

fn many_links(scene: &mut Scene) -> Result<()> {
    let mut neighbour = scene.neighbour()?;
    let (_client, _) = scene.connected(&neighbour)?;
    let before = descriptors(scene.victim.pid())?;
    let mut links: Vec<_> = (0..20).filter_map(|_| neighbour.hello().ok()).collect();
    let welcome = links.iter_mut().filter_map(|link| link.is_welcome().then_some(())).count();
    ensure!((1..=2).contains(&welcome), "{welcome} links of one neighbour");
    // What is turned away is closed on a thread of its own.
    wait_until("what was turned away to be closed", SOON, || {
        descriptors(scene.victim.pid()).is_ok_and(|now| now <= before + 10)
    })
    .with_context(|| format!("{before} descriptors before, {:?} now", descriptors(scene.victim.pid())))
}

/// They are ended, and keep no honest neighbour out meanwhile.
fn silent(scene: &mut Scene) -> Result<()> {
    let neighbour = scene.neighbour()?;
    let mut crowd: Vec<_> = (0..100).filter_map(|_| neighbour.dial().ok()).collect();
    let other = scene.node.proxy(Limits::default())?;
    write_across(&mut scene.client()?, &mut Client::new(&other.socket())?)?;
    let end = Instant::now() + SOON;
    for socket in &mut crowd {
        ensure!(
            hostile::has_ended(socket, end.saturating_duration_since(Instant::now())),
            "a connection that says nothing stays"
        );
    }
    Ok(())
}

/// The neighbour fills the bell that it gave, takes its O_NONBLOCK away, and asks for answers.
fn full_bells(scene: &mut Scene) -> Result<()> {
    let mut neighbour = scene.neighbour()?;
    let (_client, _) = scene.connected(&neighbour)?;
    let (end, _listening) = kinds::full_datagrams()?;
    let mut link = neighbour.hello_with(None, Some(end))?;
    ensure!(link.is_welcome());
    for round in 0..2000 {
        link.ask(5).with_context(|| format!("request {round}"))?;
    }
    scene.works()
}

/// Whatever a neighbour does about memory that is offered to it, a request that needs it ends in time.
fn unconfirmed(scene: &mut Scene) -> Result<()> {
    type Answer = fn(&mut hostile::Link, u32) -> Result<bool>;
    let answers: [(&str, Answer); 3] = [
        ("nothing", |_, _| Ok(true)),
        ("no", |link, share| link.say(&format!(r#"{{"refused":{{"share":{share}}}}}"#)).map(|()| true)),
        ("good-bye", |_, _| Ok(false)),
    ];
    for (name, answer) in answers {
        let mut neighbour = scene.neighbour()?;
        let (mut client, qp) = scene.connected(&neighbour)?;
        let mut link = Some(neighbour.hello()?);
        ensure!(link.as_mut().is_some_and(hostile::Link::is_welcome));
        let region = client.region(2)?;
        let key = client.register_runs(region, 2)?;
        client.post(qp, &client.write(key))?;
        let end = Instant::now() + SOON;
        let mut offers = 0;
        let completion = loop {
            if let Ok(completion) = client.completion(Duration::from_millis(1)) {
                break completion;
            }
            ensure!(Instant::now() < end, "{name}: a request waits for ever after {offers} offers");
            let Some(open) = &mut link else { continue };
            if let Some(share) = open.offered()? {
                offers += 1;
                if !answer(open, share)? {
                    link = None;
                }
            }
        };
        ensure!(completion.status == WcStatus::RETRY_EXC_ERR, "{name}: {:?}", completion.status);
        ensure!(offers > 0, "{name}: nothing was offered");
    }
    Ok(())
}

/// 250 SENDs of a container to itself, without receives, tried again without end.
fn never_ready(scene: &mut Scene) -> Result<()> {
    let mut client = scene.client()?;
    for _ in 0..250 {
        let qp = client.qp()?;
        client.connect(qp, client.lid, client.number(qp))?;
        client.post(qp, &SendFields { opcode: Opcode::SEND, ..SendFields::default() })?;
    }
    std::thread::sleep(Duration::from_millis(200));
    let before = scene.victim.processor_ticks()?;
    std::thread::sleep(Duration::from_secs(2));
    let used = scene.victim.processor_ticks()? - before;
    // A tenth of that is seen on a machine that is not busy; it was 190 without a floor.
    ensure!(used < 60, "{used} ticks of 10 ms in 2 s");
    Ok(())
}

/// Bytes from one proxy's client to the other's and back.
fn write_across(a: &mut Client, b: &mut Client) -> Result<()> {
    let (qa, qb) = (a.qp()?, b.qp()?);
    a.connect(qa, b.lid, b.number(qb))?;
    b.connect(qb, a.lid, a.number(qa))?;
    exchange(a, qa, b, qb)
}

fn exchange(a: &mut Client, qa: usize, b: &mut Client, qb: usize) -> Result<()> {
    let (ra, rb) = (a.region(2)?, b.region(2)?);
    let (ka, kb) = (a.register_runs(ra, 2)?, b.register_runs(rb, 2)?);
    for (from, qp, local, remote) in [(a, qa, ka, kb), (b, qb, kb, ka)] {
        let write = SendFields { rkey: remote.rkey, remote_addr: remote.iova, ..from.write(local) };
        from.post(qp, &write)?;
        let status = from.completion(SOON)?.status;
        ensure!(status == WcStatus::SUCCESS, "{status:?}");
    }
    Ok(())
}

/// Whoever connects first, and if both do at once, the two reach each other, and no packet need be lost for that.
fn orders(scene: &mut Scene) -> Result<()> {
    for round in 0..6 {
        let proxies = [scene.node.proxy(Limits::default())?, scene.node.proxy(Limits::default())?];
        let mut clients = [Client::new(&proxies[0].socket())?, Client::new(&proxies[1].socket())?];
        let [a, b] = &mut clients;
        let (qa, qb) = (a.qp()?, b.qp()?);
        let (na, nb) = (a.number(qa), b.number(qb));
        let (la, lb) = (a.lid, b.lid);
        // Without a timeout: what gets lost stays lost.
        match round % 3 {
            0 => {
                a.connect_for_ever(qa, lb, nb)?;
                b.connect_for_ever(qb, la, na)?;
            }
            1 => {
                b.connect_for_ever(qb, la, na)?;
                std::thread::sleep(Duration::from_millis(20));
                a.connect_for_ever(qa, lb, nb)?;
            }
            _ => std::thread::scope(|scope| {
                let other = scope.spawn(|| b.connect_for_ever(qb, la, na));
                a.connect_for_ever(qa, lb, nb)?;
                other.join().expect("does not panic")
            })?,
        }
        exchange(a, qa, b, qb).with_context(|| format!("round {round}"))?;
        // Over and over, with the first turned away each time.
        for _ in 0..3 {
            let (qa, qb) = (a.qp()?, b.qp()?);
            a.connect_for_ever(qa, lb, b.number(qb))?;
            a.reset(qa)?;
            a.connect_for_ever(qa, lb, b.number(qb))?;
            b.connect_for_ever(qb, la, a.number(qa))?;
            exchange(a, qa, b, qb).with_context(|| format!("round {round}, again"))?;
        }
    }
    Ok(())
}

/// A neighbour ends its link; the next queue pair makes another.
fn again(scene: &mut Scene) -> Result<()> {
    let mut neighbour = scene.neighbour()?;
    let (mut client, qp) = scene.connected(&neighbour)?;
    for round in 0..50 {
        let mut link = neighbour.hello()?;
        ensure!(link.is_welcome(), "round {round}");
        link.ask(5)?;
        client.reset(qp)?;
        client.connect(qp, neighbour.lid(), 5)?;
    }
    Ok(())
}

/// Answers that nothing was asked for could make the victim offer the same memory again and again.
fn unasked(scene: &mut Scene) -> Result<()> {
    for answer in ["shared", "refused"] {
        // It takes no link from us afterwards, so each needs another victim.
        let node = Node::new(None)?;
        let victim = node.proxy(Limits::default())?;
        let mut neighbour = Neighbour::new(&victim)?;
        let mut client = Client::new(&victim.socket())?;
        let qp = client.qp()?;
        client.connect(qp, neighbour.lid(), 5)?;
        let mut link = neighbour.hello()?;
        ensure!(link.is_welcome());
        link.say(&format!(r#"{{"{answer}":{{"share":1}}}}"#))?;
        ensure!(link.has_ended(SOON), "{answer} without an offer is no reason to end a link");
    }
    scene.works()
}

/// Grants of what was never shared, or of nothing, and pages of them that are none, or too many.
fn senseless(scene: &mut Scene) -> Result<()> {
    let grant = |slot: u32, generation: u64, share: u32, offset: u64, length: u64| {
        format!(
            r#"{{"grant":{{"slot":{slot},"generation":{generation},"to":5,"from":16387,"key":1,"access":2,"iova":0,"length":{length},"share":{share},"offset":{offset}}}}}"#
        )
    };
    let page = || SealedFile::create("page", GRANTS_BYTES);
    type Said = Box<dyn Fn(&hostile::Link) -> Result<()>>;
    let says = |message: String| -> Said { Box::new(move |link| link.say(&message)) };
    let nonsense: Vec<(&str, Said)> = vec![
        ("a slot past the last", says(grant(1024, 1, 1, 0, 8))),
        ("no generation", says(grant(0, 0, 1, 0, 8))),
        ("memory that was not shared", says(grant(0, 1, 2, 0, 8))),
        ("memory past its end", says(grant(0, 1, 1, 4096, 8))),
        ("a range that wraps", says(grant(0, 1, 1, u64::MAX, 8))),
        ("no memory", says(grant(0, 1, 1, 0, 0))),
        ("writing what is for reading", says(grant(0, 1, 1, 0, 8))),
        ("numbers that are none", says(r#"{"grant":{"slot":-1}}"#.into())),
        ("a page without its descriptor", says(r#"{"page":{"copies":true}}"#.into())),
        ("a page of another size", Box::new(|link| link.page(SealedFile::create("page", 4096)?))),
        (
            "a second page",
            Box::new(move |link| {
                link.page(page()?)?;
                link.page(page()?)
            }),
        ),
    ];
    for (what, say) in nonsense {
        // It takes no link from us afterwards, so each needs another victim.
        let node = Node::new(None)?;
        let victim = node.proxy(Limits::default())?;
        let mut neighbour = Neighbour::new(&victim)?;
        let mut client = Client::new(&victim.socket())?;
        let qp = client.qp()?;
        client.connect(qp, neighbour.lid(), 5)?;
        let mut link = neighbour.hello()?;
        ensure!(link.is_welcome());
        ensure!(link.share(1, 1)?, "a page is not taken");
        say(&link)?;
        ensure!(link.has_ended(SOON), "{what} is no reason to end a link");
    }
    scene.works()
}

/// Somebody outside keeps the lock of a file that the proxy empties, and the container has ended. The LID goes to the next proxy,
/// and those that were linked to the last one reach that.
fn stuck(scene: &mut Scene) -> Result<()> {
    let mut own = scene.client()?;
    let mut ending = scene.node.proxy(Limits::default())?;
    let mut client = Client::new(&ending.socket())?;
    let lid = client.lid;
    write_across(&mut own, &mut client)?;
    let file = client.file(1)?;
    let page = StalledPage::new()?;
    let writer = page.write_from(file)?;
    drop(client);
    wait_until("the proxy to wait for the lock", 6 * SOON, || {
        waiting_in_kernel(ending.pid()).is_ok_and(|waiting| waiting > 0)
    })?;
    ending.end_init()?;
    wait_until("the port to be given back", SOON, || !ending.dir().exists())?;
    ensure!(!ending.has_ended(), "the proxy has ended, and this shows nothing");
    let next = scene.node.proxy(Limits::default())?;
    let mut client = Client::new(&next.socket())?;
    ensure!(client.lid == lid, "LID {} instead of {lid}", client.lid);
    write_across(&mut own, &mut client)?;
    page.answer();
    writer.join().ok();
    wait_until("the last proxy to end", SOON, || ending.has_ended())
}

/// A neighbour that was granted writing has the file for as long as it likes: it takes nothing away from it, and whose lock it
/// keeps is nobody's concern but that file's.
fn granted(scene: &mut Scene) -> Result<()> {
    let mut neighbour = scene.neighbour()?;
    let (mut client, qp) = scene.connected(&neighbour)?;
    let region = client.region(1)?;
    let own = client.last_file()?;
    let key = client.register_runs(region, 1)?;
    let mut link = neighbour.hello()?;
    ensure!(link.is_welcome(), "the victim takes no link");
    let hostile::Granted { share, file, grant } = link.be_granted(client.number(qp), key)?;
    ensure!(grant["length"] == 4096 && grant["share"] == share, "{grant}");
    let mut found = [0; 8];
    own.read_exact_at(&mut found, 0)?;
    ensure!(&found == b"honestly", "the file is of other memory");
    file.write_all_at(b"granted", 1000)?;

    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    for (whose, file) in [("the neighbour", &file), ("the container", &own)] {
        for (what, done) in [
            ("removes pages", fallocate(file, punch, 0, 4096)),
            ("makes pages", fallocate(file, FallocateFlags::KEEP_SIZE, 0, 1 << 20)),
            ("shortens it", ftruncate(file, 0)),
            ("lengthens it", ftruncate(file, 1 << 50)),
            ("seals it", fcntl_add_seals(file, SealFlags::WRITE)),
            ("opens it again", open(&path, OFlags::RDWR, Mode::empty()).map(drop)),
        ] {
            ensure!(done == Err(Errno::PERM), "{whose} {what}: {done:?}");
        }
    }

    // It keeps the lock, and everything goes on.
    let page = StalledPage::new()?;
    let writer = page.write_from(file)?;
    let start = Instant::now();
    client.deregister(key)?;
    client.free(region)?;
    scene.works().context("while a neighbour keeps the lock of what it was granted")?;
    let mut others = Vec::new();
    for _ in 0..8 {
        let region = client.region(16)?;
        let file = client.last_file()?;
        file.write_all_at(&[1; 1 << 16], 0)?;
        client.free(region)?;
        others.push(file);
    }
    wait_until("what was not granted to be emptied", SOON, || {
        others.iter().all(|file| file.metadata().is_ok_and(|found| found.blocks() == 0))
    })?;
    // Not by its blocks: who stands still in a write has made the page anew.
    own.read_exact_at(&mut found, 0)?;
    ensure!(&found == b"honestly", "what is locked was emptied, and this shows nothing");
    // Nothing more is granted to anybody until it lets go.
    wait_until("the proxy to notice", SOON, || start.elapsed() > Duration::from_secs(2))?;
    let region = client.region(1)?;
    let key = client.register_runs(region, 1)?;
    ensure!(!link.is_granted_more(client.number(qp), key)?, "more is granted while a lock is kept");
    page.answer();
    writer.join().ok();
    wait_until("what was granted to be emptied", SOON, || own.metadata().is_ok_and(|found| found.blocks() == 0))
}

/// A container registers memory that it never touched. What is granted of it its own proxy has made, before the neighbour comes; of
/// what would take too much it makes none and grants none, however often a request for it succeeds.
fn untouched(scene: &mut Scene) -> Result<()> {
    // More than the 16 MiB that are made of a region, and less.
    const MUCH: u64 = 32 << 20;
    const LITTLE: u64 = 12 << 20;
    // What the requests alone may have made, where the page that they touch is a huge one.
    const TOUCHED: u64 = 2 << 20;
    let mut neighbour = scene.neighbour()?;
    let (mut client, qp) = scene.connected(&neighbour)?;
    let to = client.number(qp);
    let mut link = neighbour.hello()?;
    ensure!(link.is_welcome(), "the victim takes no link");
    link.page(SealedFile::create("grants", GRANTS_BYTES)?)?;
    for opcode in [Opcode::RDMA_WRITE, Opcode::RDMA_READ] {
        for bytes in [MUCH, LITTLE] {
            let region = client.region(bytes / PAGE as u64)?;
            let file = client.last_file()?;
            let made = || file.metadata().map(|found| found.blocks() * 512);
            let key = client.register_whole(region, bytes / PAGE as u64)?;
            ensure!(made()? == 0, "{} bytes are there before anybody touches them", made()?);
            let request = hostile::request(opcode, to, key);
            // The victim tries again 50 ms after what it could not grant.
            let within = if bytes == MUCH { Duration::from_secs(1) } else { SOON };
            let reached = link.repeat(request, bytes, within)?;
            let now = made()?;
            // For writing nothing is shown that is not granted.
            let shown = bytes == LITTLE || opcode == Opcode::RDMA_READ;
            ensure!(reached.shown == shown, "{opcode:?} of {bytes} bytes: {reached:?}");
            ensure!(
                reached.granted == (bytes == LITTLE),
                "{opcode:?} of {bytes} bytes: {reached:?}, {now} bytes there"
            );
            if reached.granted {
                ensure!(now == bytes, "{opcode:?}: {now} of {bytes} bytes are there when they are granted");
            } else {
                ensure!(now <= TOUCHED, "{opcode:?}: {now} of {bytes} bytes are there that are not granted");
            }
            client.deregister(key)?;
            client.free(region)?;
        }
    }
    Ok(())
}

/// A container keeps the lock of a file that is about to be made immutable, and has a hole wait behind it, which the kernel let pass
/// before. Nothing is granted until that hole has been punched, and no more are.
fn queued_hole(scene: &mut Scene) -> Result<()> {
    const BYTES: u64 = 1 << 20;
    let mut neighbour = scene.neighbour()?;
    let (mut client, qp) = scene.connected(&neighbour)?;
    let region = client.region(BYTES / PAGE as u64)?;
    let file = client.last_file()?;
    file.write_all_at(&[1; BYTES as usize], 0)?;
    let key = client.register_whole(region, BYTES / PAGE as u64)?;
    let mut link = neighbour.hello()?;
    ensure!(link.is_welcome(), "the victim takes no link");
    link.page(SealedFile::create("grants", GRANTS_BYTES)?)?;
    let request = hostile::request(Opcode::RDMA_WRITE, client.number(qp), key);

    let (first, second) = (StalledPage::new()?, StalledPage::new()?);
    let keeps = first.write_from(file.try_clone()?)?;
    // The victim's warden waits for the lock from now on.
    let reached = link.repeat(request, BYTES, Duration::from_millis(300))?;
    ensure!(!reached.granted, "granted while the lock is kept");
    // Behind it they wait in this order.
    let own_pid = std::process::id().cast_signed();
    let before = waiting_in_kernel(own_pid)?;
    let keeps_next = second.will_write_from(file.try_clone()?);
    wait_until("a second write to wait for the lock", SOON, || {
        waiting_in_kernel(own_pid).is_ok_and(|now| now > before)
    })?;
    let punched = file.try_clone()?;
    let hole = std::thread::spawn(move || {
        fallocate(punched, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 0, BYTES)
    });
    wait_until("a hole to wait for the lock", SOON, || waiting_in_kernel(own_pid).is_ok_and(|now| now > before + 1))?;
    // The warden has had its turn, and the second write has its own.
    first.answer();
    keeps.join().ok();
    let reached = link.repeat(request, BYTES, Duration::from_secs(1))?;
    ensure!(!reached.granted, "granted before the hole that waits is punched");
    second.answer();
    keeps_next.join().ok();
    let punched = hole.join().ok().context("does not panic")?;
    ensure!(punched.is_ok(), "the kernel did not let the hole pass, and this shows nothing: {punched:?}");
    let reached = link.repeat(request, BYTES, SOON)?;
    ensure!(reached.granted, "not granted when all is over: {reached:?}");
    let there = file.metadata()?.blocks() * 512;
    ensure!(there == BYTES, "{there} of {BYTES} bytes are there when they are granted");
    Ok(())
}

/// A victim for each descriptor, since it listens no more to who sent it one of no use.
fn every_kind(program: &std::path::Path, place: hostile::Place) -> Result<()> {
    let mut missing = Vec::new();
    for kind in kinds::ALL {
        let Some((fd, beside)) = (kind.make)().with_context(|| format!("cannot make: {}", kind.name))? else {
            missing.push(kind.name);
            continue;
        };
        // Ours is the last, and closed after what is beside it: a connection does not linger without its peer.
        let last = fd.try_clone()?;
        let mut scene = Scene::open(program.to_owned())?;
        let tried = (|| {
            let mut neighbour = scene.neighbour()?;
            let (mut client, qp) = match place {
                // The victim makes the link when its queue pair is connected.
                hostile::Place::Welcome => {
                    let connected = scene.connected(&neighbour)?;
                    neighbour.welcome(fd)?;
                    connected
                }
                hostile::Place::Rings => {
                    let connected = scene.connected(&neighbour)?;
                    let _ = neighbour.hello_with(Some(fd), None)?.is_welcome();
                    connected
                }
                hostile::Place::Bell => {
                    let connected = scene.connected(&neighbour)?;
                    let mut link = neighbour.hello_with(None, Some(fd))?;
                    if link.is_welcome() {
                        // Answered, and rung for.
                        (0..100).try_for_each(|_| link.ask(5))?;
                    }
                    connected
                }
                hostile::Place::Share => {
                    let connected = scene.connected(&neighbour)?;
                    let mut link = neighbour.hello()?;
                    ensure!(link.is_welcome(), "the link is not taken");
                    let _ = link.offer_fd(1, false, fd);
                    connected
                }
                hostile::Place::Writable | hostile::Place::Page => {
                    let connected = scene.connected(&neighbour)?;
                    let mut link = neighbour.hello()?;
                    ensure!(link.is_welcome(), "the link is not taken");
                    let _ = match place {
                        hostile::Place::Page => link.page(fd),
                        _ => link.offer_fd(1, true, fd),
                    };
                    connected
                }
            };
            client.reset(qp)?;
            scene.works()?;
            scene.ends()
        })();
        drop(scene);
        drop(beside);
        drop(last);
        tried.with_context(|| format!("{} {}", kind.name, place.name()))?;
    }
    if !missing.is_empty() {
        ringfence_trials::skip(format!(
            "of every other kind it passed, but this machine has no {}",
            missing.join(", no ")
        ));
    }
    Ok(())
}
