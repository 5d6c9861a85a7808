//! `ringfence-proxy`: the proxy with the software device.

use anyhow::{Context, Result, ensure};
use ringfence_proxy::device::soft::Soft;
use ringfence_proxy::device::soft::control::SoftDevice;
use ringfence_proxy::device::soft::modelled::ModelledLink;
use ringfence_proxy::fabric::clock::WireClock;
use ringfence_proxy::launch::MIN_LINK;
use ringfence_proxy::process::{self, Opened, Opening, Program};
use ringfence_sched::BitRate;
use std::process::ExitCode;

fn main() -> ExitCode {
    process::main(&Program { name: "ringfence-proxy", open })
}

fn open(opening: &Opening<'_>) -> Result<Opened<Soft>> {
    let (device, run_dir) = (&opening.launch.device, &opening.launch.run_dir);
    let link = match device.link {
        None => None,
        Some(rate) => {
            ensure!(rate >= MIN_LINK, "the link of device {} has {rate} bit/s; at least 1 Mbit/s", device.name);
            let path = run_dir.join("fabric").join(&device.name).join("wire");
            let rate = BitRate::new(rate).context("a link of 0 bit/s")?;
            Some(ModelledLink::new(WireClock::open(&path).context("cannot open the modelled link's clock")?, rate))
        }
    };
    Ok((Soft::new(link), SoftDevice::new(device, opening.guid, &opening.launch.limits)))
}
