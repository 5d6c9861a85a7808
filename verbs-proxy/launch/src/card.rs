//! What `ringfence-proxy-ibverbs --describe NAME PORT` says of a card, as one line of JSON: what its verbs say and no file does. For
//! `ringfence info` and `ringfence doctor`, which are linked statically and cannot load libibverbs.

use serde::{Deserialize, Serialize};

/// The option of the proxy's program for cards.
pub const DESCRIBE: &str = "--describe";

/// What a policy can grant of a card.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Description {
    /// The card's name.
    pub name: String,
    /// Queue pairs, of all containers together.
    pub max_qp: u32,
    /// Requests of one queue.
    pub max_qp_depth: u32,
    /// Memory regions, of all containers together.
    pub max_mr: u32,
    /// Bytes of one memory region.
    pub max_mr_bytes: u64,
    /// Pieces of memory of one request.
    pub max_sge: u32,
    /// READs and atomics of a queue pair that may be under way at once.
    pub max_rd_atomic: u32,
    /// Whether it has atomics.
    pub atomics: bool,
    /// The GIDs of that port of the card's, with the index that each has on the host; containers have their own order.
    pub gids: Vec<Gid>,
    /// Its P_Keys, as `0xffff`; entries that are empty are left out.
    #[serde(default)]
    pub pkeys: Vec<String>,
    /// What the card may do beside the proxy's scheduler.
    pub help: Vec<Help>,
}

/// Something that not all cards do, and no container needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Help {
    /// What it is.
    pub name: String,
    /// Whether the card has it; it is used then.
    pub offered: bool,
    /// Within which bounds; or why not.
    pub detail: String,
}

/// A GID of a card's port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Gid {
    /// On the host.
    pub index: u32,
    /// As an IPv6 address.
    pub gid: String,
    /// `IB`, `RoCE v1` or `RoCE v2`.
    pub kind: String,
}
