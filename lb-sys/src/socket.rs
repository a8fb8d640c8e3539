//! Socket options for which no crate has a safe function.

use std::{
    io,
    os::{fd::AsRawFd, unix::net::UnixDatagram},
};

/// The cookie of the network namespace of the calling thread (SO_NETNS_COOKIE).
///
/// # Errors
/// Those of getsockopt(2); ENOPROTOOPT on a kernel before 5.14.
pub fn netns_cookie() -> io::Result<u64> {
    let socket = UnixDatagram::unbound()?;
    let mut cookie = 0u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes to `cookie`.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            std::ptr::from_mut(&mut cookie).cast(),
            &mut length,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(cookie) }
}
