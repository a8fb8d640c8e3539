//! The tc programs: parse a packet, ask the core for the verdict, apply it.

use aya_ebpf::{
    bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC},
    programs::TcContext,
};
use lb_common::{
    abi::{
        address::{Family, Ipv4, Ipv6},
        counter::{Hook, Reason},
        flow::{Action, LOOPBACK_DEVICE, Tuple},
        settings::{MAX_DEVICES, Settings},
    },
    balance::{self, Candidate, Site, Verdict, Work},
    packet::{
        ETHERTYPE_IPV4, ETHERTYPE_IPV6, Packet, PacketKind, answer::Respond, quote::ParseQuote,
        tunnel::Tunnel,
    },
};

use crate::{
    answer,
    count::{count, count_service},
    fragment,
    frame::{
        self, LOOPBACK, Linear, prepend_ethernet, pull, receive_on, send_back, send_on, window,
    },
    icmp_error, maps, rewrite,
    rewrite::Rewrite,
    route,
    route::RouteLookup,
    scratch::{Fate, Route, Ruling, Scratch},
    tables,
    tables::FamilyMaps,
    tunnel,
};

/// The `tc_index` of packets of clients of this node that a program has translated. They may come by
/// another one: the device that they leave by has a program too, it may be a port of another device that
/// has one, and while tcx takes the place of clsact there are two at a hook. The kernel uses the field in
/// two queueing disciplines alone.
const SENT: u16 = 0x4c42;

/// Whether a program has translated the packet before.
#[inline(always)]
fn is_sent(context: &TcContext) -> bool {
    // SAFETY: the context is the kernel's.
    unsafe { (*context.skb.skb).tc_index == u32::from(SENT) }
}

/// The next program of the hook gets the packet, and after the last one the stack.
const NEXT: i32 = TC_ACT_UNSPEC;
const DROP: i32 = TC_ACT_SHOT;

/// Handles a packet at `hook`, of a device whose frames have an `ETHERNET` header or none.
#[inline(always)]
pub fn handle<const HOOK: u32, const ETHERNET: bool>(context: &TcContext) -> i32 {
    let hook = const { hook::<HOOK>() };
    let Some(settings) = tables::settings() else {
        count(hook, Reason::TableInconsistent);
        return NEXT;
    };
    // SAFETY: the context is the kernel's.
    let skb = unsafe { &*context.skb.skb };
    // The kernel keeps a VLAN tag beside the packet. A tagged packet also passes the device of its
    // VLAN, where it is handled.
    if skb.vlan_present != 0 && skb.vlan_tci & 0xfff != 0 {
        count(hook, Reason::NotIp);
        return NEXT;
    }
    let protocol = skb.protocol as u16;
    match u16::from_be(protocol) {
        ETHERTYPE_IPV4 => family::<Ipv4, HOOK, ETHERNET>(context, settings),
        ETHERTYPE_IPV6 => family::<Ipv6, HOOK, ETHERNET>(context, settings),
        _ => {
            count(hook, Reason::NotIp);
            NEXT
        }
    }
}

/// The hook with this number. All programs are one function with the hook as a constant.
const fn hook<const HOOK: u32>() -> Hook {
    Hook::ALL[HOOK as usize]
}

/// The program for packets of one family: finds out whether a packet can be for it.
#[inline(always)]
fn family<
    F: FamilyMaps + ParseQuote + Rewrite + RouteLookup,
    const HOOK: u32,
    const ETHERNET: bool,
