//! The verbs proxy: one process beside each container, which owns the container's queue pairs, schedules its work
//! requests and enforces its policy.

pub mod cgroup;
pub mod closer;
pub mod control;
pub mod datagram;
pub mod fabric;
pub mod guarded;
pub mod launch;
pub mod memory;
pub mod pacing;
pub mod plane;
pub mod rdma_cgroup;
pub mod rseq;
pub mod sandbox;
pub mod shared;
pub mod state;
pub mod warden;
pub mod worker;
