//! The tenants' figures as an SVG: latency on the left, bandwidth on the right.

use crate::contention::{LINK, Outcome};
use std::fmt::Write;

const WIDTH: f64 = 1120.0;
const HEIGHT: f64 = 520.0;
const TOP: f64 = 120.0;
const BOTTOM: f64 = 400.0;
const BAR: f64 = 46.0;

/// A bar: its value, how it is written, its colour.
struct Bar {
    value: f64,
    label: String,
    colour: &'static str,
}

struct Panel<'a> {
    left: f64,
    width: f64,
    title: &'a str,
    legend: [(&'a str, &'static str); 2],
    groups: Vec<(&'a str, Vec<Bar>)>,
}

const TYPICAL: &str = "#4c9bd6";
const P99: &str = "#1b4f7a";
const BULK_A: &str = "#e08a2e";
const BULK_B: &str = "#5aa469";

/// The chart of all scenarios.
pub fn draw(outcomes: &[Outcome]) -> String {
    let micros = |value: f64, colour| Bar { value, label: time(value), colour };
    let gbits = |value: f64, colour| Bar { value, label: format!("{value:.2}"), colour };
    let latency = outcomes.iter().map(|outcome| {
        let bars = vec![micros(outcome.latency.typical, TYPICAL), micros(outcome.latency.p99, P99)];
        (outcome.scenario, bars)
    });
    let bulk = outcomes.iter().filter_map(|outcome| {
        let bulk = outcome.bulk?;
        Some((outcome.scenario, vec![gbits(bulk.a, BULK_A), gbits(bulk.b, BULK_B)]))
    });
    let panels = [
        Panel {
            left: 40.0,
            width: 580.0,
            title: "Time of a 64-byte message (less is better)",
            legend: [("typical", TYPICAL), ("99 of 100 within", P99)],
            groups: latency.collect(),
        },
        Panel {
            left: 670.0,
            width: 410.0,
            title: "Bandwidth of the bulk tenants, Gbit/s",
            legend: [("A, 16 queue pairs", BULK_A), ("B, 4 queue pairs", BULK_B)],
            groups: bulk.collect(),
        },
    ];
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" width=\"{WIDTH}\" height=\"{HEIGHT}\" \
         font-family=\"Helvetica, Arial, sans-serif\" font-size=\"14\" fill=\"#222\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n"
    );
    text(&mut svg, 40.0, 38.0, "start", "font-size=\"21\" font-weight=\"bold\"", "Three tenants share one link");
    let subtitle = format!(
        "Software device, modelled link of {LINK}/s; unmodified ib_send_lat and ib_write_bw in containers, one proxy each"
    );
    text(&mut svg, 40.0, 60.0, "start", "fill=\"#666\"", &subtitle);
    for panel in &panels {
        panel.draw(&mut svg);
    }
    svg.push_str("</svg>\n");
    svg
}

impl Panel<'_> {
    fn draw(&self, svg: &mut String) {
        text(svg, self.left, 92.0, "start", "font-weight=\"bold\" font-size=\"15\"", self.title);
        let largest = self.groups.iter().flat_map(|(_, bars)| bars).map(|bar| bar.value).fold(0.0, f64::max);
        // Nothing measured gives bars of no height instead of a division by zero.
        let scale = (BOTTOM - TOP - 20.0) / largest.max(f64::MIN_POSITIVE);
        let step = self.width / self.groups.len().max(1) as f64;
        for (index, (name, bars)) in self.groups.iter().enumerate() {
            let middle = self.left + step * (index as f64 + 0.5);
            let first = middle - BAR * bars.len() as f64 / 2.0;
            for (place, bar) in bars.iter().enumerate() {
                // Everything measured is seen, be it ever so small.
                let height = (bar.value * scale).max(1.5);
                let left = first + BAR * place as f64;
                writeln!(
                    svg,
                    "<rect x=\"{:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{height:.1}\" fill=\"{}\"/>",
                    left + 2.0,
                    BOTTOM - height,
                    BAR - 4.0,
                    bar.colour
                )
                .expect("writing to a string succeeds");
                text(svg, left + BAR / 2.0, BOTTOM - height - 5.0, "middle", "font-size=\"12\"", &bar.label);
            }
            for (line, words) in wrapped(name, 17).iter().enumerate() {
                text(svg, middle, BOTTOM + 20.0 + 17.0 * line as f64, "middle", "font-size=\"13\"", words);
            }
        }
        writeln!(
            svg,
            "<line x1=\"{0}\" y1=\"{BOTTOM}\" x2=\"{1}\" y2=\"{BOTTOM}\" stroke=\"#888\"/>",
            self.left,
            self.left + self.width
        )
        .expect("writing to a string succeeds");
        let mut at = self.left;
        for (name, colour) in self.legend {
            writeln!(svg, "<rect x=\"{at}\" y=\"{}\" width=\"13\" height=\"13\" fill=\"{colour}\"/>", HEIGHT - 42.0)
                .expect("writing to a string succeeds");
            text(svg, at + 19.0, HEIGHT - 31.0, "start", "", name);
            at += 180.0;
        }
    }
}

fn time(micros: f64) -> String {
    if micros < 1000.0 { format!("{micros:.0} µs") } else { format!("{:.1} ms", micros / 1000.0) }
}

fn text(svg: &mut String, x: f64, y: f64, anchor: &str, attributes: &str, content: &str) {
    let content = content.replace('&', "&amp;").replace('<', "&lt;");
    writeln!(svg, "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" {attributes}>{content}</text>")
        .expect("writing to a string succeeds");
}

/// Lines of at most `width` characters, unless a word is longer.
fn wrapped(words: &str, width: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in words.split(' ') {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contention::Bulk;
    use ringfence_integration::perftest::Latency;

    #[test]
    fn every_figure_is_written_on_its_bar() {
        let latency = Latency { bytes: 64, iterations: 1000, typical: 81.0, average: 90.0, p99: 2600.0, p999: 3000.0 };
        let outcome = Outcome { scenario: "a & b", latency, bulk: Some(Bulk { a: 0.25, b: 0.0 }) };
        let svg = draw(&[outcome]);
        for label in ["81 µs", "2.6 ms", ">0.25<", ">0.00<", "a &amp; b"] {
            assert!(svg.contains(label), "no {label} in {svg}");
        }
    }

    #[test]
    fn long_names_are_wrapped_between_words() {
        assert_eq!(wrapped("together, no policy", 17), ["together, no", "policy"]);
    }
}