>(
    context: &TcContext,
    settings: &Settings,
) -> i32 {
    let hook = const { hook::<HOOK>() };
    let window = window::<F, ETHERNET>(context);
    let Some(destination) = F::destination(&window) else {
        count(hook, Reason::Malformed);
        return NEXT;
    };
    let site = site(context, hook);
    if matches!(hook, Hook::FromPod) && is_sent(context) {
        count(hook, Reason::NotService);
        return NEXT;
    }
    if matches!(hook, Hook::FromPod)
        && settings.accepts_tunnels()
        && F::is_tunnel(&window)
        && balance::tunnel::is_forged::<F, _>(&destination, &mut tables::Maps)
    {
        count(hook, Reason::UnaskedTunnel);
        return DROP;
    }
    let mut candidate = balance::candidate::<F>(destination, site, settings);
    if matches!(candidate, Candidate::NotService)
        && const { has_clients::<HOOK>() }
        && balance::may_be_direct(site, F::may_begin(&window), tables::has_direct())
    {
        candidate = Candidate::Direct;
    }
    if matches!(candidate, Candidate::NotService) {
        count(hook, Reason::NotService);
        return NEXT;
    }
    if matches!(hook, Hook::FromDevice) && is_for_another_host(context) {
        count(hook, Reason::NotService);
        return NEXT;
    }
    if const { ETHERNET || may_leave::<HOOK>() } {
        return judge::<F, HOOK, ETHERNET>(context, settings, window, candidate);
    }
    if prepend_ethernet(context).is_none() {
        count(hook, Reason::RewriteFailed);
        return NEXT;
    }
    judge::<F, HOOK, true>(context, settings, frame::window::<F, true>(context), candidate)
}

/// The rest of the program: asks for the verdict and applies it.
#[inline(always)]
fn judge<
    F: FamilyMaps + ParseQuote + Rewrite + RouteLookup,
    const HOOK: u32,
    const ETHERNET: bool,
>(
    context: &TcContext,
    settings: &Settings,
    mut window: Linear<ETHERNET>,
    mut candidate: Candidate,
) -> i32 {
    let hook = const { hook::<HOOK>() };
    let site = site(context, hook);
    let Some(scratch) = F::scratch() else {
        count(hook, Reason::TableInconsistent);
        return NEXT;
    };
    // SAFETY: this CPU's entry, for this run alone.
    let scratch = unsafe { &mut *scratch };
    scratch.packet.encap_len = 0;
    if const { may_be_encapsulated::<HOOK>() }
        && settings.accepts_tunnels()
        && F::is_tunnel(&window)
    {
        window = pull(context);
        scratch.packet.encap_len = tunnel::outer_length::<F, ETHERNET>(&window, settings);
        if scratch.packet.encap_len != 0 {
            candidate = Candidate::Service;
        }
    }
    // Towards pods a candidate excludes more code than it repeats.
    if !matches!(hook, Hook::ToPod) {
        candidate = scratch.store_candidate(candidate);
    }
    window.start += encap_len::<F, HOOK>(&scratch.packet);
    if F::parse(&window, &mut scratch.packet).is_none() {
        count(hook, Reason::Malformed);
        return NEXT;
    }
    if const { may_be_encapsulated::<HOOK>() }
        && let Some((result, reason)) = report_mtu(context, settings, scratch)
    {
        count(hook, reason);
        return result;
    }
    if matches!(hook, Hook::ToDevice) && balance::is_of_a_guest(&scratch.packet, site, settings) {
        count(hook, Reason::NotService);
        return NEXT;
    }
    let is_fragment = matches!(scratch.packet.kind, PacketKind::Fragment);
    let verdict = if is_fragment || scratch.packet.is_icmp_error() {
        let candidate = scratch.store_candidate(candidate);
        decide_portless::<F, HOOK, ETHERNET>(context, settings, scratch, candidate)
    } else {
        let (packet, work) = (&scratch.packet, &mut scratch.work);
        balance::decide(candidate, packet, site, settings, work, &mut tables::Maps)
    };
    let mut ruling = Ruling::store(&mut scratch.ruling, verdict);
    if const { may_leave::<HOOK>() } && matches!(ruling.fate, Fate::Pass) {
        let candidate = scratch.store_candidate(candidate);
        let (packet, work) = (&scratch.packet, &mut scratch.work);
        let reason = ruling.reason;
        let tables = &mut tables::Maps;
        let verdict = balance::passed(candidate, packet, site, settings, reason, work, tables);
        ruling = Ruling::store(&mut scratch.ruling, verdict);
    }
    if const { may_be_encapsulated::<HOOK>() }
        && scratch.packet.encap_len != 0
        && matches!(ruling.fate, Fate::Pass | Fate::Answer)
    {
        let (packet, work) = (&scratch.packet, &mut scratch.work);
        let is_undeliverable =
            balance::tunnel::is_undeliverable(packet, settings, work, &mut tables::Maps);
        ruling.fate = if is_undeliverable { Fate::Drop } else { Fate::Pass };
    }
    let (result, reason) = apply::<F, HOOK, ETHERNET>(context, scratch, ruling);
    count(hook, reason);
    count_service(scratch.work.out.index, reason, context.len());
    #[cfg(feature = "log")]
    aya_log_ebpf::debug!(context, "hook {} reason {}", hook as u32, reason as u32);
    result
}

