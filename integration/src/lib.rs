//! What the end-to-end tests and the demonstration are made of: a sandbox that leaves nothing behind, Debian root file
//! systems without a registry, network namespaces, containers under runc with our hook, and verbs programs in them.

pub mod artifacts;
pub mod client;
pub mod command;
pub mod config;
pub mod container;
pub mod direct;
pub mod engines;
pub mod holds;
pub mod machine;
pub mod netns;
pub mod node;
pub mod perftest;
pub mod raw;
pub mod rootfs;
pub mod sandbox;

mod spec;
pub mod stalled;
pub mod suite;
pub mod takeover;
