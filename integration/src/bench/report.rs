//! All figures, as a table in Markdown and as JSON, with what they were measured on.

use crate::figure::{COLUMNS, Figure};
use serde_json::{Value, json};
use std::fmt::Write;
use std::process::Command;
use std::time::SystemTime;

/// When, on what, and of which sources.
#[derive(Clone, Debug)]
pub struct Circumstances {
    /// In UTC.
    pub date: String,
    /// The kernel's release.
    pub kernel: String,
    /// As the processor calls itself.
    pub cpu: String,
    /// How many processors there are.
    pub cores: usize,
    /// Of the sources, if git knows it.
    pub revision: Option<String>,
}

impl Circumstances {
    /// Those of now and here.
    pub fn find() -> Self {
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        let git = Command::new("git").args(["describe", "--always", "--dirty", "--exclude=*"]).output();
        let git = git.ok().filter(|git| git.status.success());
        Self {
            date: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
            kernel: std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned(),
            cpu: model.map_or("unknown processor", |(_, model)| model).trim().to_owned(),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            revision: git.map(|git| String::from_utf8_lossy(&git.stdout).trim().to_owned()),
        }
    }

    /// In one line.
    pub fn line(&self) -> String {
        let Self { date, kernel, cpu, cores, revision } = self;
        let revision = revision.as_ref().map(|revision| format!(", revision {revision}")).unwrap_or_default();
        let day = date.split('T').next().unwrap_or(date);
        format!("{day}, {cpu}, {cores} cores, Linux {kernel}{revision}")
    }
}

/// What came of a group.
#[derive(Clone, Debug)]
pub struct Group {
    /// As `--only` takes it.
    pub name: &'static str,
    /// For people.
    pub title: &'static str,
    /// Figures of all its runs.
    pub figures: Vec<Figure>,
    /// Why a run gave none.
    pub failures: Vec<String>,
}

/// All that was measured.
#[derive(Clone, Debug)]
pub struct Report {
    /// When and where.
    pub circumstances: Circumstances,
    /// How often.
    pub runs: usize,
    /// In the order of the list.
    pub groups: Vec<Group>,
}

impl Report {
    /// A table for a README, which is to be read on a terminal, too.
    pub fn markdown(&self) -> String {
        let mut rows = vec![COLUMNS.map(str::to_owned)];
        for group in &self.groups {
            let mut title = [const { String::new() }; COLUMNS.len()];
            title[0] = format!("**{}**", group.title);
            rows.push(title);
            rows.extend(group.figures.iter().map(Figure::cells));
            let failed = |failure: &String| {
                let mut row = [const { String::new() }; COLUMNS.len()];
                row[0] = failure.replace('|', "/").lines().next().unwrap_or_default().to_owned();
                row[COLUMNS.len() - 1] = "failed".into();
                row
            };
            rows.extend(group.failures.iter().map(failed));
        }
        let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or_default();
        let widths: [usize; COLUMNS.len()] = std::array::from_fn(width);
        let runs = if self.runs == 1 { "one run".to_owned() } else { format!("medians of {} runs", self.runs) };
        let mut text = format!("{}; {runs}.\n\n", self.circumstances.line());
        for (index, row) in rows.iter().enumerate() {
            let cells: Vec<_> =
                row.iter().zip(widths).enumerate().map(|(column, (cell, width))| padded(cell, width, column)).collect();
            writeln!(text, "| {} |", cells.join(" | ")).expect("writing to a string succeeds");
            if index == 0 {
                let rule: Vec<_> = widths.iter().enumerate().map(|(column, width)| rule(*width, column)).collect();
                writeln!(text, "|{}|", rule.join("|")).expect("writing to a string succeeds");
            }
        }
        text
    }

    /// Everything, for programs.
    pub fn json(&self) -> Value {
        let Circumstances { date, kernel, cpu, cores, revision } = &self.circumstances;
        let groups = self.groups.iter().map(|group| {
            let figures: Vec<_> = group.figures.iter().map(Figure::json).collect();
            json!({ "name": group.name, "title": group.title, "figures": figures, "failures": group.failures })
        });
        json!({
            "date": date, "kernel": kernel, "cpu": cpu, "cores": cores, "revision": revision, "runs": self.runs,
            "groups": groups.collect::<Vec<_>>(),
        })
    }

    /// How many figures have met their goals, have missed them, and how many runs have failed.
    pub fn sums(&self) -> (usize, usize, usize) {
        let judged = |met| {
            self.groups.iter().flat_map(|group| &group.figures).filter(|figure| figure.met() == Some(met)).count()
        };
        (judged(true), judged(false), self.groups.iter().map(|group| group.failures.len()).sum())
    }
}

/// The columns of numbers.
fn is_number(column: usize) -> bool {
    (1..=3).contains(&column)
}

fn padded(cell: &str, width: usize, column: usize) -> String {
    if is_number(column) { format!("{cell:>width$}") } else { format!("{cell:<width$}") }
}

fn rule(width: usize, column: usize) -> String {
    if is_number(column) { format!("{}:", "-".repeat(width + 1)) } else { "-".repeat(width + 2) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::figure::Goal;

    #[test]
    fn a_table_has_a_line_for_each_figure_and_failure() {
        let circumstances = Circumstances {
            date: "2026-11-26T01:02:03Z".into(),
            kernel: "6.12".into(),
            cpu: "Some CPU".into(),
            cores: 2,
            revision: None,
        };
        let figure = Figure::new("WRITE", 3.0, "µs").beside(2.0).goal(Goal::RatioAtMost(1.0));
        let group = Group { name: "a", title: "A", figures: vec![figure], failures: vec!["no a|b\nmore".into()] };
        let report = Report { circumstances, runs: 3, groups: vec![group] };
        let expected = "\
2026-11-26, Some CPU, 2 cores, Linux 6.12; medians of 3 runs.

|        |   value |   floor | ratio | goal        |        |
|--------|--------:|--------:|------:|-------------|--------|
| **A**  |         |         |       |             |        |
| WRITE  | 3.00 µs | 2.00 µs |  1.50 | ≤ 1 × floor | missed |
| no a/b |         |         |       |             | failed |
";
        assert_eq!(report.markdown(), expected);
        assert_eq!(report.sums(), (0, 1, 1));
        assert_eq!(report.json()["groups"][0]["figures"][0]["ratio"], json!(1.5));
    }
}
