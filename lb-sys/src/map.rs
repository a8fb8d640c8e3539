//! Maps by system call, one entry or a batch at a time.

use std::{
    io,
    marker::PhantomData,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use aya_obj::generated::bpf_cmd;
use bytemuck::{Pod, Zeroable};

use super::bpf::{MapInfo, bpf, map_info};

/// The number of entries of a batch. More than any bucket of a hash has.
pub const BATCH: usize = 4096;

/// A map with keys `K` and values `V`, one value per entry.
#[derive(Debug)]
pub struct TypedMap<K, V> {
    descriptor: OwnedFd,
    info: MapInfo,
    types: PhantomData<fn(K, V)>,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Element {
    pub(super) map: u32,
    pub(super) zero: u32,
    pub(super) key: u64,
    pub(super) value: u64,
    pub(super) flags: u64,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Batch {
    pub(super) in_batch: u64,
    pub(super) out_batch: u64,
    pub(super) keys: u64,
    pub(super) values: u64,
    pub(super) count: u32,
    pub(super) map: u32,
    pub(super) element_flags: u64,
    pub(super) flags: u64,
}

impl<K: Pod, V: Pod> TypedMap<K, V> {
    /// Wraps the map, if its keys and values have the sizes of `K` and `V` and it has one value per
    /// entry.
    ///
    /// # Errors
    /// InvalidData for a map of another layout, or those of BPF_OBJ_GET_INFO_BY_FD.
    pub fn new(descriptor: OwnedFd) -> io::Result<Self> {
        let info = map_info(descriptor.as_fd())?;
        if is_per_cpu(info.map_type) {
            return Err(other_layout("per-CPU values"));
        }
        Self::checked(descriptor, info)
    }

    fn checked(descriptor: OwnedFd, info: MapInfo) -> io::Result<Self> {
        if info.key_size as usize != size_of::<K>() || info.value_size as usize != size_of::<V>() {
            return Err(other_layout(&format!(
                "keys of {} and values of {} bytes, not {} and {}",
                info.key_size,
                info.value_size,
                size_of::<K>(),
                size_of::<V>()
            )));
        }
        Ok(Self { descriptor, info, types: PhantomData })
    }

    /// The capacity of the map.
    pub fn max_entries(&self) -> u32 {
        self.info.max_entries
    }

    fn element(&self, key: &K, value: u64, flags: u64) -> Element {
        Element {
            map: self.descriptor.as_raw_fd() as u32,
            zero: 0,
            key: std::ptr::from_ref(key) as u64,
            value,
            flags,
        }
    }

    /// The value of `key`, if there is one.
    ///
    /// # Errors
    /// Those of BPF_MAP_LOOKUP_ELEM except ENOENT.
    pub fn get(&self, key: &K) -> io::Result<Option<V>> {
        let mut value = V::zeroed();
        let mut attributes = self.element(key, std::ptr::from_mut(&mut value) as u64, 0);
        // SAFETY: the kernel reads a key and writes a value of this map, whose sizes
        // `new` has compared with those of `K` and `V`.
        match unsafe { bpf(bpf_cmd::BPF_MAP_LOOKUP_ELEM, &mut attributes) } {
            Ok(_) => Ok(Some(value)),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Sets the value of `key`.
    ///
    /// # Errors
    /// Those of BPF_MAP_UPDATE_ELEM; E2BIG if the map is full.
    pub fn set(&self, key: &K, value: &V) -> io::Result<()> {
        let mut attributes = self.element(key, std::ptr::from_ref(value) as u64, 0);
        // SAFETY: the kernel reads a key and a value, of the sizes of `K` and `V`.
        unsafe { bpf(bpf_cmd::BPF_MAP_UPDATE_ELEM, &mut attributes) }.map(drop)
    }

    /// Adds `key` if it is not there. Returns whether it was added.
    ///
    /// # Errors
    /// Those of BPF_MAP_UPDATE_ELEM except EEXIST.
    pub fn add(&self, key: &K, value: &V) -> io::Result<bool> {
        const BPF_NOEXIST: u64 = 1;
        let mut attributes = self.element(key, std::ptr::from_ref(value) as u64, BPF_NOEXIST);
        // SAFETY: the kernel reads a key and a value, of the sizes of `K` and `V`.
        match unsafe { bpf(bpf_cmd::BPF_MAP_UPDATE_ELEM, &mut attributes) } {
            Ok(_) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Removes `key`. Returns whether it existed.
    ///
    /// # Errors
    /// Those of BPF_MAP_DELETE_ELEM except ENOENT.
    pub fn remove(&self, key: &K) -> io::Result<bool> {
        let mut attributes = self.element(key, 0, 0);
        // SAFETY: the kernel reads a key, of the size of `K`.
        match unsafe { bpf(bpf_cmd::BPF_MAP_DELETE_ELEM, &mut attributes) } {
            Ok(_) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Sets many entries with one system call, or several if the kernel stops early. Returns how
    /// many were set; fewer than given only with an error.
    pub fn set_batch(&self, keys: &[K], values: &[V]) -> (usize, io::Result<()>) {
        let total = keys.len().min(values.len());
        let mut done = 0;
        while done < total {
            let mut attributes = self.batch(total - done);
            attributes.keys = keys[done..].as_ptr() as u64;
            attributes.values = values[done..].as_ptr() as u64;
            // SAFETY: the kernel reads `count` keys and values, of the sizes of `K` and
            // `V`, and both slices hold as many.
            let result = unsafe { bpf(bpf_cmd::BPF_MAP_UPDATE_BATCH, &mut attributes) };
            match result {
                Ok(_) => done += (attributes.count as usize).max(1),
                Err(error) if is_unsupported(&error) => {
                    return one_by_one(total, |index| self.set(&keys[index], &values[index]));
                }
                Err(error) => {
                    return (done + done_before_error(&attributes, total - done), Err(error));
                }
            }
        }
        (total, Ok(()))
    }

    fn batch(&self, count: usize) -> Batch {
        Batch { count: count as u32, map: self.descriptor.as_raw_fd() as u32, ..Batch::zeroed() }
    }

    /// Calls `visit` for each batch of entries, until the end or until it returns false. An entry
    /// that is moved in the meantime may be visited twice or not at all.
    ///
    /// # Errors
    /// Those of BPF_MAP_LOOKUP_BATCH.
    pub fn visit(&self, mut visit: impl FnMut(&[K], &[V]) -> bool) -> io::Result<()> {
        self.visit_with(1, |keys, values| visit(keys, values))
    }

    /// Every key, with one system call each: some kernels cannot read all map types in batches.
    ///
    /// # Errors
    /// Those of BPF_MAP_GET_NEXT_KEY except ENOENT.
    pub fn keys(&self) -> io::Result<Vec<K>> {
        let mut keys: Vec<K> = Vec::new();
        let mut next = K::zeroed();
        while keys.len() < self.info.max_entries as usize {
            let into = std::ptr::from_mut(&mut next) as u64;
            let mut attributes = match keys.last() {
                Some(last) => self.element(last, into, 0),
                None => Element { key: 0, value: into, ..self.element(&K::zeroed(), 0, 0) },
            };
            // SAFETY: the kernel reads a key, unless there is none, and writes one, of the
            // size of `K`.
            match unsafe { bpf(bpf_cmd::BPF_MAP_GET_NEXT_KEY, &mut attributes) } {
                Ok(_) => keys.push(next),
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => break,
                Err(error) => return Err(error),
            }
        }
        Ok(keys)
    }

    fn visit_with(
        &self,
        values_per_entry: usize,
        mut visit: impl FnMut(&[K], &[V]) -> bool,
    ) -> io::Result<()> {
        let mut size = BATCH.min(self.info.max_entries.max(1) as usize);
        let mut cursor = None::<[u8; CURSOR]>;
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        loop {
            keys.resize(size, K::zeroed());
            values.resize(size * values_per_entry, V::zeroed());
            let mut after = [0; CURSOR];
            let mut attributes = self.batch(size);
            attributes.in_batch = cursor.as_ref().map_or(0, |cursor| cursor.as_ptr() as u64);
            attributes.out_batch = after.as_mut_ptr() as u64;
            attributes.keys = keys.as_mut_ptr() as u64;
            attributes.values = values.as_mut_ptr() as u64;
            // SAFETY: the kernel writes at most `count` keys, and values as many times
            // `values_per_entry`, of the sizes of `K` and `V`, and the buffers hold as
            // many; a cursor is a key of an array or the 4-byte number of a bucket, and
            // `CURSOR` bytes hold both.
            let result = unsafe { bpf(bpf_cmd::BPF_MAP_LOOKUP_BATCH, &mut attributes) };
            let found = attributes.count as usize;
            let is_last = match result {
                Ok(_) => false,
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => true,
                Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => {
                    size *= 2;
                    continue;
                }
                Err(error) => return Err(error),
            };
            if !visit(&keys[..found], &values[..found * values_per_entry]) || is_last {
                return Ok(());
            }
            cursor = Some(after);
        }
    }
}

/// Size of the cursor of a batch, bytes. For all map types but hashes the cursor is a key, and no
/// key of lb's maps is longer.
pub(super) const CURSOR: usize = 64;

impl<K, V> AsFd for TypedMap<K, V> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

/// A map with keys `K`, and a value `V` for each possible CPU in every entry.
#[derive(Debug)]
pub struct PerCpuMap<K, V> {
    map: TypedMap<K, V>,
    cpus: usize,
}

/// Counters by index.
pub type PerCpuCounters = PerCpuMap<u32, u64>;

impl<K: Pod, V: Pod> PerCpuMap<K, V> {
    /// The kernel rounds the size of a value up to a multiple of 8 bytes.
    const WHOLE_WORDS: () =
        assert!(size_of::<V>().is_multiple_of(8), "the size is not a multiple of 8");

    /// Wraps the map, if it is a per-CPU map whose keys and values have the sizes of `K` and `V`.
    ///
    /// # Errors
    /// InvalidData for another map, or those of BPF_OBJ_GET_INFO_BY_FD and of reading
    /// `/sys/devices/system/cpu/possible`.
    pub fn new(descriptor: OwnedFd) -> io::Result<Self> {
        let () = Self::WHOLE_WORDS;
        let info = map_info(descriptor.as_fd())?;
        if !is_per_cpu(info.map_type) {
            return Err(other_layout("one value per entry, not one per CPU"));
        }
        let cpus = aya::util::nr_cpus().map_err(|(_, error)| error)?;
        Ok(Self { map: TypedMap::checked(descriptor, info)?, cpus })
    }

    /// Calls `each` for every entry, with its values by CPU.
    ///
    /// # Errors
    /// Those of BPF_MAP_LOOKUP_BATCH, BPF_MAP_LOOKUP_ELEM and BPF_MAP_GET_NEXT_KEY.
    pub fn visit(&self, mut each: impl FnMut(K, &[V])) -> io::Result<()> {
        let visit = |keys: &[K], values: &[V]| {
            for (key, values) in keys.iter().zip(values.chunks(self.cpus)) {
                each(*key, values);
            }
            true
        };
        match self.map.visit_with(self.cpus, visit) {
            // Kernels before 5.13 do not support batches of per-CPU arrays.
            Err(error) if is_unsupported(&error) => {}
            result => return result,
        }
        for key in self.map.keys()? {
            if let Some(values) = self.get(&key)? {
                each(key, &values);
            }
        }
        Ok(())
    }

    fn get(&self, key: &K) -> io::Result<Option<Vec<V>>> {
        let mut values = vec![V::zeroed(); self.cpus];
        let mut attributes = self.map.element(key, values.as_mut_ptr() as u64, 0);
        // SAFETY: the kernel reads a key and writes a value for each possible CPU, of the
        // sizes of `K` and `V`, and the buffer has room for as many.
        match unsafe { bpf(bpf_cmd::BPF_MAP_LOOKUP_ELEM, &mut attributes) } {
            Ok(_) => Ok(Some(values)),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Sets the value of `key` on every CPU.
    ///
    /// # Errors
    /// Those of BPF_MAP_UPDATE_ELEM.
    pub fn set_all(&self, key: &K, value: V) -> io::Result<()> {
        self.set_each(key, &vec![value; self.cpus])
    }

    /// Sets the values of `key`, one for each possible CPU.
    ///
    /// # Errors
    /// Those of BPF_MAP_UPDATE_ELEM; InvalidInput for another number of values.
    pub fn set_each(&self, key: &K, values: &[V]) -> io::Result<()> {
        if values.len() != self.cpus {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut attributes = self.map.element(key, values.as_ptr() as u64, 0);
        // SAFETY: the kernel reads a key and a value for each possible CPU, of the sizes of
        // `K` and `V`, and the buffer holds as many.
        unsafe { bpf(bpf_cmd::BPF_MAP_UPDATE_ELEM, &mut attributes) }.map(drop)
    }

    /// Removes `key`. Returns whether it existed.
    ///
    /// # Errors
    /// Those of BPF_MAP_DELETE_ELEM except ENOENT.
    pub fn remove(&self, key: &K) -> io::Result<bool> {
        self.map.remove(key)
    }

    /// The capacity of the map.
    pub fn max_entries(&self) -> u32 {
        self.map.max_entries()
    }
}

impl PerCpuCounters {
    /// Every counter of an array, summed over the CPUs.
    ///
    /// # Errors
    /// Those of [`PerCpuMap::visit`].
    pub fn sums(&self) -> io::Result<Vec<u64>> {
        let mut sums = vec![0; self.max_entries() as usize];
        self.visit(|index, values| {
            if let Some(sum) = sums.get_mut(index as usize) {
                *sum = values.iter().fold(0, |sum: u64, value| sum.wrapping_add(*value));
            }
        })?;
        Ok(sums)
    }

    /// One counter, summed over the CPUs.
    ///
    /// # Errors
    /// Those of BPF_MAP_LOOKUP_ELEM; NotFound if there is no such index.
    pub fn sum(&self, index: u32) -> io::Result<u64> {
        let values = self.get(&index)?.ok_or(io::ErrorKind::NotFound)?;
        Ok(values.iter().fold(0, |sum: u64, value| sum.wrapping_add(*value)))
    }
}

fn one_by_one(
    total: usize,
    mut set: impl FnMut(usize) -> io::Result<()>,
) -> (usize, io::Result<()>) {
    for index in 0..total {
        if let Err(error) = set(index) {
            return (index, Err(error));
        }
    }
    (total, Ok(()))
}

/// After a failed update `count` is the number of entries that were set, but it is unchanged if the
/// kernel rejected the whole call.
fn done_before_error(attributes: &Batch, asked: usize) -> usize {
    let count = attributes.count as usize;
    if count < asked { count } else { 0 }
}

/// EINVAL for an unknown command (before 5.6), or ENOTSUPP, which libc does not define, for a map
/// type without batches.
pub(super) fn is_unsupported(error: &io::Error) -> bool {
    const ENOTSUPP: i32 = 524;
    matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP | ENOTSUPP))
}

pub(super) fn is_per_cpu(map_type: u32) -> bool {
    use aya_obj::generated::bpf_map_type::{
        BPF_MAP_TYPE_LRU_PERCPU_HASH, BPF_MAP_TYPE_PERCPU_ARRAY,
        BPF_MAP_TYPE_PERCPU_CGROUP_STORAGE_DEPRECATED, BPF_MAP_TYPE_PERCPU_HASH,
    };
    [
        BPF_MAP_TYPE_LRU_PERCPU_HASH,
        BPF_MAP_TYPE_PERCPU_ARRAY,
        BPF_MAP_TYPE_PERCPU_CGROUP_STORAGE_DEPRECATED,
        BPF_MAP_TYPE_PERCPU_HASH,
    ]
    .iter()
    .any(|per_cpu| *per_cpu as u32 == map_type)
}

fn other_layout(found: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the map has another layout: {found}"))
}
