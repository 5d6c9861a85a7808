//! Send requests of one queue pair that go to the card together, with one doorbell, and which of them are signaled.
//!
//! A completion says that all before it are complete as well, so not each of them need make one. But it must not be waited for long:
//! by what counts the bytes in flight, nor by the application, whose completion it is. So a run of requests with one signal at its end
//! is short, and shorter if the application waits for one within it. What the card is given last is signaled in any case; a
//! request that fails says so, signaled or not. One that the card's library does not even take has the last before it signaled.

// UNSAFETY: posts C structures with addresses of the lists beside them.
#![allow(unsafe_code)]

use super::NO_SGE;
use super::lists::{link, not_taken};
use crate::card::CardQp;
use ringfence_abi::{ibv_send_wr, ibv_sge, rdma, target};
use ringfence_protocol::verbs::SendFlags;
use ringfence_protocol::work::{MAX_INLINE, MAX_SGE};
use rustix::io::Errno;
use std::fmt::{self, Debug, Formatter};
use std::ptr::null_mut;

/// Requests that go together: as many as a queue pair may send in one turn.
pub(super) const MOST: usize = 32;
/// Requests of a run.
const RUN: usize = 8;
/// Bytes of a run ...
const RUN_BYTES: u64 = 64 << 10;
/// ... and of one in which the application waits for a completion.
const AWAITED_BYTES: u64 = 4 << 10;

/// Requests that were not posted yet, with room for [`MOST`].
pub(super) struct Batch {
    /// Bell number of their queue pair.
    pub queue: u32,
    requests: Box<[ibv_send_wr]>,
    count: usize,
    /// Of all requests, one behind the other.
    sges: Box<[ibv_sge]>,
    listed: usize,
    inline: Box<[u8]>,
    copied: usize,
    run: Run,
}

impl Debug for Batch {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.debug_struct("Batch").field("queue", &self.queue).field("count", &self.count).finish_non_exhaustive()
    }
}

/// What has come since the last that is signaled.
#[derive(Clone, Copy, Debug, Default)]
struct Run {
    requests: usize,
    bytes: u64,
    /// The application waits for one of them.
    awaited: bool,
}

impl Run {
    /// Whether `bytes` more are too much for it, on a queue that holds `room` requests.
    fn ends_before(self, bytes: u64, room: usize) -> bool {
        let most = if self.awaited { AWAITED_BYTES } else { RUN_BYTES };
        self.requests >= RUN.min(room / 2).max(1) || self.bytes + bytes > most
    }
}

/// The card has not taken the last of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Refused {
    /// How many.
    pub count: usize,
    /// What it says.
    pub error: Errno,
}

/// A request for [`Batch::add`], whose list is in [`Batch::list`] already.
#[derive(Clone, Copy)]
pub(super) struct Request {
    pub wr_id: u64,
    pub sges: usize,
    pub opcode: u32,
    pub flags: SendFlags,
    pub imm_data: u32,
    pub to: target,
    /// Of data, on the wire.
    pub bytes: u32,
    /// The application waits for its completion.
    pub awaited: bool,
    /// The card's library may refuse it for what it is. It fails when those before it have completed, which they must be heard to have.
    pub may_be_refused: bool,
    /// Requests that the queue holds.
    pub room: usize,
}

