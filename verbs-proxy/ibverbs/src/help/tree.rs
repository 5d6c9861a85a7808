//! One cap over all of a container's queue pairs, held by the card: mlx5's scheduling tree (`mlx5dv_sched_node_create(3)`).
//!
//! What others READ out of a container's memory the card sends without the proxy, which can only cap what the container sends for
//! itself. The policy's `bandwidth` is for both together, and so is the node here: one leaf below it is for what queue pairs send as
//! requestors, the other for what they send as responders. Of what a container READs (`bandwidth-rx`) the peer's card is the sender, and
//! no element of this one has a say in it.

use super::{Hardware, Probed, with_headers};
use ringfence_proxy::launch::BitRate;
use ringfence_proxy::launch::card::Help;
use rustix::io::Errno;
use std::num::NonZeroU32;

/// A container's part of the card's scheduling tree, which is made when the first queue pair needs it, and lasts as long as the card is
/// open.
#[derive(Debug)]
pub struct Tree<H: Hardware> {
    /// Of payload.
    bandwidth: Option<BitRate>,
    state: State<H::Leaf>,
}

#[derive(Debug)]
enum State<L> {
    /// The card has not been asked.
    Unasked,
    /// `bears`: queue pairs hang on the leaves.
    Grown { requestor: L, responder: L, bears: bool },
    /// The card has none, or refused something. It is not asked again.
    Without,
}

impl<H: Hardware> Tree<H> {
    /// With the policy's `bandwidth`.
    #[must_use]
    pub fn new(bandwidth: Option<BitRate>) -> Self {
        Self { bandwidth, state: State::Unasked }
    }

    /// Another card is asked again; what was made on the former has gone with it.
    pub fn forget(&mut self) {
        self.state = State::Unasked;
    }

    /// A queue pair is in INIT, so that its peer may READ from the time on that it is in RTR, or in RTS. The library takes it in these
    /// two states, and does not say whether what it was told in the first outlasts RTR: so in both. `mtu`: bytes of the port's
    /// packets. What is to be said to the operator, if something.
    pub fn hang(&mut self, card: &H, qp: &H::Qp, mtu: impl FnOnce() -> u32) -> Option<String> {
        let bandwidth = self.bandwidth?;
        if let State::Unasked = self.state {
            self.state = State::Without;
            let Probed::Offered(()) = card.tree() else { return None };
            let most = most(bandwidth, mtu())?;
            match grow(card, most) {
                Ok((requestor, responder)) => self.state = State::Grown { requestor, responder, bears: false },
                Err(error) => return Some(refused(&format!("a scheduling node of {most} Mbit/s"), error)),
            }
        }
        let State::Grown { requestor, responder, bears } = &mut self.state else { return None };
        let error = match card.hang(qp, *requestor, *responder) {
            Ok(()) => {
                *bears = true;
                return None;
            }
            Err(error) => error,
        };
        // With queue pairs on its leaves it stays until they are gone, and the card is closed.
        if !*bears {
            card.fell();
        }
        self.state = State::Without;
        Some(refused("a queue pair on a leaf of its scheduling tree", error))
    }
}

fn refused(what: &str, error: Errno) -> String {
    format!(
        "the card refuses {what}: {error}; it is not asked again, and the proxy holds the container's bandwidth alone, as on other cards"
    )
}

/// In Mbit/s; `None` for what no card sends.
fn most(bandwidth: BitRate, mtu: u32) -> Option<NonZeroU32> {
    let most = with_headers(bandwidth, mtu).div_ceil(1_000_000);
    u32::try_from(most).ok().and_then(NonZeroU32::new)
}

/// The leaves below a node with this cap, in Mbit/s; nothing is left behind if one of all that is refused.
fn grow<H: Hardware>(card: &H, most: NonZeroU32) -> Result<(H::Leaf, H::Leaf), Errno> {
    let grow = || {
        let root = card.node(None, None)?;
        let node = card.node(Some(root), Some(most))?;
        Ok((card.leaf(node)?, card.leaf(node)?))
    };
    grow().inspect_err(|_| card.fell())
}

/// For `ringfence info`: makes one, and destroys it.
pub(super) fn told<H: Hardware>(card: &H) -> Help {
    /// 1 Gbit/s.
    const SOME: NonZeroU32 = NonZeroU32::new(1000).unwrap();
    let (offered, detail) = match card.tree() {
        Probed::NotOffered(why) => (false, why),
        Probed::Offered(()) => match grow(card, SOME) {
            Ok(_) => {
                card.fell();
                (true, "whether queue pairs can hang on it is asked when a container has its first".into())
            }
            Err(error) => (false, format!("the card refuses a node and its leaves: {error}")),
        },
    };
    Help { name: "scheduling tree".into(), offered, detail }
}

/// What there is of a tree, in the order in which it was made.
#[derive(Debug)]
pub struct Elements<N, L> {
    /// Nodes; a parent comes before its children.
    pub nodes: Vec<N>,
    /// Leaves.
    pub leaves: Vec<L>,
}

impl<N, L> Default for Elements<N, L> {
    fn default() -> Self {
        Self { nodes: Vec::new(), leaves: Vec::new() }
    }
}

