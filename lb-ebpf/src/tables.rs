//! The tables of the core: kernel maps.

use aya_ebpf::{
    bindings::BPF_ANY,
    btf_maps::lpm_trie::Key,
    helpers::{bpf_get_prandom_u32, generated::bpf_jiffies64},
};
use lb_common::{
    abi::{
        address::{Address, Address4, Address6, Be16, Family, Ipv4, Ipv6},
        affinity::{Affinity, AffinityKey},
        backend::Backend,
        flow::FlowKey,
        fragment::{Fragment, FragmentKey},
        frontend::{Frontend, FrontendKey},
        range::Range,
        service::Service,
        settings::{MAX_DEVICES, Settings},
    },
    balance::{Entry, InsertError, Known, Note, Search, Tables},
    flow_table::{self, NewFlow},
};

use crate::{maps, memory, scratch::Scratch};

#[cfg(not(feature = "handover"))]
#[path = "tables/direct.rs"]
mod others;
#[cfg(feature = "handover")]
#[path = "tables/handover.rs"]
mod others;

pub mod connected;
pub mod flows;

pub use others::{datagram_peer, flow, insert_datagram_peer};

/// The low 32 bits of jiffies. The JIT turns the call into a load.
#[inline(always)]
pub fn jiffies() -> u32 {
    // SAFETY: the helper has no preconditions.
    unsafe { bpf_jiffies64() as u32 }
}

/// The settings in use.
#[inline(always)]
pub fn settings() -> Option<&'static Settings> {
    let pair = maps::SETTINGS.get(0)?;
    // SAFETY: a plain word that the agent may change at any time.
    let active = unsafe { core::ptr::read_volatile(&pair.active) };
    // By an index that the verifier does not know: with a branch, it would follow the whole program
    // once for each copy.
    pair.copies.get((active & 1) as usize)
}

/// See [`Tables::has_direct`].
#[inline(always)]
pub fn has_direct() -> bool {
    maps::DIRECT_FLOWS.get(0).is_some_and(|flows| {
        // SAFETY: plain words that others may change at any time.
        let [begun, ended] = unsafe {
            [&raw const flows.begun, &raw const flows.ended].map(|word| word.read_volatile())
        };
        begun != ended
    })
}

/// The kernel's maps.
pub struct Maps;

/// An entry of a map, which is changed in place.
#[derive(Clone, Copy)]
pub struct MapEntry<T>(*mut T);

impl<T: Copy> Entry<T> for MapEntry<T> {
    #[inline(always)]
    fn get(&self) -> &T {
        // SAFETY: the pointer came from a look-up of this run and was checked.
        unsafe { &*self.0 }
    }

    #[inline(always)]
    fn store(&self, value: T) {
        memory::copy(self.0, &raw const value);
    }
}

/// The maps of fragments of a family.
pub trait FragmentMaps: Family {
    /// Looks up in FRAGMENTS.
    fn fragment(key: &FragmentKey<Self::Address>) -> Option<Fragment>;
    /// Inserts into FRAGMENTS.
    fn insert_fragment(key: &FragmentKey<Self::Address>, fragment: &Fragment) -> Result<(), i32>;
}

/// The maps of a family.
pub trait FamilyMaps: flow::Family + FragmentMaps {
    /// The working memory of this CPU.
    fn scratch() -> Option<*mut Scratch<Self>>;
    /// Looks up in FRONTENDS.
    fn frontend(key: &FrontendKey<Self::Address>) -> Option<*const Frontend>;
    /// Looks up in RANGES.
    fn range(key: &Key<Range<Self::Address>>) -> bool;
    /// Looks up in SOURCES.
    fn source(destination: &Key<Self::Address>) -> Option<&'static Self::Address>;
    /// Looks up in NODES.
    fn node(address: &Self::Address) -> bool;
    /// Looks up in BACKENDS.
    fn backend(id: u32) -> Option<*const Backend<Self::Address>>;
}

macro_rules! family_maps {
    ($family:ty, $address:ty, $frontends:ident, $ranges:ident, $sources:ident, $nodes:ident, $backends:ident, $scratch:ident) => {
        impl FamilyMaps for $family {
            #[inline(always)]
            fn scratch() -> Option<*mut Scratch<Self>> {
                maps::$scratch.get_ptr_mut(0)
            }

            #[inline(always)]
            fn frontend(key: &FrontendKey<$address>) -> Option<*const Frontend> {
                maps::$frontends.get_ptr(key)
            }

            #[inline(always)]
            fn range(key: &Key<Range<$address>>) -> bool {
                maps::$ranges.get(key).is_some()
            }

            #[inline(always)]
            fn source(destination: &Key<$address>) -> Option<&'static $address> {
                maps::$sources.get(destination)
            }

            #[inline(always)]
            fn node(address: &$address) -> bool {
                maps::$nodes.get_ptr(address).is_some()
            }

            #[inline(always)]
            fn backend(id: u32) -> Option<*const Backend<$address>> {
                maps::$backends.get_ptr(id)
            }
        }
    };
}

family_maps!(Ipv4, Address4, FRONTENDS4, RANGES4, SOURCES4, NODES4, BACKENDS4, SCRATCH4);
family_maps!(Ipv6, Address6, FRONTENDS6, RANGES6, SOURCES6, NODES6, BACKENDS6, SCRATCH6);

impl<F: FamilyMaps> Tables<F> for Maps {
    type AffinityEntry = MapEntry<Affinity>;

    #[inline(always)]
    fn now(&self) -> u32 {
        jiffies()
    }

