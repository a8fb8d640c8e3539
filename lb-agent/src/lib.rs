//! The node agent: `watch -> snapshot -> desired -> plan -> execute`.
//!
//! The middle (`snapshot`, `desired`, `ids`, `plan`) is pure: functions of their
//! arguments, no clock, no I/O. `watch` and `dataplane` are the two shells.
#![forbid(unsafe_code)]

pub mod cli;
pub mod commands;
pub mod config;
pub mod conntrack;
pub mod controller;
pub mod dataplane;
pub mod desired;
pub mod events;
pub mod execute;
pub mod health;
pub mod ids;
pub mod kube_proxy;
pub mod maps;
pub mod metrics;
pub mod model;
pub mod network;
pub mod options;
pub mod plan;
pub mod programs;
pub mod run;
pub mod snapshot;
pub mod takeover;
pub mod watch;
