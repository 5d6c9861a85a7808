//! Two taken-over proxies.

use super::{Attack, descriptors, neighbours};
use crate::takeover::hands::call;
use crate::takeover::table::{Attempt, Seen};
use crate::takeover::victim::{BESIDE, BESIDE_AT};
use anyhow::{Context, Result, ensure};
use nix::libc;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::time::Duration;

/// What the attacker's does.
pub(in crate::takeover) fn giving() -> Vec<Attempt> {
    vec![Attempt { name: "giving another taken-over proxy a descriptor", run: give, control: false }]
}

fn give(attack: &mut Attack) -> Result<Seen> {
    let exchange = attack.exchange.clone().context("no accomplice")?;
    let number = attack.share()?.0;
    let lid: u16 = exchange.hear("accomplice")?.first().context("the accomplice said nothing")?.parse()?;
    exchange.say("accomplice-call", &[])?;
    // So that it already waits.
    std::thread::sleep(Duration::from_millis(200));
    let (socket, connected) = neighbours::connect(attack, lid)?;
    if let Err(errno) = connected {
        return Ok(Seen::Refused(errno));
    }
    let text = attack.hands.put(b"take this");
    let vector = attack.hands.words(&[text, 9]);
    let control = [20, u64::from(libc::SOL_SOCKET as u32) | (libc::SCM_RIGHTS as u64) << 32, number as u64];
    let control = attack.hands.words(&control);
    let message = attack.hands.words(&[0, 0, vector, 1, control, 20, 0]);
    if let Err(errno) = attack.hands.call(libc::SYS_sendmsg, &[socket, message, libc::MSG_NOSIGNAL as u64])? {
        return Ok(Seen::Refused(errno));
    }
    let words = exchange.hear("accomplice-has")?;
    Ok(match words.first().map(String::as_str) {
        Some("it") => Seen::Reached(format!("port {lid} reads the victim's region")),
        _ => Seen::Nothing(words.join(" ")),
    })
}

/// What the other's does: takes a connection and a descriptor before the proxy's own program sees either.
pub fn accomplice(attack: &mut Attack) -> Result<()> {
    let exchange = attack.exchange.clone().context("nobody to work with")?;
    exchange.say("accomplice", &[attack.lid.to_string()])?;
    exchange.hear("accomplice-call")?;
    let own = attack.lid.to_string();
    let listener = descriptors::all(attack)?.into_iter().find(|held| {
        let socket = held.fd.as_fd();
        let is_port = neighbours::path_of(socket).is_some_and(|path| path.ends_with(&own));
        is_port && rustix::net::sockopt::socket_acceptconn(socket).unwrap_or(false)
    });
    let listener = listener.context("the proxy listens nowhere")?.number as u64;
    // The number that the connection is going to have: the lowest that is free.
    let next = attack.hands.call(libc::SYS_fcntl, &[listener, libc::F_DUPFD_CLOEXEC as u64, 3])?.context("dup")?;
    let watched = attack.hands.words(&[listener | (libc::POLLIN as u64) << 32, next | (libc::POLLIN as u64) << 32]);
    let text = attack.hands.room(64);
    let vector = attack.hands.words(&[text, 64]);
    let control = attack.hands.room(64);
    let message = attack.hands.words(&[0, 0, vector, 1, control, 64, 0]);
    let flags = (libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK) as u64;
    let answers = attack.hands.calls(&[
        call(libc::SYS_close, &[next]),
        call(libc::SYS_poll, &[watched, 1, 1000]),
        call(libc::SYS_accept4, &[listener, 0, 0, flags]),
        call(libc::SYS_poll, &[watched + 8, 1, 500]),
        call(libc::SYS_recvmsg, &[next, message, (libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC) as u64]),
    ])?;
    let mut taken = || -> Result<()> {
        ensure!(answers[2] == Ok(next), "no connection came: {answers:?}");
        answers[4].with_context(|| format!("no message came: {answers:?}"))?;
        let number = attack.hands.number(control + 16);
        let fd = attack.hands.fetch(number)?.context("no descriptor came")?;
        let mut found = [0; BESIDE.len()];
        File::from(fd).read_exact_at(&mut found, BESIDE_AT)?;
        ensure!(found == *BESIDE, "it is another file");
        Ok(())
    };
    let words = taken().map_or_else(|error| format!("nothing: {error:#}"), |()| "it".to_owned());
    exchange.say("accomplice-has", &[words])
}