    #[inline(always)]
    fn random(&mut self) -> u32 {
        // SAFETY: no preconditions.
        unsafe { bpf_get_prandom_u32() }
    }

    #[inline(always)]
    fn frontend(&mut self, key: &FrontendKey<F::Address>) -> Option<Frontend> {
        // SAFETY: the look-up of this run found it.
        F::frontend(key).map(|frontend| unsafe { *frontend })
    }

    #[inline(always)]
    fn node_port(&mut self, port: Be16, protocol: u8) -> Option<Frontend> {
        let mut room = core::mem::MaybeUninit::<FrontendKey<F::Address>>::uninit();
        memory::zero(room.as_mut_ptr());
        // SAFETY: plain numbers, for which zero is valid.
        let key = unsafe { room.assume_init_mut() };
        (key.port, key.protocol) = (port, protocol);
        <Self as Tables<F>>::frontend(self, key)
    }

    #[inline(never)]
    fn is_in_range(&mut self, service: u32, client: &F::Address) -> bool {
        let mut range = Range { service, address: F::Address::default() };
        range.address.set(client);
        let bits = 8 * size_of::<Range<F::Address>>() as u32;
        F::range(&Key::new(bits, range))
    }

    #[inline(never)]
    fn route_source(&mut self, destination: &F::Address, source: &mut F::Address) -> bool {
        let mut address = F::Address::default();
        address.set(destination);
        let bits = 8 * size_of::<F::Address>() as u32;
        match F::source(&Key::new(bits, address)) {
            Some(found) => {
                source.set(found);
                true
            }
            None => false,
        }
    }

    #[inline(never)]
    fn is_node(&mut self, address: &F::Address) -> bool {
        F::node(address)
    }

    #[inline(always)]
    fn service(&mut self, index: u32) -> Option<Service> {
        // SAFETY: the look-up of this run found it; the ranges are aligned words that
        // the agent replaces by one store each, read here by one load each.
        maps::SERVICES.get_ptr(index).map(|service| unsafe { service.read_volatile() })
    }

    #[inline(always)]
    fn slot(&mut self, position: u32) -> Option<u32> {
        maps::SLOTS.get(position).map(|slot| slot.backend)
    }

    #[inline(always)]
    fn backend(&mut self, id: u32) -> Option<Backend<F::Address>> {
        // SAFETY: the look-up of this run found it.
        F::backend(id).map(|backend| unsafe { *backend })
    }

    #[inline(always)]
    fn device(&mut self, ifindex: u32) -> Option<u32> {
        let mut index = 0;
        while index < MAX_DEVICES {
            if maps::DEVICES.get(index)?.ifindex == ifindex {
                return Some(index);
            }
            index += 1;
        }
        None
    }

    #[inline(always)]
    fn spread(&mut self, key: &AffinityKey, period: u32) -> u32 {
        let Some(seed) = maps::FLOW_SEED.get(0) else { return 0 };
        flow_table::spread(key, period, seed)
    }

    #[inline(always)]
    fn flow(
        &mut self,
        key: &FlowKey<F::Address>,
        search: Search,
        found: &mut Known<F::Address>,
    ) -> bool {
        flow::find::<F>(key, search, found)
    }

    #[inline(always)]
    fn may_have_reply(&mut self, key: &FlowKey<F::Address>) -> bool {
        flow::may_have_reply::<F>(key)
    }

    #[inline(always)]
    fn may_have_client(&mut self, key: &FlowKey<F::Address>) -> bool {
        flow::may_have_client::<F>(key)
    }

    #[inline(always)]
    fn insert_flow(
        &mut self,
        key: &FlowKey<F::Address>,
        new: &mut NewFlow<F::Address>,
        settings: &Settings,
    ) -> Result<(), InsertError> {
        match flow::insert::<F>(key, new, settings) {
            0 => Ok(()),
            flows::EXISTS => Err(InsertError::Exists),
            _ => Err(InsertError::Full),
        }
    }

    #[inline(always)]
    fn note_flow(&mut self, key: &FlowKey<F::Address>, found: &Known<F::Address>, note: Note) {
        flow::note::<F>(key, found, flows::bits(note), note.time);
    }

    #[inline(always)]
    fn remove_flow(&mut self, key: &FlowKey<F::Address>, found: &Known<F::Address>) {
        flow::remove::<F>(key, found);
    }

    #[inline(always)]
    fn has_direct(&self) -> bool {
        has_direct()
    }

    #[inline(always)]
    fn begin_direct(&mut self) {
        if let Some(flows) = maps::DIRECT_FLOWS.get_ptr_mut(0) {
            // SAFETY: an aligned word; the helper has no preconditions.
            unsafe { (&raw mut (*flows).begun).write_volatile(bpf_jiffies64()) };
        }
    }

    #[inline(always)]
    fn fragment(&mut self, key: &FragmentKey<F::Address>) -> Option<Fragment> {
        F::fragment(key)
    }

    #[inline(always)]
    fn insert_fragment(&mut self, key: &FragmentKey<F::Address>, fragment: &Fragment) {
        // Without an entry, later fragments of the datagram count as early and are dropped.
        let _ = F::insert_fragment(key, fragment);
    }

    #[inline(always)]
    fn affinity(&mut self, key: &AffinityKey) -> Option<Self::AffinityEntry> {
        maps::AFFINITY.get_ptr_mut(key).map(MapEntry)
    }

    #[inline(always)]
    fn bind(&mut self, key: &AffinityKey, affinity: &Affinity) {
        // Without an entry, the client's next flow gets a new choice.
        let _ = maps::AFFINITY.insert(key, affinity, BPF_ANY as u64);
    }
}
