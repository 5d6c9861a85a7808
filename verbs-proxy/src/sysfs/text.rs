//! How the kernel writes it (`drivers/infiniband/core/sysfs.c`).

use super::Entry;
use ringfence_protocol::verbs::GidType;

/// Of a node or a system image, with an end of line; `raw` in network order.
#[must_use]
pub fn guid(raw: u64) -> String {
    let [a, b, c, d, e, f, g, h] = raw.to_ne_bytes();
    format!("{a:02x}{b:02x}:{c:02x}{d:02x}:{e:02x}{f:02x}:{g:02x}{h:02x}\n")
}

/// Always of the same length.
pub fn pkey(key: u16) -> String {
    format!("0x{key:04x}\n")
}

/// Always of the same length.
pub fn gid(raw: &[u8; 16]) -> String {
    let words: Vec<String> = raw.chunks(2).map(|pair| format!("{:02x}{:02x}", pair[0], pair[1])).collect();
    format!("{}\n", words.join(":"))
}

/// As programs compare it.
pub fn gid_type(entry: &Entry) -> &'static str {
    match GidType(entry.info.gid_type) {
        GidType::ROCE_V2 => "RoCE v2\n",
        _ => "IB/RoCE v1\n",
    }
}

/// The interface of an entry, as a line; nothing for none.
pub fn interface(name: &str) -> String {
    if name.is_empty() { String::new() } else { format!("{name}\n") }
}

/// `enum ibv_node_type`.
pub fn node_type(number: u32) -> String {
    let name = match number {
        1 => "CA",
        2 => "switch",
        3 => "router",
        4 => "RNIC",
        5 => "usNIC",
        6 => "usNIC UDP",
        7 => "unspecified",
        _ => "<unknown>",
    };
    format!("{number}: {name}\n")
}

/// `enum ibv_port_state`.
pub fn state(number: u32) -> String {
    let name = match number {
        0 => "NOP",
        1 => "DOWN",
        2 => "INIT",
        3 => "ARMED",
        4 => "ACTIVE",
        5 => "ACTIVE_DEFER",
        _ => "UNKNOWN",
    };
    format!("{number}: {name}\n")
}

/// The state of the link itself, of InfiniBand's PortInfo.
pub fn physical_state(number: u32) -> String {
    let name = match number {
        1 => "Sleep",
        2 => "Polling",
        3 => "Disabled",
        4 => "PortConfigurationTraining",
        5 => "LinkUp",
        6 => "LinkErrorRecovery",
        7 => "Phy Test",
        _ => "<unknown>",
    };
    format!("{number}: {name}\n")
}

/// Width and speed as the verbs encode them, in Gbit/s.
pub fn rate(width: u32, speed: u32) -> String {
    let lanes = match width {
        2 => 4,
        4 => 8,
        8 => 12,
        16 => 2,
        _ => 1,
    };
    // In tenths, a lane.
    let (name, tenths) = match speed {
        2 => ("DDR", 50),
        4 => ("QDR", 100),
        8 => ("FDR10", 100),
        16 => ("FDR", 140),
        32 => ("EDR", 250),
        64 => ("HDR", 500),
        128 => ("NDR", 1000),
        256 => ("XDR", 2000),
        _ => ("SDR", 25),
    };
    let all = tenths * lanes;
    let half = if all % 10 == 0 { "" } else { ".5" };
    format!("{}{half} Gb/sec ({lanes}X {name})\n", all / 10)
}

/// `IBV_LINK_LAYER_*`.
pub fn link_layer(number: u32) -> &'static str {
    match number {
        1 => "InfiniBand\n",
        2 => "Ethernet\n",
        _ => "Unknown\n",
    }
}

/// A zero-terminated text.
pub fn terminated(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_those_of_the_kernel() {
        for (width, speed, expected) in [
            (1, 1, "2.5 Gb/sec (1X SDR)\n"),
            (2, 1, "10 Gb/sec (4X SDR)\n"),
            (1, 32, "25 Gb/sec (1X EDR)\n"),
            (2, 32, "100 Gb/sec (4X EDR)\n"),
            (2, 256, "800 Gb/sec (4X XDR)\n"),
            (16, 64, "100 Gb/sec (2X HDR)\n"),
        ] {
            assert_eq!(rate(width, speed), expected);
        }
    }

    #[test]
    fn numbers_are_written_in_network_order() {
        assert_eq!(guid(0x0202_0304_0506_0708_u64.to_be()), "0202:0304:0506:0708\n");
        let mut raw = [0; 16];
        raw[..2].copy_from_slice(&[0xfe, 0x80]);
        raw[15] = 9;
        assert_eq!(gid(&raw), "fe80:0000:0000:0000:0000:0000:0000:0009\n");
    }
}
