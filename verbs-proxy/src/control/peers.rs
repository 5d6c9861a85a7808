//! Whom the policy lets queue pairs be connected to.

use super::driver::Driver;
use super::node::Node;
use ringfence_protocol::control::AddressVector;
use rustix::io::Errno;
use std::net::Ipv6Addr;

impl<D: Driver> Node<D> {
    /// Whether queue pairs may be connected to the port that an address vector names: `EACCES`, and a line that says so, if not. To
    /// be asked before any device is told of the vector.
    ///
    /// # Errors
    /// As said.
    pub fn check_peer(&self, av: &AddressVector) -> Result<(), Errno> {
        let Some(peers) = &self.limits.peers else { return Ok(()) };
        let gid = (av.is_global != 0).then_some(&av.dgid);
        if peers.allow(gid) {
            return Ok(());
        }
        self.voice.say(&match gid.map(|gid| Ipv6Addr::from(*gid)) {
            Some(gid) => {
                let gid = gid.to_canonical();
                format!("a queue pair was to be connected to {gid}, which is none of the policy's peers: {peers}")
            }
            None => format!(
                "a queue pair was to be connected to LID {} without a GID, by which the policy's peers are named: {peers}",
                av.dlid
            ),
        });
        Err(Errno::ACCESS)
    }
}
