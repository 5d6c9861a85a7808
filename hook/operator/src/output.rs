//! What commands print.

use anyhow::{Context, Result};
use serde::Serialize;
use std::io::{ErrorKind, Write};

/// Writes `text` to standard output. Who reads it may stop reading.
pub fn print(text: &str) -> Result<()> {
    stream(text).map(drop)
}

/// The same for who writes again and again. False if nobody reads any more.
pub fn stream(text: &str) -> Result<bool> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(false),
        result => result.context("standard output").map(|()| true),
    }
}

/// Writes one line to standard error, unless nobody reads there any more. It may quote files that others wrote.
pub fn complain(message: &str) {
    let line = plain(&message.replace('\n', " "));
    let _ = std::io::stderr().write_all(format!("ringfence: {line}\n").as_bytes());
}

/// Writes `value` as JSON to standard output.
pub fn json(value: &impl Serialize) -> Result<()> {
    print(&format!("{}\n", serde_json::to_string_pretty(value)?))
}

/// Rows in columns as wide as their widest cell, without trailing spaces.
pub fn table<const N: usize>(rows: &[[String; N]]) -> String {
    let widths: [usize; N] =
        std::array::from_fn(|column| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0));
    let mut text = String::new();
    for row in rows {
        let cells: String = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}  ")).collect();
        text += cells.trim_end();
        text += "\n";
    }
    text
}

/// `text` without what commands a terminal, or reorders or hides what is beside it: names and messages may come from
/// containers.
pub fn plain(text: &str) -> String {
    let is_invisible =
        |c| matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}');
    text.chars().map(|c| if c.is_control() || is_invisible(c) { '\u{fffd}' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned() {
        let rows = [["a", "b"], ["länger", ""], ["c", "d"]].map(|row| row.map(str::to_owned));
        assert_eq!(table(&rows), "a       b\nlänger\nc       d\n");
    }

    #[test]
    fn control_characters_do_not_reach_the_terminal() {
        assert_eq!(plain("a\u{1b}[2J\nb"), "a\u{fffd}[2J\u{fffd}b");
        assert_eq!(plain("a\u{202e}b\u{200b}ä\u{feff}"), "a\u{fffd}b\u{fffd}ä\u{fffd}");
    }
}
