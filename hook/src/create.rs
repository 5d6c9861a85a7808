//! createRuntime and prestart: joins a container that is being made to its proxy.

mod nodes;

use crate::annotations::{self, Choice, Request};
use crate::card::{self, Card};
use crate::config::{self, Config, Kind};
use crate::failure::{Code, During, Failure};
use crate::identity::Namespace;
use crate::init::Init;
use crate::inject::{self, Container, Nodes, Sources};
use crate::journal;
use crate::placement::Placement;
use crate::policy::{self, Grant, Resolution};
use crate::process::Process;
use crate::proxy::{self, Handles, Proxy};
use crate::rdma_cm::{self, Decision};
use crate::record::{self, MountPoint, Record, Records};
use crate::rootless;
use crate::session::{self, Session};
use crate::state::{Annotations, Bundle, State};
use crate::stop;
use crate::sysfs::{NODE, Tree};
use crate::trust::{self, Program};
use crate::uids;
use crate::userfaultfd;
use ringfence_launch::{BitRate, Launch, Limits, MIN_LINK, Worker};
use std::io::Read;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Acts on the container whose state is `input`; on success it is joined or not ours. Nothing remains of a failure.
///
/// `policy` is the administrator's choice for it, see [`annotations::wanted`].
pub fn create(input: impl Read, policy: Option<&str>) -> Result<(), Failure> {
    let state = State::read(input)?;
    join(&state, policy).map_err(|failure| match state.id() {
        Ok(id) => failure.of(id),
        Err(_) => failure,
    })
}

fn join(state: &State, policy: Option<&str>) -> Result<(), Failure> {
    let Some(wish) = wish(state, policy)? else { return Ok(()) };
    let id = state.id()?;
    let config = Config::load()?;
    let resolution = policy::resolve(&wish.request, &wish.namespace, &config)?;
    let bundle = wish.bundle;
    let init = Init::open(state.pid()?)?;
    rootless::check(&resolution.grant, init.network_namespace.as_fd())?;
    let root = bundle.root()?;
    let card = card(&resolution.grant, &init)?;
    let manager = match (&resolution.grant, &card) {
        (Grant::Proxied(device, _), Some(card)) => {
            rdma_cm::decide(device, card, !rootless::is_own(init.network_namespace.as_fd()))?
        }
        _ => Decision::Nothing(None),
    };

    let run_dir = session::make_run_dir(&config.run_dir)?;
    let what = || format!("records in {}", config.run_dir.display());
    let records = Records::open(&run_dir).during(Code::Internal, what)?;
    let claim = record::claim_ids(&run_dir).during(Code::Internal, what)?;
    let mount_points = match clear(&config, &records, id, init.process, &root, &resolution)? {
        Found::Joined { record } => return agree(&config, &records, &record, &wish.request),
        Found::Nothing { mount_points } => mount_points,
    };
    let lock = records.lock_shared().during(Code::Internal, what)?;
    let (Grant::Proxied(device, _) | Grant::Passthrough(device) | Grant::Exclusive(device)) = &resolution.grant;
    let record = Record {
        container: id.to_owned(),
        policy: resolution.policy,
        init: init.process,
        proxy: None,
        root,
        mount_points,
        cgroups: Vec::new(),
        unit: None,
        device: device.name.clone(),
        since: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
        warnings: Vec::new(),
        lent: None,
    };
    let mut making = Making { config: &config, records: &records, record, proxy: None };
    let taken = making.save();
    drop(claim);
    let result = taken.and_then(|()| match resolution.grant {
        Grant::Proxied(device, limits) => making.proxied(init, &bundle, device, limits, card, manager),
        Grant::Passthrough(device) => making.passthrough(init, &bundle, device, resolution.objects),
        Grant::Exclusive(device) => making.exclusive(init, &bundle, device, resolution.objects),
    });
    drop(lock);
    result.inspect_err(|_| making.undo())
}

