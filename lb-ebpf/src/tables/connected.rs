//! The table of connected sockets: CONNECTED_PEERS.
//!
//! A socket is known by its cookie, which the kernel never gives twice, and only the socket itself asks
//! for its entry. So an entry needs no generation: a cookie that matches is the socket's own.

use core::ptr;

use lb_common::abi::socket::{CONNECTED_BUCKETS, CONNECTED_WAYS, ConnectedBucket, ConnectedPeer};

use super::flows::compare_and_swap;
use crate::{maps, memory};

/// Remembers the peers of a socket in the place that it has, or in a free one. Returns whether there
/// was one.
#[inline(always)]
pub fn remember(cookie: u64, peers: &ConnectedPeer) -> bool {
    let Some(bucket) = bucket(cookie) else { return false };
    let Some(way) = way(bucket, cookie).or_else(|| claim(bucket, cookie)) else { return false };
    memory::copy(peers_of(bucket, way), peers);
    true
}

/// The peers of a socket that has a place.
#[inline(always)]
pub fn find(cookie: u64) -> Option<ConnectedPeer> {
    let bucket = bucket(cookie)?;
    let way = way(bucket, cookie)?;
    // SAFETY: as above.
    Some(unsafe { *peers_of(bucket, way) })
}

/// Frees the place of a socket, if it has one.
#[inline(always)]
pub fn forget(cookie: u64) {
    let Some(bucket) = bucket(cookie) else { return };
    if let Some(way) = way(bucket, cookie) {
        // SAFETY: as above.
        unsafe { ptr::write_volatile(cookie_of(bucket, way), 0) };
    }
}

#[inline(always)]
fn bucket(cookie: u64) -> Option<*mut ConnectedBucket> {
    maps::CONNECTED_PEERS.get_ptr_mut(cookie as u32 & (CONNECTED_BUCKETS - 1))
}

/// The place of a socket in its bucket.
#[inline(always)]
fn way(bucket: *mut ConnectedBucket, cookie: u64) -> Option<usize> {
    (0..CONNECTED_WAYS).find(|way| {
        // SAFETY: a look-up of this run found the bucket, and the way is in bounds.
        let found = unsafe { ptr::read_volatile(cookie_of(bucket, *way)) };
        found == cookie
    })
}

/// Gives a socket a free place in its bucket.
#[inline(always)]
fn claim(bucket: *mut ConnectedBucket, cookie: u64) -> Option<usize> {
    (0..CONNECTED_WAYS).find(|way| {
        // SAFETY: as above.
        unsafe { compare_and_swap(cookie_of(bucket, *way), 0, cookie) }
    })
}

#[inline(always)]
fn cookie_of(bucket: *mut ConnectedBucket, way: usize) -> *mut u64 {
    // SAFETY: the callers'.
    unsafe { (&raw mut (*bucket).cookies).cast::<u64>().add(way) }
}

#[inline(always)]
fn peers_of(bucket: *mut ConnectedBucket, way: usize) -> *mut ConnectedPeer {
    // SAFETY: the callers'.
    unsafe { (&raw mut (*bucket).peers).cast::<ConnectedPeer>().add(way) }
}
