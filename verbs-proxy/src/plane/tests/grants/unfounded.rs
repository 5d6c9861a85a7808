//! Wishes that do not hold: nothing is granted for them, and what is right beside them is.

use super::*;
use crate::control::session::random;
use crate::device::soft::Qp;
use crate::device::soft::wire::Request;

/// What is asked for: over which link, what, and over what of our memory that the neighbour has mapped.
#[derive(Clone, Copy, Debug)]
struct Asked {
    at: LinkId,
    wish: Wish,
    share: u32,
}

/// Changes one thing about a wish that holds, or about what it is for.
type Fault = fn(&mut Scene, &mut Asked);

/// A region of the responder's with the name 2, of which neighbours see this. `key`: what keys are tried.
fn register(scene: &mut Scene, pd: PdId, access: Access, shown: u64, key: impl FnMut() -> u32) -> Granted {
    let rig = &mut scene.two.rigs[1];
    let region = MemoryRegion::new(Arc::clone(&rig.memory), 0, MEMORY as u64, IOVA, pd, access, 2).unwrap();
    rig.entrance.insert(region.shown(0..shown), key).unwrap()
}

/// The wish is for a region like this instead.
fn for_region(scene: &mut Scene, asked: &mut Asked, pd: PdId, access: Access) {
    (asked.wish.key, asked.wish.share) = (register(scene, pd, access, MEMORY as u64, random).key, 2);
}

fn qp<'a>(scene: &'a mut Scene, asked: &Asked) -> &'a mut Qp {
    scene.two.rigs[1].plane.qps[asked.wish.queue as usize].as_mut().unwrap()
}

fn live(scene: &Scene) -> usize {
    scene.page(1).slots.iter().filter(|slot| !slot.holds(0)).count()
}

/// Two queue pairs of the responder are connected to the neighbour, and it has mapped the memory. `fault` is about what is wished for
/// of the first; what is wished for of the second holds.
fn case(name: &str, writes: bool, fault: Fault) -> Option<Grant> {
    let mut scene = Scene::new();
    let other = scene.two.rigs[1].qp(1, 300);
    scene.two.rigs[1].ready(&other, 101, Destination::Port(1));
    let share = if writes { WRITABLE } else { 1 };
    scene.show(share, writes);
    let at = scene.two.links[1];
    let key = scene.two.rigs[1].key;
    let incarnation = |queue: usize| scene.two.rigs[1].plane.qps[queue].as_ref().unwrap().incarnation;
    let wish = |queue: u32| Wish { queue, incarnation: incarnation(queue as usize), key, share: 1, writes };
    let (mut asked, honest) = (Asked { at, wish: wish(0), share }, wish(1));
    fault(&mut scene, &mut asked);
    let plane = &mut scene.two.rigs[1].plane;
    for (at, wish) in [(asked.at, asked.wish), (at, honest)] {
        plane.device.links.get_mut(at).unwrap().grants.giving.ask(wish);
    }
    let given = plane.give(asked.at, &asked.wish, asked.share);
    assert_eq!(live(&scene), usize::from(given.is_some()), "{name}: {asked:?}");
    let plane = &mut scene.two.rigs[1].plane;
    let right = plane.give(at, &honest, share).unwrap_or_else(|| panic!("{name}: what holds is not granted"));
    assert_eq!((right.to, right.from, right.key), (300, 101, key));
    assert_eq!((right.iova, right.length), (IOVA, MEMORY as u64), "no more than there is");
    assert_eq!(live(&scene), 1 + usize::from(given.is_some()), "{name}");
    given
}

