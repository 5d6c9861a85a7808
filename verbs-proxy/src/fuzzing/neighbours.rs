//! Messages of a neighbour, with descriptors of all kinds: over a link that it makes, and over one that we make.

use super::control::connected_qp;
use super::node::{Scene, scene};
use crate::datagram;
use crate::device::soft::link::BYTES;
use crate::plane::bell::Bell;
use crate::shared::SealedFile;
use arbitrary::{Arbitrary, Unstructured};
use rustix::fd::{AsFd, OwnedFd};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, connect, socket_with};

/// What the neighbour does next.
#[derive(Debug, Arbitrary)]
enum Action {
    /// Over the one link or the other, with descriptors.
    Say(bool, Said, Vec<Descriptor>),
    Listen(bool),
    Close(bool),
}

/// A message: one that there is, or any text.
#[derive(Debug, Arbitrary)]
enum Said {
    Hello(Option<u16>),
    Welcome,
    Share(u8, Vec<(u32, u32)>),
    Shared(u8),
    Refused(u8),
    Unshare(u8),
    Text(String),
    Bytes(Vec<u8>),
}

#[derive(Clone, Copy, Debug, Arbitrary)]
enum Descriptor {
    Rings,
    Pages,
    Bell,
    Unsealed,
    Pipe,
}

/// One input.
pub fn run(data: &[u8]) {
    let mut input = Unstructured::new(data);
    let mut scene = scene();
    let session = connected_qp(&mut scene);
    // The queue pair has had a link made to the other port.
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let made = accept_with(&scene.other.listener, flags).ok();
    let theirs = dial(&mut scene);
    let mut sockets = [made, Some(theirs)];
    for _ in 0..32 {
        if input.is_empty() {
            break;
        }
        let Ok(action) = input.arbitrary() else { break };
        act(&sockets, &mut scene, &action);
        match action {
            Action::Close(which) => drop(sockets[usize::from(which)].take()),
            Action::Listen(which) => {
                let mut buffer = [0; 1 << 14];
                while let Some(socket) = &sockets[usize::from(which)]
                    && datagram::receive(socket, &mut buffer).is_ok_and(|received| received.bytes > 0)
                {}
            }
            Action::Say(..) => {}
        }
        for position in (0..scene.node.neighbours.list.len()).rev() {
            scene.node.serve_neighbour(position);
        }
        assert!(scene.node.neighbours.list.len() <= 2, "more links than sockets");
    }
    scene.end(vec![session]);
}

/// The neighbour connects.
fn dial(scene: &mut Scene) -> OwnedFd {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
    connect(&socket, &SocketAddrUnix::new(scene.node.port.socket_of(scene.own.lid)).unwrap()).unwrap();
    let accepted = accept_with(&scene.own.listener, flags).unwrap();
    scene.node.let_neighbour_in(accepted);
    socket
}

fn act(sockets: &[Option<OwnedFd>; 2], scene: &mut Scene, action: &Action) {
    let Action::Say(which, said, descriptors) = action else { return };
    let Some(socket) = &sockets[usize::from(*which)] else { return };
    let fds: Vec<OwnedFd> = descriptors.iter().take(16).map(|kind| make(*kind, scene)).collect();
    let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    // One that is not listened to any more says nothing.
    let _ = datagram::send(socket, &text(said, scene.other.lid), &fds);
}

fn text(said: &Said, lid: u16) -> Vec<u8> {
    let text = match said {
        Said::Hello(other) => format!(r#"{{"hello":{{"lid":{}}}}}"#, other.unwrap_or(lid)),
        Said::Welcome => r#"{"welcome":{}}"#.to_owned(),
        Said::Share(share, runs) => {
            let run = |(offset, bytes): &(u32, u32)| match offset >> 30 {
                // Nearly always pages, of which the files have sixteen.
                3 => format!("[{},{}]", u64::from(*offset) << 32, u64::from(*bytes) << 24),
                _ => format!("[{},{}]", offset % 16 * 4096, bytes % 18 * 4096),
            };
            let runs: Vec<_> = runs.iter().take(20).map(run).collect();
            format!(r#"{{"share":{{"share":{share},"runs":[{}]}}}}"#, runs.join(","))
        }
        Said::Shared(share) => format!(r#"{{"shared":{{"share":{share}}}}}"#),
        Said::Refused(share) => format!(r#"{{"refused":{{"share":{share}}}}}"#),
        Said::Unshare(share) => format!(r#"{{"unshare":{{"share":{share}}}}}"#),
        Said::Text(text) => text.clone(),
        Said::Bytes(bytes) => return bytes.clone(),
    };
    text.into_bytes()
}

fn make(kind: Descriptor, scene: &Scene) -> OwnedFd {
    match kind {
        Descriptor::Rings => SealedFile::create("rings", BYTES).unwrap().into_fd(),
        Descriptor::Pages => SealedFile::create("pages", 16 << 12).unwrap().into_fd(),
        Descriptor::Bell => Bell::new(&scene.node.closers.neighbours).unwrap().1,
        Descriptor::Unsealed => rustix::fs::memfd_create("unsealed", rustix::fs::MemfdFlags::CLOEXEC).unwrap(),
        Descriptor::Pipe => rustix::pipe::pipe().unwrap().0,
    }
}
