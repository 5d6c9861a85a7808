//! A verbs proxy that its container has taken over: what it then tries, and what it may reach.
//!
//! The container runs the program `ringfence-taken`, which has a test build of the proxy make system calls. Every attempt is
//! an [`Attempt`]; [`rows`] puts them into a table with what is expected of each, which is the table in
//! `verbs-proxy/README.md`. The same attempts made by a process that is not confined show that they are real.

mod attempts;
pub mod exchange;
mod hands;
mod table;
pub mod victim;

#[path = "../../verbs-proxy/src/control/obedient/wire.rs"]
pub mod wire;

pub use attempts::collusion::accomplice;
pub use attempts::{Attack, NoShare, Target};
pub use hands::Hands;
pub use table::{Attempt, Row, Seen, Setting, Verdict, markdown, rows};