/// Whether a frame has the MAC address of another host: the device is promiscuous, and the stack
/// drops the frame.
#[inline(always)]
fn is_for_another_host(context: &TcContext) -> bool {
    const PACKET_OTHERHOST: u32 = 3;
    // SAFETY: the context is the kernel's.
    unsafe { (*context.skb.skb).pkt_type == PACKET_OTHERHOST }
}

/// Sends a client an ICMP error about the MTU of the path between two nodes, if `packet` is a
/// router's error about a packet that this node encapsulated for the client's flow.
#[inline(always)]
fn report_mtu<F: FamilyMaps + ParseQuote + Tunnel>(
    context: &TcContext,
    settings: &Settings,
    scratch: &mut Scratch<F>,
) -> Option<(i32, Reason)> {
    let Scratch { packet, work, .. } = scratch;
    if !packet.is_icmp_error() {
        return None;
    }
    let mtu = tunnel::reported_mtu(context, settings, packet);
    if mtu == 0 {
        return None;
    }
    if tunnel::decapsulate_quote(context, packet).is_none() {
        return Some((DROP, Reason::RewriteFailed));
    }
    if !balance::tunnel::is_encapsulated_flow(packet, work, &mut tables::Maps) {
        return Some((DROP, Reason::IcmpError));
    }
    let reported = answer::too_big(context, packet, Hook::FromDevice, mtu);
    Some(reported.map_or((DROP, Reason::RewriteFailed), |result| (result, Reason::TooBig)))
}

/// Whether clients of this node send packets by the hook.
const fn has_clients<const HOOK: u32>() -> bool {
    matches!(hook::<HOOK>(), Hook::FromPod | Hook::ToDevice | Hook::Loopback)
}

/// Whether packets at the hook are past the stack.
const fn may_leave<const HOOK: u32>() -> bool {
    matches!(hook::<HOOK>(), Hook::ToDevice | Hook::ToPod | Hook::Loopback)
}

/// Whether the hook may receive encapsulated packets.
const fn may_be_encapsulated<const HOOK: u32>() -> bool {
    matches!(hook::<HOOK>(), Hook::FromDevice)
}

/// Length of the outer IP header if the packet is encapsulated, else 0.
#[inline(always)]
fn encap_len<F: Family, const HOOK: u32>(packet: &Packet<F>) -> usize {
    if const { may_be_encapsulated::<HOOK>() } { tunnel::encap_len(packet) } else { 0 }
}

/// ICMP errors and later fragments have no ports but may belong to a flow.
#[inline(never)]
fn decide_portless<F: FamilyMaps + ParseQuote, const HOOK: u32, const ETHERNET: bool>(
    context: &TcContext,
    settings: &Settings,
    scratch: &mut Scratch<F>,
    candidate: Candidate,
) -> Verdict {
    let site = site(context, const { hook::<HOOK>() });
    let (packet, work) = (&scratch.packet, &mut scratch.work);
    let tables = &mut tables::Maps;
    if matches!(packet.kind, PacketKind::Fragment) {
        return balance::fragment::decide(candidate, packet, site, settings, work, tables);
    }
    let behind = encap_len::<F, HOOK>(packet);
    let is_quoted = icmp_error::read::<F, ETHERNET>(context, packet, behind, work).is_some();
    balance::icmp_error::decide(candidate, packet, is_quoted, site, settings, work, tables)
}

