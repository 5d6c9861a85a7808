//! The OCI hook: joins a container to its verbs proxy.
//!
//! Decisions are pure and live in [`annotations`], [`identity`], [`policy`], [`config`], [`units`], [`preload_file`] and [`state`];
//! the rest carries them out. [`create`] and [`stop`] are the two things that a runtime asks for.

pub mod annotations;
pub mod card;
pub mod card_counters;
pub mod config;
pub mod device_filter;
pub mod exclusive;
pub mod failures;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod fuzzing;
pub mod identity;
pub mod policy;
pub mod preload_file;
pub mod rdma_cm;
pub mod state;
pub mod uids;
pub mod units;
pub mod userfaultfd;

mod cgroup;
mod collect;
mod containers;
mod create;
mod elf;
mod failure;
mod image;
mod init;
mod inject;
mod input;
mod journal;
mod mountinfo;
mod netns;
mod nldev;
mod nothing;
mod overlay;
mod placement;
mod process;
mod proxy;
mod record;
mod registered;
mod rootfs;
mod rootless;
mod session;
mod stop;
mod sys;
mod sysfs;
mod systemd;
mod trust;

pub use collect::{Collected, Left, Removed, collect};
pub use containers::{Container, Memory, Status, containers, counters};
pub use create::create;
pub use failure::{Code, Failure};
pub use input::Input;
pub use stop::stop;
