//! Links to other proxies, under whatever name.

use super::descriptors;
use super::sockets::{address, socket};
use super::{Attack, attempt, judge};
use crate::takeover::hands::call;
use crate::takeover::table::{Attempt, Seen};
use anyhow::{Context, Result};
use nix::libc::{self, AT_FDCWD, F_ADD_SEALS, MREMAP_MAYMOVE, O_CREAT, O_RDWR, PROT_READ, PROT_WRITE, SOCK_SEQPACKET};
use ringfence_proxy::device::soft::link::BYTES;
use rustix::io::Errno;
use rustix::net::{SocketAddrAny, SocketAddrUnix};
use std::os::fd::AsFd;
use std::path::PathBuf;

/// What bells are made of.
const SOCK_DGRAM: i32 = libc::SOCK_DGRAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
const SHRINK_GROW_SEAL: u64 = (libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL) as u64;

/// As the proxy's own program would.
pub(in crate::takeover) fn own_link() -> Vec<Attempt> {
    vec![Attempt {
        name: "connect, another port",
        run: |a| {
            let (socket, answer) = connect(a, a.target.victim_lid)?;
            let _ = a.hands.call(libc::SYS_close, &[socket])?;
            Ok(judge(answer, &[]))
        },
        control: false,
    }]
}

/// As somebody else's.
pub(in crate::takeover) fn other_name() -> Vec<Attempt> {
    vec![
        Attempt { name: "hello, in the receiver's name", run: |a| hello(a, a.target.victim_lid), control: false },
        Attempt { name: "hello, in nobody's name", run: |a| hello(a, 900), control: false },
        Attempt { name: "hello, in the name of port 0", run: |a| hello(a, 0), control: false },
        attempt!("opening the table of identities", SYS_openat, |a| [AT_FDCWD, file(a, "identities"), O_RDWR, 0], also NOENT),
        attempt!("opening the ports' tables", SYS_openat, |a| [AT_FDCWD, file(a, "gids"), O_RDWR, 0], also NOENT),
        attempt!("taking another port's lock", SYS_openat, |a| [AT_FDCWD, file(a, "lids/1"), O_CREAT, 0o600], also NOENT),
        attempt!("making the table of identities writable", SYS_mprotect, |a| [
            a.target.identities, 4096, PROT_READ | PROT_WRITE,
        ]),
        attempt!("making the ports' tables writable", SYS_mprotect, |a| [a.target.pages, 4096, PROT_READ | PROT_WRITE]),
        attempt!("growing its own table over its neighbours'", SYS_mremap, |a| [a.target.own_page, 4096, 8192, MREMAP_MAYMOVE, 0]),
        Attempt { name: "listening in another port's place", run: in_its_place, control: false },
    ]
    .into_iter()
    .map(|attempt| Attempt { control: false, ..attempt })
    .collect()
}

/// A file of the node's directory of ports.
fn file(attack: &mut Attack, name: &str) -> u64 {
    let path = attack.target.fabric.join(name);
    attack.hands.text(&path.to_string_lossy())
}

/// Where ports listen, as the proxy names it: from its own port's socket.
fn fabric(attack: &mut Attack) -> Result<PathBuf> {
    let own = attack.lid.to_string();
    for held in descriptors::all(attack)? {
        // Bound before the proxy left the host's files: only the name is its own still.
        if path_of(held.fd.as_fd()).is_some_and(|path| path.ends_with(&own)) {
            return Ok(PathBuf::from("/"));
        }
    }
    anyhow::bail!("the proxy holds no socket {own}")
}

/// What a Unix socket is bound to.
pub(super) fn path_of(socket: impl AsFd) -> Option<PathBuf> {
    path_in(rustix::net::getsockname(socket).ok()?)
}

/// What its peer is bound to.
pub(super) fn path_of_peer(socket: impl AsFd) -> Option<PathBuf> {
    path_in(rustix::net::getpeername(socket).ok()??)
}

fn path_in(name: SocketAddrAny) -> Option<PathBuf> {
    let name = SocketAddrUnix::try_from(name).ok()?;
    Some(PathBuf::from(name.path()?.to_str().ok()?))
}

/// A socket, and whether the proxy of the port `lid` can be connected to by it.
pub(super) fn connect(attack: &mut Attack, lid: u16) -> Result<(u64, Result<u64, Errno>)> {
    let path = fabric(attack)?.join(lid.to_string());
    let socket = socket(attack, SOCK_SEQPACKET)?;
    let (address, bytes) = address(attack, path.to_string_lossy().as_bytes());
    Ok((socket, attack.hands.call(libc::SYS_connect, &[socket, address, bytes])?))
}

