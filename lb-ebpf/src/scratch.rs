//! What a program works with, kept in a map because its stack is small.

use lb_common::{
    abi::{address::Family, counter::Reason},
    balance::{Answer, Verdict, Work},
    packet::Packet,
};

/// What a tc program works with.
#[repr(C)]
pub struct Scratch<F: Family> {
    /// The packet as it came.
    pub packet: Packet<F>,
    /// What becomes of it.
    pub work: Work<F::Address>,
    /// Where it goes on, if it is sent by a route look-up.
    pub route: Route,
    /// What was decided.
    pub ruling: Ruling,
}

/// Where a route look-up leads.
#[repr(C)]
pub struct Route {
    /// The kernel's index of the device.
    pub ifindex: u32,
    /// 1: as the packet's flow remembers it; else the kernel has just told it.
    pub is_remembered: u16,
    /// What the way lets through, if the packet is too big for it.
    pub mtu: u16,
    /// The MAC of the next hop, and the device's, if they are known: as a frame begins, in words,
    /// since bytes are copied one by one.
    pub macs: [u32; 3],
    /// [`Device::flags`](lb_common::abi::settings::Device::flags) of the device, if remembered.
    pub flags: u16,
    /// 1: `macs` are known.
    pub has_neighbour: u16,
}

/// A [`Verdict`] in parts, to be kept in a map: what is read from there has no value that the
/// verifier knows, so that it goes once through what follows and not once for each verdict.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Ruling {
    /// What becomes of the packet.
    pub fate: Fate,
    /// The answer to it, if it gets one.
    pub answer: Answer,
    /// Why.
    pub reason: Reason,
}

/// What becomes of a packet, without any more.
#[derive(Clone, Copy)]
#[repr(u32)]
pub enum Fate {
    /// [`Verdict::Pass`].
    Pass,
    /// [`Verdict::Drop`].
    Drop,
    /// [`Verdict::Translate`].
    Translate,
    /// [`Verdict::Answer`].
    Answer,
}

impl Ruling {
    /// Keeps a verdict at `place` and reads it back.
    #[inline(always)]
    pub fn store(place: &mut Self, verdict: Verdict) -> Self {
        let (fate, answer, reason) = match verdict {
            Verdict::Pass(reason) => (Fate::Pass, Answer::Reset, reason),
            Verdict::Drop(reason) => (Fate::Drop, Answer::Reset, reason),
            Verdict::Translate(reason) => (Fate::Translate, Answer::Reset, reason),
            Verdict::Answer(answer, reason) => (Fate::Answer, answer, reason),
        };
        *place = Self { fate, answer, reason };
        // SAFETY: a reference, of which every part was just written.
        unsafe {
            Self {
                fate: core::ptr::read_volatile(&raw const place.fate),
                answer: core::ptr::read_volatile(&raw const place.answer),
                reason: core::ptr::read_volatile(&raw const place.reason),
            }
        }
    }
}
