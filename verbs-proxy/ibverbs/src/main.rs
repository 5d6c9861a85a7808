//! `ringfence-proxy-ibverbs`: the proxy with a real card.

use anyhow::{Context, Result, bail, ensure};
use ringfence_proxy::device::control::Control;
use ringfence_proxy::fabric::addresses;
use ringfence_proxy::launch::card::DESCRIBE;
use ringfence_proxy::process::{self, Opening, Program};
use ringfence_proxy::sandbox::View;
use ringfence_proxy_ibverbs::card::Card;
use ringfence_proxy_ibverbs::control::CardControl;
use ringfence_proxy_ibverbs::description;
use ringfence_proxy_ibverbs::device::Ibverbs;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::process::ExitCode;
use std::sync::Arc;

struct CardProxy;

/// `IBV_TRANSPORT_IWARP`.
const IWARP: u32 = 1;

fn main() -> ExitCode {
    if cfg!(target_feature = "crt-static") {
        eprintln!(
            "{}: built as a static program, as `cargo build` does here; libibverbs cannot be loaded into one: build it with \
             verbs-proxy/ibverbs/link.sh",
            CardProxy::NAME
        );
        return ExitCode::FAILURE;
    }
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    match arguments.as_slice() {
        [option, name, port] if option == DESCRIBE => describe(&name.to_string_lossy(), &port.to_string_lossy()),
        _ => process::main::<CardProxy>(),
    }
}

/// For `ringfence info` and `ringfence doctor`.
fn describe(name: &str, port: &str) -> ExitCode {
    let port = port.parse().with_context(|| format!("{port:?} is no number of a port: 1 to 255"));
    let described =
        port.and_then(|port| description::describe(name, port)).and_then(|card| Ok(serde_json::to_string(&card)?));
    match described {
        Ok(card) => println!("{card}"),
        Err(error) => {
            eprintln!("{}: {error:#}", CardProxy::NAME);
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

impl Program for CardProxy {
    const NAME: &'static str = "ringfence-proxy-ibverbs";
    type Device = Ibverbs;
    type Seed = ();

    fn open(opening: &Opening<'_>) -> Result<((), CardControl)> {
        raise_locked_limit();
        let name = &opening.launch.device.name;
        let card = Arc::new(Card::open(name, opening.launch.device.port)?);
        // Queue pairs are connected by rdma_cm alone there, which would let the container name others' queue pairs; and siw looks
        // for the pages of a region at the address of the process that registers it.
        ensure!(
            card.about.transport != IWARP,
            "RDMA device {name} is iWARP, which cannot be shared by a proxy yet: its queue pairs are connected by rdma_cm only; \
             give it to a trusted container with mode=passthrough"
        );
        // It copies short messages that arrive to where the receive request says, which is an address of the container's, and nothing
        // keeps it from that (`handle_recv_inl_data` of rdma-core's providers/hns).
        ensure!(
            card.about.driver().is_none_or(|driver| !driver.starts_with("hns")),
            "RDMA device {name} is of the driver hns, whose library writes received data to addresses of the container's in this process; \
             give it to a trusted container with mode=passthrough"
        );
        let mut control =
            CardControl::new(card, opening).with_context(|| format!("cannot query RDMA device {name}"))?;
        if let Some(missing) = control.missing_pkey() {
            bail!(missing);
        }
        // What cannot be read yet is read again when the proxy is up.
        let _ = addresses::list().and_then(|addresses| control.set_addresses(&addresses));
        Ok(((), control))
    }

    fn view(control: &CardControl) -> View {
        View::Card { nodes: control.nodes() }
    }

    fn start((): (), control: &mut CardControl) -> Result<Ibverbs> {
        let card = Arc::new(control.card.reopen()?);
        let pkeys = card.pkeys()?;
        control.use_card(Arc::clone(&card), &pkeys);
        control
            .reopen_connection_manager()
            .context("cannot open the connection manager as the user that the proxy is")?;
        Ibverbs::new(card, control.made()).context("cannot register memory with the card")
    }
}

/// The pages that a card reaches are locked, and count for the proxy: as many as may be.
fn raise_locked_limit() {
    let unlimited = Rlimit { current: None, maximum: None };
    if setrlimit(Resource::Memlock, unlimited).is_err() {
        let maximum = getrlimit(Resource::Memlock).maximum;
        // No more than what was allowed is asked for, which cannot fail.
        let _ = setrlimit(Resource::Memlock, Rlimit { current: maximum, maximum });
    }
}
