//! `enum ibv_rate`: link rates as multiples of 2.5 Gbit/s and as Mbit/s.

// UNSAFETY: exported under names of the C interface.
#![allow(unsafe_code)]

use core::ffi::{c_int, c_uint};

/// `IBV_RATE_MAX`: the answer for a rate that has no number.
const RATE_MAX: c_uint = 0;

/// The rate, its multiple where it is a whole one, its Mbit/s.
const RATES: [(c_uint, Option<c_int>, c_int); 23] = [
    (2, Some(1), 2500),
    (5, Some(2), 5000),
    (3, Some(4), 10000),
    (6, Some(8), 20000),
    (4, Some(12), 30000),
    (7, Some(16), 40000),
    (8, Some(24), 60000),
    (9, Some(32), 80000),
    (10, Some(48), 120_000),
    (11, None, 14062),
    (12, None, 56250),
    (13, None, 112_500),
    (14, None, 168_750),
    (15, None, 25781),
    (16, None, 103_125),
    (17, None, 206_250),
    (18, None, 309_375),
    (19, Some(11), 28125),
    (20, Some(20), 53125),
    (21, Some(160), 425_000),
    (22, Some(240), 637_500),
    (23, Some(320), 850_000),
    (24, Some(480), 1_275_000),
];

/// `ibv_rate_to_mult(3)`.
#[unsafe(no_mangle)]
pub extern "C" fn ibv_rate_to_mult(rate: c_uint) -> c_int {
    RATES.iter().find(|entry| entry.0 == rate).and_then(|entry| entry.1).unwrap_or(-1)
}

/// `mult_to_ibv_rate(3)`.
#[unsafe(no_mangle)]
pub extern "C" fn mult_to_ibv_rate(multiple: c_int) -> c_uint {
    RATES.iter().find(|entry| entry.1 == Some(multiple)).map_or(RATE_MAX, |entry| entry.0)
}

/// `ibv_rate_to_mbps(3)`.
#[unsafe(no_mangle)]
pub extern "C" fn ibv_rate_to_mbps(rate: c_uint) -> c_int {
    RATES.iter().find(|entry| entry.0 == rate).map_or(-1, |entry| entry.2)
}

/// `mbps_to_ibv_rate(3)`.
#[unsafe(no_mangle)]
pub extern "C" fn mbps_to_ibv_rate(mbps: c_int) -> c_uint {
    RATES.iter().find(|entry| entry.2 == mbps).map_or(RATE_MAX, |entry| entry.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rate_survives_both_conversions() {
        for (rate, multiple, mbps) in RATES {
            assert_eq!(mbps_to_ibv_rate(ibv_rate_to_mbps(rate)), rate);
            assert_eq!(ibv_rate_to_mbps(rate), mbps);
            if multiple.is_some() {
                assert_eq!(mult_to_ibv_rate(ibv_rate_to_mult(rate)), rate);
            }
        }
        assert_eq!(
            (ibv_rate_to_mult(11), ibv_rate_to_mbps(0), mult_to_ibv_rate(3), mbps_to_ibv_rate(1)),
            (-1, -1, 0, 0)
        );
    }
}
