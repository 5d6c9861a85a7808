//! Counters that a card keeps of queue pairs which were bound to them (`rdma-statistic(8)`).
//!
//! Anybody may read them, of processes of his own PID namespace. Binding takes CAP_NET_ADMIN of the host, so that no proxy can do it:
//! it is the operator's, who has the kernel bind each process's by itself (`rdma statistic qp set link … auto pid on`).

use super::{DEV_INDEX, DUMP, RES_PID, RES_QP, RES_QP_ENTRY, Socket, attribute, entries, find, number, text};
use std::io;

/// Of the protocol, as in the parent module.
const STAT_GET: u16 = 17;
const PORT_INDEX: u16 = 3;
const RES_LQPN: u16 = 21;
const STAT_MODE: u16 = 74;
const STAT_RES: u16 = 75;
const STAT_AUTO_MODE_MASK: u16 = 76;
const STAT_COUNTER: u16 = 77;
const STAT_COUNTER_ENTRY: u16 = 78;
const STAT_HWCOUNTERS: u16 = 80;
const STAT_HWCOUNTER_ENTRY: u16 = 81;
const STAT_HWCOUNTER_ENTRY_NAME: u16 = 82;
const STAT_HWCOUNTER_ENTRY_VALUE: u16 = 83;
/// `RDMA_COUNTER_MODE_*`.
const MODE_AUTO: u32 = 1;
const MODE_MANUAL: u32 = 2;
/// `RDMA_COUNTER_MASK_PID`.
const MASK_PID: u32 = 2;

/// How a port's queue pairs are bound to counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Not at all. It is not said whether they could be.
    None,
    /// Each, when it is made; those of different processes to different counters, or not.
    Auto {
        /// See above.
        by_process: bool,
    },
    /// Some, one by one.
    Manual,
}

/// One set of counters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counted {
    /// The thread that made the first queue pair of it; `None` if that is the kernel, or has ended.
    pub thread: Option<i32>,
    /// Numbers of the queue pairs that are bound now.
    pub queue_pairs: Vec<u32>,
    /// By the names that the driver has for them.
    pub values: Vec<(String, u64)>,
}

impl Socket {
    /// How the queue pairs of a port of the device with this index are bound.
    ///
    /// # Errors
    /// Also of kernels before 5.3, which know nothing of it.
    pub fn counter_mode(&self, index: u32, port: u32) -> io::Result<Mode> {
        let answers = self.ask(STAT_GET, 0, &mode_request(index, port))?;
        let mode = answers.iter().find_map(|answer| mode(answer));
        mode.ok_or_else(|| io::Error::other("the kernel names no mode of the counters"))
    }

    /// The counters of queue pairs of the device with this index.
    ///
    /// # Errors
    /// As of [`Self::counter_mode`].
    pub fn counted(&self, index: u32) -> io::Result<Vec<Counted>> {
        let answers = self.ask(STAT_GET, DUMP, &request(index))?;
        Ok(answers.iter().flat_map(|answer| counted(answer)).collect())
    }
}

fn request(index: u32) -> Vec<u8> {
    let of_queue_pairs = u32::from(RES_QP).to_ne_bytes();
    [attribute(DEV_INDEX, &index.to_ne_bytes()), attribute(STAT_RES, &of_queue_pairs)].concat()
}

fn mode_request(index: u32, port: u32) -> Vec<u8> {
    // Of `STAT_MODE` it matters only that it is there.
    let asked = [attribute(PORT_INDEX, &port.to_ne_bytes()), attribute(STAT_MODE, &[0; 4])].concat();
    [request(index), asked].concat()
}

fn mode(answer: &[u8]) -> Option<Mode> {
    Some(match number(answer, STAT_MODE)? {
        MODE_AUTO => Mode::Auto { by_process: number(answer, STAT_AUTO_MODE_MASK).unwrap_or(0) & MASK_PID != 0 },
        MODE_MANUAL => Mode::Manual,
        _ => Mode::None,
    })
}

