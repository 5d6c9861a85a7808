//! The process that a proxy is, whatever its device: started by the hook, one beside each container. [`crate::launch`] says how.
//!
//! A program of its own for each kind of device calls [`main`] with what opens it.

// UNSAFETY: takes the descriptors over that the hook left at agreed numbers, and sets signal masks.
#![allow(unsafe_code)]

use crate::closer::Closer;
use crate::control::adopted::AdoptedFiles;
use crate::control::driver::Driver;
use crate::control::grants::Granted;
use crate::control::node::{self, Closers, Node, Queues};
use crate::control::quota::Quota;
use crate::control::session::random;
use crate::control::spares::Spares;
use crate::control::{End, MAX_CLOSING, Server};
use crate::device::control::Control;
use crate::fabric::addresses;
use crate::fabric::budget::Budget;
use crate::fabric::neighbours::Neighbours;
use crate::fabric::ports::{MAX_PORTS, Port, Taken};
use crate::launch::addresses::Gids;
use crate::launch::{Device, DeviceKind, FD_INIT, FD_LISTENER, FD_NETNS, FD_READY, FD_SYSFS, Launch};
use crate::memory::{RegionTable, places};
use crate::plane::Plane;
use crate::plane::bell::Bell;
use crate::sandbox::{self, View};
use crate::shared::{Holes, Mapping, SealedFile};
use crate::stats::Counters;
use crate::sysfs::Shown;
use crate::voice::{self, Voice};
use crate::warden::{Directory, Duties, Log, Warden};
use crate::worker::{Worker, now};
use anyhow::{Context, Result, bail, ensure};
use ringfence_protocol::layout::{KEYS_OFFSET, bells_bytes};
use rustix::fd::{FromRawFd, OwnedFd};
use rustix::io::{Errno, fcntl_dupfd_cloexec};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

/// What a program's own device is opened by.
#[derive(Debug)]
pub struct Opening<'a> {
    /// The hook's orders.
    pub launch: &'a Launch,
    /// For a port without a manufacturer's.
    pub guid: u64,
    /// The process is in a network namespace that the hook is not in: the container's own, in which root may give interfaces any address.
    pub own_network: bool,
}

/// A program that is a proxy.
pub trait Program {
    /// What it is called.
    const NAME: &'static str;
    /// The device that it serves a container with.
    type Device: Driver;
    /// What becomes of the device's worker's side in between.
    type Seed;