impl<N: Copy, L: Copy> Elements<N, L> {
    /// Destroys it, children before their parents. What cannot be destroyed is in use, and so are its parents: it stays.
    pub fn destroy(&mut self, leaf: impl Fn(L) -> Result<(), Errno>, node: impl Fn(N) -> Result<(), Errno>) {
        self.leaves.retain(|element| leaf(*element).is_err());
        while self.leaves.is_empty() && self.nodes.last().is_some_and(|last| node(*last).is_ok()) {
            self.nodes.pop();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::recorder::{Recorder, recorder};
    use super::*;
    use std::cell::RefCell;

    fn with_tree(refuses: Option<(&'static str, Errno)>) -> Recorder {
        let without = recorder(Probed::NotOffered("no rates".into()), None);
        Recorder { tree: Probed::Offered(()), refuses, ..without }
    }

    fn gigabit() -> Tree<Recorder> {
        Tree::new(BitRate::new(1_000_000_000))
    }

    #[test]
    fn all_queue_pairs_hang_below_one_node_with_a_leaf_for_each_direction() {
        let (card, mut tree) = (with_tree(None), gigabit());
        for qp in [7, 8, 7] {
            assert_eq!(tree.hang(&card, &qp, || 4096), None);
        }
        let grown = ["tree", "node", "node below 1, 1032 Mbit/s", "leaf below 2", "leaf below 2"];
        let hung = ["hang 7 on 3 and 4", "hang 8 on 3 and 4", "hang 7 on 3 and 4"];
        assert_eq!(card.calls.take(), [&grown[..], &hung[..]].concat());
        tree.forget();
        assert_eq!(tree.hang(&card, &7, || 1024), None);
        assert_eq!(card.calls.take()[1..3], ["node", "node below 5, 1125 Mbit/s"]);
    }

    #[test]
    fn what_is_refused_half_way_leaves_nothing_and_is_told_once() {
        for (call, made) in [("node", 0), ("node below", 1), ("leaf", 2)] {
            let (card, mut tree) = (with_tree(Some((call, Errno::OPNOTSUPP))), gigabit());
            let said = tree.hang(&card, &7, || 4096).unwrap();
            assert!(said.contains("refuses a scheduling node of 1032 Mbit/s: ") && said.contains("not asked again"));
            let calls = card.calls.take();
            assert_eq!((calls.len(), calls.last().unwrap().as_str()), (made + 3, "fell"), "{calls:?}");
            assert_eq!(tree.hang(&card, &8, || 4096), None);
            assert!(card.calls.take().is_empty());
        }
    }

    #[test]
    fn a_queue_pair_that_is_refused_ends_it_and_leaves_those_that_hang() {
        for (refuses, fells) in [("hang 7", true), ("hang 8", false)] {
            let (card, mut tree) = (with_tree(Some((refuses, Errno::BUSY))), gigabit());
            let said = [7, 8, 9].map(|qp| tree.hang(&card, &qp, || 4096));
            let said: Vec<String> = said.into_iter().flatten().collect();
            assert!(matches!(&said[..], [one] if one.contains("a queue pair on a leaf")), "{said:?}");
            let calls = card.calls.take();
            assert_eq!(calls.contains(&"fell".to_owned()), fells, "{calls:?}");
            assert!(!calls.iter().any(|call| call.starts_with("hang 9")));
        }
    }

    #[test]
    fn nothing_is_asked_without_a_bandwidth_nor_made_without_a_tree_or_beyond_what_it_takes() {
        let card = with_tree(None);
        assert_eq!(Tree::new(None).hang(&card, &7, || 4096), None);
        assert!(card.calls.take().is_empty());
        assert_eq!(Tree::new(BitRate::new(u64::MAX)).hang(&card, &7, || 4096), None);
        assert_eq!(card.calls.take(), ["tree"]);
        let (card, mut tree) = (recorder(Probed::NotOffered("none".into()), None), gigabit());
        assert_eq!((tree.hang(&card, &7, || 4096), tree.hang(&card, &8, || 4096)), (None, None));
        assert_eq!(card.calls.take(), ["tree"]);
    }

    #[test]
    fn a_cap_is_never_lower_than_the_policys() {
        let mbit = |bandwidth, mtu| most(BitRate::new(bandwidth).unwrap(), mtu).map(NonZeroU32::get);
        // Nor 0, which is none.
        assert_eq!((mbit(1, 4096), mbit(1_000_001, 4096)), (Some(1), Some(2)));
    }

    #[test]
    fn what_was_probed_is_told_and_gone() {
        let card = with_tree(None);
        let help = told(&card);
        assert!(help.offered && help.detail.contains("when a container has its first"), "{help:?}");
        assert_eq!(card.calls.take().last().unwrap(), "fell");
        let help = told(&with_tree(Some(("leaf", Errno::OPNOTSUPP))));
        assert!(!help.offered && help.detail.contains("refuses a node and its leaves"), "{help:?}");
        let help = told(&recorder(Probed::NotOffered("none".into()), None));
        assert_eq!((help.offered, help.detail.as_str()), (false, "no tree"));
    }

    #[test]
    fn children_are_destroyed_before_their_parents_and_what_is_in_use_keeps_its() {
        let destroyed = RefCell::new(Vec::new());
        let destroy = |element: &'static str| {
            destroyed.borrow_mut().push(element);
            Ok(())
        };
        let elements = || Elements { nodes: vec!["root", "node"], leaves: vec!["one", "other"] };
        let mut all = elements();
        all.destroy(destroy, destroy);
        assert_eq!(destroyed.take(), ["one", "other", "node", "root"]);
        assert!(all.nodes.is_empty() && all.leaves.is_empty());
        let mut all = elements();
        all.destroy(|leaf| if leaf == "one" { Err(Errno::BUSY) } else { destroy(leaf) }, destroy);
        assert_eq!((destroyed.take(), all.leaves, all.nodes.len()), (vec!["other"], vec!["one"], 2));
    }
}
