//! Edits of a text by the edits of its rendering.

/// Carries the difference of `before` and `after` over to `text`, of which `before` is a rendering: that writes some
/// lines, such as headers with a key in other quotes, in its own way.
pub fn carry_over(text: &str, before: &str, after: &str) -> String {
    let original: Vec<_> = text.split_inclusive('\n').collect();
    if original.len() != before.split_inclusive('\n').count() {
        return after.to_owned();
    }
    let line_end = if before.contains("\r\n") { "\r\n" } else { "\n" };
    let mut lines: Vec<&str> = Vec::new();
    let after_lines: Vec<_> = after.split_inclusive('\n').collect();
    let changes = similar::TextDiff::from_lines(before, after);
    for change in changes.iter_all_changes() {
        let line = match (change.tag(), change.old_index(), change.new_index()) {
            (similar::ChangeTag::Equal, Some(index), _) => original[index],
            (similar::ChangeTag::Insert, _, Some(index)) => after_lines[index],
            _ => continue,
        };
        if lines.last().is_some_and(|last| !last.ends_with('\n')) {
            lines.push(line_end);
        }
        lines.push(line);
    }
    lines.concat()
}
