//! What is told of a card to an operator.

use crate::card::Card;
use crate::help;
use anyhow::{Context, Result};
use ringfence_abi::{ibv_device_attr, ibv_gid_entry};
use ringfence_proxy::launch::Limits;
use ringfence_proxy::launch::card::{Description, Gid};
use std::ffi::c_int;
use std::net::Ipv6Addr;
use std::num::NonZeroU8;

fn count(of: c_int) -> u32 {
    u32::try_from(of).unwrap_or(0)
}

/// Opens the card with this name, to use this port of it, and describes it.
///
/// # Errors
/// As those of [`Card::open`].
pub fn describe(name: &str, port: NonZeroU8) -> Result<Description> {
    let card = Card::open(name, port)?;
    let attr = card.attributes().with_context(|| format!("cannot query RDMA device {name}"))?;
    let pkeys = card.pkeys().unwrap_or_default();
    let pkeys = pkeys.iter().filter(|key| **key != 0).map(|key| format!("{key:#06x}")).collect();
    let gids = card.gids().with_context(|| format!("cannot read the GID table of RDMA device {name}"))?;
    Ok(Description { help: help::told(&card), pkeys, ..of(name, port.get(), &attr, &gids) })
}

fn of(name: &str, port: u8, attr: &ibv_device_attr, gids: &[ibv_gid_entry]) -> Description {
    let gids = gids.iter().filter(|entry| entry.port_num == u32::from(port)).map(|entry| Gid {
        index: entry.gid_index,
        gid: Ipv6Addr::from(entry.gid.0).to_string(),
        // `enum ibv_gid_type`
        kind: ["IB", "RoCE v1", "RoCE v2"].get(entry.gid_type as usize).copied().unwrap_or("unknown").into(),
    });
    Description {
        name: name.to_owned(),
        max_qp: count(attr.max_qp),
        max_qp_depth: count(attr.max_qp_wr),
        max_mr: count(attr.max_mr),
        max_mr_bytes: attr.max_mr_size,
        max_sge: count(attr.max_sge),
        max_rd_atomic: count(attr.max_qp_rd_atom),
        atomics: attr.atomic_cap != 0,
        gids: gids.collect(),
        pkeys: Vec::new(),
        help: Vec::new(),
    }
}

/// What of the policy's limits the card does not have, if something; the container gets what there is.
#[must_use]
pub fn beyond(name: &str, attr: &ibv_device_attr, limits: &Limits) -> Option<String> {
    let limits = [
        ("max-qp", limits.max_qp, attr.max_qp),
        ("max-qp-depth", limits.max_qp_depth, attr.max_qp_wr),
        ("max-mr", limits.max_mr, attr.max_mr),
    ];
    let beyond = limits.into_iter().filter(|(_, granted, has)| *granted > count(*has));
    let listed: Vec<String> =
        beyond.map(|(key, granted, has)| format!("{key} = {granted}, of which it has {}", count(has))).collect();
    (!listed.is_empty()).then(|| {
        format!(
            "the policy grants more than RDMA device {name} has: {}; the container gets what there is: lower the policy's bounds",
            listed.join("; ")
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use ringfence_abi::ibv_gid;

    fn attributes() -> ibv_device_attr {
        // SAFETY: plain data.
        #[allow(unsafe_code)]
        let nothing: ibv_device_attr = unsafe { std::mem::zeroed() };
        ibv_device_attr { max_qp: 100, max_qp_wr: 4096, max_mr: -1, max_mr_size: 1 << 40, atomic_cap: 1, ..nothing }
    }

    #[test]
    fn what_the_card_lacks_of_the_policy_is_named() {
        let limits = Limits { max_qp: 101, max_qp_depth: 4096, max_mr: 7, ..Limits::default() };
        let said = beyond("mlx5_0", &attributes(), &limits).unwrap();
        assert!(said.contains("max-qp = 101, of which it has 100; max-mr = 7, of which it has 0;"), "{said}");
        assert_eq!(beyond("mlx5_0", &attributes(), &Limits { max_qp: 100, max_mr: 0, ..limits }), None);
    }

    #[test]
    fn a_card_is_described_as_a_policy_sees_it() {
        let entry = |port_num, gid_type| {
            let mut raw = [0; 16];
            raw[10..].copy_from_slice(&[0xff, 0xff, 10, 9, 1, 1]);
            ibv_gid_entry { gid: ibv_gid(raw), gid_index: 3, port_num, gid_type, ndev_ifindex: 7 }
        };
        let said = of("mlx5_0", 1, &attributes(), &[entry(1, 2), entry(2, 2), entry(1, 9)]);
        let gid = |kind: &str| Gid { index: 3, gid: "::ffff:10.9.1.1".into(), kind: kind.into() };
        assert_eq!(said.gids, [gid("RoCE v2"), gid("unknown")]);
        assert_eq!((said.max_qp, said.max_mr, said.max_mr_bytes, said.atomics), (100, 0, 1 << 40, true));
        let text = serde_json::to_string(&said).unwrap();
        assert_eq!(serde_json::from_str::<Description>(&text).unwrap(), said);
    }
}
