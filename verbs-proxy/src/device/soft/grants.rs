//! One-sided operations between neighbours without the responder: grants.
//!
//! A responder's proxy grants a neighbour, for one queue pair of its own and one region, what key, rights, domain and state
//! allow, after the first request of the kind has succeeded by the responder. The neighbour has mapped the region by then, or is
//! shown it writable for this. The requester's worker checks the grant and copies, and the request is complete; the responder
//! takes no part and may sleep. How a grant is taken back is in [`ringfence_protocol::grants`], and what becomes of a requester that is
//! stopped in the midst of a copy in [`crate::rseq`].
//!
//! - [`giving`]: the responder.
//! - [`using`]: the requester; `express`: the road inlined for it.
//! - `counting`: what the responder counts of what it took no part in.
//!
//! Whatever has no grant goes by the responder: it decides, and gives the errors.

// UNSAFETY: declares that the page of grants may be overlaid on shared memory.
#![allow(unsafe_code)]

mod counting;
mod express;
pub mod giving;
pub mod using;

use crate::fabric::budget::Lease;
use crate::pacing::Nanos;
use crate::shared::{Header, Held, PAGE};
use counting::Counted;
use giving::Giving;
use ringfence_protocol::grants::Page;
use serde::{Deserialize, Serialize};
use using::{Ahead, Using};

// SAFETY: atomics only.
unsafe impl Header for Page {}

/// Bytes of a page of grants' memory file.
pub const BYTES: usize = size_of::<Page>().next_multiple_of(PAGE);

/// What a responder says of a grant. To the requester it is a claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Grant {
    /// Its place in the responder's page ...
    pub slot: u32,
    /// ... and what must stand there.
    pub generation: u64,
    /// The responder's queue pair.
    pub to: u32,
    /// The requester's.
    pub from: u32,
    /// Remote key.
    pub key: u32,
    /// Remote rights.
    pub access: u32,
    /// Remote address of its first byte.
    pub iova: u64,
    /// Bytes.
    pub length: u64,
    /// Memory that the responder shares, which begins with the first byte.
    pub share: u32,
}

/// Both roles of one end of a link.
#[derive(Debug, Default)]
pub struct Grants {
    /// The page that we write.
    ours: Option<Held<Page>>,
    /// The other end's.
    theirs: Option<(Held<Page>, Lease)>,
    /// What we grant.
    pub giving: Giving,
    /// What we are granted.
    pub using: Using,
    /// What of that we may READ before we ask.
    ahead: Ahead,
    /// What the other end has said of its use of our grants, as far as it has been counted.
    counted: Counted,
    /// The other end is not woken before, to count what we do.
    tell_at: Nanos,
}

pub use counting::Looks;

impl Grants {
    /// Our page. `unlimited`: no rate limits what others READ out of our memory.
    pub fn set_ours(&mut self, page: Held<Page>, unlimited: bool) {
        if unlimited {
            page.allowance.0.store(u64::MAX, std::sync::atomic::Ordering::Relaxed);
        }
        self.ours = Some(page);
    }

    /// The other end's page, and what it takes of the mappings.
    pub fn set_theirs(&mut self, page: Held<Page>, lease: Lease) {
        self.theirs = Some((page, lease));
    }

    /// Both pages, if there are both.
    #[inline(always)]
    fn pages(&self) -> Option<(&Page, &Page)> {
        Some((self.ours.as_ref()?, &self.theirs.as_ref()?.0))
    }
}
