//! `ringfence stats`

use crate::output::{self, plain};
use crate::rates::{self, Sample, about, share_of};
use anyhow::{Context, Result, bail};
use ringfence_hook::card_counters::{CardCounters, Reading};
use ringfence_hook::config::Config;
use ringfence_hook::units::{show_ops, show_rate};
use ringfence_hook::{Container, containers, counters};
use ringfence_launch::Limits;
use serde::Serialize;
use std::process::ExitCode;
use std::time::Duration;

/// For how long rates are measured without `--watch`. Caps hold over 100 ms.
const MOMENT: Duration = Duration::from_millis(250);

/// Shows what containers do: rates against limits, operations, errors, delays, quotas
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  ringfence stats
  ringfence stats 3f9c --watch 2
  ringfence stats --json | jq '.[] | {id, errors: .counters.errors}'

Rates are those of a quarter of a second, or of the interval of --watch; everything else counts from the start of the container.
OUT is what leaves its memory, whoever asks: SENDs, WRITEs, and what READs and atomics take out of it; FETCHED is what its own READs
and atomics bring in, IN what is sent and written to it, OPS the work requests that it posts. After the slash stands the limit, against
which a request of less than 64 bytes counts as 64: small ones reach it with fewer bytes. THROTTLED is the part of the time in which some of its queue pairs wait for these
limits or for their share of the link, DELAY what 99 % of its requests wait at most before they go. Of one container it is shown as well what
its card counts, if the operator has it count queue pairs (rdma-statistic(8)). With --watch, --json prints a line
for each interval. The names in JSON are explained in ringfence-counters(7).")]
pub struct Args {
    /// One container, by its id or the beginning of it; all, otherwise
    container: Option<String>,
    /// As JSON: counts, no rates
    #[arg(long)]
    json: bool,
    /// Again and again, every so many seconds
    #[arg(long, value_name = "SECONDS", value_parser = interval)]
    watch: Option<Duration>,
}

fn interval(text: &str) -> Result<Duration, String> {
    let seconds = text.parse::<f64>().ok().filter(|seconds| (0.1..=86400.0).contains(seconds));
    seconds.map(Duration::from_secs_f64).ok_or_else(|| "give seconds, from 0.1 to 86400".into())
}

/// One container, as JSON shows it.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Shown<'a> {
    id: &'a str,
    /// Milliseconds since 1970.
    time_ms: u64,
    limits: Option<&'a Limits>,
    counters: Option<&'a ringfence_launch::counters::Page>,
    /// What its card counts, if it does.
    card: Option<&'a CardCounters>,
    /// Why there are no counters.
    error: Option<&'a str>,
}

impl Args {
    pub fn run(self) -> Result<ExitCode> {
        let config = Config::load()?;
        let mut before = self.sample(&config)?;
        if self.json {
            while output::stream(&self.json(&before)?)? {
                let Some(pause) = self.watch else { break };
                std::thread::sleep(pause);
                before = self.sample(&config)?;
            }
            return Ok(ExitCode::SUCCESS);
        }
        loop {
            std::thread::sleep(self.watch.unwrap_or(MOMENT));
            let after = self.sample(&config)?;
            let end = if self.watch.is_some() { "\n" } else { "" };
            if !output::stream(&(self.show(&before, &after) + end))? || self.watch.is_none() {
                return Ok(ExitCode::SUCCESS);
            }
            before = after;
        }
    }

    /// What the containers that are asked for have counted by now.
    fn sample(&self, config: &Config) -> Result<Vec<Sample>> {
        let mut found = containers(config)?;
        if let Some(name) = &self.container {
            found = vec![choose(found, name)?];
        }
        // Only these show it, and to ask a card takes its time.
        let shows_card = self.container.is_some() || self.json;
        let reading = if shows_card { Reading::take() } else { Reading::default() };
        let samples: Vec<Sample> = found
            .into_iter()
            .map(|container| {
                let counted = counters(config, &container);
                let card = reading.of(&container);
                Sample::new(container, counted, card)
            })
            .collect();
        match (&self.container, samples.first()) {
            (Some(_), Some(Sample { counted: Err(error), container, .. })) => {
                bail!("container {}: {error}", container.id)
            }
            _ => Ok(samples),
        }
    }

