//! A measured figure, its floor and its goal; and what several runs make of it.

use serde_json::{Value, json};

/// What a figure should reach.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Goal {
    /// value ÷ floor at most this.
    RatioAtMost(f64),
    /// value ÷ floor at least this.
    RatioAtLeast(f64),
    /// The value at least this.
    AtLeast(f64),
    /// The value at most this.
    AtMost(f64),
    /// The value between minus and plus this.
    Within(f64),
}

/// A figure of one run, or of several together.
#[derive(Clone, Debug, PartialEq)]
pub struct Figure {
    name: String,
    unit: &'static str,
    goal: Option<Goal>,
    /// Of each turn of each run the value and its floor.
    samples: Vec<Sample>,
}

/// A turn's value and its floor.
pub type Sample = (f64, Option<f64>);

impl Figure {
    /// A figure without a floor or a goal.
    pub fn new(name: &str, value: f64, unit: &'static str) -> Self {
        Self { name: name.to_owned(), unit, goal: None, samples: vec![(value, None)] }
    }

    /// A figure of several turns.
    pub fn of(name: &str, unit: &'static str, samples: Vec<Sample>) -> Self {
        Self { name: name.to_owned(), unit, goal: None, samples }
    }

    /// Beside this floor, in the same unit.
    pub fn beside(mut self, floor: f64) -> Self {
        self.samples.iter_mut().for_each(|sample| sample.1 = Some(floor));
        self
    }

    /// With this goal.
    pub fn goal(self, goal: Goal) -> Self {
        Self { goal: Some(goal), ..self }
    }

    /// Joins the figures of another run to those of this name, or appends them.
    pub fn join(all: &mut Vec<Self>, run: Vec<Self>) {
        for figure in run {
            match all.iter_mut().find(|known| known.name == figure.name) {
                Some(known) => known.samples.extend(figure.samples),
                None => all.push(figure),
            }
        }
    }

    /// What it is of.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The median of the turns of all runs.
    pub fn value(&self) -> f64 {
        median(self.samples.iter().map(|(value, _)| *value).collect())
    }

    fn floor(&self) -> Option<f64> {
        self.samples.iter().map(|(_, floor)| *floor).collect::<Option<Vec<_>>>().map(median)
    }

    /// Of each turn by itself: what changes between two turns then meets value and floor alike.
    fn ratio(&self) -> Option<f64> {
        self.samples.iter().map(|(value, floor)| Some(value / (*floor)?)).collect::<Option<Vec<_>>>().map(median)
    }

    /// Whether the goal is met, if there is one.
    pub fn met(&self) -> Option<bool> {
        self.margin().map(|margin| margin >= 1.0)
    }

    /// How many times better than its goal it is: 1 is just what is asked for.
    pub fn margin(&self) -> Option<f64> {
        Some(match self.goal? {
            Goal::RatioAtMost(limit) => better_if_less(self.ratio()?, limit),
            Goal::RatioAtLeast(limit) => self.ratio()? / limit,
            Goal::AtLeast(limit) => self.value() / limit,
            Goal::AtMost(limit) => better_if_less(self.value(), limit),
            Goal::Within(limit) => better_if_less(self.value().abs(), limit),
        })
    }

    fn goal_text(&self) -> String {
        let (sign, limit, of) = match self.goal {
            None => return String::new(),
            Some(Goal::RatioAtMost(limit)) => ("≤", limit, "× floor"),
            Some(Goal::RatioAtLeast(limit)) => ("≥", limit, "× floor"),
            Some(Goal::AtLeast(limit)) => ("≥", limit, self.unit),
            Some(Goal::AtMost(limit)) => ("≤", limit, self.unit),
            Some(Goal::Within(limit)) => ("±", limit, self.unit),
        };
        let limit = format!("{limit:.2}");
        let limit = limit.trim_end_matches('0').trim_end_matches('.');
        format!("{sign} {limit} {of}").trim_end().to_owned()
    }

    /// The value as people write it.
    pub fn value_text(&self) -> String {
        number(self.value(), self.unit)
    }

