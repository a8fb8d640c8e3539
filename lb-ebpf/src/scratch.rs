//! The working memory of a program, in a map because its stack is small.

use lb_common::{
    abi::{address::Family, counter::Reason},
    balance::{Answer, Candidate, Verdict, Work},
    packet::Packet,
};

/// The working memory of a program.
#[repr(C)]
pub struct Scratch<F: Family> {
    /// The packet as it arrived.
    pub packet: Packet<F>,
    /// The memory of the decision, and its result.
    pub work: Work<F::Address>,
    /// The route, if the program looks it up.
    pub route: Route,
    /// The verdict.
    pub ruling: Ruling,
    /// What the packet may be.
    pub candidate: Candidate,
}

impl<F: Family> Scratch<F> {
    /// Stores a candidate and reads it back, for the same reason as a [`Ruling`]: the verifier follows
    /// the decision once and not once for each candidate.
    #[inline(always)]
    pub fn store_candidate(&mut self, candidate: Candidate) -> Candidate {
        self.candidate = candidate;
        // SAFETY: a reference, which was just written.
        unsafe { core::ptr::read_volatile(&raw const self.candidate) }
    }
}

/// The result of a route look-up.
#[repr(C)]
pub struct Route {
    /// The kernel's index of the egress device.
    pub ifindex: u32,
    /// 1: the packet's flow remembered the route; 0: the kernel has just looked it up.
    pub is_remembered: u16,
    /// The MTU of the route in bytes. After a failed look-up: the MTU if the packet is larger, 0 if
    /// it is not known.
    pub mtu: u16,
    /// The MACs of the next hop and of the device, if they are known, as a frame starts: in words,
    /// because the compiler copies bytes one by one.
    pub macs: [u32; 3],
    /// [`Device::flags`](lb_common::abi::settings::Device::flags) of the device, if the route is
    /// remembered.
    pub flags: u16,
    /// 1: `macs` are known.
    pub has_neighbour: u16,
}

/// A [`Verdict`] in parts, stored in a map. The verifier knows no value of what it reads back from
/// there, so it follows the code after the decision once and not once for each verdict.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Ruling {
    /// The kind of verdict.
    pub fate: Fate,
    /// The answer, if the kind is [`Fate::Answer`].
    pub answer: Answer,
    /// The reason to count.
    pub reason: Reason,
}

/// The kind of a [`Verdict`].
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
    /// Stores a verdict at `place` and reads it back.
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
