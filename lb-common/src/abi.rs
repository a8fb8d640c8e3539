//! The layout of every map: keys and values, one file per map family.
//!
//! It is not a place for logic. All types are `repr(C)`, free of padding and of
//! values that some bit pattern would make invalid, so that whatever a map holds
//! may be read.

pub mod address;
pub mod affinity;
pub mod backend;
pub mod counter;
pub mod flow;
pub mod fragment;
pub mod frontend;
pub mod range;
pub mod service;
pub mod settings;
pub mod socket;
pub mod traffic;

/// Version of the layout, part of the path that maps are pinned under
/// (`<bpf-dir>/v<ABI_VERSION>/<MAP>`): a change of any type here bumps it.
pub const ABI_VERSION: u32 = 3;

/// Implements [`bytemuck::Pod`] for types of which each family has its own, which the derive
/// refuses, and proves at compile time that they hold no padding.
macro_rules! pod {
    ($($name:ident<$address:ident> { $($field:ty),+ $(,)? })+) => {$(
        const _: () = {
            const fn is_full<$address: $crate::abi::address::Address>() -> bool {
                size_of::<$name<$address>>() == 0 $(+ size_of::<$field>())+
            }
            use $crate::abi::address::{Address4, Address6};
            assert!(
                is_full::<Address4>() && is_full::<Address6>(),
                concat!(stringify!($name), " holds padding")
            );
        };
        // SAFETY: `repr(C)`, every field is `Pod`, and the assertion above shows that the
        // fields fill the type for both addresses that there are: nobody else implements
        // `Address`.
        unsafe impl<$address: $crate::abi::address::Address> bytemuck::Zeroable
            for $name<$address> {}
        // SAFETY: as above.
        unsafe impl<$address: $crate::abi::address::Address> bytemuck::Pod
            for $name<$address> {}
    )+};
}
pub(crate) use pod;
