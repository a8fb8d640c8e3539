//! Numbers in network byte order, IP addresses and prefixes.

use core::{fmt::Debug, hash::Hash};

use bytemuck::{Pod, Zeroable};

/// Implements [`bytemuck::Pod`] for types that are generic over the family's address, which the
/// derive refuses, and proves at compile time that they have no padding.
macro_rules! pod {
    ($($name:ident<$address:ident> { $($field:ty),+ $(,)? })+) => {$(
        const _: () = {
            const fn is_full<$address: $crate::abi::ip::Address>() -> bool {
                size_of::<$name<$address>>() == 0 $(+ size_of::<$field>())+
            }
            use $crate::abi::ip::{Address4, Address6};
            assert!(
                is_full::<Address4>() && is_full::<Address6>(),
                concat!(stringify!($name), " holds padding")
            );
        };
        // SAFETY: `repr(C)`, every field is `Pod`, and the assertion above shows that the fields
        // fill the type for both addresses. No other type implements `Address`, which is sealed.
        #[expect(unsafe_code, reason = "the derive refuses type parameters")]
        unsafe impl<$address: $crate::abi::ip::Address> bytemuck::Zeroable
            for $name<$address> {}
        // SAFETY: as above.
        #[expect(unsafe_code, reason = "the derive refuses type parameters")]
        unsafe impl<$address: $crate::abi::ip::Address> bytemuck::Pod
            for $name<$address> {}
    )+};
}
pub(crate) use pod;

/// A 16-bit number in network byte order, such as a port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct Be16 {
    /// The number in network byte order, as in the packet.
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
    /// The address in network byte order, as in the packet.
    pub be32: u32,
}

/// An IPv6 address: four 32-bit words in network byte order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct Address6 {
    /// The address in network byte order, as in the packet.
    pub be32: [u32; 4],
}

mod sealed {
    /// Keeps other crates from implementing [`Address`](super::Address).
    pub trait Sealed {}
}
use sealed::Sealed;

/// An address of either family, as words in network byte order.
pub trait Address: Copy + Debug + Default + Eq + Ord + Hash + Pod + Sealed {
    /// The words of the address, in network byte order.
    fn words(&self) -> &[u32];

    /// Copies `other` word by word. A copy of an IPv6 address in one piece is large enough for the
    /// compiler to call memmove, which eBPF programs do not have.
    fn set(&mut self, other: &Self);

    /// The address with every bit cleared that `mask` has cleared.
    fn masked(self, mask: Self) -> Self;

    /// 0 if `other` is the same address.
    fn difference(&self, other: &Self) -> u32;

    /// Whether this is the unspecified address.
    #[inline(always)]
    fn is_unspecified(self) -> bool {
        self == Self::default()
    }

    /// The address in four words: IPv4 in the first, followed by zeros.
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
    fn difference(&self, other: &Self) -> u32 {
        self.be32 ^ other.be32
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
            // SAFETY: both are references and the index is in bounds. Volatile accesses keep their
            // order, so that the compiler does not copy by way of the stack.
            #[expect(unsafe_code, reason = "there are no volatile accesses without it")]
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
    fn difference(&self, other: &Self) -> u32 {
        let (one, two) = (self.be32, other.be32);
        (one[0] ^ two[0]) | (one[1] ^ two[1]) | (one[2] ^ two[2]) | (one[3] ^ two[3])
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
    /// Whether `address` is in this prefix.
    #[inline(always)]
    pub fn contains(&self, address: A) -> bool {
        address.masked(self.mask) == self.address
    }
}

pod! {
    Prefix<A> { A, A }
}