/// The card that the container's proxy is to open; `None` if it needs none.
fn card(grant: &Grant<'_>, init: &Init) -> Result<Option<Card>, Failure> {
    let device = match grant {
        Grant::Proxied(device, _) if device.kind == Kind::Ibverbs => device,
        _ => return Ok(None),
    };
    let sys = Path::new(card::SYS);
    let found = Card::find(sys, &device.name).map_err(|missing| Failure::new(Code::Device, missing.to_string()))?;
    found.port(device.port).map_err(|missing| Failure::new(Code::Device, missing.to_string()))?;
    // With the host's GIDs the proxy stays in the host's.
    let joins = !device.gids.are_of_host() && !rootless::is_own(init.network_namespace.as_fd());
    if card::is_of_one_namespace(sys) && joins {
        let message = format!(
            "RDMA device {} belongs to the host's network namespace alone, and the container has another: `rdma system set netns \
             shared` before there are any others (ib_core.netns_mode=1), give the container the host's network, or the host's GIDs: \
             gids = \"host\" of the [[device]]",
            device.name
        );
        return Err(Failure::new(Code::Device, message));
    }
    Ok(Some(found))
}

/// What a container asks for, and who it is.
struct Wish {
    request: Request,
    namespace: Namespace,
    bundle: Bundle,
}

/// What the container asks for; `None` if it is not ours.
fn wish(state: &State, policy: Option<&str>) -> Result<Option<Wish>, Failure> {
    let mentioned = policy.is_some() || state.annotations().any(|(key, _)| annotations::is_ours(key));
    let cwd = PathBuf::from(format!("/proc/{}/cwd", std::os::unix::process::parent_id()));
    let bundle = match Bundle::load(state, &cwd) {
        Ok(bundle) => bundle,
        // Runtimes copy annotations to the state; without any there the container is not ours to stop.
        Err(_) if !mentioned => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    // The state is what the runtime goes by.
    let merged: Annotations = bundle
        .annotations()
        .chain(state.annotations())
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect();
    // hooks.d and a CDI device may both call us: the engine's choice holds for all calls, whichever is the first.
    let policy = policy.or_else(|| bundle.policy());
    let Some(request) = annotations::wanted(&merged, policy)? else { return Ok(None) };
    Ok(Some(Wish { request, namespace: Namespace::of(&merged, &bundle.directory()), bundle }))
}

/// Whether another hook of the same container that has joined it, as of another CDI device, gave it the same policy. If not,
/// the container will not start, and nothing of it remains.
fn agree(config: &Config, records: &Records, record: &Record, request: &Request) -> Result<(), Failure> {
    let Some(asked) = request.policy.as_ref().map(Choice::name).filter(|asked| *asked != record.policy) else {
        return Ok(());
    };
    let message = format!(
        "the container has the policy {} already, and now the engine gives it {asked} (--policy); \
         use one CDI device of ringfence.dev, or one policy, per container",
        record.policy
    );
    // The first failure is the one to tell; what could not be undone stays on record for the next clean-up.
    let _ = stop::undo(config, records, record);
    Err(Failure::new(Code::Denied, message))
}

/// What was there under a container's id.
enum Found {
    /// This very container: another stage of the same hook, or another hook, has done it all.
    Joined { record: Box<Record> },
    /// Nothing, or nothing any more but mount points in the same root file system.
    Nothing { mount_points: Vec<MountPoint> },
}

/// Removes what a crash left under the id of the container of `init`, whose root file system is `root`, and which is to get
/// what `resolution` says.
fn clear(
    config: &Config,
    records: &Records,
    id: &str,
    init: Process,
    root: &Path,
    resolution: &Resolution<'_>,
) -> Result<Found, Failure> {
    let mut mount_points = Vec::new();
    let record = match records.load(id) {
        Ok(record) => record,
        // It is of no use to anybody. It may be that of a container which runs all the same.
        Err(error) => match proxy::running(config, id) {
            Some(proxy) => return Err(in_use_without_record(id, proxy, &error)),
            None => None,
        },
    };
    if let Some(mut record) = record {
        if record.init == init && is_joined(config, &record, resolution) {
            return Ok(Found::Joined { record: Box::new(record) });
        }
        if record.init != init && record.init.is_alive() {
            let message = format!(
                "container id {id} is in use by a running container (init pid {}); ids must be unique on the host, also between runtimes",
                record.init.pid
            );
            return Err(Failure::new(Code::State, message));
        }
        let undone = if record.root == root {
            // They are about to be used again. The record that names them stays until it is overwritten.
            mount_points = std::mem::take(&mut record.mount_points);
            stop::release(config, records, &record, stop::CARD_PATIENCE)
        } else {
            stop::undo(config, records, &record)
        };
        undone.map_err(|error| {
            Failure::new(Code::Internal, format!("cannot clean up after an earlier container {id}: {error}"))
        })?;
    }
    session::remove(&config.run_dir, id)
        .during(Code::Internal, || format!("cannot remove an earlier container {id}"))?;
    Ok(Found::Nothing { mount_points })
}

/// Whether the container of `record` has got what there is on record: nobody else finds out that it has no proxy.
fn is_joined(config: &Config, record: &Record, resolution: &Resolution<'_>) -> bool {
    match (record.proxy, &resolution.grant) {
        (Some(proxy), _) => trust::what_is(config, &record.container, proxy) == Program::Proxy,
        (None, Grant::Passthrough(_)) => true,
        (None, Grant::Exclusive(_)) => record.lent.is_some(),
        // That of a hook which came no further; or of another policy's passthrough, about which there is no agreement.
        (None, Grant::Proxied(..)) => record.policy != resolution.policy,
    }
}

fn in_use_without_record(id: &str, proxy: Process, error: &std::io::Error) -> Failure {
    let message = format!(
        "container id {id} has a proxy already (pid {}), and its record is of no use: {error}; stop the container of that \
         id, then ringfence gc",
        proxy.pid
    );
    Failure::new(Code::State, message)
}

/// What an operator is told of a proxy that has no user id of its own.
const SHARED_USER: &str = "its proxy is the same user as all others: the engine's user namespace has no ids for them \
     (60578-61183, or proxy.uids), or denies setgroups; give the user more in /etc/subuid and /etc/subgid";

/// A container while it is being joined.
struct Making<'a> {
    config: &'a Config,
    records: &'a Records,
    record: Record,
    proxy: Option<Proxy>,
}

