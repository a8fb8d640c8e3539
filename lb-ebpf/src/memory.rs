//! Fills and copies memory without memset and memmove, which eBPF programs do not have. The stores
//! are volatile, so that the compiler does not turn them into calls.

/// Fills `place` with zeros. The size must be a multiple of 4 bytes.
#[inline(always)]
pub fn zero<T>(place: *mut T) {
    let mut index = 0;
    while index < size_of::<T>() / size_of::<u32>() {
        // SAFETY: inside the value, whose alignment is at least that of a word.
        unsafe { core::ptr::write_volatile(place.cast::<u32>().add(index), 0) };
        index += 1;
    }
}

/// Copies `from` to `to`. The size and the alignment must be multiples of 4 bytes.
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
