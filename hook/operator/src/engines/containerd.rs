//! Text of containerd's configuration: the `ringfence` runtime for CRI goes in and comes out, all else stays as it is.
//!
//! What we add carries [`MARK`] in a comment, by which it is found again. The runtime is containerd's own
//! `io.containerd.runc.v2` with our wrapper for a `BinaryName`, since that works on every version from 1.6 on.

pub mod dump;
pub mod files;

mod default_runtime;
mod defects;
mod lines;
#[cfg(test)]
mod tests;

pub use defects::{defects, misuses_shim};

use anyhow::{Result, bail};
use toml_edit::{Array, DocumentMut, Item, Table, TableLike, Value, value};

/// The runtime's name, a `RuntimeClass`'s handler.
pub const NAME: &str = "ringfence";
/// The runtime type whose options containerd knows; others get options that the runc shim cannot read.
pub const RUNTIME_TYPE: &str = "io.containerd.runc.v2";
/// Pods' annotations that have to reach the hook. A `*` of containerd's does not match a slash.
pub const ANNOTATIONS: [&str; 2] = ["ringfence.dev/*", "*.ringfence.dev/*"];
/// The first line of a file that holds nothing but ours.
const HEADER: &str = "# Written by `ringfence configure`; `ringfence unconfigure` removes it.\n";
const MARK: &str = "# ringfence configure:";
const MARK_RUNTIME: &str =
    "\n# ringfence configure: containers of this runtime may use RDMA, each behind its own proxy.\n";
const MARK_RUNC: &str =
    "\n# ringfence configure: containerd 1.x drops its built-in runc once any other runtime is listed.\n";
const MARK_SECTION: &str = "\n# ringfence configure: for the default runtime below.\n";
const MARK_VERSION: &str = " # ringfence configure: the file was empty";

/// What is to be registered.
#[derive(Clone, Debug)]
pub struct Registration {
    /// `ringfence-runtime`, as an absolute path.
    pub binary: String,
    /// Whether pods without a `RuntimeClass` get it.
    pub set_as_default: bool,
    /// The runc runtime of another file of the configuration, for when the edited one has none.
    pub runc: Option<Table>,
}

/// A configuration file.
#[derive(Clone, Debug)]
pub struct File {
    document: DocumentMut,
    /// Line ends are `\r\n`.
    crlf: bool,
}

impl File {
    /// Parses a whole file; errors say the line.
    pub fn parse(text: &str) -> Result<Self, String> {
        let crlf = text.contains('\n') && text.matches("\r\n").count() == text.matches('\n').count();
        let text = if crlf { text.replace("\r\n", "\n") } else { text.to_owned() };
        let document = text.parse::<DocumentMut>().map_err(|error| {
            let line = error.span().map_or(1, |span| text[..span.start.min(text.len())].matches('\n').count() + 1);
            format!("line {line}: {}", error.message().trim_end().replace('\n', ", "))
        })?;
        Ok(Self { document, crlf })
    }

    /// The `imports`, as they are written.
    pub fn imports(&self) -> Vec<String> {
        let imports = self.document.get("imports").and_then(Item::as_array);
        imports.into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
    }

    /// Replaces the `imports`.
    pub fn set_imports(&mut self, imports: &[String]) {
        self.document["imports"] = value(imports.iter().collect::<Array>());
    }

    /// Which format it is in; 1 if it does not say.
    pub fn version(&self) -> i64 {
        self.document.get("version").and_then(Item::as_integer).unwrap_or(1)
    }

    /// Whether it says nothing at all.
    pub fn is_empty(&self) -> bool {
        self.document.is_empty()
    }

    /// Whether containerd is told not to load its CRI plugin.
    pub fn disables_cri(&self) -> bool {
        let disabled = self.document.get("disabled_plugins").and_then(Item::as_array);
        let names = ["cri", "io.containerd.grpc.v1.cri", "io.containerd.cri.v1.runtime"];
        disabled.into_iter().flatten().any(|plugin| plugin.as_str().is_some_and(|plugin| names.contains(&plugin)))
    }

    /// Whether it holds any of the CRI plugin's configuration.
    pub fn has_cri(&self) -> bool {
        self.find(&["plugins", self.plugin()]).is_some()
    }

    /// A runtime's table.
    pub fn runtime(&self, name: &str) -> Option<&dyn TableLike> {
        self.find(&["plugins", self.plugin(), "containerd", "runtimes", name])
    }

