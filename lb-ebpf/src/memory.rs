//! Filling and copying without memset and memmove, which the programs of the kernel do
//! not have: the stores are volatile, so that the compiler does not make calls of them.

/// Fills with zeros; the size must be a whole number of 4-byte words.
#[inline(always)]
pub fn zero<T>(place: *mut T) {
    let mut index = 0;
    while index < size_of::<T>() / size_of::<u32>() {
        // SAFETY: inside the value, whose alignment is at least that of a word.
        unsafe { core::ptr::write_volatile(place.cast::<u32>().add(index), 0) };
        index += 1;
    }
}

/// Copies; the size must be a whole number of 4-byte words, aligned as such.
#[inline(always)]
pub fn copy<T>(to: *mut T, from: *const T) {
    let mut index = 0;
    while index < size_of::<T>() / size_of::<u32>() {
        // SAFETY: inside both values, whose alignment is at least that of a word.
        unsafe {
            let word = *from.cast::<u32>().add(index);
            core::ptr::write_volatile(to.cast::<u32>().add(index), word);
        }
        index += 1;
    }
}
