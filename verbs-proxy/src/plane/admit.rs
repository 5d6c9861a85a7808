//! Claims are checked against what the container owns and may do.

use super::claim::{Claim, MAX_MESSAGE, fetches, vendor};
use super::qp::Qp;
use crate::device::Device;
use crate::memory::RegionTable;
use ringfence_protocol::verbs::{Access, Opcode, WcStatus};
use ringfence_protocol::work::Sge;
use std::ops::Deref;

/// Why a request is not admitted: what its completion says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The status.
    pub status: WcStatus,
    /// More of it: [`vendor`], or a [`crate::memory::AccessFault`].
    pub vendor_err: u16,
}

/// A claim that has been checked against what the container owns and may do. [`Qp::admit`] alone makes one, and without one no
/// device gathers, scatters or sends anything; what goes an inlined road asks the same function, and the table, in the same turn.
/// Regions may go while a request is under way: whoever reaches for memory asks the table
/// again.
#[derive(Clone, Copy, Debug)]
pub struct Admitted<'a>(&'a Claim);

impl<'a> Admitted<'a> {
    /// The request, for as long as it is there.
    #[inline]
    #[must_use]
    pub fn claim(self) -> &'a Claim {
        self.0
    }
}

impl Deref for Admitted<'_> {
    type Target = Claim;

    fn deref(&self) -> &Claim {
        self.0
    }
}

/// A claim, and whether it has been admitted.
#[derive(Debug)]
pub struct Work {
    claim: Claim,
    admitted: bool,
}

/// What a request of this opcode and so many bytes needs to be allowed in the container's own memory, if its queue pair may make it.
///
/// # Errors
/// The opcode, or the length.
#[inline(always)]
pub(crate) fn local_access<D: Device>(qp: &Qp<D>, opcode: Opcode, total: u32) -> Result<Access, Refusal> {
    let refuse = |status, vendor_err| Err(Refusal { status, vendor_err });
    match opcode {
        Opcode::RDMA_WRITE | Opcode::RDMA_WRITE_WITH_IMM | Opcode::SEND | Opcode::SEND_WITH_IMM => {}
        Opcode::RDMA_READ | Opcode::CMP_AND_SWP | Opcode::FETCH_AND_ADD => {
            if qp.attr.max_rd_atomic == 0 {
                return refuse(WcStatus::LOC_QP_OP_ERR, vendor::RD_ATOMIC);
            }
            if opcode != Opcode::RDMA_READ && total != 8 {
                return refuse(WcStatus::LOC_LEN_ERR, vendor::ATOMIC);
            }
        }
        _ => return refuse(WcStatus::LOC_QP_OP_ERR, vendor::OPCODE),
    }
    if total > MAX_MESSAGE {
        return refuse(WcStatus::LOC_LEN_ERR, vendor::LENGTH);
    }
    Ok(if fetches(opcode) { Access::LOCAL_WRITE } else { Access(0) })
}

impl Claim {
    fn check<D: Device>(&self, qp: &Qp<D>, regions: &RegionTable) -> Result<(), Refusal> {
        let access = local_access(qp, self.opcode, self.total)?;
        let held = |sge: &Sge| regions.admit(sge.lkey, qp.pd, sge.addr, u64::from(sge.length), access).map(drop);
        let all = self.data.sges().iter().filter(|sge| sge.length > 0).try_for_each(held);
        all.map_err(|fault| Refusal { status: WcStatus::LOC_PROT_ERR, vendor_err: fault as u16 })
    }
}

impl From<Claim> for Work {
    fn from(claim: Claim) -> Self {
        Self { claim, admitted: false }
    }
}

impl Work {
    /// What it was checked against has changed: it is a claim again.
    pub fn doubt(&mut self) {
        self.admitted = false;
    }

    /// The request, if it has been admitted.
    #[inline]
    #[must_use]
    pub fn admitted(&self) -> Option<Admitted<'_>> {
        self.admitted.then_some(Admitted(&self.claim))
    }

    /// The claim, of which nothing is believed.
    #[inline]
    #[must_use]
    pub fn claim(&self) -> &Claim {
        &self.claim
    }
}

impl<D: Device> Qp<D> {
    /// Admits the request at this index, unless it has been.
    ///
    /// # Errors
    /// What the container does not own, or may not do.
    #[inline]
    pub fn admit(&mut self, index: usize, regions: &RegionTable) -> Result<(), Refusal> {
        let work = &self.pending[index].work;
        if !work.admitted {
            work.claim.check(self, regions)?;
            self.pending[index].work.admitted = true;
        }
        Ok(())
    }
}
