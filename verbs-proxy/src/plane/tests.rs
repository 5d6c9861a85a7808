//! The data plane driven by hand: a rig plays the container's library on the same rings.

// Of the rig, fuzzers do not need everything.
#![cfg_attr(not(test), allow(dead_code, unused_imports))]

mod foreign;
pub(crate) mod fuzzing;
#[cfg(test)]
mod grants;
mod keys;
mod ledger;
mod links;
#[cfg(test)]
mod names;
#[cfg(test)]
mod one;
#[cfg(test)]
mod out_of_step;
#[cfg(test)]
mod rates;
mod rigs;
#[cfg(test)]
mod scribbled;
#[cfg(test)]
mod shares;
mod speed;
#[cfg(test)]
mod two;
#[cfg(test)]
mod ways;

use rigs::{ALL, BULK, IOVA, MEMORY, PD, Rig, RigQp, SLOTS, TwoRigs, closer, link, post};

use super::CqEntry;
use super::bell::{Bell, Foreign, Ringer};
use super::cq::{Cq, CqIndex};
use super::qp::{Caps, NewQp, Owner};
use super::shaping::Shaping;
use crate::closer::Closer;
use crate::device::Device;
use crate::device::soft::Destination;
use crate::device::soft::grants::giving::Wish;
use crate::device::soft::link::{BYTES, End, Ends, Link, LinkFault, Share, Shared};
use crate::device::soft::links::LinkId;
use crate::device::soft::modelled::ModelledLink;
use crate::device::soft::qp::Peer;
use crate::device::soft::{Notice, Plane, Soft, Task};
use crate::fabric::budget::{Amount, Budget};
use crate::fabric::clock::WireClock;
use crate::memory::{Entrance, Granted, MemoryRegion, PdId, RegionTable};
use crate::shared::{Mapping, PAGE, SealedFile};
use crate::stats::Counters;
use ringfence_protocol::completion::Completion;
use ringfence_protocol::control::{ModifyQp, QpAttr};
use ringfence_protocol::layout::{RINGS_OFFSET, cq_bytes, qp_bytes};
use ringfence_protocol::ring::{Consumer, Producer, SLOT_BYTES};
use ringfence_protocol::verbs::{
    Access, EventType, Opcode, QpAttrMask as Mask, QpState, SendFlags, WcOpcode, WcStatus,
};
use ringfence_protocol::work::{ReceiveBase, SendBase, SendFields, Sge};
use ringfence_sched::{BitRate, Class, OpRate, Policy};
use std::sync::{Arc, OnceLock};
