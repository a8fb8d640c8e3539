//! Agents that follow a real API server.

mod admission;
mod alerts;
mod api_server;
mod clusterip;
mod config;
mod control_plane;
mod drain;
mod events;
mod kube_proxy;
mod latency;
mod manifests;
mod nginx;
mod node_object;
mod parity;
mod restart;
mod source_ip;
mod start;
mod takeover;
mod watch;
