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
use ringfence_sched::shares::{Contender, fill};
use ringfence_sched::{BitRate, Class, Nanos, Weight};

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

/// A container that always wants more, of any class, perhaps with a cap.
fn tenant() -> impl Strategy<Value = Tenant> {
    let class = prop_oneof![Just(Class::None), Just(Class::Ops), Just(Class::Bulk), Just(Class::Latency)];
    let cap = prop_oneof![2 => Just(None), 1 => (0u8..2, 2u64..60).prop_map(Some)];
    (30u32..=1000, 64u64..=64 << 10, 1u32..40, class, cap, any::<bool>()).prop_map(
        |(weight, bytes, queues, class, cap, fetches)| {
            let depth = (u64::from(weight) * 12_500 / (bytes + 64)) as u32 / queues + 32;
            let flow = Flow { fetches, ..Flow::new(queues, bytes, depth) };
            let mut tenant = Tenant { class, ..Tenant::weighing(weight, &[flow]) };
            // A cap of so many hundredths of the link.
            match cap {
                Some((0, part)) => tenant.ops = Some(LINK / 100 * part / (bytes * 8)),
                Some((_, part)) if fetches => tenant.fetching = Some(LINK / 100 * part),
                Some((_, part)) => tenant.bandwidth = Some(LINK / 100 * part),
                None => {}
            }
            tenant
        },
    )
}

const LINK: u64 = 10_000_000_000;
/// How far from what is fair each may be, in percent of it: there are few pieces in so short a time.
const OFF: u64 = 6;

/// What a container wants and may have of the link.
fn wants(tenant: &Tenant, had: &Outcome) -> Contender {
    // Caps do not count headers, which the link does.
    let headers = had.charged as f64 / had.flows[0].bytes.max(1) as f64;
    let by_ops = tenant.ops.map(|cap| cap * tenant.flows[0].bytes * 8);
    let cap = tenant.bandwidth.or(tenant.fetching).or(by_ops).map(|cap| cap as f64 * headers);
    let weight = tenant.weight.and_then(Weight::new).unwrap();
    Contender { weight, demand: u64::MAX, cap: cap.and_then(|cap| BitRate::new(cap as u64)), guarantee: 0 }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    /// Any containers of any classes, some with caps, that all want more than they get: each has what is fair among them by their
    /// weights and caps, and none more than its cap.
    #[test]
    fn shares_caps_and_classes_hold_together(tenants in prop::collection::vec(tenant(), 2..5), oversleep in 0u64..30) {
        let time = Nanos::millis(80);
        let outcomes = Model::new(Some(LINK), &tenants, Nanos::micros(oversleep), Nanos::millis(20)).run(time);
        let bits = |bytes: u64| bytes * 8 * 1_000_000_000 / time.0;
        let link = BitRate::new(LINK).unwrap();
        let contenders: Vec<Contender> = tenants.iter().zip(&outcomes).map(|(tenant, had)| wants(tenant, had)).collect();
        // What one with a cap leaves is the others', whether it is early or late with a request.
        let had = |(wants, had): (&Contender, &Outcome)| match wants.cap {
            Some(_) => Contender { demand: bits(had.charged), ..*wants },
            None => *wants,
        };
        let left: Vec<Contender> = contenders.iter().zip(&outcomes).map(had).collect();
        for (index, (fair, by_weight)) in fill(link, &contenders).into_iter().zip(fill(link, &left)).enumerate() {
            let (tenant, had) = (&tenants[index], bits(outcomes[index].charged));
            // Operations are counted when a request begins, and the link carries it afterwards.
            let Flow { queues, bytes, .. } = tenant.flows[0];
            let begun = bits(tenant.ops.map_or(0, |_| u64::from(queues + 8) * bytes));
            let (within, beyond) = (|bits: u64| bits - bits * OFF / 100, |bits: u64| bits + bits * OFF / 100 + begun);
            prop_assert!(had >= within(fair.min(by_weight)).saturating_sub(begun), "{had} instead of {fair}: {tenant}");
            prop_assert!(had <= beyond(by_weight), "{had} instead of {by_weight}: {tenant}");
            let Some(cap) = contenders[index].cap.map(BitRate::bits) else { continue };
            // In the time that is looked at, five quarters of a bucket's burst and what the last request took beyond.
            let burst = (cap / 1000).max(16 << 13) / 8 * 5 / 4 + bytes;
            prop_assert!(had <= cap + bits(burst) + begun, "{had} with a cap of {cap}: {tenant}");
        }
    }
}
