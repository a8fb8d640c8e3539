//! The two address families.

use core::fmt::Debug;

use super::settings::{FamilySettings, Settings};

pub use super::ip::{Address, Address4, Address6, Be16, Prefix};

/// IPv4, as a type parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ipv4;

/// IPv6, as a type parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ipv6;

/// What differs between IPv4 and IPv6 for the datapath.
pub trait Family: Copy + Debug + 'static {
    /// The address type.
    type Address: Address;

    /// The protocol number of ICMP (1) or ICMPv6 (58).
    const ICMP: u8;
    /// The ICMP type of an echo request.
    const ECHO_REQUEST: u8;
    /// The ICMP type of a redirect: a router reports a better next hop.
    const REDIRECT: u8;

    /// This family's part of the settings.
    fn settings(settings: &Settings) -> &FamilySettings<Self::Address>;

    /// Whether this is a loopback address (127.0.0.0/8, ::1), which never leaves its host.
    fn is_loopback(address: Self::Address) -> bool;
    /// Whether no packet on a wire may have this source address: unspecified, loopback, multicast
    /// or broadcast. `ip_route_input_slow` drops such packets as martians.
    fn is_martian(address: Self::Address) -> bool;
    /// Whether an ICMP message of this type reports an error about another packet
    /// (RFC 792, RFC 4443 section 2.1).
    fn is_icmp_error(icmp_type: u8) -> bool;
}

impl Family for Ipv4 {
    type Address = Address4;

    const ICMP: u8 = 1;
    const ECHO_REQUEST: u8 = 8;
    const REDIRECT: u8 = 5;

    #[inline(always)]
    fn settings(settings: &Settings) -> &FamilySettings<Address4> {
        &settings.ipv4
    }

    #[inline(always)]
    fn is_loopback(address: Address4) -> bool {
        address.be32 & 0xff00_0000u32.to_be() == 0x7f00_0000u32.to_be()
    }

    #[inline(always)]
    fn is_martian(address: Address4) -> bool {
        let address = u32::from_be(address.be32);
        matches!(address >> 24, 0 | 127 | 224..=239) || address == u32::MAX
    }

    #[inline(always)]
    fn is_icmp_error(icmp_type: u8) -> bool {
        matches!(icmp_type, 3 | 4 | 5 | 11 | 12)
    }
}

impl Family for Ipv6 {
    type Address = Address6;

    const ICMP: u8 = 58;
    const ECHO_REQUEST: u8 = 128;
    const REDIRECT: u8 = 137;

    #[inline(always)]
    fn settings(settings: &Settings) -> &FamilySettings<Address6> {
        &settings.ipv6
    }

    #[inline(always)]
    fn is_loopback(address: Address6) -> bool {
        address.be32 == [0, 0, 0, 1u32.to_be()]
    }

    #[inline(always)]
    fn is_martian(address: Address6) -> bool {
        let [first, second, third, fourth] = address.be32;
        let is_small = first | second | third == 0 && u32::from_be(fourth) <= 1;
        is_small || u32::from_be(first) >> 24 == 0xff
    }

    #[inline(always)]
    fn is_icmp_error(icmp_type: u8) -> bool {
        icmp_type < 128
    }
}
