//! An mmap-able array whose words programs and processes change at the same time.
//!
//! The whole array is mapped, and the kernel counts every page of it as memory of the process for
//! as long as it is. Every access is an atomic operation on one word of 8 bytes.

use std::{
    io,
    num::NonZeroUsize,
    os::fd::BorrowedFd,
    ptr::NonNull,
    sync::atomic::{AtomicU64, Ordering::SeqCst},
};

use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

use super::memory::mmapable_info;

const WORD: usize = size_of::<u64>();

/// The words of an array in memory. Words are read and compared-and-swapped in one order that all
/// CPUs agree on.
#[derive(Debug)]
pub struct SharedArray {
    base: NonNull<AtomicU64>,
    /// Bytes mapped.
    length: usize,
    /// Words of an entry.
    stride: usize,
    entries: u32,
    is_writable: bool,
}

// SAFETY: only this value refers to the memory, and every access to it is an atomic operation.
unsafe impl Send for SharedArray {}
// SAFETY: as above.
unsafe impl Sync for SharedArray {}

impl SharedArray {
    /// Maps the values of `map`, which must have the size `value_size`, a multiple of 8.
    ///
    /// # Errors
    /// InvalidData if the map is not an mmap-able array of such values, or those of mmap(2)
    /// and BPF_OBJ_GET_INFO_BY_FD.
    pub fn new(map: BorrowedFd<'_>, value_size: usize, is_writable: bool) -> io::Result<Self> {
        let info = mmapable_info(map, value_size)?;
        let mut protection = ProtFlags::PROT_READ;
        protection.set(ProtFlags::PROT_WRITE, is_writable);
        Self::mapped(info.max_entries, value_size, is_writable, |length| {
            // SAFETY: the kernel chooses a range that nothing uses.
            unsafe { mmap(None, length, protection, MapFlags::MAP_SHARED, map, 0) }
        })
    }

    /// An array of zeros that belongs to this process alone, for tests.
    ///
    /// # Errors
    /// Those of mmap(2), and InvalidData for an empty array.
    pub fn anonymous(entries: u32, value_size: usize) -> io::Result<Self> {
        Self::mapped(entries, value_size, true, |length| {
            let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
            // SAFETY: the kernel chooses a range that nothing uses.
            unsafe { mmap_anonymous(None, length, protection, MapFlags::MAP_PRIVATE) }
        })
    }

    fn mapped(
        entries: u32,
        value_size: usize,
        is_writable: bool,
        map: impl FnOnce(NonZeroUsize) -> nix::Result<NonNull<std::ffi::c_void>>,
    ) -> io::Result<Self> {
        let invalid = |text: &str| io::Error::new(io::ErrorKind::InvalidData, text.to_owned());
        if !value_size.is_multiple_of(WORD) {
            return Err(invalid("the values are not whole words"));
        }
        let length = NonZeroUsize::new(value_size * entries as usize)
            .ok_or_else(|| invalid("the array is empty"))?;
        let base = map(length)?.cast();
        let (length, stride) = (length.get(), value_size / WORD);
        Ok(Self { base, length, stride, entries, is_writable })
    }

    /// How many entries the array has.
    pub fn entries(&self) -> u32 {
        self.entries
    }

    /// A word of an entry; `None` outside of the array.
    pub fn load(&self, index: u32, word: usize) -> Option<u64> {
        Some(self.word(index, word)?.load(SeqCst))
    }

    /// Replaces a word by `new` if it is `old`. Returns whether it was; false outside of the array
    /// or if it is mapped for reading only.
    pub fn compare_and_swap(&self, index: u32, word: usize, old: u64, new: u64) -> bool {
        self.writable(index, word)
            .is_some_and(|word| word.compare_exchange(old, new, SeqCst, SeqCst).is_ok())
    }

    /// Sets bits of a word. Returns false outside of the array or if it is mapped for reading only.
    pub fn set_bits(&self, index: u32, word: usize, bits: u64) -> bool {
        let place = self.writable(index, word);
        place.inspect(|place| _ = place.fetch_or(bits, SeqCst)).is_some()
    }

    /// Clears bits of a word, likewise.
    pub fn clear_bits(&self, index: u32, word: usize, bits: u64) -> bool {
        let place = self.writable(index, word);
        place.inspect(|place| _ = place.fetch_and(!bits, SeqCst)).is_some()
    }

