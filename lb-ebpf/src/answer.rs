//! Answers to a client in place of a backend: TCP reset, ICMP error, ICMP echo reply.

use aya_ebpf::{
    helpers::generated::{bpf_skb_change_tail, bpf_skb_load_bytes, bpf_skb_store_bytes},
    programs::TcContext,
};
use lb_common::{
    abi::{counter::Hook, frontend::TCP, settings::MAX_DEVICES},
    balance::Answer,
    packet::{
        IP_OFFSET, Packet,
        answer::{self, MAX_QUOTE_WORDS, Respond},
        checksum,
    },
};

use crate::{frame, maps, memory};

/// Turns the packet into the answer and sends it back to where the packet came from. Returns the
/// program's return code; `None` if the kernel refused to change the packet.
#[inline(never)]
pub fn send<F: Respond>(
    context: &TcContext,
    packet: &Packet<F>,
    hook: Hook,
    kind: Answer,
) -> Option<i32> {
    match kind {
        Answer::Reset => reset(context, packet)?,
        Answer::PortUnreachable => icmp_error(context, packet, F::PORT_UNREACHABLE, 0)?,
        Answer::ProtocolUnreachable => icmp_error(context, packet, F::PROTOCOL_UNREACHABLE, 0)?,
        Answer::TimeExceeded => icmp_error(context, packet, F::TIME_EXCEEDED, 0)?,
        Answer::Echo => echo(context, packet)?,
    }
    send_back(context, hook)
}

/// The same for a packet that is larger than the `mtu` of its route, in bytes.
#[inline(never)]
pub fn too_big<F: Respond>(
    context: &TcContext,
    packet: &Packet<F>,
    hook: Hook,
    mtu: u16,
) -> Option<i32> {
    icmp_error(context, packet, F::TOO_BIG, mtu)?;
    send_back(context, hook)
}

/// Sends the answer, which is in place of the packet, to where the packet came from.
#[inline(always)]
fn send_back(context: &TcContext, hook: Hook) -> Option<i32> {
    match hook {
        Hook::ToDevice => {}
        Hook::Loopback => return frame::receive_on(context, frame::LOOPBACK, [0; 6]),
        _ => return frame::send_back(context),
    }
    // SAFETY: the context is the kernel's.
    let ifindex = unsafe { (*context.skb.skb).ifindex };
    let mut index = 0;
    while index < MAX_DEVICES {
        let device = maps::DEVICES.get(index)?;
        if device.ifindex == ifindex {
            return frame::receive_on(context, ifindex, device.mac);
        }
        index += 1;
    }
    None
}

#[inline(never)]
fn reset<F: Respond>(context: &TcContext, packet: &Packet<F>) -> Option<()> {
    let mut numbers = [0u32; 2];
    load(context, packet.transport as u32 + 4, numbers.as_mut_ptr(), size_of_val(&numbers) as u32)?;
    let start = IP_OFFSET + size_of::<F::Header>();
    resize(context, start + answer::RESET_LENGTH as usize)?;
    write(context, start, &answer::reset(packet, numbers))?;
    write(context, IP_OFFSET, &answer::header(packet, TCP, answer::RESET_LENGTH))
}

#[inline(never)]
fn icmp_error<F: Respond>(
    context: &TcContext,
    packet: &Packet<F>,
    kind: (u8, u8),
    mtu: u16,
) -> Option<()> {
    let length = answer::quote_length(packet)?;
    let scratch = maps::QUOTE.get_ptr_mut(0)?;
    // SAFETY: the entry of this CPU, for this run.
    let quote = unsafe { &mut *scratch };
    memory::zero(quote);
    // The verifier must see that the length is not 0 (before 6.8 it learns nothing from a
    // comparison with 0) and that it fits. The compiler knows both already, and would drop the
    // check without the volatile read.
    // SAFETY: a local.
    let bounded = unsafe { core::ptr::read_volatile(&raw const length) } as u32;
    if bounded < size_of::<F::Header>() as u32 || bounded > (MAX_QUOTE_WORDS * 4) as u32 {
        return None;
    }
    load(context, IP_OFFSET as u32, quote.as_mut_ptr(), bounded)?;
    let icmp = answer::icmp_error(packet, kind, mtu, quote, length);
    let start = IP_OFFSET + size_of::<F::Header>() + size_of_val(&icmp);
    resize(context, start + bounded as usize)?;
    write(context, IP_OFFSET + size_of::<F::Header>(), &icmp)?;
    let total = size_of_val(&icmp) as u16 + length;
    write(context, IP_OFFSET, &answer::header(packet, F::ICMP, total))?;
    // SAFETY: the buffer holds `bounded` bytes.
    let result = unsafe {
        bpf_skb_store_bytes(
            context.skb.skb,
            start as u32,
            quote.as_ptr().cast(),
            bounded,
            RECOMPUTE_CHECKSUM,
        )
    };
    (result == 0).then_some(())
}

/// Turns an echo request into its reply: swaps the addresses and changes the type.
#[inline(never)]
fn echo<F: Respond>(context: &TcContext, packet: &Packet<F>) -> Option<()> {
    let to = packet.tuple().reversed();
    let at = IP_OFFSET + size_of::<F::Header>() - 2 * size_of::<F::Address>();
    frame::store(context, at, &[to.source, to.destination])?;
    let transport = packet.transport as u32;
    // Type, code and checksum.
    let mut start = [0u16; 2];
    load(context, transport, start.as_mut_ptr(), 4)?;
    let reply = [u16::from_ne_bytes([F::ECHO_REPLY, 0]), start[1]];
    let difference = checksum::difference(start[0].into(), reply[0].into());
    let sum = checksum::updated(start[1], difference);
    write(context, transport as usize, &[reply[0], sum])
}

/// BPF_F_RECOMPUTE_CSUM: updates the checksum that the device computed over the packet
/// (CHECKSUM_COMPLETE).
const RECOMPUTE_CHECKSUM: u64 = 1;

#[inline(always)]
fn load<T>(context: &TcContext, offset: u32, to: *mut T, length: u32) -> Option<()> {
    // SAFETY: the buffer holds `length` bytes.
    let result = unsafe { bpf_skb_load_bytes(context.skb.skb.cast(), offset, to.cast(), length) };
    (result == 0).then_some(())
}

#[inline(always)]
fn write<T>(context: &TcContext, offset: usize, value: &T) -> Option<()> {
    context.store(offset, value, RECOMPUTE_CHECKSUM).ok()
}

#[inline(always)]
fn resize(context: &TcContext, length: usize) -> Option<()> {
    // SAFETY: the context is the kernel's.
    let result = unsafe { bpf_skb_change_tail(context.skb.skb, length as u32, 0) };
    (result == 0).then_some(())
}
