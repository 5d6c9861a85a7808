//! What a container's preload library and its verbs proxy agree on.
//!
//! Nothing here knows either side: this crate holds the shapes of shared memory ([`ring`], [`doorbell`], [`layout`]),
//! the entries that travel through it ([`work`], [`completion`]), the control messages ([`control`]) and the numbers of
//! the InfiniBand specification that both speak ([`verbs`]).
//!
//! The container is hostile. Types of this crate that come out of shared memory or off the socket are *claims*: they
//! are well-formed bytes and nothing more. The proxy copies a claim once and validates the copy.

#![cfg_attr(not(loom), no_std)]

pub mod completion;
pub mod control;
pub mod doorbell;
pub mod grants;
pub mod keys;
pub mod layout;
#[cfg(all(test, loom))]
mod models;
mod prefetch;
pub mod ring;
mod sync;
pub mod verbs;
pub mod work;

/// Version of everything in this crate; client and proxy must agree exactly.
///
/// The library is mounted into the container by the hook that starts the proxy, from the same package, so the two can
/// only differ if an administrator mixed packages.
pub const VERSION: u32 = 5;
