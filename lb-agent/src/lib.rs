//! The node agent: `watch -> lb-control -> maps`.
//!
//! What is decided is in the crate `lb-control`, which does no I/O. This crate is the shell
//! around it: it watches objects, reads configuration, opens maps, attaches programs,
//! follows the node's network and serves health and metrics.
#![forbid(unsafe_code)]
#![cfg_attr(not(test), deny(clippy::print_stdout))]

pub mod cli;
pub mod commands;
pub mod config;
pub mod conntrack;
pub mod events;
pub mod health;
pub mod kube_proxy;
pub mod logs;
pub mod maps;
pub mod metrics;
pub mod network;
pub mod options;
pub mod output;
pub mod privileges;
pub mod programs;
pub mod report;
pub mod run;
pub mod takeover;
pub mod watch;
