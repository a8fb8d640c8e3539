//! The connect-time hooks: read the address that the socket asks for, ask the core for the
//! decision, apply it.
//!
//! A v4-mapped address of an IPv6 socket is handled as IPv4: with the same tables and decisions.
//! The socket gets v4-mapped addresses back.

use aya_ebpf::{
    helpers::generated::{
        bpf_get_current_ancestor_cgroup_id, bpf_get_netns_cookie, bpf_get_socket_cookie,
        bpf_set_retval,
    },
    programs::{SockAddrContext, SockContext},
};
use lb_common::{
    abi::{
        address::{Address, Address4, Address6, Be16, Family, Ipv4, Ipv6},
        counter::{Hook, Reason},
        frontend::{TCP, UDP},
        socket::{ConnectedPeer, DatagramKey, Peer},
    },
    balance::{
        Endpoint,
        socket::{self, Caller, Decision},
    },
};

use crate::{
    count::{count, count_service},
    maps, memory, tables,
    tables::{FamilyMaps, connected, datagram_peer, insert_datagram_peer},
};

/// The call goes on.
const ALLOW: i32 = 1;
const REFUSE: i32 = 0;
const ECONNREFUSED: i32 = 111;
const EPERM: i32 = 1;
/// The depth below the root at which an excluded cgroup is found.
const CGROUP_LEVELS: i32 = 8;
/// The third word of a v4-mapped address (RFC 4291 section 2.5.5.2).
const MAPPED_PREFIX: u32 = 0xffffu32.to_be();

/// The location of a socket address in the hook's context.
trait Location {
    type Family: FamilyMaps;
    const FAMILY_NUMBER: u16;

    fn load(context: &SockAddrContext) -> <Self::Family as Family>::Address;
    fn store(context: &SockAddrContext, address: [u32; 4]);
    fn address(words: [u32; 4]) -> <Self::Family as Family>::Address;
}

/// The address of an IPv4 socket.
struct Inet4;
/// The address of an IPv6 socket.
struct Inet6;
/// The v4-mapped address of an IPv6 socket.
struct Mapped;

impl Location for Inet4 {
    type Family = Ipv4;
    const FAMILY_NUMBER: u16 = 4;

    #[inline(always)]
    fn load(context: &SockAddrContext) -> Address4 {
        // SAFETY: the context is the kernel's.
        Address4 { be32: unsafe { (*context.sock_addr).user_ip4 } }
    }

    #[inline(always)]
    fn store(context: &SockAddrContext, address: [u32; 4]) {
        // SAFETY: the context is the kernel's.
        unsafe { (*context.sock_addr).user_ip4 = address[0] }
    }

    #[inline(always)]
    fn address(words: [u32; 4]) -> Address4 {
        Address4 { be32: words[0] }
    }
}

impl Location for Mapped {
    type Family = Ipv4;
    const FAMILY_NUMBER: u16 = 4;

    #[inline(always)]
    fn load(context: &SockAddrContext) -> Address4 {
        Address4 { be32: word6(context, 3) }
    }

    #[inline(always)]
    fn store(context: &SockAddrContext, address: [u32; 4]) {
        set_word6(context, 3, address[0]);
    }

    #[inline(always)]
    fn address(words: [u32; 4]) -> Address4 {
        Address4 { be32: words[0] }
    }
}

impl Location for Inet6 {
    type Family = Ipv6;
    const FAMILY_NUMBER: u16 = 6;

    #[inline(always)]
    fn load(context: &SockAddrContext) -> Address6 {
        Address6 {
            be32: [word6(context, 0), word6(context, 1), word6(context, 2), word6(context, 3)],
        }
    }

    #[inline(always)]
    fn store(context: &SockAddrContext, address: [u32; 4]) {
        set_word6(context, 0, address[0]);
        set_word6(context, 1, address[1]);
        set_word6(context, 2, address[2]);
        set_word6(context, 3, address[3]);
    }

    #[inline(always)]
    fn address(words: [u32; 4]) -> Address6 {
        Address6 { be32: words }
    }
}

/// One word of `user_ip6`. The verifier allows only accesses of one word to the context; the
/// volatile read keeps the compiler from merging them.
#[inline(always)]
fn word6(context: &SockAddrContext, index: usize) -> u32 {
    // SAFETY: the context is the kernel's, the index below 4.
    unsafe { core::ptr::read_volatile(&raw const (*context.sock_addr).user_ip6[index]) }
}

#[inline(always)]
fn set_word6(context: &SockAddrContext, index: usize, word: u32) {
    // SAFETY: as above.
    unsafe { core::ptr::write_volatile(&raw mut (*context.sock_addr).user_ip6[index], word) }
}

#[inline(always)]
fn is_mapped(context: &SockAddrContext) -> bool {
    word6(context, 0) == 0 && word6(context, 1) == 0 && word6(context, 2) == MAPPED_PREFIX
}

