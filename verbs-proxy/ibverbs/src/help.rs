//! What a card may do beside the proxy's scheduler, and never instead of it: the scheduler holds each cap with or without.
//!
//! Tested by a recorder in the place of a card: the calls are made as documented, and nothing more is known.
//!
//! A queue pair that has a rate of its own sends evenly what the scheduler gave to the card at once, and is held to it by the card
//! even if the proxy were not. Few cards have that for RC queue pairs; `packet_pacing_caps` of `ibv_query_device_ex(3)` say which.

#[cfg(test)]
mod recorder;
mod tree;

pub use tree::{Elements, Tree};

use ringfence_proxy::launch::BitRate;
use ringfence_proxy::launch::card::Help;
use rustix::io::Errno;
use std::fmt::Debug;
use std::num::NonZeroU32;

/// Rates that a card can hold a queue pair to, in kbit/s.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Paces {
    /// The lowest.
    pub least: u32,
    /// The highest.
    pub most: u32,
}

/// What a card says of something that not all have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Probed<T> {
    /// It has it, within these bounds.
    Offered(T),
    /// It has not, because of this.
    NotOffered(String),
}

/// A card, as far as it may help.
pub trait Hardware {
    /// Its queue pairs.
    type Qp;

    /// Whether RC queue pairs can have a rate.
    fn paces(&self) -> Probed<Paces>;

    /// `ibv_modify_qp_rate_limit`: the queue pair, which is in RTS, sends no more than so many kbit/s, until it is reset.
    ///
    /// # Errors
    /// The card's.
    fn limit(&self, qp: &Self::Qp, rate: NonZeroU32) -> Result<(), Errno>;

    /// Where elements of a scheduling tree meet: each has what is below it send in turn.
    type Node: Copy + Debug;
    /// What queue pairs hang on.
    type Leaf: Copy + Debug;

    /// Whether there is a scheduling tree to be asked for. What the card says of it, it says when it is.
    fn tree(&self) -> Probed<()>;

    /// `mlx5dv_sched_node_create`: what is below it sends no more than so many Mbit/s together. A node without a parent has no such
    /// cap.
    ///
    /// # Errors
    /// The card's.
    fn node(&self, parent: Option<Self::Node>, most: Option<NonZeroU32>) -> Result<Self::Node, Errno>;

    /// `mlx5dv_sched_leaf_create`: one without a cap of its own.
    ///
    /// # Errors
    /// The card's.
    fn leaf(&self, parent: Self::Node) -> Result<Self::Leaf, Errno>;

    /// `mlx5dv_modify_qp_sched_elem`: what the queue pair, which is in INIT or RTS, sends for itself goes by one leaf, and what it
    /// sends for its peer, which READs, by the other.
    ///
    /// # Errors
    /// The card's.
    fn hang(&self, qp: &Self::Qp, requestor: Self::Leaf, responder: Self::Leaf) -> Result<(), Errno>;

    /// Destroys all nodes and leaves, on which no queue pair hangs.
    fn fell(&self);
}

/// Bytes of a packet that are not its payload, by which no card counts more: preamble, gap, Ethernet with a VLAN, IPv6, UDP, BTH, RETH
/// and both checksums are 126.
const HEADERS: u64 = 128;

/// The rates of a container's queue pairs: of each the container's `bandwidth`.
#[derive(Debug)]
pub struct Pacing {
    /// Of payload.
    bandwidth: Option<BitRate>,
    /// What the card has; asked when the first queue pair is ready to send.
    paces: Option<Probed<Paces>>,
}

impl Pacing {
    /// With the policy's `bandwidth`.
    #[must_use]
    pub fn new(bandwidth: Option<BitRate>) -> Self {
        Self { bandwidth, paces: None }
    }

    /// Another card is asked again.
    pub fn forget(&mut self) {
        self.paces = None;
    }

    /// A queue pair is in RTS, with packets of `mtu` bytes, and sends nothing yet. What is to be said to the operator, if something:
    /// a card that refuses is told nothing more.
    pub fn ready<H: Hardware>(&mut self, card: &H, qp: &H::Qp, mtu: u32) -> Option<String> {
        let bandwidth = self.bandwidth?;
        let Probed::Offered(paces) = self.paces.get_or_insert_with(|| card.paces()) else { return None };
        let rate = rate(bandwidth, mtu, *paces)?;
        let error = card.limit(qp, rate).err()?;
        self.paces = Some(Probed::NotOffered(error.to_string()));
        Some(format!(
            "the card says that it can hold queue pairs to a rate, and refuses {rate} kbit/s: {error}; it is not asked again, and the \
             proxy holds the container's bandwidth alone, as on other cards"
        ))
    }
}

