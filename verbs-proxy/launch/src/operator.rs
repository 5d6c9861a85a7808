//! What the operator says to a proxy with a card, and hears: one datagram each way, on a connection of root's to the socket of the proxy's
//! port, `<run_dir>/fabric/<device>/sockets/<lid>`.

/// Close the card, until it has been away or [`RESUME`] is said.
pub const DRAIN: &[u8] = b"drain";
/// Open it again.
pub const RESUME: &[u8] = b"resume";
/// That has been done.
pub const DONE: &[u8] = b"done";
