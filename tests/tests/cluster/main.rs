//! Agents that follow a real API server.

mod clusterip;
mod config;
mod control_plane;
mod drain;
mod events;
mod kube_proxy;
mod latency;
mod nginx;
mod parity;
mod restart;
mod source_ip;
mod start;
mod takeover;
mod watch;
