//! What runs in a cluster: agents, clients, servers, and the processes behind them.

pub mod agent;
pub mod client;
pub(crate) mod exec;
pub mod host;
pub mod process;
pub mod rights;
