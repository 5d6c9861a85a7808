//! The proxy's warden, to which it has a socket.

use super::{Attack, descriptors};
use crate::takeover::hands::call;
use crate::takeover::table::{Attempt, Seen};
use anyhow::{Context, Result, ensure};
use nix::libc;
use rustix::io::Errno;
use std::os::fd::AsFd;

/// What a proxy says when its warden is to do something with a memory file.
const REQUEST: &[u8] = b"file";

/// The last of all: a warden that is asked for what it does not do ends its proxy.
pub(in crate::takeover) fn requests() -> Vec<Attempt> {
    vec![Attempt { name: "having it open a neighbour's memory file", run: open_the_share, control: false }]
}

fn open_the_share(attack: &mut Attack) -> Result<Seen> {
    let number = attack.share()?.0;
    let socket = socket(attack)?;
    let text = attack.hands.put(REQUEST);
    let vector = attack.hands.words(&[text, REQUEST.len() as u64]);
    let control =
        attack.hands.words(&[20, u64::from(libc::SOL_SOCKET as u32) | (libc::SCM_RIGHTS as u64) << 32, number as u64]);
    let asking = attack.hands.words(&[0, 0, vector, 1, control, 20, 0]);
    let room = attack.hands.room(16);
    let answer = attack.hands.words(&[room, 16]);
    let answer_control = attack.hands.room(32);
    let hearing = attack.hands.words(&[0, 0, answer, 1, answer_control, 32, 0]);
    let watched = attack.hands.words(&[socket | (libc::POLLIN as u64) << 32]);
    let answers = attack.hands.calls(&[
        call(libc::SYS_sendmsg, &[socket, asking, libc::MSG_NOSIGNAL as u64]),
        call(libc::SYS_poll, &[watched, 1, 500]),
        call(libc::SYS_recvmsg, &[socket, hearing, (libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC) as u64]),
    ])?;
    ensure!(answers[0].is_ok(), "the warden could not be asked: {answers:?}");
    let length = u64::from_ne_bytes(attack.hands.get(answer_control, 8).try_into()?);
    Ok(match answers[2] {
        Ok(bytes) if bytes > 0 && length >= 20 => Seen::Reached("it opened it".to_owned()),
        Ok(_) => Seen::Refused(Errno::CONNRESET),
        Err(errno) => Seen::Refused(errno),
    })
}

/// The socket that the proxy made for its warden while it was root, as the peer's credentials say.
fn socket(attack: &mut Attack) -> Result<u64> {
    let own = attack.hands.call(libc::SYS_getpid, &[])?.context("getpid")?;
    let mut all = Vec::new();
    for held in descriptors::all(attack)? {
        let socket = held.fd.as_fd();
        let is_connected = rustix::net::getpeername(socket).is_ok();
        if !is_connected {
            continue;
        }
        attack.hands.clear();
        let (peer, length) = (attack.hands.room(12), attack.hands.words(&[12]));
        let arguments = [held.number as u64, libc::SOL_SOCKET as u64, libc::SO_PEERCRED as u64, peer, length];
        if attack.hands.call(libc::SYS_getsockopt, &arguments)?.is_ok() {
            let [pid, user] = [peer, peer + 4].map(|at| attack.hands.number(at));
            all.push((held.number, pid, user));
            if pid as u64 == own && user == 0 {
                attack.hands.clear();
                return Ok(held.number as u64);
            }
        }
    }
    anyhow::bail!("no socket to a warden among {all:?}")
}
