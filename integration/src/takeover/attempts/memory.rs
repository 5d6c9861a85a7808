//! Memory that a neighbour's proxy shares with this one's.

use super::Attack;
use super::{attempt, descriptors, judge, neighbours};
use crate::takeover::hands::call;
use crate::takeover::table::{Attempt, Seen};
use crate::takeover::victim::{BESIDE, BESIDE_AT, EDGE, REGION, SECRET};
use anyhow::{Context, Result, ensure};
use nix::libc::{self, AT_FDCWD, F_ADD_SEALS, F_SEAL_WRITE, FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, O_RDWR};
use nix::libc::{MAP_SHARED, PROT_READ, PROT_WRITE};
use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, PermissionsExt};

const MADV_REMOVE: u64 = 9;

/// What the neighbour meant to be read.
pub(in crate::takeover) fn reading() -> Vec<Attempt> {
    vec![
        Attempt { name: "keeping the descriptor", run: catch, control: false },
        Attempt {
            name: "the page beside the one that was sent",
            run: |a| {
                let at = map(a, PROT_READ, BESIDE_AT)?.context("mapping the descriptor")?;
                let buffer = a.hands.room(BESIDE.len());
                a.hands.copy(buffer, at, BESIDE.len() as u64)?;
                ensure!(a.hands.get(buffer, BESIDE.len()) == BESIDE, "the descriptor is of another file");
                Ok(Seen::Reached("it stands there".to_owned()))
            },
            control: false,
        },
        Attempt {
            name: "handing it to the container",
            run: |a| {
                let (_, fd) = a.share()?;
                let mut found = [0; BESIDE.len()];
                File::from(fd.try_clone()?).read_exact_at(&mut found, BESIDE_AT)?;
                ensure!(found == *BESIDE, "the descriptor is of another file");
                Ok(Seen::Reached("the container reads it".to_owned()))
            },
            control: false,
        },
    ]
}

/// What it did not.
pub(in crate::takeover) fn writing() -> Vec<Attempt> {
    let attempts = vec![
        Attempt {
            name: "mapping it for writing",
            run: |a| Ok(judge(map(a, PROT_READ | PROT_WRITE, 0)?, &[])),
            control: false,
        },
        Attempt {
            name: "mprotect of its mapping",
            run: |a| {
                let at = map(a, PROT_READ, 0)?.context("mapping the descriptor")?;
                let answer = a.hands.call(libc::SYS_mprotect, &[at, 4096, (PROT_READ | PROT_WRITE) as u64])?;
                Ok(judge(answer, &[]))
            },
            control: false,
        },
        Attempt {
            name: "madvise, removing its pages",
            run: |a| {
                let at = map(a, PROT_READ, 0)?.context("mapping the descriptor")?;
                Ok(judge(a.hands.call(libc::SYS_madvise, &[at, 4096, MADV_REMOVE])?, &[]))
            },
            control: false,
        },
        attempt!("pwrite64", SYS_pwrite64, |a| [a.share()?.0, a.hands.put(b"EVIL"), 4, 0], also BADF),
        attempt!("ftruncate", SYS_ftruncate, |a| [a.share()?.0, 0], also BADF INVAL),
        attempt!("fallocate", SYS_fallocate, |a| [a.share()?.0, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 4096], also BADF),
        attempt!("fchmod", SYS_fchmod, |a| [a.share()?.0, 0o666]),
        attempt!("fchown", SYS_fchown, |a| [a.share()?.0, 0, 0]),
        attempt!("sealing it against its owner", SYS_fcntl, |a| [a.share()?.0, F_ADD_SEALS, F_SEAL_WRITE]),
        attempt!("opening it again", SYS_openat, |a| [AT_FDCWD, again(a)?, O_RDWR, 0], also NOENT),
    ];
    attempts.into_iter().map(|attempt| Attempt { control: false, ..attempt }).collect()
}

/// What is no part of the region that was sent.
pub(in crate::takeover) fn edges() -> Vec<Attempt> {
    vec![Attempt {
        name: "bytes before the region, on its first page, and behind it, on its last",
        run: |a| {
            let Some((number, fd, said)) = next_file(a, "send-edged")? else {
                // Where regions are shown, the link's buffer must have been.
                ensure!(a.share.is_none(), "the victim sent something, and no file came");
                return Ok(Seen::Nothing("no file came".to_owned()));
            };
            let file = File::from(fd);
            let mut bytes = vec![0; file.metadata()?.len() as usize];
            file.read_exact_at(&mut bytes, 0)?;
            if bytes.windows(EDGE.len()).any(|window| window == EDGE) {
                return Ok(Seen::Reached(format!("in {number}, which came with {said}")));
            }
            Ok(Seen::Nothing(format!("not in the file that came with {said}")))
        },
        control: false,
    }]
}

/// What the container can do with it.
pub(in crate::takeover) fn handed_over() -> Vec<Attempt> {
    vec![Attempt { name: "opening it again, in the container", run: in_the_container, control: false }]
}