#[inline(always)]
fn port(context: &SockAddrContext) -> Be16 {
    // SAFETY: the context is the kernel's.
    Be16 { be16: unsafe { (*context.sock_addr).user_port } as u16 }
}

#[inline(always)]
fn set_port(context: &SockAddrContext, port: Be16) {
    // SAFETY: the context is the kernel's.
    unsafe { (*context.sock_addr).user_port = port.be16 as u32 }
}

/// The socket that makes the call.
struct Socket<'a> {
    context: &'a SockAddrContext,
    is_sendmsg: bool,
}

impl Caller for Socket<'_> {
    #[inline(always)]
    fn netns(&self) -> u64 {
        if maps::HAS_NETNS_COOKIE.load() == 0 {
            return 0;
        }
        // SAFETY: the context is the kernel's.
        unsafe { bpf_get_netns_cookie(self.context.sock_addr.cast()) }
    }

    #[inline(always)]
    fn is_node(&self) -> bool {
        let node = maps::NODE_COOKIE.load();
        node != 0 && self.netns() == node
    }

    #[inline(always)]
    fn datagram_socket(&self) -> Option<u64> {
        self.is_sendmsg.then(|| cookie(self.context))
    }
}

#[inline(always)]
fn cookie(context: &SockAddrContext) -> u64 {
    // SAFETY: the context is the kernel's.
    unsafe { bpf_get_socket_cookie(context.sock_addr.cast()) }
}

/// Whether calls of this socket are left untranslated, so that their packets are translated.
#[inline(always)]
fn is_exempt(socket: &Socket, protocol: u8) -> bool {
    let covered = protocol == TCP || protocol == UDP && maps::SOCKET_LB_UDP.load() != 0;
    !covered || maps::ONLY_NODE.load() != 0 && !socket.is_node() || is_excluded()
}

/// Whether the calling process is in an excluded cgroup, or below one. If no cgroup is excluded,
/// the verifier removes this code, because it knows the count.
#[inline(always)]
fn is_excluded() -> bool {
    if maps::EXCLUDED_COUNT.load() == 0 {
        return false;
    }
    let excluded = maps::EXCLUDED_CGROUPS.load();
    for level in 1..=CGROUP_LEVELS {
        // SAFETY: no pointers; a level deeper than the process's cgroup gives 0.
        let ancestor = unsafe { bpf_get_current_ancestor_cgroup_id(level) };
        if ancestor == 0 {
            return false;
        }
        if excluded.contains(&ancestor) {
            return true;
        }
    }
    false
}

/// connect() and sendmsg(): translates the address in the call.
#[inline(always)]
fn call<L: Location>(context: &SockAddrContext, hook: Hook, is_sendmsg: bool) -> i32 {
    // SAFETY: the context is the kernel's.
    let protocol = unsafe { (*context.sock_addr).protocol } as u8;
    let socket = Socket { context, is_sendmsg };
    if is_exempt(&socket, protocol) {
        count(hook, Reason::SocketExempt);
        return ALLOW;
    }
    let Some(settings) = tables::settings() else {
        count(hook, Reason::TableInconsistent);
        return ALLOW;
    };
    let requested = Endpoint { address: L::load(context), port: port(context) };
    let decision =
        socket::decide::<L::Family, _>(requested, protocol, &socket, settings, &mut tables::Maps);
    match decision {
        Decision::Untouched(reason) => {
            count(hook, reason);
            ALLOW
        }
        Decision::Refuse(reason, service) => {
            count(hook, reason);
            count_service(service, reason, 0);
            refuse(if matches!(reason, Reason::SourceNotAllowed) { EPERM } else { ECONNREFUSED })
        }
        Decision::Translate(actual) => {
            let requested = peer::<L>(requested);
            let actual = peer::<L>(actual);
            if !is_sendmsg {
                remember_connected(context, requested, actual);
            }
            if protocol == UDP {
                remember_datagrams(context, requested, actual);
            }
            L::store(context, actual.address);
            set_port(context, actual.port);
            count(hook, Reason::SocketTranslated);
            ALLOW
        }
    }
}

#[inline(always)]
fn peer<L: Location>(endpoint: Endpoint<<L::Family as Family>::Address>) -> Peer {
    Peer { address: endpoint.address.widened(), port: endpoint.port, family: L::FAMILY_NUMBER }
}

/// The call fails with `error`. A kernel without `bpf_set_retval` cannot return the error from
/// here: the call goes on unchanged, and its packets are refused.
#[inline(always)]
fn refuse(error: i32) -> i32 {
    if maps::HAS_SET_RETVAL.load() == 0 {
        return ALLOW;
    }
    // SAFETY: no preconditions.
    unsafe { bpf_set_retval(-error) };
    REFUSE
}

