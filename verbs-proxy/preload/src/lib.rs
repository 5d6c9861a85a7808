//! libibverbs.so.1 as the container sees it.
//!
//! `link.sh` makes the shared library out of this crate; a Rust `cdylib` could not give its symbols versions. Everything
//! here runs inside somebody else's process, in an image of unknown age: no standard library, no thread-local storage,
//! no constructor, nothing from glibc that is newer than 2.17, and no system call before the first verb.
//!
//! - [`abi`], a crate of its own: the C types of `infiniband/verbs.h`.
//! - [`process`], [`connection`], [`descriptor`], [`atfork`]: which process we are since the last fork, its connection to the
//!   proxy, and which descriptors still are ours.
//! - [`device`], [`context`], [`port`], [`pd`], [`mr`], [`channel`], [`cq`], [`qp`], [`events`]: the verbs.
//! - [`post`], [`poll`], [`work_queue`]: the data path; no system call, no allocation.
//! - [`pages`]: how ordinary memory becomes memory that the proxy shares; [`adopt`]: how memory is registered that is shared.
//! - [`names`], [`rates`], [`address`], [`sysfs`], [`fork`]: what needs no proxy.
//! - [`kernel_copies`]: what librdmacm has of the kernel, in the container's terms.
//! - [`unsupported`], [`versions`]: what a device without the capability answers, under every name and version.

#![cfg_attr(all(feature = "freestanding", not(test)), no_std)]

extern crate alloc;

use ringfence_abi as abi;

mod address;
mod adopt;
mod atfork;
mod channel;
mod connection;
mod context;
mod cq;
mod cq_ex;
mod descriptor;
mod device;
mod events;
mod fork;
#[cfg(all(feature = "freestanding", not(test)))]
mod freestanding;
mod kernel_copies;
#[cfg(test)]
mod layout_test;
mod lock;
mod mr;
mod names;
mod pages;
mod pd;
mod poll;
mod port;
mod post;
mod process;
mod qp;
mod qp_attr;
mod rates;
mod registry;
mod shared;
mod sys;
mod sysfs;
#[cfg(test)]
mod tests;
mod unsupported;
#[cfg(all(feature = "freestanding", not(test)))]
mod versions;
mod work_queue;
