//! Nodes and pods made of network namespaces, agents that read manifests, real sockets.

mod affinity;
mod agent;
mod clusterip;
mod config;
mod detached;
mod dsr;
mod dsr_flows;
mod dsr_mtu;
mod explain;
mod external_mode;
mod frontends;
mod get_services;
mod harness;
mod healthcheck;
mod icmp;
mod lifetime;
mod limits;
mod mishaps;
mod offloads;
mod outside;
mod outside_load;
mod refusals;
mod strangers;
mod takeover;
mod upper;
