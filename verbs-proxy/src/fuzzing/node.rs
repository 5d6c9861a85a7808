//! A proxy without its processes: the control thread's state, a worker, and a second port of the same node.

use crate::closer::Closer;
use crate::control::adopted::AdoptedFiles;
use crate::control::grants::Granted;
use crate::control::node::{Closers, Node, Queues};
use crate::control::quota::{Quota, Resource};
use crate::control::session::{PeerFault, Session};
use crate::control::spares::Spares;
use crate::device::soft::Worker;
use crate::device::soft::control::SoftDevice;
use crate::device::soft::{Plane, Soft};
use crate::fabric::budget::Budget;
use crate::fabric::neighbours::Neighbours;
use crate::fabric::ports::Taken;
use crate::launch::addresses::Gids;
use crate::launch::marks::Marks;
use crate::launch::{Bytes, Device, DeviceKind, FIRST_PORT, Limits};
use crate::memory::{RegionTable, places};
use crate::plane::bell::Bell;
use crate::shared::{Holes, Mapping, SealedFile};
use crate::stats::Counters;
use crate::voice;
use crate::warden::Warden;
use ringfence_protocol::control::{Hello, Op};
use ringfence_protocol::layout::{KEYS_OFFSET, bells_bytes};
use ringfence_sched::Policy;
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;
use zerocopy::IntoBytes;

/// What a container may have: little, so that a few messages reach every limit.
const LIMITS: Limits = Limits {
    bandwidth: None,
    bandwidth_rx: None,
    ops: None,
    weight: None,
    class: crate::launch::Class::None,
    max_qp: 6,
    max_mr: 8,
    max_mr_bytes: Bytes(1 << 20),
    max_cq: 6,
    max_qp_depth: 256,
    peers: None,
};

/// Of which nothing may be left.
const RESOURCES: [Resource; 11] = [
    Resource::Qp,
    Resource::Cq,
    Resource::Mr,
    Resource::MrBytes,
    Resource::RegionBytes,
    Resource::Region,
    Resource::QueueBytes,
    Resource::Other,
    Resource::MrHandle,
    Resource::KeptBytes,
    Resource::Kept,
];

/// The proxy, and the port of a neighbour that is this process, too.
pub struct Scene {
    pub node: Node,
    /// Who connects to the proxy's own port ends here.
    pub own: Place,
    pub other: Place,
    _dir: tempfile::TempDir,
}

/// A port's LID, and what listens there.
pub struct Place {
    pub lid: u16,
    pub listener: OwnedFd,
}

