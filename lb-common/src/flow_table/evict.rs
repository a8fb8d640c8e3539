//! Which flow of a full bucket makes room for a new one.

use crate::abi::{
    flow::{ANSWERED, CLIENT_FIN, CONFIRMED, MOVED, ONE_WAY, RESET, SERVER_FIN, STREAM},
    flow_table::RequestWord,
    settings::Lifetimes,
};

use super::{IS_UDP, age};

/// The flows that are evicted alike. A later class is evicted before an earlier one, and of one
/// class the flow that was idle longest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Class {
    /// A TCP connection that both ends have confirmed.
    Established,
    /// UDP with traffic both ways over more than two seconds.
    Stream,
    /// UDP that was answered.
    Answered,
    /// TCP that both ends have closed, or one has reset: its ports rest. UDP whose client has another
    /// flow by now.
    Closed,
    /// A TCP handshake that is not complete, or UDP that was not answered: anybody can forge these.
    Unanswered,
}

impl Class {
    /// All classes, by number.
    pub const ALL: [Self; 5] =
        [Self::Established, Self::Stream, Self::Answered, Self::Closed, Self::Unanswered];

    /// The name in metrics and in the output of `get flows`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Established => "established",
            Self::Stream => "stream",
            Self::Answered => "answered",
            Self::Closed => "closed",
            Self::Unanswered => "unanswered",
        }
    }
}

/// The class of a flow in `state`, which includes the protocol's bit.
pub const fn class(state: u8) -> Class {
    if state & IS_UDP != 0 {
        return match state {
            state if state & MOVED != 0 => Class::Closed,
            state if state & STREAM != 0 => Class::Stream,
            state if state & ANSWERED != 0 => Class::Answered,
            _ => Class::Unanswered,
        };
    }
    let both = CLIENT_FIN | SERVER_FIN;
    let is_over = state & RESET != 0 || state & both == both;
    match state & (CONFIRMED | ONE_WAY) {
        _ if is_over => Class::Closed,
        0 | ONE_WAY => Class::Unanswered,
        _ => Class::Established,
    }
}

/// How long an established connection must be idle before a new flow may take its place, in
/// seconds. Younger ones stay, and the new flow is not opened.
pub const PROTECTED: u32 = 60;

/// How readily the flow with this word is evicted: the number of its class in the upper byte, its
/// age below. An expired flow goes before every other, and before it a place that is free.
#[inline(always)]
pub fn rank(word: RequestWord, now: u32, lifetimes: &Lifetimes) -> u32 {
    let life = lifetimes.words[(word.0 & RequestWord::LIFE) as usize];
    let age = age(word.time(), now);
    let class = (life >> 24).wrapping_add(1) & 0xff;
    let class = if age > Lifetimes::ticks(life) { EXPIRED } else { class };
    (class << 24) | age
}

/// In [`Lifetimes`], of a place without a flow: it is taken first.
pub const FREE: u32 = 0xfeff_ffff;
/// In [`Lifetimes`], of a place that a program has claimed: it is never taken.
pub const NEVER: u32 = 0xffff_ffff;

/// The class in a rank, as a number: a later one is evicted first.
#[inline(always)]
pub(super) const fn class_of(rank: u32) -> u32 {
    rank >> 24
}

/// Whether a rank is that of a place with a flow that has not expired.
#[inline(always)]
pub(super) const fn has_flow_to_keep(rank: u32) -> bool {
    class_of(rank) < EXPIRED
}

const EXPIRED: u32 = Class::ALL.len() as u32 + 1;

/// The least rank of a flow that a new one may evict.
#[inline(always)]
pub(super) const fn least_rank(protected: u32) -> u32 {
    ((Class::Established as u32 + 1) << 24) + protected
}