    fn json(&self, samples: &[Sample]) -> Result<String> {
        let shown = samples.iter().map(|sample| Shown {
            id: &sample.container.id,
            time_ms: sample.time_ms,
            limits: sample.container.limits.as_ref(),
            counters: sample.counted.as_ref().ok(),
            card: sample.card.as_ref(),
            error: sample.counted.as_ref().err().map(String::as_str),
        });
        let shown = match &self.container {
            Some(_) => shown.map(|one| serde_json::to_value(&one)).next().transpose()?.unwrap_or_default(),
            None => serde_json::to_value(shown.collect::<Vec<_>>())?,
        };
        let text = match self.watch {
            Some(_) => serde_json::to_string(&shown),
            None => serde_json::to_string_pretty(&shown),
        };
        Ok(text? + "\n")
    }

    fn show(&self, before: &[Sample], after: &[Sample]) -> String {
        match (&self.container, after) {
            (Some(_), [one]) => {
                rates::describe(one, before.iter().find(|sample| sample.container.id == one.container.id))
            }
            _ => overview(before, after),
        }
    }
}

/// The container with this id, or the only one whose id begins with it.
fn choose(found: Vec<Container>, name: &str) -> Result<Container> {
    let mut matching: Vec<_> = found.into_iter().filter(|container| container.id.starts_with(name)).collect();
    if let Some(place) = matching.iter().position(|container| container.id == name) {
        return Ok(matching.swap_remove(place));
    }
    match matching.len() {
        0 => bail!("there is no container {name} with RDMA; ringfence list shows which there are"),
        1 => matching.pop().context("it was there"),
        several => bail!("{several} containers have an id that begins with {name}: {} and others", matching[0].id),
    }
}

fn overview(before: &[Sample], after: &[Sample]) -> String {
    let header = ["CONTAINER", "OUT", "FETCHED", "IN", "OPS", "ERRORS", "THROTTLED", "DELAY", "QPS", "MEMORY"];
    let mut rows = vec![header.map(str::to_owned)];
    let mut warnings = String::new();
    for sample in after {
        let id = plain(&sample.container.id);
        let page = match &sample.counted {
            Ok(page) => page,
            Err(error) => {
                rows.push(std::array::from_fn(|column| if column == 0 { id.clone() } else { "-".into() }));
                warnings += &format!("warning: {id}: {}\n", plain(error));
                continue;
            }
        };
        let rates = sample.rates(before.iter().find(|sample_before| sample_before.container.id == sample.container.id));
        let quota = |place: usize| page.quotas[place];
        rows.push([
            id,
            share_of(about(rates.out, "bit"), rates.limits.bandwidth.map(|rate| show_rate(rate.bits()))),
            share_of(about(rates.fetched, "bit"), rates.limits.bandwidth_rx.map(|rate| show_rate(rate.bits()))),
            about(rates.into, "bit"),
            share_of(about(rates.operations, ""), rates.limits.ops.map(|rate| show_ops(rate.ops()))),
            page.failed().to_string(),
            format!("{:.0}%", rates.throttled * 100.0),
            rates::delay(page, 0.99),
            format!("{}/{}", quota(0).used, quota(0).limit),
            format!("{}/{}", rates::size(quota(3).used), rates::size(quota(3).limit)),
        ]);
    }
    output::table(&rows) + &warnings
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rates::tests::{container, sample};

    #[test]
    fn a_container_is_chosen_by_the_beginning_of_its_id() {
        let all = || ["aa1", "ab", "abc"].map(container).to_vec();
        assert_eq!(choose(all(), "aa").unwrap().id, "aa1");
        assert_eq!(choose(all(), "ab").unwrap().id, "ab", "the whole id comes first");
        assert!(choose(all(), "a").unwrap_err().to_string().starts_with("3 containers"));
        assert!(choose(all(), "../x").unwrap_err().to_string().contains("no container ../x"));
    }

    #[test]
    fn every_container_has_a_line_and_what_is_wrong_another() {
        let (before, after) = (sample("c1", 0, 0), sample("c1", 1000, 125_000_000));
        let mut broken = sample("c2", 1000, 0);
        broken.counted = Err("its\ncounters".into());
        let shown = overview(&[before], &[after, broken]);
        let lines: Vec<Vec<_>> = shown.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines[1], ["c1", "1Gbit/10Gbit", "0bit/-", "0bit", "1k/-", "0", "25%", "0", "2/256", "4KiB/16GiB"]);
        assert_eq!(lines[2][..2], ["c2", "-"]);
        assert_eq!(lines[3].join(" "), "warning: c2: its\u{fffd}counters");
    }

    #[test]
    fn intervals() {
        assert_eq!(interval("0.5"), Ok(Duration::from_millis(500)));
        for wrong in ["0", "-1", "nan", "inf", "1e9", "x", ""] {
            assert!(interval(wrong).is_err(), "{wrong}");
        }
    }
}
