//! Arrays that the agent writes by plain stores into memory that it shares with the programs.
//!
//! A store needs no system call, except for the first access to a part of the array.
//! [`kernel`](super::kernel) decides the order of the stores of one entry.

use std::{io, marker::PhantomData, os::fd::OwnedFd};

use bytemuck::{Pod, Zeroable};

use lb_sys::Memory;

/// An mmap-able array of `T`, whose size is a multiple of 4.
#[derive(Debug)]
pub struct MappedArray<T> {
    memory: Memory,
    value: PhantomData<fn(T)>,
}

impl<T: Pod> MappedArray<T> {
    const WHOLE_WORDS: () =
        assert!(size_of::<T>().is_multiple_of(4), "the size is not a multiple of 4");

    /// Maps the array `map` for reading and writing.
    ///
    /// # Errors
    /// InvalidData if the map is not an mmap-able array of `T`, or an error of mmap(2).
    pub fn writable(map: OwnedFd) -> io::Result<Self> {
        let () = Self::WHOLE_WORDS;
        Ok(Self { memory: Memory::new(map, size_of::<T>(), true)?, value: PhantomData })
    }

    /// Maps the array `map` for reading.
    ///
    /// # Errors
    /// As [`MappedArray::writable`].
    pub fn readable(map: OwnedFd) -> io::Result<Self> {
        let () = Self::WHOLE_WORDS;
        Ok(Self { memory: Memory::new(map, size_of::<T>(), false)?, value: PhantomData })
    }

    /// How many entries there are.
    pub fn entries(&self) -> u32 {
        self.memory.entries()
    }

    /// Stores an entry, 4 bytes at a time.
    ///
    /// # Errors
    /// InvalidInput if there is no entry `index`.
    pub fn store(&mut self, index: u32, value: &T) -> io::Result<()> {
        self.memory.store(index, 0, bytemuck::bytes_of(value))
    }

    /// Stores a part of an entry, 4 bytes at a time; `offset` is in bytes.
    ///
    /// # Errors
    /// InvalidInput outside of the entry, or if `offset` is not a multiple of 4.
    pub fn store_part<P: Pod>(&mut self, index: u32, offset: usize, part: &P) -> io::Result<()> {
        self.memory.store(index, offset, bytemuck::bytes_of(part))
    }

    /// Stores 8 bytes of an entry at once. A program that sees them sees every earlier store.
    ///
    /// # Errors
    /// InvalidInput outside of the entry, or if `offset` is not a multiple of 8.
    pub fn publish(&mut self, index: u32, offset: usize, word: u64) -> io::Result<()> {
        self.memory.publish(index, offset, word)
    }

    /// The current value of an entry.
    ///
    /// # Errors
    /// InvalidInput if there is no entry `index`.
    pub fn load(&mut self, index: u32) -> io::Result<T> {
        let mut value = T::zeroed();
        self.memory.load(index, bytemuck::bytes_of_mut(&mut value))?;
        Ok(value)
    }

    /// Unmaps the array until it is accessed again: the kernel counts what is mapped as memory of
    /// the process.
    ///
    /// # Errors
    /// Those of mmap(2).
    pub fn unmap(&mut self) -> io::Result<()> {
        self.memory.unmap()
    }

    /// Every entry.
    ///
    /// # Errors
    /// The errors of mmap(2).
    pub fn load_all(&mut self) -> io::Result<Vec<T>> {
        (0..self.entries()).map(|index| self.load(index)).collect()
    }
}

/// The 8 bytes of `value` at the byte `offset`, as one word.
///
/// # Panics
/// If `value` has fewer bytes.
pub fn word_of<T: Pod>(value: &T, offset: usize) -> u64 {
    let mut word = u64::zeroed();
    bytemuck::bytes_of_mut(&mut word)
        .copy_from_slice(&bytemuck::bytes_of(value)[offset..offset + 8]);
    word
}

#[cfg(test)]
mod tests {
    use lb_common::abi::service::{Service, SlotRange};

    use super::*;

    #[test]
    fn a_word_has_the_bytes_at_its_offset() {
        let value = Service { cluster: SlotRange::new(3, 4), ..Service::default() };
        assert_eq!(word_of(&value, 0), value.cluster.start_and_length);
        assert_eq!(word_of(&value, 8), 0);
    }
}
