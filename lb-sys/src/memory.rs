//! The memory of an mmap-able array.
//!
//! The kernel counts every page of such a mapping as resident from the start. So a large array is
//! mapped piece by piece, when its entries are accessed, into one reserved address range.

use std::{
    io,
    num::NonZeroUsize,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    ptr::NonNull,
    sync::atomic::{AtomicU32, AtomicU64, Ordering},
};

use bytemuck::pod_read_unaligned;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

use super::bpf::{MapInfo, map_info};

/// Size of a piece, bytes; a multiple of any page size.
const PIECE: usize = 256 * 1024;

/// The values of an array in memory, shared with the programs.
///
/// The programs may read any word at any time, so every access is an atomic operation on whole
/// words.
#[derive(Debug)]
pub struct Memory {
    base: NonNull<u8>,
    /// Bytes reserved: the array's, rounded up to whole pages.
    length: usize,
    stride: usize,
    entries: u32,
    pieces: Vec<bool>,
    descriptor: OwnedFd,
    protection: ProtFlags,
}

// SAFETY: only this value refers to the range, and all stores to it are atomic operations while it
// is shared with the kernel.
unsafe impl Send for Memory {}

impl Memory {
    /// Reserves an address range for the values of `map`, which must have the size `value_size`.
    ///
    /// # Errors
    /// InvalidData if the map is not an mmap-able array of such values, or those of mmap(2)
    /// and BPF_OBJ_GET_INFO_BY_FD.
    pub fn new(map: OwnedFd, value_size: usize, writable: bool) -> io::Result<Self> {
        let info = mmapable_info(map.as_fd(), value_size)?;
        let page = page_size();
        let stride = value_size.next_multiple_of(8);
        let length = (stride * info.max_entries as usize).next_multiple_of(page);
        let size = NonZeroUsize::new(length)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "the array is empty"))?;
        // SAFETY: the range is new, and PROT_NONE forbids every access.
        let base = unsafe {
            mmap_anonymous(
                None,
                size,
                ProtFlags::PROT_NONE,
                MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE,
            )
        }?
        .cast();
        let mut protection = ProtFlags::PROT_READ;
        protection.set(ProtFlags::PROT_WRITE, writable);
        Ok(Self {
            base,
            length,
            stride,
            entries: info.max_entries,
            pieces: vec![false; length.div_ceil(PIECE)],
            descriptor: map,
            protection,
        })
    }

    /// How many entries the array has.
    pub fn entries(&self) -> u32 {
        self.entries
    }

    /// Stores `bytes`, in whole 4-byte words, at the byte `offset` of the entry.
    ///
    /// # Errors
    /// InvalidInput outside of the array, PermissionDenied if it is mapped read-only,
    /// or those of mmap(2).
    pub fn store(&mut self, index: u32, offset: usize, bytes: &[u8]) -> io::Result<()> {
        let start = self.writable(index, offset, bytes.len(), 4)?;
        for (position, word) in bytes.chunks_exact(4).enumerate() {
            // SAFETY: `writable` has checked that the words are in mapped memory of the
            // entry and are aligned.
            let target = unsafe { AtomicU32::from_ptr(start.add(position * 4).cast().as_ptr()) };
            target.store(pod_read_unaligned(word), Ordering::Relaxed);
        }
        Ok(())
    }

    /// Publishes one 8-byte word: a program that sees it sees every earlier store.
    ///
    /// # Errors
    /// As [`Memory::store`].
    pub fn publish(&mut self, index: u32, offset: usize, word: u64) -> io::Result<()> {
        let start = self.writable(index, offset, 8, 8)?;
        // SAFETY: `writable` has checked that the word is in mapped memory of the entry
        // and is aligned.
        let target = unsafe { AtomicU64::from_ptr(start.cast().as_ptr()) };
        target.store(word, Ordering::Release);
        Ok(())
    }

    /// Loads `bytes`, in whole 4-byte words, from the start of the entry.
    ///
    /// # Errors
    /// InvalidInput outside of the array, or those of mmap(2).
    pub fn load(&mut self, index: u32, bytes: &mut [u8]) -> io::Result<()> {
        let start = self.place(index, 0, bytes.len(), 4)?;
        for (position, word) in bytes.chunks_exact_mut(4).enumerate() {
            // SAFETY: `place` has checked that the words are in mapped memory of the
            // entry and are aligned; an atomic load of 4 bytes writes nothing, so memory
            // that is mapped read-only suffices.
            let source = unsafe { AtomicU32::from_ptr(start.add(position * 4).cast().as_ptr()) };
            word.copy_from_slice(&source.load(Ordering::Relaxed).to_ne_bytes());
        }
        Ok(())
    }

    /// Unmaps all pieces, which the kernel counts as resident. They are mapped again when they are
    /// accessed.
    ///
    /// # Errors
    /// Those of mmap(2).
    pub fn unmap(&mut self) -> io::Result<()> {
        let length = NonZeroUsize::new(self.length).expect("an array is not empty");
        // SAFETY: replaces the range that this value reserved, and no reference to it exists.
        unsafe {
            mmap_anonymous(
                Some(self.base.addr()),
                length,
                ProtFlags::PROT_NONE,
                MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE | MapFlags::MAP_FIXED,
            )
        }?;
        self.pieces.fill(false);
        Ok(())
    }

    fn writable(
        &mut self,
        index: u32,
        offset: usize,
        length: usize,
        align: usize,
    ) -> io::Result<NonNull<u8>> {
        if !self.protection.contains(ProtFlags::PROT_WRITE) {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        self.place(index, offset, length, align)
    }

    /// The address of `length` bytes of an entry, after mapping them.
    fn place(
        &mut self,
        index: u32,
        offset: usize,
        length: usize,
        align: usize,
    ) -> io::Result<NonNull<u8>> {
        let end = offset.saturating_add(length);
        if index >= self.entries
            || end > self.stride
            || !offset.is_multiple_of(align)
            || !length.is_multiple_of(align)
        {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("bytes {offset} to {end} of entry {index} of {}", self.entries),
            ));
        }
        let start = index as usize * self.stride + offset;
        for piece in start / PIECE..=(start + length.max(1) - 1) / PIECE {
            self.map_piece(piece)?;
        }
        // SAFETY: `start` is less than the length of the reserved range.
        Ok(unsafe { self.base.add(start) })
    }

    fn map_piece(&mut self, piece: usize) -> io::Result<()> {
        if self.pieces[piece] {
            return Ok(());
        }
        let start = piece * PIECE;
        // SAFETY: `pieces` has an entry only for a start within the reserved range.
        let address = unsafe { self.base.add(start) }.addr();
        let length = NonZeroUsize::new(PIECE.min(self.length - start))
            .expect("a piece starts before the end of the range");
        // SAFETY: replaces a part of the range that this value reserved, and no reference to it
        // exists yet.
        unsafe {
            mmap(
                Some(address),
                length,
                self.protection,
                MapFlags::MAP_SHARED | MapFlags::MAP_FIXED,
                &self.descriptor,
                start as libc::off_t,
            )
        }?;
        self.pieces[piece] = true;
        Ok(())
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: this value owns the range, and no reference to it outlives a call.
        let result = unsafe { munmap(self.base.cast(), self.length) };
        debug_assert!(result.is_ok(), "unmapping what was mapped: {result:?}");
    }
}

/// The information on `map`, if it is an mmap-able array of such values.
pub(super) fn mmapable_info(map: BorrowedFd<'_>, value_size: usize) -> io::Result<MapInfo> {
    let info = map_info(map)?;
    let mmapable = aya_obj::generated::BPF_F_MMAPABLE;
    let array = aya_obj::generated::bpf_map_type::BPF_MAP_TYPE_ARRAY as u32;
    if info.map_type != array
        || info.flags & mmapable == 0
        || info.value_size as usize != value_size
    {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("the map is not an mmap-able array of {value_size}-byte values"),
        ));
    }
    Ok(info)
}

pub(super) fn page_size() -> usize {
    // SAFETY: sysconf(3) takes no pointer.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(size).unwrap_or(4096)
}
