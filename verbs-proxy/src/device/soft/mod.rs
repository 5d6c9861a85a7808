//! The software device: bytes are copied by processors, within a container and between those of one node.

pub mod bounce;
pub mod grants;
pub mod link;
pub mod links;
pub(crate) mod remote;
pub mod respond;
mod serve;
pub(crate) mod source;
pub mod wire;

use crate::plane::{Notice, Plane, bell, intake, qp, shaping, transmit};
