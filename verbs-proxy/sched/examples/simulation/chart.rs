//! Figures as SVG.

use std::fmt::Write;

/// One drawing.
pub enum Chart {
    Bars { title: String, unit: String, bars: Vec<(String, f64, f64)> },
    Points { title: String, x: String, unit: String, points: Vec<(f64, f64)> },
}

const WIDTH: f64 = 1080.0;
const LEFT: f64 = 430.0;
const ROW: f64 = 26.0;
const TOP: f64 = 60.0;
const FOUND: &str = "#4c9bd6";
const WANTED: &str = "#1b4f7a";

impl Chart {
    /// A bar for each case, and a mark where it should end.
    pub fn bars(title: &str, unit: &str) -> Self {
        Self::Bars { title: title.into(), unit: unit.into(), bars: Vec::new() }
    }

    /// A point for each container; the other axis is logarithmic.
    pub fn points(title: &str, x: &str, unit: &str) -> Self {
        Self::Points { title: title.into(), x: x.into(), unit: unit.into(), points: Vec::new() }
    }

    pub fn bar(&mut self, name: &str, found: f64, wanted: f64) {
        if let Self::Bars { bars, .. } = self {
            bars.push((name.into(), found, wanted));
        }
    }

    pub fn point(&mut self, x: f64, y: f64) {
        if let Self::Points { points, .. } = self {
            points.push((x, y));
        }
    }

    pub fn draw(&self) -> String {
        match self {
            Self::Bars { title, unit, bars } => draw_bars(title, unit, bars),
            Self::Points { title, x, unit, points } => draw_points(title, x, unit, points),
        }
    }
}

fn begin(title: &str, height: f64) -> String {
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" \
         font-size=\"13\"><rect width=\"100%\" height=\"100%\" fill=\"white\"/>\
         <text x=\"20\" y=\"32\" font-size=\"17\">{title}</text>\n"
    )
}

fn draw_bars(title: &str, unit: &str, bars: &[(String, f64, f64)]) -> String {
    let mut svg = begin(title, TOP + ROW * bars.len() as f64 + 20.0);
    let most = bars.iter().map(|bar| bar.1.max(bar.2)).fold(1e-9, f64::max);
    let scale = (WIDTH - LEFT - 110.0) / most;
    for (row, (name, found, wanted)) in bars.iter().enumerate() {
        let y = TOP + ROW * row as f64;
        let mark = LEFT + wanted * scale;
        let _ = writeln!(
            svg,
            "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{name}</text>\
             <rect x=\"{LEFT}\" y=\"{y}\" width=\"{}\" height=\"{}\" fill=\"{FOUND}\"/>\
             <line x1=\"{mark}\" x2=\"{mark}\" y1=\"{}\" y2=\"{}\" stroke=\"{WANTED}\" stroke-width=\"2\"/>\
             <text x=\"{}\" y=\"{}\">{found:.2} {unit}</text>",
            LEFT - 8.0,
            y + 14.0,
            found * scale,
            ROW - 8.0,
            y - 3.0,
            y + ROW - 5.0,
            LEFT + found.max(*wanted) * scale + 8.0,
            y + 14.0,
        );
    }
    svg + "</svg>\n"
}

fn draw_points(title: &str, x: &str, unit: &str, points: &[(f64, f64)]) -> String {
    const HEIGHT: f64 = 460.0;
    const RANGE: f64 = 5.0;
    let mut svg = begin(title, HEIGHT);
    let across = |value: f64| 70.0 + value.log10() / 3.0 * (WIDTH - 110.0);
    let down = |value: f64| 240.0 - value.clamp(-RANGE, RANGE) / RANGE * 170.0;
    for error in [-3.0, 0.0, 3.0] {
        let y = down(error);
        let _ = writeln!(
            svg,
            "<line x1=\"70\" x2=\"{}\" y1=\"{y}\" y2=\"{y}\" stroke=\"#bbb\"/>\
             <text x=\"62\" y=\"{}\" text-anchor=\"end\">{error:+} {unit}</text>",
            WIDTH - 40.0,
            y + 4.0
        );
    }
    for weight in [1.0, 10.0, 100.0, 1000.0] {
        let _ = writeln!(svg, "<text x=\"{}\" y=\"435\" text-anchor=\"middle\">{x} {weight}</text>", across(weight));
    }
    for (x, y) in points {
        let _ = writeln!(svg, "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"2.5\" fill=\"{FOUND}\"/>", across(*x), down(*y));
    }
    svg + "</svg>\n"
}
