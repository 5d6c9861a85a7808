//! `ringfence-proxy-ibverbs`: the proxy with a real card.

use anyhow::{Context, Result};
use ringfence_proxy::process::{self, Opened, Opening, Program};
use ringfence_proxy_ibverbs::card::Card;
use ringfence_proxy_ibverbs::control::CardControl;
use ringfence_proxy_ibverbs::device::{Ibverbs, Made};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::process::ExitCode;
use std::sync::Arc;

fn main() -> ExitCode {
    if cfg!(target_feature = "crt-static") {
        eprintln!(
            "ringfence-proxy-ibverbs: built as a static program, as `cargo build` does here; libibverbs cannot be loaded into one: \
             build it with verbs-proxy/ibverbs/link.sh"
        );
        return ExitCode::FAILURE;
    }
    process::main(&Program { name: "ringfence-proxy-ibverbs", open })
}

fn open(opening: &Opening<'_>) -> Result<Opened<Ibverbs>> {
    raise_locked_limit();
    let card = Arc::new(Card::open(&opening.launch.device.name)?);
    let made = Made::default();
    let control = CardControl::new(Arc::clone(&card), &opening.launch.limits, Arc::clone(&made))
        .with_context(|| format!("cannot query RDMA device {}", opening.launch.device.name))?;
    let device = Ibverbs::new(card, made).context("cannot register memory with it")?;
    Ok((device, control))
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
