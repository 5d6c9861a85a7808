//! The simulation, in short, and that it finds what it is there for.

#[path = "../examples/simulation/arguments.rs"]
mod arguments;
#[path = "../examples/simulation/chart.rs"]
mod chart;
#[path = "../examples/simulation/figure.rs"]
mod figure;
#[path = "../examples/simulation/model.rs"]
mod model;
#[path = "../examples/simulation/parts/mod.rs"]
mod parts;

use arguments::Arguments;
use clap::Parser;
use clap::error::ErrorKind;
use figure::Figure;
use model::{Flow, Model, Outcome, Tenant};
use parts::Part;
use proptest::prelude::*;
use ringfence_sched::Nanos;

fn holds(part: fn(bool) -> Part) {
    let Part { figures, chart, file } = part(true);
    assert!(!figures.is_empty(), "{file} has no figures");
    assert!(chart.draw().ends_with("</svg>\n"));
    let lines: String = figures.iter().map(|figure| format!("{figure}\n")).collect();
    let missed: Vec<String> = figures.into_iter().flat_map(Figure::missed).collect();
    assert!(missed.is_empty(), "{lines}{}", missed.join("\n"));
}

#[test]
fn pairs_share_by_weight() {
    holds(parts::ALL[0]);
}

#[test]
fn floods_of_urgent_requests_share_by_weight() {
    holds(parts::ALL[1]);
}

#[test]
fn many_share_by_weight() {
    holds(parts::ALL[2]);
}

#[test]
fn many_share_by_weight_among_floods_of_urgent_requests() {
    holds(parts::ALL[3]);
}

#[test]
fn caps_hold() {
    holds(parts::ALL[4]);
}

#[test]
fn urgent_requests_within_the_share_do_not_wait() {
    holds(parts::ALL[5]);
}

#[test]
fn a_share_that_is_not_by_weight_is_found() {
    let tenants = [Tenant::weighing(100, &[Flow::new(4, 64, 1)]).in_a_hurry(), Tenant::weighing(300, &[])];
    let judged = |first, second| {
        let had = |charged| Outcome { charged, ..Outcome::default() };
        Figure::shares("a case", &tenants, &[had(first), had(second)])
    };
    assert_eq!(judged(257, 750).missed(), Vec::<String>::new());
    let figure = judged(300, 700);
    assert!(figure.to_string().ends_with("MISSED"), "{figure}");
    assert_eq!(
        figure.missed(),
        [
            "a case: container 0 (weight 100, class latency, 4 QPs of 64 B): expected 25.0000 % of the link, got 30.0000 %: \
             +20.00 %, more than ±3 %",
            "a case: container 1 (weight 300, class bulk): expected 75.0000 % of the link, got 70.0000 %: -6.67 %, more \
             than ±3 %",
        ]
    );
    // Nothing at all has gone.
    assert_eq!(judged(0, 0).missed().len(), 2);
}

#[test]
fn the_command_line_is_as_users_expect() {
    let parse = |words: &[&str]| Arguments::try_parse_from([&["simulation"], words].concat());
    for help in ["--help", "-h"] {
        assert_eq!(parse(&[help]).unwrap_err().kind(), ErrorKind::DisplayHelp);
    }
    assert!(parse(&["--help"]).unwrap_err().to_string().contains("--quick"));
    assert_eq!(parse(&["--fast"]).unwrap_err().kind(), ErrorKind::UnknownArgument);
    assert_eq!(parse(&["one", "two"]).unwrap_err().kind(), ErrorKind::UnknownArgument);
    let Arguments { quick, directory } = parse(&["--quick", "drawings"]).unwrap();
    assert_eq!((quick, directory.to_str()), (true, Some("drawings")));
    assert!(!parse(&[]).unwrap().quick);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    /// Any containers, in class latency or not, that all want more than they get: each has the share of its weight.
    #[test]
    fn whoever_floods_has_the_share_of_its_weight(
        flows in prop::collection::vec((30u32..=1000, 0u64..=64 << 10, 1u32..40, any::<bool>()), 2..6),
        oversleep in 0u64..60,
    ) {
        let tenant = |(weight, bytes, queues, hurry): (u32, u64, u32, bool)| {
            let depth = (u64::from(weight) * 12_500 / (bytes + 64)) as u32 / queues + 32;
            let tenant = Tenant::weighing(weight, &[Flow::new(queues, bytes, depth)]);
            if hurry { tenant.in_a_hurry() } else { tenant }
        };
        let tenants: Vec<Tenant> = flows.into_iter().map(tenant).collect();
        let model = Model::new(Some(10_000_000_000), &tenants, Nanos::micros(oversleep), Nanos::millis(50));
        let missed = Figure::shares("100 ms", &tenants, &model.run(Nanos::millis(100))).missed();
        prop_assert!(missed.is_empty(), "{}", missed.join("\n"));
    }
}
