//! A small cluster out of network namespaces: nodes, pods, an outside client, real sockets.
//!
//! ```text
//!        outside 192.0.2.10           fabric: router (default gateway of all), bridge br0,
//!              |                      drops and counts what is meant for a ClusterIP
//!           [fabric]--br0------------------+
//!                      | eth0              | eth0
//!                   [node1] 172.18.0.11  [node2] 172.18.0.12
//!                    |    |                |
//!                  [pod] [pod]           [pod]   10.244.NODE.n, veths or a bridge cni0
//! ```
//! Everything has an IPv6 address beside it. Nothing here has a route to the machine's own
//! network, and nothing is attached or changed outside the namespaces, the cgroups and the
//! BPF directories that a [`topology::cluster::Cluster`] made and removes when it is dropped. What a run
//! that was killed left behind is removed by the next run: every name holds the process id.

pub mod actors;
pub mod topology;
pub mod traffic;
pub mod words;
