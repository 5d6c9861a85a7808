//! The C types of `infiniband/verbs.h`, from rdma-core 44 to today's; fields without a doc are the header's.
//!
//! Two use them: the library that is libibverbs to programs, and the proxy of a real card, to which libibverbs is that. A test of the
//! first (`preload/src/layout_test.rs`) compares every size and offset with the installed header.

#![no_std]
#![allow(missing_docs)] // Fields without a doc are the header's.

mod attributes;
mod objects;
mod requests;

pub use attributes::*;
pub use objects::*;
pub use requests::*;
