//! How far each figure is from its goal, as an SVG: to the right of the line it is met.

use crate::figure::Figure;
use crate::report::Report;
use std::fmt::Write;

const WIDTH: f64 = 1120.0;
/// Names end and bars are around these.
const NAMES: f64 = 470.0;
const GOAL: f64 = 700.0;
/// For each doubling.
const OCTAVE: f64 = 70.0;
/// Doublings to either side.
const MOST: f64 = 3.0;
const TOP: f64 = 96.0;
const LINE: f64 = 19.0;

const MET: &str = "#4f8f5b";
const MISSED: &str = "#c0573f";

/// The chart of all figures that have a goal.
pub fn draw(report: &Report) -> String {
    let judged = |figure: &&Figure| figure.margin().is_some_and(f64::is_finite) || figure.met() == Some(true);
    let groups: Vec<(&str, Vec<&Figure>)> = report
        .groups
        .iter()
        .map(|group| (group.title, group.figures.iter().filter(judged).collect()))
        .filter(|(_, figures): &(_, Vec<_>)| !figures.is_empty())
        .collect();
    let lines: usize = groups.iter().map(|(_, figures)| figures.len() + 2).sum();
    let height = TOP + LINE * lines as f64 + 20.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" height=\"{height}\" \
         font-family=\"Helvetica, Arial, sans-serif\" font-size=\"13\" fill=\"#222\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n"
    );
    text(
        &mut svg,
        24.0,
        34.0,
        "start",
        "font-size=\"20\" font-weight=\"bold\"",
        "What Ringfence costs, against its goals",
    );
    text(&mut svg, 24.0, 56.0, "start", "fill=\"#666\"", &report.circumstances.line());
    for doublings in [-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0_f64] {
        let x = GOAL + OCTAVE * doublings;
        let label = match doublings {
            0.0 => "goal".to_owned(),
            less if less < 0.0 => format!("{:.0} × worse", (-less).exp2()),
            more => format!("{:.0} × better", more.exp2()),
        };
        text(&mut svg, x, TOP - 12.0, "middle", "font-size=\"11\" fill=\"#666\"", &label);
        let colour = if doublings == 0.0 { "#444" } else { "#ddd" };
        line(&mut svg, x, TOP - 6.0, height - 14.0, colour);
    }
    let mut y = TOP;
    for (title, figures) in groups {
        y += LINE;
        text(&mut svg, 24.0, y, "start", "font-weight=\"bold\"", title);
        for figure in figures {
            y += LINE;
            bar(&mut svg, figure, y);
        }
        y += LINE;
    }
    svg.push_str("</svg>\n");
    svg
}

fn bar(svg: &mut String, figure: &Figure, y: f64) {
    // What is infinitely good, as nothing where nothing was asked for, goes to the edge.
    let margin = figure.margin().unwrap_or(1.0).log2().clamp(-MOST, MOST);
    let (x, width) = if margin < 0.0 { (GOAL + OCTAVE * margin, -margin) } else { (GOAL, margin) };
    let colour = if figure.met() == Some(true) { MET } else { MISSED };
    // What is just met is seen, too.
    let width = (OCTAVE * width).max(2.0);
    text(svg, NAMES, y, "end", "", figure.name());
    writeln!(svg, "<rect x=\"{x:.1}\" y=\"{:.1}\" width=\"{width:.1}\" height=\"13\" fill=\"{colour}\"/>", y - 11.0)
        .expect("writing to a string succeeds");
    text(svg, GOAL + OCTAVE * MOST + 14.0, y, "start", &format!("fill=\"{colour}\""), &figure.value_text());
}

fn line(svg: &mut String, x: f64, from: f64, to: f64, colour: &str) {
    writeln!(svg, "<line x1=\"{x:.1}\" y1=\"{from:.1}\" x2=\"{x:.1}\" y2=\"{to:.1}\" stroke=\"{colour}\"/>")
        .expect("writing to a string succeeds");
}

fn text(svg: &mut String, x: f64, y: f64, anchor: &str, attributes: &str, content: &str) {
    let content = content.replace('&', "&amp;").replace('<', "&lt;");
    writeln!(svg, "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" {attributes}>{content}</text>")
        .expect("writing to a string succeeds");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::figure::Goal;
    use crate::report::{Circumstances, Group};

    #[test]
    fn every_judged_figure_has_a_bar_inside_the_chart() {
        let figures = vec![
            Figure::new("met & more", 10.0, "M/s").goal(Goal::AtLeast(5.0)),
            Figure::new("far away", 0.001, "M/s").goal(Goal::AtLeast(5.0)),
            Figure::new("nothing", 0.0, "%").goal(Goal::AtMost(0.0)),
            Figure::new("no goal", 1.0, "ns"),
        ];
        let group = Group { name: "a", title: "A", figures, failures: Vec::new() };
        let report = Report { circumstances: Circumstances::find(), runs: 1, groups: vec![group] };
        let svg = draw(&report);
        assert!(svg.contains("met &amp; more") && !svg.contains("no goal"), "{svg}");
        assert_eq!((svg.matches(MET).count(), svg.matches(MISSED).count()), (4, 2), "{svg}");
        assert!(!svg.contains("inf") && !svg.contains("NaN"), "{svg}");
    }
}
