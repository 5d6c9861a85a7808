//! What the hook adds to a container's start.

use crate::figure::{Figure, Goal, median};
use crate::programs::Effort;
use anyhow::{Result, ensure};
use ringfence_integration::config::Config;
use ringfence_integration::container::Builder;
use ringfence_integration::rootfs::Image;
use std::time::Instant;

/// `runc run` of a container that ends at once, with our hook and without.
pub fn figures(effort: Effort) -> Result<Vec<Figure>> {
    let image = Image::debian()?;
    let config = Config::new("")?;
    let plain = Builder::default().args(&["true"]);
    let hooked = Builder::default().args(&["true"]).hooked(&config).annotation("enable", "true");
    let (mut without, mut with) = (Vec::new(), Vec::new());
    for _ in 0..effort.starts {
        without.push(run(&plain, &image)?);
        with.push(run(&hooked, &image)?);
    }
    let (without, with) = (median(without), median(with));
    Ok(vec![
        Figure::new("runc run with the hook, median", with, "ms").beside(without),
        Figure::new("what the hook adds, median", with - without, "ms").goal(Goal::AtMost(20.0)),
    ])
}

fn run(builder: &Builder, image: &Image) -> Result<f64> {
    let bundle = builder.bundle(image)?;
    let start = Instant::now();
    let ended = bundle.run()?;
    let took = start.elapsed();
    ensure!(ended.status.success(), "runc: {}", ended.output);
    Ok(took.as_secs_f64() * 1e3)
}
