//! What `drain` says to proxies, and makes of their answers.

use crate::node::{Node, json};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, accept, bind, listen, recv, send,
    socket_with,
};
use std::thread::JoinHandle;

const DEVICES: &str = r#"
[[device]]
name = "soft0"
kind = "soft"
[[device]]
name = "mlx5_0"
kind = "ibverbs"
nodes = ["/dev/infiniband/uverbs0"]
"#;

/// The proxy of a port, which answers so; what it was told.
fn proxy(node: &Node, lid: &str, answer: &'static [u8]) -> JoinHandle<Vec<u8>> {
    let sockets = node.path("run/fabric/mlx5_0/sockets");
    std::fs::create_dir_all(&sockets).unwrap();
    let listener = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    bind(&listener, &SocketAddrUnix::new(sockets.join(lid)).unwrap()).unwrap();
    listen(&listener, 1).unwrap();
    std::thread::spawn(move || {
        let client = accept(&listener).unwrap();
        let mut word = [0; 16];
        let (bytes, _) = recv(&client, &mut word, RecvFlags::empty()).unwrap();
        if !answer.is_empty() {
            send(&client, answer, SendFlags::empty()).unwrap();
        }
        word[..bytes].to_vec()
    })
}

pub fn every_proxy_of_the_device_is_told() {
    let node = Node::new(DEVICES);
    assert_eq!(node.succeed(&["drain", "mlx5_0"]), "0 proxies have closed mlx5_0\n");
    let proxies = [proxy(&node, "1", b"done"), proxy(&node, "2", b"done")];
    assert_eq!(node.succeed(&["drain", "mlx5_0"]), "2 proxies have closed mlx5_0\n");
    assert!(proxies.into_iter().all(|proxy| proxy.join().unwrap() == b"drain"));
    // Their sockets are there, and nobody behind them.
    let resumed = proxy(&node, "3", b"done");
    let said = json(&node.succeed(&["drain", "--resume", "--json", "mlx5_0"]));
    assert_eq!((said["proxies"].as_u64(), said["failed"].as_array().unwrap().len()), (Some(1), 0));
    assert_eq!(resumed.join().unwrap(), b"resume");
}

pub fn a_proxy_that_does_not_is_named() {
    let node = Node::new(DEVICES);
    let (deaf, other) = (proxy(&node, "7", b""), proxy(&node, "8", b"done"));
    let outcome = node.run(&["drain", "mlx5_0"]);
    assert_eq!(outcome.code, 1, "{}", outcome.err);
    assert!(outcome.out.contains("1 proxies have closed") && outcome.out.contains("sockets/7: "), "{}", outcome.out);
    drop((deaf.join().unwrap(), other.join().unwrap()));
}

pub fn what_keeps_no_driver_is_not_drained() {
    let node = Node::new(DEVICES);
    for (device, why) in
        [("soft0", "kind soft"), ("mlx5_7", "no device mlx5_7; there are "), ("../x", "no device ../x")]
    {
        let outcome = node.run(&["drain", device]);
        assert!(outcome.code == 1 && outcome.err.contains(why), "{device}: {}", outcome.err);
    }
}
