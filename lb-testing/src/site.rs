//! Where a test's frame is received: a hook, on a device, with the device that the frame came
//! in by.

use lb_common::{abi::counter::Hook, balance::Site};

use super::world::{EXTERNAL, EXTERNAL_TOO, POD_DEVICE};

/// Where a frame is received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TestSite {
    /// It leaves a pod.
    FromPod,
    /// It is about to enter a pod.
    ToPod,
    /// It arrives at [`EXTERNAL`].
    FromDevice,
    /// It arrives at [`EXTERNAL_TOO`].
    FromOtherDevice,
    /// A node process sends it out of [`EXTERNAL`].
    ToDevice,
    /// The node forwards it: it came in by [`POD_DEVICE`] and leaves by [`EXTERNAL`].
    ToDeviceForwarded,
    /// The node sends it back: it came in by [`EXTERNAL`] and leaves by [`EXTERNAL`].
    ToDeviceReturned,
    /// The node sends it to itself.
    Loopback,
}

impl TestSite {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::FromPod,
        Self::ToPod,
        Self::FromDevice,
        Self::FromOtherDevice,
        Self::ToDevice,
        Self::ToDeviceForwarded,
        Self::ToDeviceReturned,
        Self::Loopback,
    ];

    /// The site as the core knows it.
    pub fn site(self) -> Site {
        match self {
            Self::FromPod => Site::FromPod,
            Self::ToPod => Site::ToPod,
            Self::FromDevice | Self::FromOtherDevice => Site::FromDevice,
            Self::ToDevice => Site::ToDevice { ifindex: EXTERNAL, ingress: 0 },
            Self::ToDeviceForwarded => Site::ToDevice { ifindex: EXTERNAL, ingress: POD_DEVICE },
            Self::ToDeviceReturned => Site::ToDevice { ifindex: EXTERNAL, ingress: EXTERNAL },
            Self::Loopback => Site::Loopback,
        }
    }

    /// The hook that receives the frame.
    pub fn hook(self) -> Hook {
        match self {
            Self::FromPod => Hook::FromPod,
            Self::ToPod => Hook::ToPod,
            Self::FromDevice | Self::FromOtherDevice => Hook::FromDevice,
            Self::ToDevice | Self::ToDeviceForwarded | Self::ToDeviceReturned => Hook::ToDevice,
            Self::Loopback => Hook::Loopback,
        }
    }

    /// The device that the hook is on.
    pub fn ifindex(self) -> u32 {
        match self {
            Self::FromPod | Self::ToPod => POD_DEVICE,
            Self::FromDevice
            | Self::ToDevice
            | Self::ToDeviceForwarded
            | Self::ToDeviceReturned => EXTERNAL,
            Self::FromOtherDevice => EXTERNAL_TOO,
            Self::Loopback => 1,
        }
    }

    /// The device that the frame came in by; 0 if a process of the node sent it.
    pub fn ingress_ifindex(self) -> u32 {
        match self {
            Self::ToDevice | Self::Loopback => 0,
            Self::ToDeviceForwarded | Self::ToPod => POD_DEVICE,
            other => other.ifindex(),
        }
    }
}
