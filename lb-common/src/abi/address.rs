//! Numbers in network byte order, addresses and the two address families.

use core::{fmt::Debug, hash::Hash};

use bytemuck::{Pod, Zeroable};

use super::pod;
use super::settings::{FamilySettings, Settings};

/// A 16-bit number in network byte order, such as a port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct Be16 {
    /// The number as it stands in the packet.
    pub be16: u16,
}

impl Be16 {
    /// From host byte order.
    #[inline(always)]
    pub const fn new(host: u16) -> Self {
        Self { be16: host.to_be() }
    }

    /// In host byte order.
    #[inline(always)]
    pub const fn get(self) -> u16 {
        u16::from_be(self.be16)
    }
}

/// An IPv4 address: one 32-bit word in network byte order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct Address4 {
    /// The address as it stands in the packet.
    pub be32: u32,
}

/// An IPv6 address: four 32-bit words in network byte order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct Address6 {
    /// The address as it stands in the packet.
    pub be32: [u32; 4],
}

mod sealed {
    /// Nobody else's types are addresses.
    pub trait Sealed {}
}
use sealed::Sealed;

/// An address of either family, as words in network byte order.
pub trait Address: Copy + Debug + Default + Eq + Ord + Hash + Pod + Sealed {
    /// The words of the address.
    fn words(&self) -> &[u32];

    /// Takes over `other` word by word: in one piece an IPv6 address is large enough for
    /// the compiler to call memmove, which the programs of the kernel do not have.
    fn set(&mut self, other: &Self);

    /// The address with every bit cleared that `mask` has cleared.
    fn masked(self, mask: Self) -> Self;

    /// Whether this is the unspecified address.
    #[inline(always)]
    fn is_unspecified(self) -> bool {
        self == Self::default()
    }

    /// The address widened to four words: IPv4 in the first, zeros behind.
    fn widened(self) -> [u32; 4];
}

impl Sealed for Address4 {}
impl Sealed for Address6 {}

impl Address for Address4 {
    #[inline(always)]
    fn words(&self) -> &[u32] {
        core::slice::from_ref(&self.be32)
    }

    #[inline(always)]
    fn set(&mut self, other: &Self) {
        self.be32 = other.be32;
    }

    #[inline(always)]
    fn masked(self, mask: Self) -> Self {
        Self { be32: self.be32 & mask.be32 }
    }

    #[inline(always)]
    fn widened(self) -> [u32; 4] {
        [self.be32, 0, 0, 0]
    }
}

impl Address for Address6 {
    #[inline(always)]
    fn words(&self) -> &[u32] {
        &self.be32
    }

    #[inline(always)]
    fn set(&mut self, other: &Self) {
        let mut index = 0;
        while index < 4 {
            // SAFETY: both are references; the index is in bounds. Volatile accesses keep
            // their order, so that a long copy does not go by way of the stack.
            unsafe {
                let word = core::ptr::read_volatile(&raw const other.be32[index]);
                core::ptr::write_volatile(&raw mut self.be32[index], word);
            }
            index += 1;
        }
    }

    #[inline(always)]
    fn masked(self, mask: Self) -> Self {
        let (a, m) = (self.be32, mask.be32);
        Self { be32: [a[0] & m[0], a[1] & m[1], a[2] & m[2], a[3] & m[3]] }
    }

    #[inline(always)]
    fn widened(self) -> [u32; 4] {
        self.be32
    }
}

impl From<core::net::Ipv4Addr> for Address4 {
    fn from(address: core::net::Ipv4Addr) -> Self {
        Self { be32: u32::from_ne_bytes(address.octets()) }
    }
}

impl From<Address4> for core::net::Ipv4Addr {
    fn from(address: Address4) -> Self {
        Self::from(address.be32.to_ne_bytes())
    }
}

impl From<core::net::Ipv6Addr> for Address6 {
    fn from(address: core::net::Ipv6Addr) -> Self {
        Self { be32: bytemuck::cast(address.octets()) }
    }
}

impl From<Address6> for core::net::Ipv6Addr {
    fn from(address: Address6) -> Self {
        Self::from(bytemuck::cast::<[u32; 4], [u8; 16]>(address.be32))
    }
}

/// IPv4, as a type parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ipv4;

/// IPv6, as a type parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ipv6;

/// An address family: what differs between IPv4 and IPv6 for the datapath.
pub trait Family: Copy + Debug + 'static {
    /// The address type.
    type Address: Address;

    /// The protocol number of the family's ICMP.
    const ICMP: u8;
    /// The ICMP type of an echo request.
    const ECHO_REQUEST: u8;
    /// The ICMP type by which a router tells of a better next hop.
    const REDIRECT: u8;

    /// This family's part of the settings.
    fn settings(settings: &Settings) -> &FamilySettings<Self::Address>;

    /// Whether the address never leaves its host.
    fn is_loopback(address: Self::Address) -> bool;
    /// Whether no packet on a wire may come from this address: unspecified, the host itself,
    /// multicast, broadcast.
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

/// A prefix: an address belongs to it if its bits under `mask` are `address`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct Prefix<A> {
    /// The network address; bits outside the mask are zero.
    pub address: A,
    /// The mask, in network byte order.
    pub mask: A,
}

impl<A: Address> Prefix<A> {
    /// Whether `address` lies in this prefix.
    #[inline(always)]
    pub fn contains(&self, address: A) -> bool {
        address.masked(self.mask) == self.address
    }
}

pod! {
    Prefix<A> { A, A }
}