#[inline(always)]
fn site(context: &TcContext, hook: Hook) -> Site {
    match hook {
        Hook::FromPod => Site::FromPod,
        Hook::ToPod => Site::ToPod,
        Hook::FromDevice => Site::FromDevice,
        Hook::Loopback => Site::Loopback,
        _ => {
            // SAFETY: the context is the kernel's. Volatile, because the compiler would load one of two
            // fields by a computed pointer, which the verifier refuses.
            let [ifindex, ingress] = unsafe {
                let skb = context.skb.skb;
                [&raw const (*skb).ifindex, &raw const (*skb).ingress_ifindex]
                    .map(|field| field.read_volatile())
            };
            // It is not a client's any more, nor does it return to the router that sent it: its
            // destination is a backend's, which may also be an external address of a Service.
            let ingress = if is_sent(context) { LOOPBACK } else { ingress };
            Site::ToDevice { ifindex, ingress }
        }
    }
}

/// Applies the verdict. Returns the program's return code and the reason to count.
#[inline(always)]
fn apply<F: FamilyMaps + Rewrite + RouteLookup, const HOOK: u32, const ETHERNET: bool>(
    context: &TcContext,
    scratch: &mut Scratch<F>,
    Ruling { fate, answer, reason }: Ruling,
) -> (i32, Reason) {
    let hook = const { hook::<HOOK>() };
    let Scratch { packet, work, route, .. } = scratch;
    let is_changed = matches!(fate, Fate::Answer | Fate::Translate);
    if !ETHERNET && is_changed && prepend_ethernet(context).is_none() {
        return (DROP, Reason::RewriteFailed);
    }
    match fate {
        Fate::Pass => (NEXT, reason),
        Fate::Drop => (DROP, reason),
        Fate::Answer => match answer::send(context, packet, hook, answer) {
            Some(result) => (result, reason),
            None => (DROP, Reason::RewriteFailed),
        },
        Fate::Translate => {
            let action = work.out.action;
            let encapsulates = const { may_be_encapsulated::<HOOK>() } && action.is_one_way();
            let added = if encapsulates { F::LENGTH } else { 0 };
            let remembers = const { remembers::<HOOK>() } && action.is_forward();
            let has_route = if remembers && route::remembered(context, packet, work, added, route) {
                Ok(())
            } else if action.is_forward() || action == Action::REQUEST_ROUTE {
                route::find(context, packet, &work.out.rewrite, added, route)
            } else {
                Ok(())
            };
            if let Err(reason) = has_route {
                if !matches!(reason, Reason::NoRoute) || !is_from_this_node(action) {
                    return not_routed(context, packet, hook, reason, route.mtu);
                }
                // The kernel has routes that it does not tell programs of. With an address of this
                // node as its source, a packet may come in by lo, and the stack forwards it.
                work.out.action = Action::REQUEST_LOOPBACK;
            }
            let action = work.out.action;
            if packet.is_first_fragment != 0 {
                balance::fragment::remember(packet, work, &mut tables::Maps);
            }
            let changed = if encapsulates {
                encapsulate::<F>(context, &work.out.rewrite)
            } else {
                translate::<F, HOOK>(context, packet, work)
            };
            if changed.is_none() {
                return (DROP, Reason::RewriteFailed);
            }
            if const { has_clients::<HOOK>() } {
                // SAFETY: the context is the kernel's.
                unsafe { (*context.skb.skb).tc_index = u32::from(SENT) };
            }
            match deliver::<F, HOOK>(context, packet, work, route, action) {
                // The device cannot send the header that was prepended.
                Ok(NEXT) if !ETHERNET => (send_on(context), reason),
                Ok(result) => (result, reason),
                Err(reason) => (DROP, reason),
            }
        }
    }
}

/// Whether a translated packet with this action has an address of this node as its source.
#[inline(always)]
fn is_from_this_node(action: Action) -> bool {
    action == Action::REQUEST_FORWARD || action == Action::REQUEST_ROUTE
}

