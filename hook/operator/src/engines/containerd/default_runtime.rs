//! `default_runtime_name`, and back.

use super::{MARK, MARK_SECTION, NAME, is_marked, table};
use anyhow::{Result, bail};
use toml_edit::{Decor, Item, TableLike, Value};

/// Makes pods without a `RuntimeClass` run with ours; what was before stays in a comment.
pub fn set(item: &mut Item) -> Result<()> {
    let containerd = table(item, "containerd")?;
    let key = "default_runtime_name";
    let mut name = Value::from(NAME);
    match containerd.get(key) {
        Some(former) if former.as_str() == Some(NAME) => return Ok(()),
        None => name.decor_mut().set_suffix(format!(" {MARK} none before")),
        Some(former) => {
            let Some(former) =
                former.as_value().filter(|value| value.as_str().is_some_and(crate::engines::is_plain_name))
            else {
                bail!("its {key} = {former} cannot be understood");
            };
            let mut bare = former.clone();
            bare.decor_mut().clear();
            let suffix = format!(" {MARK} was {bare};{}", suffix(former));
            *name.decor_mut() = Decor::new(prefix(former), suffix);
        }
    }
    put(containerd, key, name);
    if let Some(section) = item.as_table_mut().filter(|section| section.is_implicit()) {
        section.set_implicit(false);
        section.decor_mut().set_prefix(MARK_SECTION);
    }
    Ok(())
}

/// Undoes [`set`].
pub fn reset(item: &mut Item) {
    let key = "default_runtime_name";
    let Some(containerd) = item.as_table_like_mut() else { return };
    let Some(name) = containerd.get(key).and_then(Item::as_value) else { return };
    let Some((_, mark)) = suffix(name).split_once(MARK) else { return };
    let former = mark.strip_prefix(" was ").and_then(|mark| mark.split_once(';'));
    match former.and_then(|(former, suffix)| Some((former.parse::<Value>().ok()?, suffix))) {
        Some((mut former, suffix)) => {
            *former.decor_mut() = Decor::new(prefix(name), suffix);
            put(containerd, key, former);
        }
        None => _ = containerd.remove(key),
    }
    if let Some(section) = item.as_table_mut().filter(|section| is_marked(section)) {
        section.set_implicit(true);
    }
}

/// Like `insert`, which would forget how the key is indented.
fn put(table: &mut dyn TableLike, key: &str, value: Value) {
    match table.get_mut(key) {
        Some(present) => *present = Item::Value(value),
        None => _ = table.insert(key, Item::Value(value)),
    }
}

fn prefix(value: &Value) -> String {
    value.decor().prefix().and_then(|prefix| prefix.as_str()).unwrap_or(" ").to_owned()
}

fn suffix(value: &Value) -> &str {
    value.decor().suffix().and_then(|suffix| suffix.as_str()).unwrap_or("")
}
