//! Partitions of an InfiniBand subnet, which switches keep apart: the administrator says which of a card's a container is in.

use serde::{Deserialize, Serialize};
use std::fmt;

/// A partition key (InfiniBand Architecture Specification, 10.9.1): the number of a partition in the lower 15 bits, of which none is 0,
/// and in the highest one whether the member may speak to members of both kinds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "i64", into = "u16")]
pub struct Pkey(u16);

/// The most keys that a port has entries for in practice, and that a container is given.
pub const MOST: usize = 128;

impl TryFrom<i64> for Pkey {
    type Error = String;

    fn try_from(number: i64) -> Result<Self, String> {
        match u16::try_from(number) {
            Ok(key) if key & 0x7fff != 0 => Ok(Self(key)),
            _ => Err(format!("{number:#x} is no P_Key, which are 0x0001 to 0xffff, and not 0x8000")),
        }
    }
}

impl From<Pkey> for u16 {
    fn from(key: Pkey) -> Self {
        key.0
    }
}

impl fmt::Display for Pkey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#06x}", self.0)
    }
}

/// Whether these can be a container's table; what is wrong with them.
///
/// # Errors
/// That there are none, too many, or one twice.
pub fn check(keys: &[Pkey]) -> Result<(), String> {
    if keys.is_empty() {
        return Err("pkeys = [] names no partition; leave it out for the first of the card's port".into());
    }
    if keys.len() > MOST {
        return Err(format!("pkeys has {} partitions; {MOST} at most", keys.len()));
    }
    match keys.iter().enumerate().find(|(index, key)| keys[..*index].contains(key)) {
        Some((_, key)) => Err(format!("pkeys has {key} twice")),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_have_a_number() {
        let key = |number| Pkey::try_from(number).map(u16::from);
        assert_eq!((key(1), key(0x8001), key(0xffff)), (Ok(1), Ok(0x8001), Ok(0xffff)));
        assert_eq!(key(0x8000), Err("0x8000 is no P_Key, which are 0x0001 to 0xffff, and not 0x8000".into()));
        assert!(key(0).is_err() && key(0x1_0001).is_err() && key(-1).is_err() && key(i64::MAX).is_err());
        assert_eq!(Pkey(0x12).to_string(), "0x0012");
    }

    #[test]
    fn a_table_names_each_partition_once() {
        assert_eq!(check(&[Pkey(1), Pkey(0x8001)]), Ok(()));
        assert_eq!(check(&[Pkey(1), Pkey(2), Pkey(1)]), Err("pkeys has 0x0001 twice".into()));
        assert!(check(&[]).is_err());
        let many: Vec<_> = (1..=129).map(Pkey).collect();
        assert_eq!(check(&many), Err("pkeys has 129 partitions; 128 at most".into()));
    }
}
