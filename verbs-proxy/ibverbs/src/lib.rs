//! The verbs proxy with a real card: the device behind [`ringfence_proxy`]'s seam that is an RNIC, through libibverbs.
//!
//! - [`library`]: libibverbs, loaded when the proxy starts; [`card`]: a card and what is made in it. All of the foreign interface
//!   is in these two.
//! - [`device`]: the worker's side, with [`names`], by which a completion finds what it is of.
//! - [`control`], [`driver`]: the control thread's side, with [`absence`], a card that goes and comes, and [`drained`], what only a queue that
//!   has nothing to send is told; [`attributes`]: words in between; [`rdma_cm`], by which the kernel says what addresses are on the
//!   card's interfaces; [`description`]: what operators are told; [`help`]: what a card may do beside the scheduler.

pub mod absence;
pub mod attributes;
pub mod card;
pub mod control;
pub mod description;
pub mod device;
pub mod drained;
pub mod driver;
pub mod help;
pub mod library;
pub mod names;
pub mod rdma_cm;