/// Everything that waits to be closed is, sooner or later.
fn is_done(closer: &Closer) {
    for _ in 0..60_000 {
        if closer.waiting() == 0 {
            return;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    panic!("what was given back is never closed");
}

/// One for all inputs: it has threads.
pub fn scene() -> MutexGuard<'static, Scene> {
    static SCENE: OnceLock<Mutex<Scene>> = OnceLock::new();
    SCENE.get_or_init(|| Mutex::new(Scene::new())).lock().unwrap_or_else(PoisonError::into_inner)
}

impl Scene {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("fabric")).unwrap();
        let mut own = Taken::take(dir.path(), "soft0", 1, 1023).unwrap();
        let other = Taken::take(dir.path(), "soft0", 2, 1023).unwrap();
        own.port.find_sockets_in(&own.sockets);
        let places = places(LIMITS.max_mr);
        let doorbell_file = SealedFile::create("bells", bells_bytes(places)).unwrap();
        let bells = Arc::new(Mapping::of(&doorbell_file).unwrap());
        let (regions, entrance) = RegionTable::new(bells.headers(KEYS_OFFSET, places as usize));
        let Counters { tally, holdings } = Counters::private().unwrap();
        let plane = Plane::new(bells.header(0), regions, &Policy::default(), tally, Soft::default(), 0);
        let closer = |name| Closer::start(name, 1 << 16).unwrap();
        let closers = Closers {
            container: closer("close-own"),
            neighbours: closer("close-others"),
            granted: closer("close-granted"),
        };
        let (bell, ringer) = Bell::new(&closers.container).unwrap();
        let device = Device {
            name: "soft0".into(),
            kind: DeviceKind::Soft,
            link: None,
            gids: Gids::default(),
            pkeys: None,
            port: FIRST_PORT,
            marks: Marks::default(),
        };
        let lids = [own.port.lid(), other.port.lid()];
        let node = Node {
            worker: Worker::start(plane, bell, 0).unwrap(),
            quota: Quota::new(&LIMITS, Arc::clone(&holdings)),
            limits: LIMITS,
            entrance,
            places,
            queues: Queues::default(),
            doorbell_file: Arc::new(doorbell_file.into_fd()),
            bell: Arc::new(ringer),
            processors: 2,
            device: SoftDevice::new(&device, 1, &LIMITS),
            port: own.port,
            warden: Warden::absent().unwrap(),
            gids_fresh_until: u64::MAX,
            gids_due: None,
            gids_pause: 0,
            gids_told: None,
            shown: None,
            neighbours: Neighbours::new(Budget::new(65_530)),
            voice: Arc::new(voice::pair(holdings).unwrap().0),
            shares: HashMap::new(),
            granted: Granted::default(),
            adopted: AdoptedFiles::default(),
            holes: Holes::new().ok(),
            spares: Spares::default(),
            last_pd: 0,
            last_share: 0,
            closers,
            announced: Vec::new(),
        };
        let own = Place { lid: lids[0], listener: own.listener };
        // The other port lives for ever.
        std::mem::forget(other.port);
        std::mem::forget(other.tenure);
        Self { node, own, other: Place { lid: lids[1], listener: other.listener }, _dir: dir }
    }

    /// A connection that has said hello.
    pub fn session(&mut self) -> Session {
        static NEXT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(1);
        let mut session = Session::new(NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed));
        let hello = Hello { version: ringfence_protocol::VERSION, reserved: 0 };
        self.ask(&mut session, Op::HELLO, hello.as_bytes(), None).unwrap().unwrap();
        session
    }

    /// Serves one request: the body of its answer.
    pub fn ask(
        &mut self,
        session: &mut Session,
        op: Op,
        body: &[u8],
        fd: Option<OwnedFd>,
    ) -> Result<Result<Vec<u8>, Errno>, PeerFault> {
        let mut fd = fd;
        let answer = session.serve(op, body, &mut fd, &mut self.node)?;
        Ok(answer.map(|answer| {
            assert!(answer.fds.len() <= ringfence_protocol::control::MAX_FDS, "too many descriptors");
            assert!(answer.body.len() + 16 <= ringfence_protocol::control::MAX_DATAGRAM, "too long an answer");
            answer.body
        }))
    }

    /// Ends the sessions: everything that they held is free afterwards.
    pub fn end(&mut self, sessions: Vec<Session>) {
        for mut session in sessions {
            session.end(&mut self.node);
        }
        let node = &mut self.node;
        while !node.neighbours.list.is_empty() {
            let neighbour = node.neighbours.list.swap_remove(0);
            if let Some(link) = neighbour.link() {
                drop(node.worker.call(move |plane| plane.remove_link(link)));
            }
        }
        // Whoever has broken the protocol would not be listened to any more.
        node.neighbours = Neighbours::new(Budget::new(65_530));
        while node.worker.notices.try_recv().is_ok() {}
        let Closers { container, neighbours, granted } = &node.closers;
        [container, neighbours, granted].into_iter().for_each(is_done);
        for resource in RESOURCES {
            let (left, limit) = (node.quota.left(resource), node.quota.limit(resource));
            assert_eq!(left, limit, "of {resource:?} something is never given back");
        }
        assert!(node.shares.is_empty(), "a region is left to be shared: {:?}", node.shares);
        let left = node.worker.call(|plane| {
            let queues = plane.qps.iter().flatten().count() + plane.by_number.len();
            (queues, plane.cqs.iter().flatten().count(), plane.device.links.is_empty())
        });
        assert_eq!(left, (0, 0, true), "queue pairs, completion queues or links are left");
    }
}