#[test]
fn nothing_is_granted_for_what_does_not_hold() {
    let faults: [(&str, Fault); 16] = [
        ("a key of nothing, whose place has one", |_, asked| asked.wish.key ^= 1 << 31),
        ("the key of an earlier region, whose place has another", |scene, asked| {
            let before = register(scene, PD, ALL, MEMORY as u64, random);
            drop(scene.two.rigs[1].plane.regions.remove(before));
            let after = register(scene, PD, ALL, MEMORY as u64, || before.key ^ 1 << 31);
            assert_ne!(after.key, before.key);
            (asked.wish.key, asked.wish.share) = (before.key, 2);
        }),
        ("another protection domain", |scene, asked| for_region(scene, asked, PdId(2), ALL)),
        ("the name of another region", |_, asked| asked.wish.share = 2),
        ("memory that the neighbour has not mapped", |_, asked| asked.share = 99),
        ("a region of which neighbours see nothing", |scene, asked| {
            (asked.wish.key, asked.wish.share) = (register(scene, PD, ALL, 0, random).key, 2);
        }),
        ("a region without the right", |scene, asked| {
            let access = if asked.wish.writes { Access::REMOTE_READ } else { Access::REMOTE_WRITE };
            for_region(scene, asked, PD, access);
        }),
        ("a queue pair without the right", |scene, asked| {
            let access = if asked.wish.writes { Access::REMOTE_READ } else { Access::REMOTE_WRITE };
            qp(scene, asked).attr.access = access;
        }),
        ("a queue pair that is not there", |_, asked| asked.wish.queue = 9),
        ("the queue pair that had the number before", |_, asked| asked.wish.incarnation ^= 1 << 40),
        ("a queue pair that is connected to another neighbour", |scene, asked| qp(scene, asked).device.port = 7),
        ("over the link of another neighbour", |scene, asked| {
            let mapping = Arc::new(Mapping::of(&SealedFile::create("link", BYTES).unwrap()).unwrap());
            let pages = [scene.page(1), scene.page(0)];
            let plane = &mut scene.two.rigs[1].plane;
            asked.at = plane.add_link(link(2, 3, End::Acceptor, &mapping));
            let link = plane.device.links.get_mut(asked.at).unwrap();
            let [ours, theirs] = pages;
            link.grants.set_ours(ours, true);
            link.grants.set_theirs(theirs, lease());
            link.shared.insert(asked.share, Shared::CONFIRMED);
        }),
        ("a queue pair in RESET", |scene, asked| qp(scene, asked).state = QpState::RESET),
        ("a queue pair in INIT", |scene, asked| qp(scene, asked).state = QpState::INIT),
        ("a queue pair in ERR", |scene, asked| qp(scene, asked).state = QpState::ERR),
        ("a queue pair in SQE", |scene, asked| qp(scene, asked).state = QpState::SQE),
    ];
    for (name, fault) in faults {
        for writes in [false, true] {
            assert_eq!(case(name, writes, fault), None, "{name}, writes: {writes}");
        }
    }
}

#[test]
fn no_more_is_granted_than_neighbours_see() {
    let grant = case("a part of a region", true, |scene, asked| {
        (asked.wish.key, asked.wish.share) = (register(scene, PD, ALL, 3 * PAGE as u64, random).key, 2);
    });
    assert_eq!(grant.map(|grant| (grant.to, grant.iova, grant.length)), Some((200, IOVA, 3 * PAGE as u64)));
}

/// Requests that do not hold are not counted, however many come.
#[test]
fn nothing_is_asked_for_that_does_not_hold() {
    let mut scene = Scene::new();
    let (at, key) = (scene.two.links[1], scene.two.rigs[1].key);
    let hidden = register(&mut scene, PD, ALL, 0, random).key;
    let plane = &mut scene.two.rigs[1].plane;
    let right = Request { to: 200, from: 100, opcode: Opcode::RDMA_WRITE, total: 8, rkey: key, ..Request::default() };
    for (name, request, wishes) in [
        ("no such queue pair", Request { to: 201, ..right }, 0),
        ("no such key", Request { rkey: key ^ 1 << 31, ..right }, 0),
        ("a region of which neighbours see nothing", Request { rkey: hidden, ..right }, 0),
        ("no bytes", Request { total: 0, ..right }, 0),
        ("not one-sided", Request { opcode: Opcode::SEND, ..right }, 0),
        ("what holds", right, 1),
    ] {
        (0..10).for_each(|_| plane.offer(at, &request));
        assert_eq!(plane.take_notices().count(), wishes, "{name}");
    }
}
