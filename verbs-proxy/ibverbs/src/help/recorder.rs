//! What stands in a card's place in tests.

use super::{Hardware, Paces, Probed};
use rustix::io::Errno;
use std::cell::{Cell, RefCell};
use std::num::NonZeroU32;

/// Records what it is asked, and answers as it is told: no card is behind it.
pub struct Recorder {
    pub calls: RefCell<Vec<String>>,
    pub paces: Probed<Paces>,
    pub tree: Probed<()>,
    /// Calls that begin so fail so.
    pub refuses: Option<(&'static str, Errno)>,
    /// How many nodes and leaves: each has the number that it was.
    pub made: Cell<u32>,
}

/// One without a scheduling tree, which refuses rates.
pub fn recorder(paces: Probed<Paces>, refuses: Option<Errno>) -> Recorder {
    Recorder {
        calls: RefCell::default(),
        paces,
        tree: Probed::NotOffered("no tree".into()),
        refuses: refuses.map(|error| ("limit", error)),
        made: Cell::default(),
    }
}

impl Recorder {
    fn hear(&self, call: String) -> Result<(), Errno> {
        let refused = self.refuses.filter(|(begins, _)| call.starts_with(begins));
        self.calls.borrow_mut().push(call);
        refused.map_or(Ok(()), |(_, error)| Err(error))
    }

    fn make(&self, call: String) -> Result<u32, Errno> {
        self.hear(call)?;
        self.made.set(self.made.get() + 1);
        Ok(self.made.get())
    }
}

impl Hardware for Recorder {
    type Qp = u32;
    type Node = u32;
    type Leaf = u32;

    fn paces(&self) -> Probed<Paces> {
        self.calls.borrow_mut().push("paces".into());
        self.paces.clone()
    }

    fn limit(&self, qp: &u32, rate: NonZeroU32) -> Result<(), Errno> {
        self.hear(format!("limit {qp} {rate}"))
    }

    fn tree(&self) -> Probed<()> {
        self.calls.borrow_mut().push("tree".into());
        self.tree.clone()
    }

    fn node(&self, parent: Option<u32>, most: Option<NonZeroU32>) -> Result<u32, Errno> {
        self.make(match (parent, most) {
            (None, None) => "node".into(),
            (Some(parent), Some(most)) => format!("node below {parent}, {most} Mbit/s"),
            // As mlx5's library does.
            _ => return Err(Errno::INVAL),
        })
    }

    fn leaf(&self, parent: u32) -> Result<u32, Errno> {
        self.make(format!("leaf below {parent}"))
    }

    fn hang(&self, qp: &u32, requestor: u32, responder: u32) -> Result<(), Errno> {
        self.hear(format!("hang {qp} on {requestor} and {responder}"))
    }

    fn fell(&self) {
        self.calls.borrow_mut().push("fell".into());
    }
}
