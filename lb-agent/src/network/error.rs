//! Why the interfaces of the node cannot be followed.

use std::io;

use lb_control::dataplane::DataplaneError;

use crate::{maps::pins::PinError, programs::tc::AttachError};

/// The interfaces cannot be followed.
#[derive(Debug, thiserror::Error)]
pub enum InterfaceError {
    /// No netlink socket could be opened.
    #[error("cannot open a netlink socket")]
    Connect {
        /// The error of the kernel.
        #[source]
        source: io::Error,
    },
    /// A netlink request failed.
    #[error("cannot read interfaces, addresses and routes")]
    Read {
        /// The error of rtnetlink.
        #[source]
        source: rtnetlink::Error,
    },
    /// The socket broke.
    #[error("the netlink socket was closed")]
    Closed,
    /// The pinned links cannot be read.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// DEVICES cannot be opened.
    #[error(transparent)]
    Pin(#[from] PinError),
    /// DEVICES cannot be written.
    #[error(transparent)]
    Devices(#[from] DataplaneError),
}