    /// A copy of runc's table, for [`Registration::runc`].
    pub fn runc(&self) -> Option<Table> {
        let mut table = Table::new();
        self.runtime("runc")?.iter().for_each(|(key, item)| _ = table.insert(key, item.clone()));
        Some(table)
    }

    /// All runtimes, by name.
    pub fn runtimes(&self) -> impl Iterator<Item = (&str, &dyn TableLike)> {
        let runtimes = self.find(&["plugins", self.plugin(), "containerd", "runtimes"]);
        let runtimes = runtimes.into_iter().flat_map(|runtimes| runtimes.iter());
        runtimes.filter_map(|(name, item)| Some((name, item.as_table_like()?)))
    }

    /// The runtime of pods that name none, if the file says it.
    pub fn default_runtime(&self) -> Option<&str> {
        self.find(&["plugins", self.plugin(), "containerd"])?.get("default_runtime_name")?.as_str()
    }

    fn plugin(&self) -> &'static str {
        if self.version() <= 2 { "io.containerd.grpc.v1.cri" } else { "io.containerd.cri.v1.runtime" }
    }

    fn find(&self, path: &[&str]) -> Option<&dyn TableLike> {
        let root: &dyn TableLike = self.document.as_table();
        path.iter().try_fold(root, |table, key| table.get(key)?.as_table_like())
    }

    /// Puts the registration in, or brings it up to date.
    pub fn configure(&mut self, registration: &Registration) -> Result<()> {
        if self.is_empty() {
            // 2.x reads version 2 as well as its own.
            let mut version = Value::from(2);
            version.decor_mut().set_suffix(MARK_VERSION);
            self.document.insert("version", Item::Value(version));
        }
        let (version, plugin) = (self.version(), self.plugin());
        if !(2..=4).contains(&version) {
            bail!(
                "its format is version {version}, whose plugins containerd 2.x ignores; convert it by \
                 `containerd config dump` (and take \"cri\" out of disabled_plugins), then try again"
            );
        }
        let containerd = child(child(child(self.document.as_item_mut(), "plugins")?, plugin)?, "containerd")?;
        let runtimes = child(containerd, "runtimes")?;
        if !runtimes.as_table().is_some_and(|runtimes| !runtimes.is_dotted()) {
            bail!("its runtimes are an inline table or dotted keys; write each as a [table], then try again");
        }
        if registration.set_as_default {
            default_runtime::set(containerd)?;
        }
        let runtimes = table(child(containerd, "runtimes")?, "runtimes")?;
        let runc = match runtimes.get("runc").and_then(Item::as_table_like) {
            Some(runc) => Some(copy(runc)),
            None => registration.runc.as_ref().map(|runc| copy(runc)),
        };
        if version == 2 && !runtimes.iter().any(|(name, _)| name != NAME) {
            // No more than its type: where an earlier file's runc counts, as in 2.x, this leaves that as it is.
            let mut table = Table::new();
            table.insert("runtime_type", value(RUNTIME_TYPE));
            table.decor_mut().set_prefix(MARK_RUNC);
            runtimes.insert("runc", Item::Table(table));
        }
        let wanted = runtime(runc.unwrap_or_default(), &registration.binary);
        match runtimes.get(NAME) {
            Some(Item::Table(present)) if is_marked(present) && same(present, &wanted) => {}
            Some(present) if !present.as_table().is_some_and(is_marked) => {
                let defects = present.as_table_like().map_or_else(
                    || vec!["it is no table".to_owned()],
                    |present| defects(present, &registration.binary, None),
                );
                if let Some(defect) = defects.first() {
                    bail!("its runtime {NAME} is not ours to change, and {defect}; remove it, then try again");
                }
            }
            _ => _ = runtimes.insert(NAME, Item::Table(wanted)),
        }
        Ok(())
    }

    /// Takes out all that [`Self::configure`] put in.
    pub fn unconfigure(&mut self) {
        let plugin = self.plugin();
        prune(self.document.as_item_mut(), &["plugins", plugin, "containerd"], &mut |containerd| {
            default_runtime::reset(containerd);
            prune(containerd, &["runtimes"], &mut |runtimes| {
                let Some(runtimes) = runtimes.as_table_like_mut() else { return };
                for name in [NAME, "runc"] {
                    if runtimes.get(name).and_then(Item::as_table).is_some_and(is_marked) {
                        runtimes.remove(name);
                    }
                }
            });
        });
        let version = self.document.get("version").and_then(Item::as_value);
        let suffix = version.and_then(|version| version.decor().suffix()?.as_str());
        if suffix == Some(MARK_VERSION) && self.document.len() == 1 {
            self.document.remove("version");
        }
    }
}