/// Remembers the peer that getpeername() returns: in CONNECTED_PEERS, or if there is no place, in the
/// socket. Without memory for that the connection works, and getpeername() returns the backend.
#[inline(always)]
fn remember_connected(context: &SockAddrContext, requested: Peer, actual: Peer) {
    let mut value = ConnectedPeer { requested, actual };
    if connected::remember(cookie(context), &value) {
        return;
    }
    // SAFETY: the context is the kernel's; the entry belongs to this socket.
    unsafe {
        let entry = maps::SOCKETS.get_or_insert_ptr_mut(context, Some(&mut value));
        if !entry.is_null() {
            memory::copy(entry, &raw const value);
        }
    }
}

/// Remembers the sender that recvmsg() returns for the backend's datagrams.
#[inline(always)]
fn remember_datagrams(context: &SockAddrContext, requested: Peer, actual: Peer) {
    let key = datagram_key(context, actual);
    insert_datagram_peer(&key, &requested);
}

#[inline(always)]
fn datagram_key(context: &SockAddrContext, actual: Peer) -> DatagramKey {
    let cookie = cookie(context);
    DatagramKey { cookie: [cookie as u32, (cookie >> 32) as u32], actual }
}

/// getpeername(): returns the peer that the socket asked for.
#[inline(always)]
fn restore_peer<L: Location>(context: &SockAddrContext, hook: Hook) -> i32 {
    let found = connected::find(cookie(context)).or_else(|| {
        // SAFETY: the context is the kernel's; the entry belongs to this socket.
        let entry = unsafe { maps::SOCKETS.get_ptr_mut(context) };
        // SAFETY: checked for null.
        if entry.is_null() { None } else { Some(unsafe { *entry }) }
    });
    let current = peer::<L>(Endpoint { address: L::load(context), port: port(context) });
    match found {
        Some(found) if found.actual == current => {
            restore::<L>(context, found.requested);
            count(hook, Reason::SocketTranslated);
        }
        _ => count(hook, Reason::NotService),
    }
    ALLOW
}

/// See [`crate::release`].
#[inline(always)]
pub fn release(context: &SockContext) -> i32 {
    // SAFETY: the context is the kernel's.
    connected::forget(unsafe { bpf_get_socket_cookie(context.sock.cast()) });
    ALLOW
}

/// recvmsg(): returns the Service as the sender.
#[inline(always)]
fn restore_sender<L: Location>(context: &SockAddrContext, hook: Hook) -> i32 {
    let current = peer::<L>(Endpoint { address: L::load(context), port: port(context) });
    let key = datagram_key(context, current);
    match datagram_peer(&key) {
        Some(requested) => {
            restore::<L>(context, requested);
            count(hook, Reason::SocketTranslated);
        }
        None => count(hook, Reason::NotService),
    }
    ALLOW
}

#[inline(always)]
fn restore<L: Location>(context: &SockAddrContext, peer: Peer) {
    L::store(context, L::address(peer.address).widened());
    set_port(context, peer.port);
}

/// See [`crate::connect4`].
#[inline(always)]
pub fn connect4(context: &SockAddrContext) -> i32 {
    call::<Inet4>(context, Hook::Connect4, false)
}

/// See [`crate::connect6`].
#[inline(always)]
pub fn connect6(context: &SockAddrContext) -> i32 {
    if is_mapped(context) {
        call::<Mapped>(context, Hook::Connect6, false)
    } else {
        call::<Inet6>(context, Hook::Connect6, false)
    }
}

/// See [`crate::sendmsg4`].
#[inline(always)]
pub fn sendmsg4(context: &SockAddrContext) -> i32 {
    call::<Inet4>(context, Hook::Sendmsg4, true)
}

/// See [`crate::sendmsg6`].
#[inline(always)]
pub fn sendmsg6(context: &SockAddrContext) -> i32 {
    if is_mapped(context) {
        call::<Mapped>(context, Hook::Sendmsg6, true)
    } else {
        call::<Inet6>(context, Hook::Sendmsg6, true)
    }
}

/// See [`crate::recvmsg4`].
#[inline(always)]
pub fn recvmsg4(context: &SockAddrContext) -> i32 {
    restore_sender::<Inet4>(context, Hook::Recvmsg4)
}

/// See [`crate::recvmsg6`].
#[inline(always)]
pub fn recvmsg6(context: &SockAddrContext) -> i32 {
    if is_mapped(context) {
        restore_sender::<Mapped>(context, Hook::Recvmsg6)
    } else {
        restore_sender::<Inet6>(context, Hook::Recvmsg6)
    }
}

/// See [`crate::getpeername4`].
#[inline(always)]
pub fn getpeername4(context: &SockAddrContext) -> i32 {
    restore_peer::<Inet4>(context, Hook::Getpeername4)
}

/// See [`crate::getpeername6`].
#[inline(always)]
pub fn getpeername6(context: &SockAddrContext) -> i32 {
    if is_mapped(context) {
        restore_peer::<Mapped>(context, Hook::Getpeername6)
    } else {
        restore_peer::<Inet6>(context, Hook::Getpeername6)
    }
}