    /// Stores a word. Returns false outside of the array or if it is mapped for reading only.
    pub fn store(&self, index: u32, word: usize, value: u64) -> bool {
        let place = self.writable(index, word);
        place.inspect(|place| place.store(value, SeqCst)).is_some()
    }

    /// Copies words of an entry from `first` on, one by one: others may write to them meanwhile.
    /// Returns false outside of the array or if the entry has not as many.
    pub fn copy(&self, index: u32, first: usize, into: &mut [u64]) -> bool {
        if !self.has(index, first, into.len()) {
            return false;
        }
        for (word, into) in (first..).zip(into) {
            *into = self.load(index, word).unwrap_or_default();
        }
        true
    }

    /// Stores words of an entry from `first` on, one by one. Returns false outside of the array, if the
    /// entry has not as many or if the array is mapped for reading only.
    pub fn fill(&self, index: u32, first: usize, from: &[u64]) -> bool {
        self.has(index, first, from.len())
            && (first..).zip(from).all(|(word, value)| self.store(index, word, *value))
    }

    fn has(&self, index: u32, first: usize, words: usize) -> bool {
        index < self.entries && first.checked_add(words).is_some_and(|end| end <= self.stride)
    }

    fn writable(&self, index: u32, word: usize) -> Option<&AtomicU64> {
        self.word(index, word).filter(|_| self.is_writable)
    }

    fn word(&self, index: u32, word: usize) -> Option<&AtomicU64> {
        if index >= self.entries || word >= self.stride {
            return None;
        }
        // SAFETY: the word is in the mapped memory, which is aligned to a page, and every access to
        // it is atomic. An atomic load of 8 bytes writes nothing, so memory that is mapped for
        // reading suffices.
        Some(unsafe { self.base.add(index as usize * self.stride + word).as_ref() })
    }
}

impl Drop for SharedArray {
    fn drop(&mut self) {
        // SAFETY: this value owns the memory, and no reference to it outlives a call.
        let result = unsafe { munmap(self.base.cast(), self.length) };
        debug_assert!(result.is_ok(), "unmapping what was mapped: {result:?}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_loaded_stored_and_swapped_inside_the_array_alone() {
        let array = SharedArray::anonymous(3, 16).unwrap();
        assert!(array.store(2, 1, 7));
        assert!(array.compare_and_swap(2, 1, 7, 8));
        assert!(!array.compare_and_swap(2, 1, 7, 9), "it is another word by now");
        assert!(array.set_bits(2, 1, 12) && !array.set_bits(3, 0, 1));
        assert!(array.clear_bits(2, 1, 4) && !array.clear_bits(3, 0, 1));
        assert_eq!((array.load(2, 1), array.load(2, 0)), (Some(8), Some(0)));
        for (index, word) in [(3, 0), (0, 2), (u32::MAX, usize::MAX)] {
            assert_eq!(array.load(index, word), None, "{index} {word}");
            assert!(!array.store(index, word, 1) && !array.compare_and_swap(index, word, 0, 1));
        }
    }

    #[test]
    fn words_of_an_entry_are_copied_and_filled_together() {
        let array = SharedArray::anonymous(2, 24).unwrap();
        assert!(array.fill(1, 0, &[1, 2, 3]) && array.fill(1, 1, &[4]));
        let mut copied = [0; 2];
        assert!(array.copy(1, 1, &mut copied) && copied == [4, 3]);
        assert!(!array.copy(2, 0, &mut copied) && !array.copy(0, 2, &mut copied));
        assert!(!array.copy(0, usize::MAX, &mut copied));
        assert!(!array.fill(2, 0, &[1]) && !array.fill(0, 0, &[0; 4]));
    }

    #[test]
    fn an_array_of_no_whole_words_is_refused() {
        SharedArray::anonymous(1, 12).unwrap_err();
        SharedArray::anonymous(0, 8).unwrap_err();
    }

    #[test]
    fn threads_that_count_by_compare_and_swap_lose_nothing() {
        const EACH: u64 = 10_000;
        let array = SharedArray::anonymous(1, 8).unwrap();
        let count = || {
            for _ in 0..EACH {
                while array
                    .load(0, 0)
                    .is_none_or(|word| !array.compare_and_swap(0, 0, word, word + 1))
                {
                }
            }
        };
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(count);
            }
        });
        assert_eq!(array.load(0, 0), Some(4 * EACH));
    }
}