    /// Opens the device, in the network namespace that its GIDs are of, while the process is root and has the host's file systems.
    ///
    /// # Errors
    /// With what is wrong, and what to do.
    fn open(opening: &Opening<'_>) -> Result<(Self::Seed, <Self::Device as Driver>::Control)>;

    /// What the process is to see of file systems from now on.
    fn view(control: &<Self::Device as Driver>::Control) -> View {
        let _ = control;
        View::Sockets
    }

    /// Makes the worker's side, when the process has no rights any more, one thread yet, and no filter of system calls. Nothing has
    /// been heard of the container.
    ///
    /// # Errors
    /// As [`Self::open`].
    fn start(seed: Self::Seed, control: &mut <Self::Device as Driver>::Control) -> Result<Self::Device>;
}

fn usage(name: &str) -> String {
    format!(
        "usage: {name} --launch FILE\n\n\
        The verbs proxy of one container. The OCI hook starts it; people have no need to.\n\
        FILE is the launch.json that the hook wrote; descriptors 3 to 7 are the listening socket,\n\
        the pidfd of the container's init, the pipe for \"ready\", the container's network namespace,\n\
        and, if FILE says so, the root of a file system for what /sys is to show."
    )
}

/// Does what the command line says.
#[must_use]
pub fn main<P: Program>() -> ExitCode {
    let name = P::NAME;
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let path = match arguments.as_slice() {
        [flag, path] if flag == "--launch" => PathBuf::from(path),
        [flag] if flag == "--version" => {
            println!("{name} {}", env!("CARGO_PKG_VERSION"));
            #[cfg(feature = "obedient")]
            println!("{}", crate::control::obedient::MARK);
            return ExitCode::SUCCESS;
        }
        [flag] if flag == "--help" => {
            println!("{}", usage(name));
            return ExitCode::SUCCESS;
        }
        _ => {
            eprintln!("{}", usage(name));
            return ExitCode::from(2);
        }
    };
    #[cfg(feature = "obedient")]
    crate::control::obedient::steps::open();
    match run::<P>(&path) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{name}: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The descriptor that the hook left at this number.
fn inherited(fd: i32, what: &str) -> Result<OwnedFd> {
    // SAFETY: called once for each number, before anything else is opened; that it is open is checked next.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    match rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC) {
        Ok(()) => Ok(fd),
        Err(error) => {
            std::mem::forget(fd);
            bail!("no {what} was passed down ({error}); a proxy is started by ringfence-hook")
        }
    }
}

fn run<P: Program>(path: &Path) -> Result<()> {
    let listener = inherited(FD_LISTENER, "listening socket")?;
    let init = inherited(FD_INIT, "pidfd")?;
    let ready = inherited(FD_READY, "ready pipe")?;
    let netns = inherited(FD_NETNS, "network namespace")?;
    let started = start::<P>(path, listener, init, netns);
    let line = match &started {
        Ok((_, voice)) => {
            voice.serve(true);
            "ready\n".to_owned()
        }
        Err(error) => format!("{error:#}\n"),
    };
    // If the hook is gone, its container is too, or will be; the pidfd tells.
    let _ = rustix::io::write(&ready, line.as_bytes());
    drop(ready);
    let (mut server, voice) = started?;
    let end = server.run().context("waiting for events");
    // Nothing is closed by us: what the container or a neighbour sent may take its time to close, and a process that ends
    // does not wait for it. The warden clears up.
    match end {
        Ok(End::Container | End::Signal) => {
            voice.serve(false);
            leave(0)
        }
        // Nobody is left to log it.
        Ok(End::Warden) => eprintln!("{}: the warden has ended", P::NAME),
        Err(error) => voice.say(&format!("{error:#}")),
    }
    leave(1)
}

fn leave(code: i32) -> ! {
    // SAFETY: `_exit` has no preconditions; standard error is not buffered.
    unsafe { libc::_exit(code) }
}

fn start<P: Program>(
    path: &Path,
    listener: OwnedFd,
    init: OwnedFd,
    netns: OwnedFd,
) -> Result<(Server<P::Device>, Arc<Voice>)> {
    let launch = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let launch: Launch = serde_json::from_slice(&launch)
        .with_context(|| format!("{} is no launch file of this version", path.display()))?;
    let tree = if launch.sysfs { Some(inherited(FD_SYSFS, "file system for sysfs")?) } else { None };
    let policy = launch.limits.policy();
    let Device { kind, gids, .. } = &launch.device;
    ensure!(
        *kind != DeviceKind::Soft || *gids == Gids::Namespace,
        "device.gids is for a card: the software device's GIDs are the addresses of its container's network namespace"
    );
    let signals = block_signals()?;
    sandbox::raise_file_limit();
    let processors = std::thread::available_parallelism().map_or(1, |count| count.get() as u32);

    let guid = u64::from(random()) << 32 | u64::from(random());
    // Locally administered, as for an interface identifier that no manufacturer gave.
    let guid = guid & !(1 << 56) | 1 << 57;
    let mut taken = take_port(&launch, guid)?;
    let id = launch.uids.map(|uids| uids.of(taken.port.lid()));
    let Counters { tally, holdings } = Counters::create(&launch.container_dir)
        .with_context(|| format!("cannot make the counters in {}", launch.container_dir.display()))?;
    let (voice, ear) = voice::pair(Arc::clone(&holdings)).context("cannot make memory to speak to the warden")?;
    let voice = Arc::new(voice);
    // While there still is a /proc to ask.
    let budget = Budget::of_this_process();
    let warden = Warden::start(Duties {
        init: fcntl_dupfd_cloexec(&init, 3)?,
        signals: fcntl_dupfd_cloexec(&signals, 3)?,
        tenure: taken.tenure,
        container_dir: Directory::at(&launch.container_dir)
            .with_context(|| format!("no directory {}", launch.container_dir.display()))?,
        proxy: rustix::process::getpid(),
        proxy_uid: id.unwrap_or(rustix::process::geteuid().as_raw()),
        log: Arc::new(Log::new(&launch.container, &launch.run_dir, Arc::clone(&holdings), ear)),
    })
    .context("cannot start the warden")?;
    voice.report_panics();
    // A card's GIDs that are the host's are so in the host's namespace: there their addresses are listed, and there a card's
    // driver looks up how a peer is reached.
    let own_network = !launch.device.gids.are_of_host()
        && addresses::join(&netns).context("cannot join the container's network namespace")?;
    drop(netns);
    let limits = &launch.limits;
    let (seed, mut control) = P::open(&Opening { launch: &launch, guid, own_network })?;
    let quota = Quota::new(limits, holdings);
    let shown = match tree {
        Some(tree) => Some(show(&tree, &mut taken.port, &mut control, &quota).context("cannot write what /sys shows")?),
        None => None,
    };
    let view = P::view(&control);
    sandbox::enter_root(&view, &taken.sockets, id).context("cannot leave the host's file systems")?;
    taken.port.find_sockets_in(Path::new("/"));
    taken.port.leave_lock();
    // From here on the proxy touches what a container or a neighbour says. The threads inherit this.
    sandbox::become_user(id)?;
    sandbox::give_up_files(&view).context("Landlock")?;
    // Who opens a device for good is who uses it: the kernel compares credentials, and they change no more.
    let device = P::start(seed, &mut control)?;

    let places = places(limits.max_mr);
    let doorbell_file = SealedFile::create("ringfence-bells", bells_bytes(places))?;
    let bells = Arc::new(Mapping::of(&doorbell_file)?);
    let (regions, entrance) = RegionTable::new(bells.headers(KEYS_OFFSET, places as usize));
    let plane = Plane::new(bells.header(0), regions, &policy, tally, device, now());
    // Threads are made before the system calls for it are forbidden.
    let closers = Closers {
        container: Closer::start("close-own", MAX_CLOSING).context("cannot start a thread")?,
        neighbours: Closer::start("close-others", MAX_CLOSING).context("cannot start a thread")?,
        granted: Closer::start("close-granted", MAX_CLOSING).context("cannot start a thread")?,
    };
    let (bell, ringer) = Bell::new(&closers.container).context("cannot make a pair of sockets")?;
    let worker =
        Worker::start(plane, bell, u64::from(launch.worker.spin_us) * 1000).context("cannot start the worker")?;
    let node = Node {
        worker,
        quota,
        limits: limits.clone(),
        entrance,
        places,
        queues: Queues::default(),
        doorbell_file: Arc::new(doorbell_file.into_fd()),
        bell: Arc::new(ringer),
        processors,
        device: control,
        port: taken.port,
        warden,
        gids_fresh_until: 0,
        // What changed between the first reading and when somebody heard of changes.
        gids_due: Some(0),
        gids_pause: 0,
        gids_told: None,
        shown,
        neighbours: Neighbours::new(budget),
        voice: Arc::clone(&voice),
        shares: HashMap::new(),
        granted: Granted::default(),
        adopted: AdoptedFiles::default(),
        // Where there is none, the container's own memory files cannot be registered, and everything else can.
        holes: Holes::new()
            .inspect_err(|error| {
                voice.say(&format!("no userfaultfd ({error}): memory that is shared already cannot be registered"));
            })
            .ok(),
        spares: Spares::default(),
        last_pd: 0,
        last_share: 0,
        closers,
        announced: Vec::new(),
    };
    P::Device::begun(&node);
    node.warden.await_up().context("the warden did not come up")?;
    sandbox::filter::confine_proxy(P::Device::IOCTLS, P::Device::OPENS_FILES)
        .context("cannot confine the proxy to its system calls")?;
    Ok((Server::new(node, listener, taken.listener, init, signals), voice))
}

/// Fills the file system with the root `tree`, and keeps what it takes to bring it up to date.
fn show(tree: &OwnedFd, port: &mut Port, device: &mut impl Control, quota: &Quota) -> Result<Shown, Errno> {
    // What cannot be read yet is read again when the proxy is up.
    let addresses = addresses::list().unwrap_or_default();
    port.set_addresses(&addresses.gids);
    let _ = device.set_addresses(&addresses);
    Shown::new(&device.shown(quota, port.lid(), node::gid_entries(device, port, &addresses)), tree)
}

fn take_port(launch: &Launch, guid: u64) -> Result<Taken> {
    let most = launch.uids.map_or(u32::from(MAX_PORTS), |uids| uids.count.min(u32::from(MAX_PORTS)));
    match Taken::take(&launch.run_dir, &launch.device.name, guid, most as u16) {
        Err(Errno::USERS) => {
            bail!(
                "{most} proxies run on this node already, as many as there are LIDs and user ids (proxy.uids) for them"
            )
        }
        taken => taken.with_context(|| format!("cannot take a port of the fabric in {}", launch.run_dir.display())),
    }
}

/// SIGTERM and SIGINT become readable; all threads started from here on inherit the mask.
fn block_signals() -> Result<OwnedFd> {
    // SAFETY: an all-zero sigset_t is valid storage for sigemptyset.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: `set` lives across the calls; the arguments are constants.
    let fd = unsafe {
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGTERM);
        libc::sigaddset(&raw mut set, libc::SIGINT);
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
        libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK)
    };
    ensure!(fd >= 0, "signalfd: {}", std::io::Error::last_os_error());
    // SAFETY: signalfd returned a descriptor that nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