/// Whether the victim accepts a link in the name of a port: it would have closed it otherwise.
fn hello(attack: &mut Attack, lid: u16) -> Result<Seen> {
    let socket = match silent(attack) {
        Ok(socket) => socket,
        // Further ones may be turned away before they can say a word; the first is heard.
        Err(_) if lid != attack.target.victim_lid => return Ok(Seen::Refused(Errno::CONNRESET)),
        Err(error) => return Err(error),
    };
    let seen = hello_on(attack, socket, lid)?;
    // There may not be many of them at a time.
    let _ = attack.hands.call(libc::SYS_close, &[socket])?;
    Ok(seen)
}

/// A connection that the victim's proxy keeps until something is said: one of few that it has for us.
fn silent(attack: &mut Attack) -> Result<u64> {
    for _ in 0..20 {
        let (socket, connected) = connect(attack, attack.target.victim_lid)?;
        connected.context("connecting to the victim's proxy")?;
        let watched = attack.hands.words(&[socket | (libc::POLLIN as u64) << 32]);
        if attack.hands.call(libc::SYS_poll, &[watched, 1, 50])? == Ok(0) {
            return Ok(socket);
        }
        let _ = attack.hands.call(libc::SYS_close, &[socket])?;
        attack.hands.clear();
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    anyhow::bail!("the victim's proxy turns everybody away, whatever he says")
}

fn hello_on(attack: &mut Attack, socket: u64, lid: u16) -> Result<Seen> {
    let name = attack.hands.text("link");
    let pair = attack.hands.room(8);
    let made = attack.hands.calls(&[
        call(libc::SYS_memfd_create, &[name, u64::from(libc::MFD_ALLOW_SEALING | libc::MFD_CLOEXEC)]),
        call(libc::SYS_socketpair, &[libc::AF_UNIX as u64, SOCK_DGRAM as u64, 0, pair]),
    ])?;
    let file = made[0].context("a link's memory")?;
    made[1].context("a link's bell")?;
    let bell = attack.hands.number(pair) as u64;
    let ready = attack.hands.calls(&[
        call(libc::SYS_fchmod, &[file, 0o400]),
        call(libc::SYS_ftruncate, &[file, BYTES as u64]),
        call(libc::SYS_fcntl, &[file, F_ADD_SEALS as u64, SHRINK_GROW_SEAL]),
    ])?;
    ready.into_iter().collect::<Result<Vec<_>, _>>().context("a link's memory")?;
    let text = format!("{{\"hello\":{{\"lid\":{lid}}}}}");
    let text_at = attack.hands.put(text.as_bytes());
    let vector = attack.hands.words(&[text_at, text.len() as u64]);
    let rights = u64::from(libc::SOL_SOCKET as u32) | (libc::SCM_RIGHTS as u64) << 32;
    let control = attack.hands.words(&[24, rights, file | bell << 32]);
    let message = attack.hands.words(&[0, 0, vector, 1, control, 24, 0]);
    attack.hands.call(libc::SYS_sendmsg, &[socket, message, libc::MSG_NOSIGNAL as u64])?.context("sending hello")?;
    let watched = attack.hands.words(&[socket | (libc::POLLIN as u64) << 32]);
    let buffer = attack.hands.room(8);
    let answers = attack.hands.calls(&[
        call(libc::SYS_poll, &[watched, 1, 300]),
        call(libc::SYS_recvfrom, &[socket, buffer, 8, libc::MSG_DONTWAIT as u64, 0, 0]),
    ])?;
    // Closed: there is something to be read, which is nothing.
    Ok(match (answers[0].context("waiting for the link's end")?, answers[1]) {
        (0, _) => Seen::Reached(format!("port {} keeps the link", attack.target.victim_lid)),
        (_, Ok(0)) => Seen::Refused(Errno::CONNRESET),
        (_, Ok(_)) => Seen::Reached(format!("port {} answers", attack.target.victim_lid)),
        (_, Err(errno)) => Seen::Refused(errno),
    })
}

/// Takes the victim's socket away and binds one of the same name.
fn in_its_place(attack: &mut Attack) -> Result<Seen> {
    let path = fabric(attack)?.join(attack.target.victim_lid.to_string());
    let socket = socket(attack, SOCK_SEQPACKET)?;
    let moved = attack.hands.text(&path.with_file_name("899").to_string_lossy());
    let from = attack.hands.text(&path.to_string_lossy());
    let renamed = attack.hands.call(libc::SYS_rename, &[from, moved])?;
    let (address, bytes) = address(attack, path.to_string_lossy().as_bytes());
    let bound = attack.hands.call(libc::SYS_bind, &[socket, address, bytes])?;
    let also = [Errno::ROFS, Errno::NOENT, Errno::ADDRINUSE];
    Ok(match judge(renamed, &also) {
        reached @ Seen::Reached(_) => reached,
        _ => judge(bound, &also),
    })
}