/// What was never exchanged.
pub(in crate::takeover) fn unnamed() -> Vec<Attempt> {
    vec![Attempt {
        name: "the victim's secret in memory files that the proxy holds",
        run: |a| {
            let mut looked_at = 0;
            for held in descriptors::all(a)?.into_iter().filter(descriptors::Held::is_memory) {
                let file = File::from(held.fd);
                let mut bytes = vec![0; file.metadata()?.len().min(1 << 20) as usize];
                // What cannot be read holds no secret for us.
                let _ = file.read_exact_at(&mut bytes, 0);
                looked_at += 1;
                if bytes.windows(SECRET.len()).any(|window| window == SECRET) {
                    return Ok(Seen::Reached(format!("descriptor {}", held.number)));
                }
            }
            Ok(Seen::Nothing(format!("not in {looked_at} files")))
        },
        control: false,
    }]
}

fn again(attack: &mut Attack) -> Result<u64> {
    let path = format!("/proc/self/fd/{}", attack.share()?.0);
    Ok(attack.hands.text(&path))
}

fn map(attack: &mut Attack, protection: i32, offset: u64) -> Result<Result<u64, rustix::io::Errno>> {
    let number = attack.share()?.0 as u64;
    attack.hands.call(libc::SYS_mmap, &[0, 4096, protection as u64, MAP_SHARED as u64, number, offset])
}

/// Keeps the file of the next region that the victim sends something of.
fn catch(attack: &mut Attack) -> Result<Seen> {
    let exchange = attack.exchange.clone().context("no victim to exchange data with")?;
    exchange.hear("linked")?;
    let Some((number, fd, said)) = next_file(attack, "send-another")? else {
        return Ok(Seen::Nothing("no region came from the victim's proxy".to_owned()));
    };
    let size = File::from(fd.try_clone()?).metadata()?.len();
    // Longer than the region, so that the program's mapping of it can grow.
    ensure!(size >= REGION, "a file of {size} bytes with {said}");
    attack.share = Some((number, fd));
    Ok(Seen::Reached(format!("{number} came with {said}")))
}

/// Has the victim send something, and takes the message of its proxy before the proxy's own program does: the number of the
/// descriptor that it brings, a copy, and what it says.
fn next_file(attack: &mut Attack, word: &str) -> Result<Option<(i32, OwnedFd, String)>> {
    let exchange = attack.exchange.clone().context("no victim to exchange data with")?;
    let links = links(attack)?;
    let watched: Vec<u64> = links.iter().map(|link| link | (libc::POLLIN as u64) << 32).collect();
    let mut calls = vec![call(libc::SYS_poll, &[attack.hands.words(&watched), watched.len() as u64, 1500])];
    let mut rooms = Vec::new();
    for link in &links {
        let text = attack.hands.room(256);
        let vector = attack.hands.words(&[text, 256]);
        let control = attack.hands.room(64);
        let message = attack.hands.words(&[0, 0, vector, 1, control, 64, 0]);
        calls.push(call(libc::SYS_recvmsg, &[*link, message, (libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC) as u64]));
        rooms.push((text, control));
    }
    exchange.say(word, &[])?;
    let answers = attack.hands.calls(&calls)?;
    let came = answers[1..].iter().zip(rooms).find_map(|(answer, room)| Some((answer.ok()?, room)));
    let Some((bytes, (text, control))) = came else { return Ok(None) };
    let length = u64::from_ne_bytes(attack.hands.get(control, 8).try_into()?);
    let said = String::from_utf8_lossy(attack.hands.get(text, bytes as usize)).into_owned();
    ensure!(length >= 20, "a message without descriptors: {said}");
    let number = attack.hands.number(control + 16);
    let fd = attack.hands.fetch(number)?.context("a descriptor that is none")?;
    Ok(Some((number, fd, said)))
}

/// The proxy's ends of its links with the victim's: made by the one or by the other.
fn links(attack: &mut Attack) -> Result<Vec<u64>> {
    let (own, theirs) = (attack.lid.to_string(), attack.target.victim_lid.to_string());
    let mut found = Vec::new();
    for held in descriptors::all(attack)? {
        let socket = held.fd.as_fd();
        let is = |path: Option<std::path::PathBuf>, name: &str| path.is_some_and(|path| path.ends_with(name));
        let accepted = is(neighbours::path_of(socket), &own) && !rustix::net::sockopt::socket_acceptconn(socket)?;
        if accepted || is(neighbours::path_of_peer(socket), &theirs) {
            found.push(held.number as u64);
        }
    }
    ensure!(!found.is_empty() && found.len() <= 3, "{} links with the victim's proxy", found.len());
    Ok(found)
}

/// The container's root opens what its proxy was given, by all the privileges that it has.
fn in_the_container(attack: &mut Attack) -> Result<Seen> {
    let (_, fd) = attack.share()?;
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let file = File::from(fd.try_clone()?);
    let owner = rustix::process::getuid();
    // Whether or not that is allowed: what counts is whether it can be opened then.
    let _ = std::os::unix::fs::fchown(&file, Some(owner.as_raw()), None);
    let _ = file.set_permissions(std::fs::Permissions::from_mode(0o666));
    Ok(match OpenOptions::new().read(true).write(true).open(path) {
        Ok(_) => Seen::Reached("it can be written".to_owned()),
        Err(error) => judge(Err(rustix::io::Errno::from_io_error(&error).context("no errno")?), &[]),
    })
}