fn counted(answer: &[u8]) -> impl Iterator<Item = Counted> {
    entries(answer, STAT_COUNTER, STAT_COUNTER_ENTRY).map(|entry| {
        let values = entries(entry, STAT_HWCOUNTERS, STAT_HWCOUNTER_ENTRY);
        Counted {
            thread: number(entry, RES_PID).and_then(|thread| i32::try_from(thread).ok()),
            queue_pairs: entries(entry, RES_QP, RES_QP_ENTRY).filter_map(|pair| number(pair, RES_LQPN)).collect(),
            values: values.filter_map(value).collect(),
        }
    })
}

fn value(entry: &[u8]) -> Option<(String, u64)> {
    let value = find(entry, STAT_HWCOUNTER_ENTRY_VALUE)?;
    Some((text(entry, STAT_HWCOUNTER_ENTRY_NAME)?, u64::from_ne_bytes(value.try_into().ok()?)))
}

#[cfg(test)]
mod tests {
    use super::super::{CLIENT, HEADER, attributes, message};
    use super::*;
    use std::fmt::Write as _;
    use std::process::Command;

    const NESTED: u16 = 0x8000;

    /// As `fill_res_counter_entry` of the kernel writes it.
    fn entry(thread: Option<u32>, queue_pairs: &[u32], values: &[(&str, u64)]) -> Vec<u8> {
        let pairs = queue_pairs.iter().map(|pair| {
            let number = attribute(RES_LQPN, &pair.to_ne_bytes());
            attribute(NESTED | RES_QP_ENTRY, &number)
        });
        let values = values.iter().map(|(name, value)| {
            let name = attribute(STAT_HWCOUNTER_ENTRY_NAME, format!("{name}\0").as_bytes());
            let value = attribute(STAT_HWCOUNTER_ENTRY_VALUE, &value.to_ne_bytes());
            attribute(NESTED | STAT_HWCOUNTER_ENTRY, &[name, value].concat())
        });
        let parts = [
            attribute(PORT_INDEX, &1_u32.to_ne_bytes()),
            // Its number.
            attribute(79, &5_u32.to_ne_bytes()),
            thread.map_or_else(Vec::new, |thread| attribute(RES_PID, &thread.to_ne_bytes())),
            attribute(STAT_MODE, &MODE_AUTO.to_ne_bytes()),
            attribute(NESTED | RES_QP, &pairs.collect::<Vec<_>>().concat()),
            attribute(NESTED | STAT_HWCOUNTERS, &values.collect::<Vec<_>>().concat()),
        ];
        attribute(NESTED | STAT_COUNTER_ENTRY, &parts.concat())
    }

    #[test]
    fn counters_are_read() {
        let table = [
            entry(Some(4711), &[0x107, 0x108], &[("rx_write_requests", 7), ("rdma_tx_bytes", u64::MAX)]),
            entry(None, &[], &[]),
        ];
        let answer = [attribute(DEV_INDEX, &[0; 4]), attribute(NESTED | STAT_COUNTER, &table.concat())].concat();
        let found: Vec<_> = counted(&answer).collect();
        let values = vec![("rx_write_requests".into(), 7), ("rdma_tx_bytes".into(), u64::MAX)];
        let first = Counted { thread: Some(4711), queue_pairs: vec![0x107, 0x108], values };
        assert_eq!(found, [first, Counted { thread: None, queue_pairs: Vec::new(), values: Vec::new() }]);
        // What is cut off is passed over.
        for end in 0..answer.len() {
            assert!(counted(&answer[..end]).count() <= 2);
        }
    }