impl Batch {
    pub(super) fn new() -> Self {
        let to = target { rdma: rdma { remote_addr: 0, rkey: 0 } };
        let nothing = ibv_send_wr {
            wr_id: 0,
            next: null_mut(),
            sg_list: null_mut(),
            num_sge: 0,
            opcode: 0,
            send_flags: 0,
            imm_data: 0,
            wr: to,
            remote_srqn: 0,
            rest: [0; 6],
        };
        Self {
            queue: 0,
            requests: std::iter::repeat_n(nothing, MOST).collect(),
            count: 0,
            sges: vec![NO_SGE; MOST * MAX_SGE as usize].into(),
            listed: 0,
            inline: vec![0; MOST * MAX_INLINE as usize].into(),
            copied: 0,
            run: Run::default(),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.count == 0
    }

    pub(super) fn is_full(&self) -> bool {
        self.count == MOST
    }

    /// Where the next request's list goes.
    pub(super) fn list(&mut self) -> &mut [ibv_sge] {
        &mut self.sges[self.listed..][..MAX_SGE as usize]
    }

    /// Makes the next request's list one of these bytes, for a request with [`SendFlags::INLINE`]. They are copied: where they are now
    /// is not where they will be.
    pub(super) fn list_inline(&mut self, bytes: &[u8]) -> usize {
        let bytes = &bytes[..bytes.len().min(MAX_INLINE as usize)];
        let copy = &mut self.inline[self.copied..][..bytes.len()];
        copy.copy_from_slice(bytes);
        let addr = copy.as_ptr().addr() as u64;
        self.sges[self.listed] = ibv_sge { addr, length: bytes.len() as u32, lkey: 0 };
        self.copied += bytes.len();
        1
    }

    /// Adds a request; there is room.
    pub(super) fn add(&mut self, request: &Request) {
        let bytes = u64::from(request.bytes);
        if self.count > 0 && (request.may_be_refused || self.run.ends_before(bytes, request.room)) {
            self.signal_last();
        }
        self.listed += request.sges;
        let place = &mut self.requests[self.count];
        place.wr_id = request.wr_id;
        place.num_sge = request.sges as i32;
        place.opcode = request.opcode;
        place.send_flags = u32::from(request.flags.0);
        place.imm_data = request.imm_data;
        place.wr = request.to;
        self.count += 1;
        self.run.requests += 1;
        self.run.bytes += bytes;
        self.run.awaited |= request.awaited;
    }

    fn signal_last(&mut self) {
        self.requests[self.count - 1].send_flags |= u32::from(SendFlags::SIGNALED.0);
        self.run = Run::default();
    }

    /// Posts what there is, and is empty.
    pub(super) fn post(&mut self, qp: &CardQp) -> Result<(), Refused> {
        if self.count == 0 {
            return Ok(());
        }
        self.signal_last();
        let count = std::mem::take(&mut self.count);
        (self.listed, self.copied) = (0, 0);
        // What the card's library reads by address.
        self.inline.as_ptr().expose_provenance();
        let first = link(&mut self.requests[..count], &mut self.sges);
        // SAFETY: the requests are linked to each other as above; their lists lie in `sges`, and inline data in `inline`, none of
        // which moves or is written to before the call returns.
        unsafe { qp.post_send(first) }.map_err(|(bad, error)| Refused { count: not_taken(first, bad, count), error })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn signaled(requests: &[(u32, bool)]) -> Vec<bool> {
        signaled_before(requests, usize::MAX)
    }

    /// With a request at `refused` that may be.
    fn signaled_before(requests: &[(u32, bool)], refused: usize) -> Vec<bool> {
        let mut batch = Batch::new();
        for (place, (bytes, awaited)) in requests.iter().enumerate() {
            batch.add(&Request {
                wr_id: 0,
                sges: 0,
                opcode: 0,
                flags: SendFlags(0),
                imm_data: 0,
                to: target { rdma: rdma { remote_addr: 0, rkey: 0 } },
                bytes: *bytes,
                awaited: *awaited,
                may_be_refused: place == refused,
                room: 256,
            });
        }
        batch.signal_last();
        let flag = u32::from(SendFlags::SIGNALED.0);
        batch.requests[..batch.count].iter().map(|request| request.send_flags & flag != 0).collect()
    }

    #[test]
    fn one_of_several_small_requests_is_signaled_and_the_last_in_any_case() {
        let mut expected = [false; 10];
        (expected[7], expected[9]) = (true, true);
        assert_eq!(signaled(&[(8, true); 10]), expected);
        assert_eq!(signaled(&[(8, false)]), [true]);
    }

    #[test]
    fn what_is_before_a_request_that_may_be_refused_is_signaled() {
        assert_eq!(signaled_before(&[(8, true); 4], 2), [false, true, false, true]);
        assert_eq!(signaled_before(&[(8, true); 2], 0), [false, true]);
    }

    #[test]
    fn nobody_waits_for_the_completion_of_what_is_long() {
        assert_eq!(signaled(&[(8, true), (8, true), (32 << 10, false), (8, false)]), [false, true, false, true]);
        // Of requests without a completion of the application's, what is in flight is to be known.
        assert_eq!(signaled(&[(16 << 10, false); 6]), [false, false, false, true, false, true]);
        assert_eq!(signaled(&[(256 << 10, false), (256 << 10, true)]), [true, true]);
    }
}
