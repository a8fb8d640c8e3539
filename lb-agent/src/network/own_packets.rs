//! The sysctls of `lo` that the programs rely on.
//!
//! A value that is right is never written, so that an agent without a writable /proc/sys starts
//! where `run --init-only` has been before it.

use std::fs;

use tracing::warn;

/// Sets sysctls of `lo` so that the kernel accepts the node's packets to itself that the programs
/// redirect to `lo`: they have no route attached, and an address of this node as their source, or
/// 127.0.0.1 as source and destination, which input routing else rejects as martian. Only packets
/// of the node itself are received on `lo`.
pub fn accept() {
    let settings = [
        ("accept_local", "cannot set it: node processes cannot reach backends on this node by UDP"),
        ("route_localnet", "cannot set it: node processes cannot reach NodePorts at 127.0.0.1"),
    ];
    for (name, consequence) in settings {
        let path = format!("/proc/sys/net/ipv4/conf/lo/{name}");
        if fs::read_to_string(&path).is_ok_and(|value| value.trim() == "1") {
            continue;
        }
        if let Err(error) = fs::write(&path, "1") {
            warn!(path, %error, "{consequence}");
        }
    }
}
