//! What `ringfence-runtime` and `containerd-shim-ringfence-v2` do before they become the real runtime and shim.
//!
//! [`arguments`], [`json`] and [`edit`] are pure; [`runtime`] and [`shim`] carry out.

pub mod arguments;
pub mod edit;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod fuzzing;
pub mod json;
pub mod runtime;
pub mod shim;

mod bundle;
mod decide;
mod find;
mod places;
mod report;
