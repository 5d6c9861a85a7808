//! `ringfence-proxy`: the proxy with the software device.

use anyhow::{Context, Result, ensure};
use ringfence_proxy::device::soft::Soft;
use ringfence_proxy::device::soft::control::SoftDevice;
use ringfence_proxy::device::soft::modelled::ModelledLink;
use ringfence_proxy::fabric::clock::WireClock;
use ringfence_proxy::launch::MIN_LINK;
use ringfence_proxy::process::{self, Opening, Program};
use std::process::ExitCode;

struct SoftProxy;

fn main() -> ExitCode {
    process::main::<SoftProxy>()
}

impl Program for SoftProxy {
    const NAME: &'static str = "ringfence-proxy";
    type Device = Soft;
    type Seed = Soft;

    fn open(opening: &Opening<'_>) -> Result<(Soft, SoftDevice)> {
        let (device, run_dir) = (&opening.launch.device, &opening.launch.run_dir);
        let link = match device.link {
            None => None,
            Some(rate) => {
                let (name, bits) = (&device.name, rate.bits());
                ensure!(rate >= MIN_LINK, "the link of device {name} has {bits} bit/s; at least 1 Mbit/s");
                let path = run_dir.join("fabric").join(&device.name).join("wire");
                let clock = WireClock::open(&path).context("cannot open the modelled link's clock")?;
                Some(ModelledLink::new(clock, rate))
            }
        };
        Ok((Soft::new(link), SoftDevice::new(device, opening.guid, &opening.launch.limits)))
    }

    fn start(seed: Soft, _: &mut SoftDevice) -> Result<Soft> {
        Ok(seed)
    }
}