    #[test]
    fn modes_are_read() {
        let told = |mode: u32, mask: Option<u32>| {
            let mask = mask.map_or_else(Vec::new, |mask| attribute(STAT_AUTO_MODE_MASK, &mask.to_ne_bytes()));
            super::mode(&[attribute(STAT_MODE, &mode.to_ne_bytes()), mask].concat())
        };
        assert_eq!(told(0, None), Some(Mode::None));
        assert_eq!(told(1, Some(3)), Some(Mode::Auto { by_process: true }));
        assert_eq!(told(1, Some(1)), Some(Mode::Auto { by_process: false }));
        assert_eq!(told(2, None), Some(Mode::Manual));
        assert_eq!(super::mode(&[]), None);
    }

    #[test]
    fn requests_are_encoded_as_the_kernel_reads_them() {
        let sent = message(STAT_GET, 0, 17, &mode_request(3, 1));
        assert_eq!(sent[..HEADER], [48, 0, 0, 0, 17, 0x14, 1, 0, 17, 0, 0, 0, 0, 0, 0, 0]);
        let asked: Vec<_> = attributes(&sent[HEADER..]).map(|(kind, value)| (kind, value[0])).collect();
        assert_eq!(asked, [(DEV_INDEX, 3), (STAT_RES, 19), (PORT_INDEX, 1), (STAT_MODE, 0)]);
        let sent = message(STAT_GET, DUMP, 17, &request(3));
        assert_eq!(sent[..8], [32, 0, 0, 0, 17, CLIENT.to_ne_bytes()[0] << 2, 1, 3]);
    }

    #[test]
    fn numbers_are_the_headers() {
        let mut text = String::from("#include <rdma/rdma_netlink.h>\n");
        for (name, ours) in [
            ("RDMA_NLDEV_CMD_STAT_GET", u32::from(STAT_GET)),
            ("RDMA_NLDEV_ATTR_PORT_INDEX", PORT_INDEX.into()),
            ("RDMA_NLDEV_ATTR_RES_QP", RES_QP.into()),
            ("RDMA_NLDEV_ATTR_RES_QP_ENTRY", RES_QP_ENTRY.into()),
            ("RDMA_NLDEV_ATTR_RES_LQPN", RES_LQPN.into()),
            ("RDMA_NLDEV_ATTR_RES_PID", RES_PID.into()),
            ("RDMA_NLDEV_ATTR_STAT_MODE", STAT_MODE.into()),
            ("RDMA_NLDEV_ATTR_STAT_RES", STAT_RES.into()),
            ("RDMA_NLDEV_ATTR_STAT_AUTO_MODE_MASK", STAT_AUTO_MODE_MASK.into()),
            ("RDMA_NLDEV_ATTR_STAT_COUNTER", STAT_COUNTER.into()),
            ("RDMA_NLDEV_ATTR_STAT_COUNTER_ENTRY", STAT_COUNTER_ENTRY.into()),
            ("RDMA_NLDEV_ATTR_STAT_HWCOUNTERS", STAT_HWCOUNTERS.into()),
            ("RDMA_NLDEV_ATTR_STAT_HWCOUNTER_ENTRY", STAT_HWCOUNTER_ENTRY.into()),
            ("RDMA_NLDEV_ATTR_STAT_HWCOUNTER_ENTRY_NAME", STAT_HWCOUNTER_ENTRY_NAME.into()),
            ("RDMA_NLDEV_ATTR_STAT_HWCOUNTER_ENTRY_VALUE", STAT_HWCOUNTER_ENTRY_VALUE.into()),
            ("RDMA_COUNTER_MODE_AUTO", MODE_AUTO),
            ("RDMA_COUNTER_MODE_MANUAL", MODE_MANUAL),
            ("RDMA_COUNTER_MASK_PID", MASK_PID),
        ] {
            writeln!(text, "_Static_assert({name} == {ours}, \"ours is {ours}\");").unwrap();
        }
        let source = std::env::temp_dir().join(format!("ringfence-nldev-{}.c", std::process::id()));
        std::fs::write(&source, text).unwrap();
        let compiled = Command::new("cc").arg("-fsyntax-only").arg(&source).output().unwrap();
        std::fs::remove_file(&source).unwrap();
        assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
    }
}
