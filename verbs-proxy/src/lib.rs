//! The verbs proxy: one process beside each container, which owns the container's queue pairs, schedules its work
//! requests and enforces its policy.

pub mod cgroup;
pub mod closer;
pub mod control;
pub mod datagram;
pub mod device;
pub mod errors;
pub mod fabric;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod fuzzing;
pub mod guarded;
pub mod memory;
pub mod pacing;
pub mod plane;
pub mod process;
pub mod rdma_cgroup;
pub mod rseq;
pub mod sandbox;
pub mod shared;
pub mod state;
pub mod stats;
pub mod steps;
pub mod sysfs;
pub mod voice;
pub mod warden;
pub mod worker;

pub use ringfence_launch as launch;
