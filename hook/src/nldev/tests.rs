use super::*;

/// What `rdma dev set r netns fd:7` sends for device 3, as `strace` shows it, on a little-endian machine.
#[test]
fn a_move_is_encoded_as_the_kernel_reads_it() {
    let request = message(SET, ACK, 2, &moving(3, 7));
    let expected = [
        &[32, 0, 0, 0, 0x02, 0x14, 0x05, 0, 2, 0, 0, 0, 0, 0, 0, 0][..],
        &[8, 0, 1, 0, 3, 0, 0, 0],
        &[8, 0, 68, 0, 7, 0, 0, 0],
    ];
    assert_eq!(request, expected.concat());
}

fn answer(kind: u16, sequence: u32, body: &[u8]) -> Vec<u8> {
    let length = (HEADER + body.len()) as u32;
    let mut bytes =
        [&length.to_ne_bytes()[..], &kind.to_ne_bytes(), &[0, 0], &sequence.to_ne_bytes(), &[0; 4], body].concat();
    bytes.resize(padded(bytes.len()), 0);
    bytes
}

fn of_device(index: u32, name: &str, guid: u64) -> Vec<u8> {
    let name = format!("{name}\0");
    // One that is not looked for stands between them.
    [
        attribute(DEV_INDEX, &index.to_ne_bytes()),
        attribute(DEV_NAME, name.as_bytes()),
        attribute(3, &1_u32.to_ne_bytes()),
        attribute(NODE_GUID, &guid.to_ne_bytes()),
    ]
    .concat()
}

#[test]
fn answers_are_taken_apart() {
    let (first, second) = (of_device(0, "mlx5_0", 0x5054_00ff_fe12_3456), of_device(7, "rxe0", 0));
    let piece = [answer(0x1401, 1, &first), answer(0x1401, 9, &second), answer(0x1401, 1, &second)].concat();
    let mut answers = Vec::new();
    assert_eq!(take(&piece, 1, &mut answers).unwrap(), End::Open);
    assert_eq!(take(&answer(DONE, 1, &[0; 4]), 1, &mut answers).unwrap(), End::Told);
    let devices: Vec<_> = answers.iter().filter_map(|answer| device(answer)).collect();
    let expected = Device { index: 0, name: "mlx5_0".into(), guid: Guid(0x5054_00ff_fe12_3456) };
    assert_eq!(devices, [expected, Device { index: 7, name: "rxe0".into(), guid: Guid(0) }]);
    assert_eq!(devices[0].guid.to_string(), "5054:00ff:fe12:3456");
}

#[test]
fn the_kernels_errors_are_told() {
    for (code, expected) in [(libc::EOPNOTSUPP, Some(libc::EOPNOTSUPP)), (libc::EBUSY, Some(libc::EBUSY)), (0, None)] {
        let answer = answer(ERROR, 2, &(-code).to_ne_bytes());
        let found = take(&answer, 2, &mut Vec::new());
        assert_eq!(found.map_err(|error| error.raw_os_error()).err(), expected.map(Some), "{code}");
        // Another request's is not ours.
        assert_eq!(take(&answer, 3, &mut Vec::new()).unwrap(), End::Open);
    }
}

#[test]
fn broken_answers_are_refused_or_passed_over() {
    let whole = answer(0x1401, 1, &of_device(0, "mlx5_0", 1));
    for end in HEADER..whole.len() {
        assert!(take(&whole[..end], 1, &mut Vec::new()).is_err(), "{end}");
    }
    let mut short = whole.clone();
    short[0] = 8;
    assert!(take(&short, 1, &mut Vec::new()).is_err());
    for broken in [&[][..], &[9, 0, 1], &[0, 0, 1, 0], &[3, 0, 1, 0], &[200, 0, 1, 0, 1]] {
        assert_eq!(attributes(broken).count(), 0, "{broken:?}");
        assert_eq!(device(broken), None);
    }
}

#[test]
fn who_uses_a_device_is_read() {
    let entry = |attributes: &[Vec<u8>]| attribute(0x8000 | RES_QP_ENTRY, &attributes.concat());
    let kernel = |kind: u8, name: &[u8]| entry(&[attribute(RES_TYPE, &[kind]), attribute(RES_KERN_NAME, name)]);
    let table = [kernel(1, b"ib_mad\0"), kernel(RELIABLE_CONNECTION, b"nvme\0")].concat();
    let answer = [attribute(DEV_INDEX, &[0; 4]), attribute(0x8000 | RES_QP, &table)].concat();
    let found: Vec<_> = entries(&answer, RES_QP, RES_QP_ENTRY).collect();
    assert_eq!(found.len(), 2);
    assert_eq!(text(found[1], RES_KERN_NAME).as_deref(), Some("nvme"));
    assert_eq!(find(found[1], RES_TYPE), Some(&[RELIABLE_CONNECTION][..]));
    assert_eq!(entries(&answer, RES_CTX, RES_CTX_ENTRY).count(), 0);
}

#[test]
fn a_character_device_is_read() {
    let number = rustix::fs::makedev(231, 193);
    let attributes = [attribute(CHARDEV_NAME, b"uverbs1\0"), attribute(CHARDEV, &number.to_ne_bytes())].concat();
    assert_eq!(node(&attributes), Some(Node { name: "uverbs1".into(), major: 231, minor: 193 }));
    assert_eq!(node(&attributes[..12]), None);
}

/// Here as on any machine without a card.
#[test]
fn a_kernel_without_rdma_says_so() {
    match Socket::open() {
        Ok(socket) => drop(socket.devices().unwrap()),
        Err(error) => assert_eq!(error.raw_os_error(), Some(libc::EPROTONOSUPPORT), "{error}"),
    }
}