    /// The cells of a line of the table, as [`COLUMNS`] names them.
    pub fn cells(&self) -> [String; 6] {
        [
            self.name.clone(),
            self.value_text(),
            self.floor().map(|floor| number(floor, self.unit)).unwrap_or_default(),
            self.ratio().map(|ratio| format!("{ratio:.2}")).unwrap_or_default(),
            self.goal_text(),
            match self.met() {
                None => String::new(),
                Some(true) => "met".into(),
                Some(false) => "missed".into(),
            },
        ]
    }

    /// All of it, with each turn's.
    pub fn json(&self) -> Value {
        let goal = self.goal.map(|_| self.goal_text());
        let of_turns = |of: fn(&Sample) -> Value| self.samples.iter().map(of).collect::<Vec<_>>();
        json!({
            "name": self.name, "unit": self.unit, "value": self.value(), "floor": self.floor(), "ratio": self.ratio(),
            "goal": goal, "met": self.met(), "margin": self.margin(),
            "values": of_turns(|(value, _)| json!(value)), "floors": of_turns(|(_, floor)| json!(floor)),
        })
    }
}

/// What [`Figure::cells`] are.
pub const COLUMNS: [&str; 6] = ["", "value", "floor", "ratio", "goal", ""];

/// Of an even number of values, the larger of the two in the middle.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn better_if_less(value: f64, limit: f64) -> f64 {
    // A goal of nothing is met by nothing alone.
    if value <= limit { (limit / value).max(1.0) } else { (limit / value).min(1.0 - f64::EPSILON) }
}

/// With as many digits as say something.
fn number(value: f64, unit: &str) -> String {
    let number = match value.abs() {
        large if large >= 1000.0 => format!("{value:.0}"),
        medium if medium >= 100.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    };
    format!("{number} {unit}").trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn goals_are_judged_by_value_or_ratio() {
        let figure = Figure::new("x", 3.0, "ns").beside(2.0);
        for (goal, met) in [
            (Goal::RatioAtMost(1.5), true),
            (Goal::RatioAtMost(1.4), false),
            (Goal::RatioAtLeast(1.6), false),
            (Goal::AtLeast(3.0), true),
            (Goal::AtMost(2.9), false),
            (Goal::AtMost(0.0), false),
            (Goal::Within(3.0), true),
        ] {
            assert_eq!(figure.clone().goal(goal).met(), Some(met), "{goal:?}");
        }
        assert_eq!(figure.met(), None);
        assert_eq!(Figure::new("x", 0.0, "%").goal(Goal::AtMost(0.0)).met(), Some(true));
        assert_eq!(Figure::new("x", -4.0, "%").goal(Goal::Within(3.0)).met(), Some(false));
        assert_eq!(Figure::new("x", f64::NAN, "%").goal(Goal::AtLeast(3.0)).met(), Some(false));
    }

    #[test]
    fn runs_are_joined_by_name_and_ratios_are_of_one_run() {
        let mut all = Vec::new();
        for (value, floor) in [(10.0, 5.0), (40.0, 10.0), (20.0, 20.0)] {
            let plain = Figure::new("other", value, "");
            Figure::join(&mut all, vec![Figure::new("x", value, "ns").beside(floor), plain]);
        }
        assert_eq!(all.len(), 2);
        assert_eq!((all[0].value(), all[0].floor(), all[0].ratio()), (20.0, Some(10.0), Some(2.0)));
        assert_eq!((all[1].value(), all[1].floor(), all[1].ratio()), (20.0, None, None));
        assert_eq!(all[0].json()["values"], json!([10.0, 40.0, 20.0]));
    }

    #[test]
    fn goals_are_written_with_the_digits_that_they_have() {
        for (goal, expected) in [
            (Goal::RatioAtLeast(1.0 / 1.1), "≥ 0.91 × floor"),
            (Goal::RatioAtMost(2.5), "≤ 2.5 × floor"),
            (Goal::AtMost(20.0), "≤ 20 ms"),
            (Goal::Within(0.0), "± 0 ms"),
        ] {
            assert_eq!(Figure::new("x", 1.0, "ms").goal(goal).goal_text(), expected);
        }
    }

    #[test]
    fn numbers_have_the_digits_that_say_something() {
        for (value, expected) in [(0.123, "0.12 x"), (12.3, "12.30 x"), (123.46, "123.5 x"), (12345.6, "12346 x")] {
            assert_eq!(number(value, "x"), expected);
        }
        assert_eq!(number(1.0, ""), "1.00");
    }
}
