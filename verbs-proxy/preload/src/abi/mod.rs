//! The C types of `infiniband/verbs.h`, from rdma-core 44 to today's; fields without a doc are the header's.
//!
//! `layout_test` compares every size and offset with the installed header.

mod attributes;
mod objects;
mod requests;

#[cfg(test)]
mod layout_test;

pub use attributes::*;
pub use objects::*;
pub use requests::*;
