//! Maps whose layout is not known when this is compiled: keys and values are bytes.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use aya_obj::generated::bpf_cmd;
use bytemuck::{Pod, Zeroable};

use super::{
    bpf::{MapInfo, bpf, map_info, owned},
    map::{BATCH, Batch, CURSOR, Element, is_per_cpu, is_unsupported},
};

/// A map of keys and values as bytes. The value of an entry of a per-CPU map is those of all CPUs,
/// each rounded up to a multiple of 8 bytes.
#[derive(Debug)]
pub struct RawMap {
    descriptor: OwnedFd,
    info: MapInfo,
    value_size: usize,
}

/// The parameters of a new map.
#[derive(Clone, Copy, Debug)]
pub struct NewMap<'a> {
    /// At most 15 bytes.
    pub name: &'a str,
    /// `enum bpf_map_type`.
    pub map_type: u32,
    /// Bytes of a key.
    pub key_size: u32,
    /// Bytes of a value.
    pub value_size: u32,
    /// The capacity.
    pub max_entries: u32,
    /// BPF_F_*.
    pub flags: u32,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Create {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    flags: u32,
    inner: u32,
    numa_node: u32,
    name: [u8; 16],
}

impl RawMap {
    /// Creates a map.
    ///
    /// # Errors
    /// Those of BPF_MAP_CREATE.
    pub fn create(new: NewMap<'_>) -> io::Result<Self> {
        let mut name = [0; 16];
        for (to, from) in name.iter_mut().take(15).zip(new.name.bytes()) {
            *to = from;
        }
        let NewMap { map_type, key_size, value_size, max_entries, flags, .. } = new;
        let (inner, numa_node) = (0, 0);
        let mut attributes =
            Create { map_type, key_size, value_size, max_entries, flags, inner, numa_node, name };
        // SAFETY: the attributes hold no address.
        let descriptor = unsafe { bpf(bpf_cmd::BPF_MAP_CREATE, &mut attributes) }.map(owned)?;
        Self::new(descriptor)
    }

    /// Wraps the map.
    ///
    /// # Errors
    /// Those of BPF_OBJ_GET_INFO_BY_FD, and of reading `/sys/devices/system/cpu/possible`.
    pub fn new(descriptor: OwnedFd) -> io::Result<Self> {
        let info = map_info(descriptor.as_fd())?;
        let size = info.value_size as usize;
        let value_size = if is_per_cpu(info.map_type) {
            let cpus = aya::util::nr_cpus().map_err(|(_, error)| error)?;
            size.next_multiple_of(8) * cpus
        } else {
            size
        };
        Ok(Self { descriptor, info, value_size })
    }

    /// The kernel's information.
    pub fn info(&self) -> &MapInfo {
        &self.info
    }

    /// Whether an entry has a value for each CPU.
    pub fn is_per_cpu(&self) -> bool {
        is_per_cpu(self.info.map_type)
    }

    fn element(&self, key: &[u8], value: u64, flags: u64) -> io::Result<Element> {
        if key.len() != self.info.key_size as usize {
            return Err(other_size("key", key.len()));
        }
        let map = self.descriptor.as_raw_fd() as u32;
        Ok(Element { map, zero: 0, key: key.as_ptr() as u64, value, flags })
    }

