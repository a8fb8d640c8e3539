//! The XDP program: handles packets of known flows that it can send on itself, and leaves every
//! other packet, unchanged, to tc.
//!
//! It decides as tc does, over the same tables.

use aya_ebpf::{
    bindings::xdp_action::{XDP_DROP, XDP_PASS, XDP_REDIRECT, XDP_TX},
    helpers::bpf_redirect,
    programs::XdpContext,
};
use lb_common::{
    abi::{
        address::{Ipv4, Ipv6},
        counter::{Hook, Reason},
        flow::{Action, Tuple},
        settings::{Device, MAX_DEVICES, Settings},
        traffic::DIRECT,
    },
    balance::{self, Candidate, Site, Verdict},
    packet::{ETHERTYPE_IPV4, ETHERTYPE_IPV6, IP_OFFSET, Packet, Window, ethertype},
};

use crate::{
    count::{count, count_service},
    frame::{self, Linear},
    maps,
    rewrite::{self, Rewrite},
    route::{self, Received},
    scratch::{Route, Scratch},
    tables,
    tables::FamilyMaps,
    tunnel,
};

/// Handles a frame that an external device received.
#[inline(always)]
pub fn handle(context: &XdpContext) -> u32 {
    let Some(settings) = tables::settings() else {
        count(Hook::Xdp, Reason::TableInconsistent);
        return XDP_PASS;
    };
    let window = Linear::<true>::of(context);
    match ethertype(&window) {
        Some(ETHERTYPE_IPV4) => family::<Ipv4>(context, settings),
        Some(ETHERTYPE_IPV6) => family::<Ipv6>(context, settings),
        _ => {
            count(Hook::Xdp, Reason::NotIp);
            XDP_PASS
        }
    }
}

/// The program for frames of one family.
#[inline(always)]
fn family<F: FamilyMaps + Rewrite>(context: &XdpContext, settings: &Settings) -> u32 {
    let (action, reason) = judge::<F>(context, settings);
    count(Hook::Xdp, reason);
    action
}

#[inline(always)]
fn judge<F: FamilyMaps + Rewrite>(context: &XdpContext, settings: &Settings) -> (u32, Reason) {
    let mut window = Linear::<true>::of(context);
    let Some(destination) = F::destination(&window) else {
        return (XDP_PASS, Reason::Malformed);
    };
    let mut candidate = balance::candidate::<F>(destination, Site::FromDevice, settings);
    if matches!(candidate, Candidate::NotService) {
        return (XDP_PASS, Reason::NotService);
    }
    let Some(scratch) = F::scratch() else {
        return (XDP_PASS, Reason::TableInconsistent);
    };
    // SAFETY: this CPU's entry, for this run alone.
    let scratch = unsafe { &mut *scratch };
    scratch.packet.encap_len = 0;
    if settings.accepts_tunnels() && F::is_tunnel(&window) {
        scratch.packet.encap_len = tunnel::outer_length::<F, true>(&window, settings);
        if scratch.packet.encap_len != 0 {
            candidate = Candidate::Service;
        }
    }
    window.start += tunnel::encap_len(&scratch.packet);
    if F::parse(&window, &mut scratch.packet).is_none() {
        return (XDP_PASS, Reason::Malformed);
    }
    let packet = &scratch.packet;
    let work = &mut scratch.work;
    match balance::decide_known(candidate, packet, settings, work, &mut tables::Maps) {
        Some(Verdict::Pass(reason)) => (XDP_PASS, reason),
        // tc sees whom the frame is for.
        Some(Verdict::Drop(_) | Verdict::Translate(_)) if is_for_another_host(context) => {
            (XDP_PASS, Reason::LeftToTc)
        }
        Some(Verdict::Drop(reason)) => (XDP_DROP, reason),
        Some(Verdict::Translate(reason)) => {
            let length = context.ip_length::<F>(packet).unwrap_or(0) as u32 + IP_OFFSET as u32;
            let (action, reason) = translate(context, scratch, reason);
            count_service(scratch.work.out.index, reason, length);
            (action, reason)
        }
        Some(Verdict::Answer(..)) | None => (XDP_PASS, Reason::LeftToTc),
    }
}

