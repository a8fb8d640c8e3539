//! All unsafe code of the agent: bpf(2) calls that aya does not offer, maps in memory, and a few
//! calls of the system and of libc.
//!
//! It knows nothing of Services. Every function is safe to call: where the kernel reads or writes
//! memory by the sizes of a map, the map is a [`TypedMap`], a [`RawMap`], a [`Memory`] or a
//! [`SharedArray`], which compared its sizes with the kernel's.

mod bpf;
mod clock;
mod heap;
mod map;
mod memory;
mod raw;
mod shared;
mod socket;

pub use bpf::{
    LinkInfo, LinkTarget, MapInfo, ProgramInfo, link_create, link_detach, link_info, link_update,
    load_classifier, map_info, obj_get, obj_pin, program_by_id, program_info, tcx_query, test_run,
};

pub use clock::{SHORTEST_PACKET, coarse_clock_resolution, ticks_now, ticks_per_second};
pub use heap::{keep_heap_small, page_out, trim_heap};
pub use map::{BATCH, PerCpuCounters, PerCpuMap, TypedMap};
pub use memory::Memory;
pub use raw::{NewMap, RawMap};
pub use shared::SharedArray;
pub use socket::netns_cookie;