impl std::fmt::Display for File {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let text = self.document.to_string();
        f.write_str(&if self.crlf { text.replace('\n', "\r\n") } else { text })
    }
}

/// `text` with the registration.
pub fn configure(text: &str, registration: &Registration) -> Result<String> {
    let mut file = File::parse(text).map_err(anyhow::Error::msg)?;
    let before = file.to_string();
    file.configure(registration)?;
    let new = lines::carry_over(text, &before, &file.to_string());
    if let Err(error) = File::parse(&new) {
        bail!("it is written in a way that cannot be edited in place ({error}); write its runtimes as [tables]");
    }
    Ok(new)
}

/// A whole new file of format `version`.
pub fn create(registration: &Registration, version: i64) -> Result<String> {
    let text = if version == 2 { String::new() } else { format!("version = {version}{MARK_VERSION}\n") };
    Ok(format!("{HEADER}{}", configure(&text, registration)?))
}

/// `text` without the registration; `None` if nothing else was in it and it is ours.
pub fn unconfigure(text: &str) -> Result<Option<String>> {
    let (ours, rest) = match text.strip_prefix(HEADER) {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let mut file = File::parse(rest).map_err(anyhow::Error::msg)?;
    let before = file.to_string();
    file.unconfigure();
    let rest = lines::carry_over(rest, &before, &file.to_string());
    Ok(if ours && rest.trim().is_empty() { None } else { Some(rest) })
}

/// Our runtime: runc's with another program, and with our annotations let through.
fn runtime(runc: Table, binary: &str) -> Table {
    let mut table = runc;
    table.insert("runtime_type", value(RUNTIME_TYPE));
    for key in ["pod_annotations", "container_annotations"] {
        let mut patterns: Array = match table.get(key).and_then(Item::as_array) {
            Some(patterns) => patterns.iter().filter_map(Value::as_str).collect(),
            None => Array::new(),
        };
        for pattern in ANNOTATIONS {
            if !patterns.iter().any(|present| present.as_str() == Some(pattern)) {
                patterns.push(pattern);
            }
        }
        table.insert(key, value(patterns));
    }
    let mut options = table.remove("options").and_then(|item| item.into_table().ok()).unwrap_or_default();
    options.insert("BinaryName", value(binary));
    table.insert("options", Item::Table(options));
    table.decor_mut().set_prefix(MARK_RUNTIME);
    table
}

/// A table's values and tables of values, without its comments and its place.
fn copy(table: &dyn TableLike) -> Table {
    let mut new = Table::new();
    for (key, item) in table.iter() {
        match item {
            Item::Value(Value::InlineTable(table)) => _ = new.insert(key, Item::Table(copy(table))),
            Item::Value(value) => {
                let mut value = value.clone();
                value.decor_mut().clear();
                new.insert(key, Item::Value(value));
            }
            Item::Table(table) => _ = new.insert(key, Item::Table(copy(table))),
            Item::None | Item::ArrayOfTables(_) => {}
        }
    }
    new
}

fn same(a: &Table, b: &Table) -> bool {
    let plain = |table: &Table| toml::from_str::<toml::Table>(&DocumentMut::from(copy(table)).to_string());
    matches!((plain(a), plain(b)), (Ok(a), Ok(b)) if a == b)
}

fn is_marked(table: &Table) -> bool {
    table.decor().prefix().and_then(|prefix| prefix.as_str()).is_some_and(|prefix| prefix.contains(MARK))
}

fn table<'a>(item: &'a mut Item, name: &str) -> Result<&'a mut dyn TableLike> {
    match item.as_table_like_mut() {
        Some(table) => Ok(table),
        None => bail!("its {name} is not a table"),
    }
}

/// The item `key` of the table `parent`, made a table if it is missing.
fn child<'a>(parent: &'a mut Item, key: &str) -> Result<&'a mut Item> {
    let mut new = Table::new();
    new.set_implicit(true);
    let child = table(parent, key)?.entry(key).or_insert(Item::Table(new));
    table(child, key)?;
    Ok(child)
}

/// Does `work` on the item at `path`, if there is one, and removes what is empty and stands nowhere in the file then.
fn prune(item: &mut Item, path: &[&str], work: &mut dyn FnMut(&mut Item)) {
    let Some((key, rest)) = path.split_first() else { return work(item) };
    let Some(table) = item.as_table_like_mut() else { return };
    let Some(child) = table.get_mut(key) else { return };
    prune(child, rest, work);
    if child.as_table().is_some_and(|child| child.is_implicit() && child.is_empty()) {
        table.remove(key);
    }
}
