//! When a piece of a work request goes.
//!
//! Everything here is a decision and nothing else: no clock is read, nothing is sent, and nothing is known about queues in
//! memory, links between processes or devices. `now` is passed in, queue pairs are numbers. So a thousand containers can
//! be simulated on a laptop (`cargo run -p ringfence-sched --example simulation`), by the code that ships.
//!
//! | module | decides |
//! |---|---|
//! | [`bucket`] | when a rate allows the next piece |
//! | [`caps`] | the same for all rates of a container, each way and in operations |
//! | [`order`] | whether that is for the container's own requests now, or for a neighbour who READs |
//! | [`turns`] | whose turn it is among queue pairs |
//! | [`window`] | how much a container may have on a link that others share |
//! | [`link`] | when a piece has left that link |
//! | [`scheduler`] | all of these together, for one container |
//! | [`shares`] | what is fair between containers that want more than there is |
//! | [`retry`] | when a request that was put off comes again |
//!
//! The data plane does not call [`shares`] yet: windows give shares on a link without it, and where there is no link it is what a
//! ledger of shares across containers is to compute them by. Until then the tests compare with it what windows and caps give.

#![forbid(unsafe_code)]

pub mod bucket;
pub mod caps;
pub mod link;
pub mod order;
pub mod retry;
pub mod scheduler;
pub mod shares;
pub mod turns;
pub mod units;
pub mod window;

pub use caps::{Allowance, Cost};
pub use order::Party;
pub use scheduler::{Class, Closed, LinkNow, Piece, Policy, Scheduler};
pub use units::{BitRate, Bytes, Nanos, OpRate, Ops, Weight};

/// What a piece costs on a link besides its data: headers, and work for the device.
///
/// HT-Verbs measured 18 to 23 bytes of traffic for each byte of an 8-byte request; a request without any data is a packet
/// nevertheless.
pub const HEADERS: Bytes = Bytes(64);