    /// The value of `key`, if there is one.
    ///
    /// # Errors
    /// Those of BPF_MAP_LOOKUP_ELEM except ENOENT; InvalidInput for a key of another size.
    pub fn get(&self, key: &[u8]) -> io::Result<Option<Vec<u8>>> {
        let mut value = vec![0; self.value_size];
        let mut attributes = self.element(key, value.as_mut_ptr() as u64, 0)?;
        // SAFETY: the kernel reads a key, whose size `element` has checked, and writes a value, for
        // which the buffer has room.
        match unsafe { bpf(bpf_cmd::BPF_MAP_LOOKUP_ELEM, &mut attributes) } {
            Ok(_) => Ok(Some(value)),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn update(&self, key: &[u8], value: &[u8], flags: u64) -> io::Result<()> {
        if value.len() != self.value_size {
            return Err(other_size("value", value.len()));
        }
        let mut attributes = self.element(key, value.as_ptr() as u64, flags)?;
        // SAFETY: the kernel reads a key and a value, whose sizes were checked.
        unsafe { bpf(bpf_cmd::BPF_MAP_UPDATE_ELEM, &mut attributes) }.map(drop)
    }

    /// Sets the value of `key`.
    ///
    /// # Errors
    /// Those of BPF_MAP_UPDATE_ELEM; InvalidInput for a key or value of another size.
    pub fn set(&self, key: &[u8], value: &[u8]) -> io::Result<()> {
        self.update(key, value, 0)
    }

    /// Adds `key` if it is not there. Returns whether it was added.
    ///
    /// # Errors
    /// As [`RawMap::set`].
    pub fn add(&self, key: &[u8], value: &[u8]) -> io::Result<bool> {
        const BPF_NOEXIST: u64 = 1;
        match self.update(key, value, BPF_NOEXIST) {
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(false),
            result => result.map(|()| true),
        }
    }

    /// Removes `key`. Returns whether it existed.
    ///
    /// # Errors
    /// Those of BPF_MAP_DELETE_ELEM except ENOENT.
    pub fn remove(&self, key: &[u8]) -> io::Result<bool> {
        let mut attributes = self.element(key, 0, 0)?;
        // SAFETY: the kernel reads a key, whose size `element` has checked.
        match unsafe { bpf(bpf_cmd::BPF_MAP_DELETE_ELEM, &mut attributes) } {
            Ok(_) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Calls `each` for every entry, until it fails. An entry that is moved in the meantime may be
    /// visited twice or not at all.
    ///
    /// # Errors
    /// Those of `each` and of reading the map.
    pub fn visit(&self, mut each: impl FnMut(&[u8], &[u8]) -> io::Result<()>) -> io::Result<()> {
        let key_size = self.info.key_size as usize;
        let mut size = BATCH.min(self.info.max_entries.max(1) as usize);
        let mut cursor = None::<[u8; CURSOR]>;
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        loop {
            keys.resize(size * key_size, 0_u8);
            values.resize(size * self.value_size, 0_u8);
            let mut after = [0; CURSOR];
            let map = self.descriptor.as_raw_fd() as u32;
            let mut attributes = Batch { count: size as u32, map, ..Batch::zeroed() };
            attributes.in_batch = cursor.as_ref().map_or(0, |cursor| cursor.as_ptr() as u64);
            attributes.out_batch = after.as_mut_ptr() as u64;
            attributes.keys = keys.as_mut_ptr() as u64;
            attributes.values = values.as_mut_ptr() as u64;
            // SAFETY: the kernel writes at most `count` keys and values, and the buffers hold as
            // many; the cursor has room for a key of an array and for the number of a bucket.
            let result = unsafe { bpf(bpf_cmd::BPF_MAP_LOOKUP_BATCH, &mut attributes) };
            let is_last = match result {
                Ok(_) => false,
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => true,
                Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => {
                    size *= 2;
                    continue;
                }
                Err(error) if is_unsupported(&error) && cursor.is_none() => {
                    return self.visit_one_by_one(each);
                }
                Err(error) => return Err(error),
            };
            let found = attributes.count as usize;
            let keys = keys.chunks_exact(key_size).take(found);
            for (key, value) in keys.zip(values.chunks_exact(self.value_size)) {
                each(key, value)?;
            }
            if is_last {
                return Ok(());
            }
            cursor = Some(after);
        }
    }

    fn visit_one_by_one(
        &self,
        mut each: impl FnMut(&[u8], &[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut last: Option<Vec<u8>> = None;
        let mut keys = Vec::new();
        while keys.len() < self.info.max_entries as usize {
            let mut next = vec![0; self.info.key_size as usize];
            let into = next.as_mut_ptr() as u64;
            let mut attributes = match &last {
                Some(last) => self.element(last, into, 0)?,
                None => Element { key: 0, value: into, ..self.element(&next, 0, 0)? },
            };
            // SAFETY: the kernel reads a key, unless there is none, and writes one.
            match unsafe { bpf(bpf_cmd::BPF_MAP_GET_NEXT_KEY, &mut attributes) } {
                Ok(_) => keys.push(next.clone()),
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => break,
                Err(error) => return Err(error),
            }
            last = Some(next);
        }
        for key in keys {
            if let Some(value) = self.get(&key)? {
                each(&key, &value)?;
            }
        }
        Ok(())
    }
}

impl AsFd for RawMap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

fn other_size(what: &str, size: usize) -> io::Error {
    let text = format!("a {what} of {size} bytes, which the map does not have");
    io::Error::new(io::ErrorKind::InvalidInput, text)
}
