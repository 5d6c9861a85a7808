//! What is no function of libibverbs but a pointer of the `verbs_context` before each `ibv_context`, which grew over time.

// UNSAFETY: follows the pointers of a structure that libibverbs and the card's provider filled.
#![allow(unsafe_code)]

use super::{Card, CardQp, done, mlx5};
use crate::help::{Hardware, Paces, Probed};
use ringfence_abi::{ABI_IS_EXTENDED, ibv_device_attr_ex, ibv_qp_rate_limit_attr, verbs_context};
use rustix::io::Errno;
use std::mem::{offset_of, zeroed};
use std::num::NonZeroU32;
use std::ptr::null;

/// `1 << IBV_QPT_RC`.
const RC: u32 = 1 << 2;

/// As `verbs_get_ctx_op` of the header: the card's pointer with this name, if its structure goes as far and has it.
macro_rules! operation {
    ($card:expr, $name:ident) => {
        $card.operation(offset_of!(verbs_context, $name), |all| all.$name)
    };
}

impl Card {
    /// The pointer at this offset of our `verbs_context`, of the type that `_of` says.
    fn operation<T: Copy>(&self, offset: usize, _of: fn(&verbs_context) -> Option<T>) -> Option<T> {
        const END: usize = offset_of!(verbs_context, context);
        self.check().ok()?;
        let context = self.context.as_ptr();
        let before = |distance: usize| context.cast::<u8>().wrapping_sub(distance);
        // SAFETY: the context is open. What is before it is read only if the context says that there is something, and no further
        // than that says that it goes; fields have these distances from the context in every version of the header, with which a test
        // compares them.
        unsafe {
            if (*context).abi_compat != ABI_IS_EXTENDED {
                return None;
            }
            let reach: usize = before(END - offset_of!(verbs_context, sz)).cast::<usize>().read();
            if reach < size_of::<verbs_context>() - offset {
                None
            } else {
                before(END - offset).cast::<Option<T>>().read()
            }
        }
    }
}

impl Hardware for Card {
    type Qp = CardQp;

    fn paces(&self) -> Probed<Paces> {
        let without = |why: &str| Probed::NotOffered(why.into());
        if self.check().is_err() {
            return without("the card is gone");
        }
        let Some(query) = operation!(self, query_device_ex) else {
            return without("its driver has no ibv_query_device_ex");
        };
        if operation!(self, modify_qp_rate_limit).is_none() {
            return without("its driver has no ibv_modify_qp_rate_limit");
        }
        // SAFETY: plain data; the call fills as much of it as it knows.
        let mut attr: ibv_device_attr_ex = unsafe { zeroed() };
        // SAFETY: the context is open, and `attr` of that size lives across the call.
        let asked =
            done(unsafe { query(self.context.as_ptr(), null(), &raw mut attr, size_of::<ibv_device_attr_ex>()) });
        if let Err(error) = asked {
            return Probed::NotOffered(format!("ibv_query_device_ex: {error}"));
        }
        let caps = attr.packet_pacing_caps;
        match caps.qp_rate_limit_max > 0 && caps.supported_qpts & RC != 0 {
            true => Probed::Offered(Paces { least: caps.qp_rate_limit_min, most: caps.qp_rate_limit_max }),
            false => without("its packet_pacing_caps have no RC queue pairs"),
        }
    }

    fn limit(&self, qp: &CardQp, rate: NonZeroU32) -> Result<(), Errno> {
        self.check()?;
        let limit = operation!(self, modify_qp_rate_limit).ok_or(Errno::OPNOTSUPP)?;
        let mut attr =
            ibv_qp_rate_limit_attr { rate_limit: rate.get(), max_burst_sz: 0, typical_pkt_sz: 0, comp_mask: 0 };
        // SAFETY: the queue pair is there, since a card that is not closed destroys none that somebody has; `attr` lives across the call.
        done(unsafe { limit(qp.raw(), &raw mut attr) })
    }

    type Node = mlx5::Node;
    type Leaf = mlx5::Leaf;

    fn tree(&self) -> Probed<()> {
        self.has_tree()
    }

    fn node(&self, parent: Option<mlx5::Node>, most: Option<NonZeroU32>) -> Result<mlx5::Node, Errno> {
        self.make_node(parent, most)
    }

    fn leaf(&self, parent: mlx5::Node) -> Result<mlx5::Leaf, Errno> {
        self.make_leaf(parent)
    }

    fn hang(&self, qp: &CardQp, requestor: mlx5::Leaf, responder: mlx5::Leaf) -> Result<(), Errno> {
        self.hang_on(qp, requestor, responder)
    }

    fn fell(&self) {
        self.fell_tree();
    }
}