impl Making<'_> {
    fn proxied(
        &mut self,
        init: Init,
        bundle: &Bundle,
        device: &config::Device,
        limits: Limits,
        card: Option<Card>,
        manager: Decision,
    ) -> Result<(), Failure> {
        let session = Session::make(&self.config.run_dir, &self.record.container);
        let what = || format!("directory of container {} in {}", self.record.container, self.config.run_dir.display());
        let session = session.during(Code::Internal, what)?;
        let listener = session.listen().during(Code::Internal, || format!("socket in {}", session.path().display()))?;
        let uids = uids::for_proxies(self.config.proxy.uids)?;
        let launch = Launch {
            container: self.record.container.clone(),
            init_pid: init.process.pid,
            run_dir: self.config.run_dir.clone(),
            container_dir: session.path().to_owned(),
            uids,
            device: ringfence_launch::Device {
                name: device.name.clone(),
                kind: device.kind.into(),
                // Config::check refuses what is slower.
                link: device.link.map(|rate| BitRate::new(rate).unwrap_or(MIN_LINK)),
                port: device.port,
                gids: device.gids.clone(),
                pkeys: device.pkeys.clone(),
                marks: device.marks(limits.class),
            },
            limits,
            worker: Worker { spin_us: self.config.proxy.spin_us },
            sysfs: self.config.inject.sysfs,
        };
        let launch = session.write_launch(&launch).during(Code::Internal, what)?;

        let (manager, without) = match manager {
            Decision::Node(host) => (Some(rdma_cm::grant(&session, host, bundle, init.process.pid)?), None),
            Decision::Nothing(why) => (None, why),
        };
        let nodes = self.config.inject.has_node().then_some(NODE);
        let nodes = nodes.into_iter().chain(manager.is_some().then_some(rdma_cm::NAME));
        let tree = if self.config.inject.sysfs { Some(Tree::new(nodes)) } else { None };
        let tree = tree.transpose().during(Code::Injection, || "cannot make a tmpfs for what /sys shows".into())?;

        let container = &self.record.container;
        let mut placement = Placement::plan(&self.config.proxy, init.process.pid, container, bundle);
        self.record.cgroups = placement.paths();
        self.record.unit = placement.unit().map(str::to_owned);
        self.save()?;
        let cgroups = placement.make();
        let handles = Handles {
            listener: listener.as_fd(),
            init: init.pidfd.as_fd(),
            network: init.network_namespace.as_fd(),
            sysfs: tree.as_ref().map(Tree::root),
            cgroups: &cgroups,
            oom_score_adj: bundle.oom_score_adj(),
        };
        let proxy = self.proxy.insert(proxy::start(&self.config.proxy, device, &launch, &handles)?).process;
        placement.ask_systemd(proxy.pid);
        self.record.proxy = Some(proxy);
        let mut others: Vec<String> = uids.is_none().then(|| SHARED_USER.to_owned()).into_iter().collect();
        let mut complaints: Vec<String> =
            card.iter().flat_map(|card| card.complaints(device.port)).map(|complaint| complaint.to_string()).collect();
        complaints.extend(without);
        complaints.iter().for_each(|warning| journal::warn(&self.record.container, warning));
        others.extend(complaints);
        self.record.warnings = [placement.warnings(), &others].concat();
        self.save()?;

        // The proxy comes up meanwhile.
        let given = userfaultfd::grant(&session, &self.config.inject, bundle, init.process.pid).and_then(|granted| {
            let nodes = Nodes { userfaultfd: granted.node.as_ref(), rdma_cm: manager.as_ref() };
            let sources = Sources::proxied(&session, &self.config.inject, nodes, tree)?;
            Ok((granted.warning, self.inject(&init.container(&self.record, bundle)?, sources)?))
        });
        let started = self.proxy.as_mut().expect("it was just started");
        // A proxy that cannot start takes its directory with it, of which the container was to see parts.
        let (warning, injected) = given.map_err(|failure| started.refusal(init.pidfd.as_fd()).unwrap_or(failure))?;
        others.extend(warning);
        injected.iter().for_each(|warning| journal::warn(&self.record.container, warning));
        others.extend(injected);
        let timeout = Duration::from_millis(self.config.proxy.ready_timeout_ms);
        started.wait_ready(timeout, init.pidfd.as_fd())?;
        placement.check(proxy.pid);
        let warnings = [placement.warnings(), &others].concat();
        if warnings != self.record.warnings || placement.unit() != self.record.unit.as_deref() {
            self.record.warnings = warnings;
            self.record.unit = placement.unit().map(str::to_owned);
            self.save()?;
        }
        Ok(())
    }

    fn inject(&mut self, container: &Container, sources: Sources) -> Result<Vec<String>, Failure> {
        let Self { records, record, .. } = self;
        inject::inject(container, sources, &mut |mount_point| {
            record.mount_points.push(mount_point);
            records.save(record)
        })
    }

    fn save(&self) -> Result<(), Failure> {
        self.records.save(&self.record).during(Code::Internal, || "cannot write the container's record".into())
    }

    fn undo(&mut self) {
        if let Some(proxy) = self.proxy.take() {
            proxy.abandon(&self.record.container);
        }
        // The first failure is the one to tell; what could not be undone stays on record for the next clean-up.
        let _ = stop::undo(self.config, self.records, &self.record);
    }
}