/// Whether a frame has another MAC address than the external device that received it. The device of
/// a bond, which is not in DEVICES itself, accepts every frame.
#[inline(always)]
fn is_for_another_host(context: &XdpContext) -> bool {
    let window = Linear::<true>::of(context);
    let Some([first, second, third]) = window.load::<[u16; 3]>(0) else { return true };
    let mut index = 0;
    while index < MAX_DEVICES {
        let Some(device) = maps::DEVICES.get(index) else { return false };
        if device.ifindex == context.ifindex() {
            let own: [u16; 3] = bytemuck::cast(device.mac);
            return first != own[0] || second != own[1] || third != own[2];
        }
        index += 1;
    }
    false
}

/// Translates a packet that goes on to the stack of this node or out of a device; leaves any other
/// to tc.
#[inline(always)]
fn translate<F: FamilyMaps + Rewrite>(
    context: &XdpContext,
    scratch: &mut Scratch<F>,
    reason: Reason,
) -> (u32, Reason) {
    let Scratch { packet, work, route, .. } = scratch;
    let (new, action) = (&work.out.rewrite, work.out.action);
    let done = match action {
        // Behind XDP it would be an answer of the Service's flow.
        _ if work.out.index == DIRECT => None,
        Action::REQUEST => Some(XDP_PASS),
        Action::REPLY_INTO_DEVICE => is_here(context, work.out.device).then_some(XDP_PASS),
        action if action.is_forward() => {
            let added = if action.is_one_way() { F::LENGTH } else { 0 };
            // The first packet of each second is left to tc, which looks up the route and uses the
            // kernel's neighbour entry, so that the entry stays alive.
            if route::remembered(context, packet, work, added, route) {
                exit(context, route)
            } else {
                None
            }
        }
        _ => None,
    };
    let Some(done) = done else { return (XDP_PASS, Reason::LeftToTc) };
    let mut changed = change(context, packet, new, action);
    if done != XDP_PASS {
        changed = changed.and_then(|()| frame::store(context, 0, &route.macs));
    }
    match changed {
        None => (XDP_DROP, Reason::RewriteFailed),
        Some(()) if done == XDP_REDIRECT => {
            // SAFETY: no preconditions.
            (unsafe { bpf_redirect(route.ifindex, 0) } as u32, reason)
        }
        Some(()) => (done, reason),
    }
}

/// Translates a frame, and decrements its TTL if the program forwards it.
#[inline(always)]
fn change<F: Rewrite>(
    context: &XdpContext,
    packet: &Packet<F>,
    new: &Tuple<F::Address>,
    action: Action,
) -> Option<()> {
    if action.is_one_way() {
        return tunnel::encapsulate::<F>(context, new);
    }
    if packet.encap_len != 0 {
        tunnel::decapsulate::<F>(context)?;
    }
    rewrite::apply(context, packet, new)?;
    if action.is_forward() { F::decrement_ttl(context) } else { Some(()) }
}

/// The XDP action that sends a frame out of the route's device; `None` if XDP cannot.
#[inline(always)]
fn exit(context: &XdpContext, route: &Route) -> Option<u32> {
    if route.flags & Device::XDP_REDIRECT != 0 {
        return Some(XDP_REDIRECT);
    }
    (route.ifindex == context.ifindex()).then_some(XDP_TX)
}

/// Whether the device with this index in DEVICES received the frame.
#[inline(always)]
fn is_here(context: &XdpContext, device: u32) -> bool {
    device < MAX_DEVICES
        && maps::DEVICES.get(device).is_some_and(|device| device.ifindex == context.ifindex())
}
