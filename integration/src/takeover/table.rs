//! What is expected of every attempt, and the table that says so.

use super::attempts::{self, Attack};
use anyhow::Result;
use rustix::io::Errno;
use std::fmt;

/// Under whose engine a taken-over proxy runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Setting {
    /// Root's, and the container has the host's user namespace.
    Root,
    /// Root's, and the container has a user namespace of its own.
    Mapped,
    /// A user's.
    Rootless,
}

/// What came of an attempt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seen {
    /// It worked, or got past every check: what was had.
    Reached(String),
    /// It was refused.
    Refused(Errno),
    /// There is nothing there that could be tried.
    Nothing(String),
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Reached(what) => write!(f, "reached\t{what}"),
            Self::Refused(errno) => write!(f, "refused\t{errno}"),
            Self::Nothing(why) => write!(f, "nothing\t{why}"),
        }
    }
}

/// One thing that a taken-over proxy tries.
#[derive(Clone, Copy, Debug)]
pub struct Attempt {
    /// Unique.
    pub name: &'static str,
    /// Makes it. An error: it could not be tried, which fails the test.
    pub run: fn(&mut Attack) -> Result<Seen>,
    /// Whether a process of root's that nothing confines gets there: what shows that the attempt is one.
    pub control: bool,
}

/// Whether a row's attempts reach what they want.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// None of them.
    No,
    /// All of them; what the README says about it.
    Yes(&'static str),
}

impl Verdict {
    /// Whether an attempt may have been seen to end so.
    #[must_use]
    pub fn allows(self, reached: bool) -> bool {
        (self != Self::No) == reached
    }
}

/// A row of the table: attempts of the same kind.
#[derive(Clone, Debug)]
pub struct Row {
    /// What they want.
    pub what: &'static str,
    /// Under root's engines.
    pub root: Verdict,
    /// The same, with a user namespace.
    pub mapped: Verdict,
    /// Under a user's.
    pub rootless: Verdict,
    /// The attempts.
    pub attempts: Vec<Attempt>,
}

impl Row {
    /// What is expected in a setting.
    #[must_use]
    pub fn expected(&self, setting: Setting) -> Verdict {
        match setting {
            Setting::Root => self.root,
            Setting::Mapped => self.mapped,
            Setting::Rootless => self.rootless,
        }
    }
}

/// What a file's descriptor reaches.
const PAGES: &str = "all of its pages, for as long as it keeps them";

/// Why proxies can give each other things.
const CARRY: &str = "sockets between proxies carry descriptors; what either may have is in this table";

/// All rows, in the order in which they are tried: the most harmful last.
#[must_use]
pub fn rows() -> Vec<Row> {
    use Verdict::{No, Yes};
    let row = |what, [root, mapped, rootless]: [Verdict; 3], attempts| Row { what, root, mapped, rootless, attempts };
    let never = |what, attempts| row(what, [No; 3], attempts);
    let always = |what, why, attempts| row(what, [Yes(why); 3], attempts);
    vec![
        never("what the host or a neighbour owns, through a descriptor that it holds", attempts::descriptors::held()),
        always(
            "the files in which its own container reads of the device (`/sys`): writing",
            "they lie in the container's own file system of 4 MiB, and tell nobody else anything",
            attempts::descriptors::shown(),
        ),
        never("programs, further processes, other namespaces and roots", attempts::processes::programs()),
        never("mounts", attempts::files::mounts()),
        never("privileges: other ids, capabilities, `prctl`, real-time priority", attempts::processes::privileges()),
        never(
            "the rest of the kernel: BPF, `perf`, `io_uring`, keys, modules, clocks, System V IPC, …",
            attempts::kernel::all(),
        ),
        never("sockets of any family but Unix and the netlink that lists addresses", attempts::sockets::families()),
        never("the host's network, its abstract sockets among it", attempts::sockets::network()),
        never("daemons that listen at a path", attempts::sockets::daemons()),
        never("another process: its memory, descriptors, scheduling, limits", attempts::processes::others()),
        never("a signal to another process: another proxy, the engine, init", attempts::processes::signals()),
        // Without root, files cannot be made immutable, and neighbours are shown a buffer of the link's in their place.
        row(
            "the memory file of a region that a neighbour's work request named, if it is whole pages of nothing else: reading",
            [Yes(PAGES), Yes(PAGES), No],
            attempts::memory::reading(),
        ),
        never("the same file: writing, resizing, sealing, removing pages", attempts::memory::writing()),
        row("the same, when it has handed the file to its container", [No; 3], attempts::memory::handed_over()),
        never("bytes beside such a region, on its first or last page", attempts::memory::edges()),
        never("memory that no work request named", attempts::memory::unnamed()),
        never("a link under another port's name", attempts::neighbours::other_name()),
        always(
            "a link to another proxy, under its own name",
            "that is how containers exchange data; what comes over it is believed by nobody",
            attempts::neighbours::own_link(),
        ),
        row(
            "another taken-over proxy, to give it a region's file that it was shown",
            [Yes(CARRY), Yes(CARRY), No],
            attempts::collusion::giving(),
        ),
        never("files of the host: reading, writing, making, removing, watching", attempts::files::files()),
        never("a signal to another process by `fcntl`", attempts::processes::late_signals()),
        never("its warden, which is root, for anything but its own memory files", attempts::warden::requests()),
    ]
}

/// The table as Markdown.
#[must_use]
pub fn markdown() -> String {
    let cell = |verdict| match verdict {
        Verdict::No => "no".to_owned(),
        Verdict::Yes(why) => format!("yes: {why}"),
    };
    let mut text =
        "| a taken-over proxy reaches | root's engines | … with a user namespace | without root |\n|---|---|---|---|\n"
            .to_owned();
    for row in rows() {
        let [root, mapped, rootless] = [row.root, row.mapped, row.rootless].map(cell);
        // The same reason is not said twice.
        let mapped = if mapped == root && row.root != Verdict::No { "yes".to_owned() } else { mapped };
        let rootless = if rootless == root && row.root != Verdict::No { "yes".to_owned() } else { rootless };
        text += &format!("| {} | {root} | {mapped} | {rootless} |\n", row.what);
    }
    text
}
