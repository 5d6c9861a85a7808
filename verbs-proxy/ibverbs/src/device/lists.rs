//! Lists of requests as the card's library takes them: linked to each other, each with its own list of memory.

// UNSAFETY: writes to requests through pointers that the library will follow.
#![allow(unsafe_code)]

use ringfence_abi::{ibv_recv_wr, ibv_send_wr, ibv_sge};
use std::ptr::null_mut;

/// A request of either kind.
pub(super) trait Linked {
    /// Sets where its list of memory is and what comes behind it. How long the list is.
    fn link(&mut self, list: *mut ibv_sge, next: *mut Self) -> usize;
}

macro_rules! linked {
    ($request:ty) => {
        impl Linked for $request {
            fn link(&mut self, list: *mut ibv_sge, next: *mut Self) -> usize {
                (self.sg_list, self.next) = (list, next);
                self.num_sge as usize
            }
        }
    };
}
linked!(ibv_send_wr);
linked!(ibv_recv_wr);

/// Links these requests, whose lists lie in `sges` one behind the other. The first.
pub(super) fn link<R: Linked>(requests: &mut [R], sges: &mut [ibv_sge]) -> *mut R {
    let count = requests.len();
    let (first, mut list) = (requests.as_mut_ptr(), sges.as_mut_ptr());
    for index in 0..count {
        let next = if index + 1 < count { first.wrapping_add(index + 1) } else { null_mut() };
        // SAFETY: `index` is within the requests, and no other reference to one is there.
        let sges = unsafe { (*first.add(index)).link(list, next) };
        // Nobody follows it behind the last request.
        list = list.wrapping_add(sges);
    }
    first
}

/// How many of `count` the card has not taken, which says that `bad` is the first of them. One that names none has taken none.
pub(super) fn not_taken<R>(first: *mut R, bad: *mut R, count: usize) -> usize {
    let taken = bad.addr().checked_sub(first.addr()).map(|bytes| bytes / size_of::<R>());
    count - taken.filter(|taken| *taken < count).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_linked_and_their_lists_lie_one_behind_the_other() {
        let sge = ibv_sge { addr: 0, length: 0, lkey: 0 };
        let mut sges = [sge; 6];
        let request = |num_sge| ibv_recv_wr { wr_id: 0, next: null_mut(), sg_list: null_mut(), num_sge };
        let mut requests = [request(2), request(0), request(3)];
        let first = link(&mut requests, &mut sges);
        assert_eq!(
            requests.each_ref().map(|request| request.next.addr()),
            [first.wrapping_add(1).addr(), first.wrapping_add(2).addr(), 0]
        );
        let places =
            requests.each_ref().map(|request| (request.sg_list.addr() - sges.as_ptr().addr()) / size_of_val(&sge));
        assert_eq!(places, [0, 2, 2]);
    }

    #[test]
    fn a_card_that_does_not_say_which_has_taken_none() {
        let mut requests = [const { 0u64 }; 4];
        let first = requests.as_mut_ptr();
        let bad = [0, 1, 3].map(|index| not_taken(first, first.wrapping_add(index), 4));
        assert_eq!(bad, [4, 3, 1]);
        assert_eq!([null_mut(), first.wrapping_add(4)].map(|bad| not_taken(first, bad, 4)), [4, 4]);
    }
}