/// Bits per second of payload, with the headers of packets that are full.
fn with_headers(bandwidth: BitRate, mtu: u32) -> u64 {
    let bandwidth = bandwidth.bits();
    bandwidth.saturating_add(bandwidth.saturating_mul(HEADERS) / u64::from(mtu.max(1)))
}

/// In kbit/s, such that the card, which may count headers, holds back nothing of full packets that the scheduler lets go. Of messages
/// that are shorter than their headers it then sends less than the scheduler would. `None` if the card cannot send as fast.
fn rate(bandwidth: BitRate, mtu: u32, paces: Paces) -> Option<NonZeroU32> {
    let rate = with_headers(bandwidth, mtu).div_ceil(1000).max(u64::from(paces.least));
    let rate = u32::try_from(rate).ok().filter(|rate| *rate <= paces.most)?;
    NonZeroU32::new(rate)
}

/// For `ringfence info`.
#[must_use]
pub fn told<H: Hardware>(card: &H) -> Vec<Help> {
    let (offered, detail) = match card.paces() {
        Probed::Offered(Paces { least, most }) => (true, format!("{least} to {most} kbit/s")),
        Probed::NotOffered(why) => (false, why),
    };
    vec![Help { name: "rate per queue pair".into(), offered, detail }, tree::told(card)]
}

#[cfg(test)]
mod tests {
    use super::recorder::recorder;
    use super::*;

    const PACES: Paces = Paces { least: 1000, most: 100_000_000 };

    #[test]
    fn each_queue_pair_is_given_the_containers_rate_and_the_card_is_asked_once_whether_it_can() {
        let card = recorder(Probed::Offered(PACES), None);
        let mut pacing = Pacing::new(BitRate::new(1_000_000_000));
        assert_eq!(pacing.ready(&card, &7, 1024), None);
        assert_eq!(pacing.ready(&card, &8, 4096), None);
        assert_eq!(card.calls.take(), ["paces", "limit 7 1125000", "limit 8 1031250"]);
        pacing.forget();
        assert_eq!(pacing.ready(&card, &7, 1024), None);
        assert_eq!(card.calls.take(), ["paces", "limit 7 1125000"]);
    }

    #[test]
    fn a_card_that_refuses_is_not_asked_again_and_the_operator_hears_of_it_once() {
        let card = recorder(Probed::Offered(PACES), Some(Errno::OPNOTSUPP));
        let mut pacing = Pacing::new(BitRate::new(1_000_000_000));
        let said = pacing.ready(&card, &7, 1024).unwrap();
        assert!(said.contains("refuses 1125000 kbit/s: ") && said.contains("not asked again"), "{said}");
        assert_eq!(pacing.ready(&card, &8, 1024), None);
        assert_eq!(card.calls.take(), ["paces", "limit 7 1125000"]);
    }

    #[test]
    fn nothing_is_set_without_a_bandwidth_or_without_what_it_takes() {
        let card = recorder(Probed::Offered(PACES), None);
        assert_eq!(Pacing::new(None).ready(&card, &7, 1024), None);
        assert!(card.calls.take().is_empty());
        let card = recorder(Probed::NotOffered("none".into()), None);
        let mut pacing = Pacing::new(BitRate::new(1_000_000_000));
        assert_eq!((pacing.ready(&card, &7, 1024), pacing.ready(&card, &8, 1024)), (None, None));
        assert_eq!(card.calls.take(), ["paces"]);
    }

    #[test]
    fn a_rate_is_never_lower_than_the_policys() {
        let kbit = |bandwidth, mtu| rate(BitRate::new(bandwidth).unwrap(), mtu, PACES).map(NonZeroU32::get);
        assert_eq!(kbit(1_000_000_001, 4096), Some(1_031_251));
        // As low as the card can.
        assert_eq!(kbit(1, 1024), Some(1000));
        // Faster than the card is.
        assert_eq!(kbit(100_000_000_000, 4096), None);
        assert_eq!(kbit(u64::MAX, 256), None);
    }

    #[test]
    fn what_was_probed_is_told() {
        let [help, _] = &told(&recorder(Probed::Offered(PACES), None))[..] else { panic!("two") };
        assert_eq!((help.offered, help.detail.as_str()), (true, "1000 to 100000000 kbit/s"));
        let [help, _] = &told(&recorder(Probed::NotOffered("why".into()), None))[..] else { panic!("two") };
        assert_eq!((help.offered, help.detail.as_str()), (false, "why"));
    }
}
