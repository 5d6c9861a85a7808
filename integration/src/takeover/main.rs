//! `ringfence-taken`: the programs in the containers of the tests of a taken-over proxy.
//!
//! Every line that `attack` and `control` print is the name of an attempt, what came of it, and how; tabs in between.

use anyhow::{Context, Result, bail};
use ringfence_integration::takeover::exchange::{Endpoint, Exchange, INSIDE};
use ringfence_integration::takeover::{Attack, Attempt, Hands, NoShare, Seen, Target, accomplice, rows, victim};
use ringfence_protocol::control::SOCKET_PATH;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener};
use std::path::Path;
use std::process::ExitCode;

const USAGE: &str = "usage: ringfence-taken attack TARGET… | control NAME TARGET… | victim | accomplice | daemon STREAM DATAGRAM ABSTRACT";

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match run(&words) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ringfence-taken: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(words: &[String]) -> Result<()> {
    let exchange = Exchange(INSIDE.into());
    match words.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["attack", ..] => attack(&words[1..], exchange),
        ["control", name, ..] => {
            let attempts = rows().into_iter().flat_map(|row| row.attempts);
            let attempt = attempts.into_iter().find(|attempt| attempt.name == *name).context("no such attempt")?;
            make(&attempt, &mut Attack::new(Hands::own(), Target::of(&words[2..])?, None, 0));
            Ok(())
        }
        ["victim"] => victim::run(&exchange),
        ["accomplice"] => {
            let own = victim::Application::new()?.endpoint()?;
            let hands = Hands::of_proxy(SOCKET_PATH.as_ref())?;
            accomplice(&mut Attack::accomplice(hands, exchange, own.lid))
        }
        ["daemon", stream, datagram, name] => daemon(stream.as_ref(), datagram.as_ref(), name),
        _ => bail!(USAGE),
    }
}

fn attack(words: &[String], exchange: Exchange) -> Result<()> {
    let mut application = victim::Application::new()?;
    let own = application.endpoint()?;
    let peer = Endpoint::of(&exchange.hear("victim")?)?;
    application.join(&peer)?;
    exchange.say("attacker", &own.words())?;
    exchange.hear("victim-joined")?;
    exchange.say("attacker-joined", &[])?;
    let mut target = Target::of(words)?;
    target.victim_lid = peer.lid;
    let mut attack = Attack::new(Hands::of_proxy(SOCKET_PATH.as_ref())?, target, Some(exchange), own.lid);
    let mut attempts = rows().into_iter().flat_map(|row| row.attempts).peekable();
    while let Some(attempt) = attempts.next() {
        make(&attempt, &mut attack);
        if attempts.peek().is_some() {
            // A connection of its own for each: one that ends is no reason to end.
            attack.hands =
                Hands::of_proxy(SOCKET_PATH.as_ref()).with_context(|| format!("after {:?}", attempt.name))?;
        }
    }
    Ok(())
}

fn make(attempt: &Attempt, attack: &mut Attack) {
    attack.hands.clear();
    match (attempt.run)(attack) {
        Ok(seen) => println!("{}\t{seen}", attempt.name),
        Err(error) if error.is::<NoShare>() => println!("{}\t{}", attempt.name, Seen::Nothing(NoShare.to_string())),
        Err(error) => println!("{}\tbroken\t{error:#}", attempt.name),
    }
}

/// Listens until it is killed.
fn daemon(stream: &Path, datagram: &Path, name: &str) -> Result<()> {
    let abstract_name = SocketAddr::from_abstract_name(name)?;
    let _sockets =
        (UnixListener::bind(stream)?, UnixDatagram::bind(datagram)?, UnixListener::bind_addr(&abstract_name)?);
    println!("listening");
    loop {
        std::thread::park();
    }
}
