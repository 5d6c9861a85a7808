//! A measured figure, its floor and its goal.

use anyhow::Result;
use serde_json::json;

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

/// A figure.
#[derive(Clone, Debug)]
pub struct Figure {
    name: String,
    value: f64,
    unit: &'static str,
    floor: Option<f64>,
    goal: Option<Goal>,
}

impl Figure {
    /// A figure without a floor or a goal.
    pub fn new(name: &str, value: f64, unit: &'static str) -> Self {
        Self { name: name.to_owned(), value, unit, floor: None, goal: None }
    }

    /// Beside this floor, in the same unit.
    pub fn beside(self, floor: f64) -> Self {
        Self { floor: Some(floor), ..self }
    }

    /// With this goal.
    pub fn goal(self, goal: Goal) -> Self {
        Self { goal: Some(goal), ..self }
    }

    fn ratio(&self) -> Option<f64> {
        self.floor.map(|floor| self.value / floor)
    }

    fn met(&self) -> Option<bool> {
        Some(match self.goal? {
            Goal::RatioAtMost(limit) => self.ratio()? <= limit,
            Goal::RatioAtLeast(limit) => self.ratio()? >= limit,
            Goal::AtLeast(limit) => self.value >= limit,
            Goal::AtMost(limit) => self.value <= limit,
            Goal::Within(limit) => self.value.abs() <= limit,
        })
    }

    fn goal_text(&self) -> String {
        match self.goal {
            None => String::new(),
            Some(Goal::RatioAtMost(limit)) => format!("≤ {limit} × floor"),
            Some(Goal::RatioAtLeast(limit)) => format!("≥ {limit} × floor"),
            Some(Goal::AtLeast(limit)) => format!("≥ {limit} {}", self.unit),
            Some(Goal::AtMost(limit)) => format!("≤ {limit} {}", self.unit),
            Some(Goal::Within(limit)) => format!("± {limit} {}", self.unit),
        }
    }

    /// The table's head.
    pub fn print_head() {
        println!("{:<52} {:>12} {:>12} {:>7}  goal", "figure", "value", "floor", "ratio");
    }

    /// A line of the table.
    pub fn print(&self) {
        let number = |value: f64| format!("{value:.2} {}", self.unit);
        println!(
            "{:<52} {:>12} {:>12} {:>7}  {:<16} {}",
            self.name,
            number(self.value),
            self.floor.map(number).unwrap_or_default(),
            self.ratio().map(|ratio| format!("{ratio:.2}")).unwrap_or_default(),
            self.goal_text(),
            match self.met() {
                None => "",
                Some(true) => "met",
                Some(false) => "NOT MET",
            },
        );
    }

    /// A line of JSON.
    pub fn print_json(&self) -> Result<()> {
        let goal = self.goal.map(|_| self.goal_text());
        let object = json!({
            "name": self.name, "value": self.value, "unit": self.unit, "floor": self.floor,
            "ratio": self.ratio(), "goal": goal, "met": self.met(),
        });
        println!("{}", serde_json::to_string(&object)?);
        Ok(())
    }
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
            (Goal::Within(3.0), true),
        ] {
            assert_eq!(figure.clone().goal(goal).met(), Some(met), "{goal:?}");
        }
        assert_eq!(figure.met(), None);
    }
}
