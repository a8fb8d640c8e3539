//! Memory of the process that is not needed any more.

use crate::memory::page_size;

/// Lets the allocator give memory back as soon as 128 KiB of it are free in one piece at the end of a
/// heap. By itself it keeps more and more, up to 64 MiB for each heap, once a large piece was freed,
/// and [`trim_heap`] does not look at the ends of the heaps of other threads.
///
/// To be called before the first thread starts.
pub fn keep_heap_small() {
    #[cfg(target_env = "gnu")]
    for parameter in [libc::M_TRIM_THRESHOLD, libc::M_MMAP_THRESHOLD] {
        // SAFETY: mallopt(3) takes numbers alone.
        unsafe {
            libc::mallopt(parameter, 128 << 10);
        }
    }
}

/// Gives freed memory back to the kernel, which allocators otherwise keep for the next allocation.
/// Takes milliseconds for each 100 MB.
pub fn trim_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim(3) takes a number, and touches only memory that is not in use.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Lets the kernel take the whole pages of `bytes` at once, as if memory were scarce: for a part of
/// the program's file that is read once. They are read again when they are accessed.
pub fn page_out(bytes: &[u8]) {
    let page = page_size();
    let start = bytes.as_ptr().addr().next_multiple_of(page);
    let end = (bytes.as_ptr().addr() + bytes.len()) / page * page;
    if end > start {
        let skipped = start - bytes.as_ptr().addr();
        // SAFETY: the pages are those of `bytes`, and MADV_PAGEOUT changes no content. Kernels
        // that refuse it leave the pages where they are.
        unsafe {
            let first = bytes.as_ptr().add(skipped).cast_mut().cast();
            libc::madvise(first, end - start, libc::MADV_PAGEOUT);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_paged_out_can_still_be_read() {
        let bytes: Vec<u8> = (0..100_000_u32).map(|number| number as u8).collect();
        page_out(&bytes[1..]);
        page_out(&[]);
        keep_heap_small();
        trim_heap();
        assert!(bytes.iter().zip(0_u32..).all(|(byte, number)| *byte == number as u8));
    }
}
