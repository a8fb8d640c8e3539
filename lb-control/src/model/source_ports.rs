//! Which ports may be used as source ports of translated flows.

/// The usual range of node ports: a Service may get any of them at any time.
pub(crate) const NODE_PORTS: (u16, u16) = (30_000, 32_767);
/// Ports below this one are reserved for servers.
pub(crate) const FIRST_SOURCE_PORT: u16 = 1_024;
/// A range with fewer source ports is not used.
pub const MIN_SOURCE_PORTS: u16 = 1_000;

/// Whether [`Settings::source_ports`](lb_common::abi::settings::Settings) may ever include
/// `port`, if the kernel gives the ports `local` to sockets.
pub fn may_be_drawn(port: u16, local: (u16, u16)) -> bool {
    let is_in = |(first, last): (u16, u16)| (first..=last).contains(&port);
    port >= FIRST_SOURCE_PORT && !is_in(local) && !is_in(NODE_PORTS)
}