/// A separate function, so that the verifier follows the code after the call once and not once for
/// each of its returns.
#[inline(never)]
fn encapsulate<F: Rewrite>(context: &TcContext, ends: &Tuple<F::Address>) -> Option<()> {
    tunnel::encapsulate::<F>(context, ends)
}

/// Translates a packet, and decrements its TTL if the program forwards it.
#[inline(always)]
fn translate<F: Rewrite, const HOOK: u32>(
    context: &TcContext,
    packet: &Packet<F>,
    work: &Work<F::Address>,
) -> Option<()> {
    if const { may_be_encapsulated::<HOOK>() } && packet.encap_len != 0 {
        tunnel::decapsulate::<F>(context)?;
    }
    let rewrite = &work.out.rewrite;
    match packet.kind {
        PacketKind::Icmp => icmp_error::apply(context, packet, work)?,
        PacketKind::Fragment => fragment::apply(context, packet, rewrite)?,
        _ => rewrite::apply(context, packet, rewrite)?,
    }
    if const { matches!(hook::<HOOK>(), Hook::ToDevice) }
        && work.out.action == Action::REPLY_DIRECT
        && packet.is_syn_ack()
    {
        tunnel::clamp(context, packet);
    }
    if work.out.action.is_forward() { F::decrement_ttl(context) } else { Some(()) }
}

/// Whether flows at this hook are usually forwarded by the program, so that their next hop is
/// remembered.
const fn remembers<const HOOK: u32>() -> bool {
    matches!(hook::<HOOK>(), Hook::FromPod | Hook::FromDevice | Hook::Loopback)
}

/// The result for a packet without a usable route. The sender of a packet larger than the MTU gets
/// an ICMP error, with or without "don't fragment": the program cannot fragment, but the sender can
/// once it knows the MTU. No ICMP error is sent about an ICMP error or a fragment without ports
/// (RFC 1122 section 3.2.2).
#[inline(always)]
fn not_routed<F: Respond>(
    context: &TcContext,
    packet: &Packet<F>,
    hook: Hook,
    reason: Reason,
    mtu: u16,
) -> (i32, Reason) {
    let is_reported = matches!(reason, Reason::TooBig)
        && matches!(packet.kind, PacketKind::Tcp | PacketKind::Udp)
        && mtu != 0;
    if !is_reported {
        return (DROP, reason);
    }
    match answer::too_big(context, packet, hook, mtu) {
        Some(result) => (result, reason),
        None => (DROP, Reason::RewriteFailed),
    }
}

/// Sends a translated packet on as its action says.
#[inline(always)]
fn deliver<F: FamilyMaps, const HOOK: u32>(
    context: &TcContext,
    packet: &Packet<F>,
    work: &mut Work<F::Address>,
    route: &Route,
    action: Action,
) -> Result<i32, Reason> {
    let device = work.out.device;
    match action {
        Action::REQUEST_HAIRPIN | Action::REPLY_HAIRPIN => {
            send_back(context).ok_or(Reason::RewriteFailed)
        }
        Action::REQUEST_FORWARD | Action::REPLY_FORWARD | Action::REQUEST_TUNNEL => {
            let remembers = const { remembers::<HOOK>() };
            route::forward(context, packet, work, route, remembers).ok_or(Reason::RewriteFailed)
        }
        Action::REQUEST_ROUTE => Ok(route::send(route)),
        Action::REQUEST_LOOPBACK => {
            receive_on(context, LOOPBACK, [0; 6]).ok_or(Reason::RewriteFailed)
        }
        Action::REPLY_INTO_DEVICE => {
            if device == LOOPBACK_DEVICE {
                return receive_on(context, LOOPBACK, [0; 6]).ok_or(Reason::RewriteFailed);
            }
            let Some(device) = maps::DEVICES.get(device & (MAX_DEVICES - 1)) else {
                return Err(Reason::TableInconsistent);
            };
            // SAFETY: the context is the kernel's.
            if device.ifindex == unsafe { (*context.skb.skb).ifindex } {
                return Ok(NEXT);
            }
            receive_on(context, device.ifindex, device.mac).ok_or(Reason::RewriteFailed)
        }
        _ => Ok(NEXT),
    }
}
