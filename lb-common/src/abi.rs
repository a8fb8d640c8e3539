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

/// Version of the layout, part of the path that maps are pinned under
/// (`<bpf-dir>/v<ABI_VERSION>/<MAP>`): a change of any type here bumps it.
pub const ABI_VERSION: u32 = 3;

/// Implements [`bytemuck::Pod`] for instances of generic types, which the derive
/// refuses, and proves at compile time that they hold no padding.
macro_rules! pod {
    ($($type:ty { $($field:ty),+ $(,)? })+) => {$(
        const _: () = assert!(
            size_of::<$type>() == 0 $(+ size_of::<$field>())+,
            concat!(stringify!($type), " holds padding")
        );
        // SAFETY: `repr(C)`, every field is `Pod`, and the assertion above shows
        // that the fields fill the type.
        unsafe impl bytemuck::Zeroable for $type {}
        // SAFETY: as above.
        unsafe impl bytemuck::Pod for $type {}
    )+};
}
pub(crate) use pod;
