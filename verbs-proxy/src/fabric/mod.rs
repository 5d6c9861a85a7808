//! The soft device's fabric: where the proxies of a node find and reach each other.

pub mod addresses;
pub mod budget;
pub mod clock;
pub mod neighbours;
pub mod ports;
