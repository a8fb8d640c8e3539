//! The decision on every packet and every connect(): a function of the packet, the
//! settings and the tables.
//!
//! It never writes to a packet. Hooks parse, call [`decide`] or [`socket::decide`] and
//! apply the verdict; they decide nothing themselves.

use crate::{
    abi::{
        address::{Address, Be16, Family},
        counter::Reason,
        flow::{Action, Flow, FlowKey, Tuple},
        settings::{FamilySettings, Settings},
    },
    packet::{Kind, Packet},
};

pub mod reply;
pub mod request;
pub mod select;
pub mod socket;
pub mod tables;
pub mod track;

pub use tables::{Entry, FlowTable, InsertError, Tables};

/// Where a packet was caught.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Site {
    /// It comes out of a pod.
    FromPod,
    /// It is about to go into a pod.
    ToPod,
    /// It comes in by an external device.
    FromDevice,
    /// It is about to leave by an external device.
    ToDevice {
        /// The kernel's index of that device.
        ifindex: u32,
        /// Whether it came in by another device; else a process of this node made it.
        forwarded: bool,
    },
    /// It goes from this node to itself.
    Loopback,
}

/// How a client is told that there is nothing to connect to (or, for an echo, that
/// there is).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// TCP RST.
    Reset,
    /// ICMP(v6) port unreachable.
    PortUnreachable,
    /// ICMP protocol unreachable; ICMPv6 has only port unreachable for it.
    ProtocolUnreachable,
    /// ICMP(v6) echo reply.
    Echo,
}

/// What becomes of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Goes on as it is.
    Pass(Reason),
    /// Ends here.
    Drop(Reason),
    /// Goes on with the addresses and ports of [`Work::rewrite`].
    Translate {
        /// Where it goes on.
        action: Action,
        /// Index into DEVICES, for [`Action::REPLY_INTO_DEVICE`].
        device: u32,
        /// Why.
        reason: Reason,
    },
    /// Ends here, and its sender is answered.
    Answer(Answer, Reason),
}

/// Room for what a decision works out. It is an argument so that the programs, whose
/// stack is small, can keep it in a map; nothing in it outlives a decision.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Work<A> {
    /// The addresses and ports that a translated packet goes on with.
    pub rewrite: Tuple<A>,
    pair_key: FlowKey<A>,
    flow: Flow<A>,
    pair: Flow<A>,
}

/// What every step of a decision needs beside the tables.
pub(crate) struct Context<'a, F: Family> {
    pub(crate) packet: &'a Packet<F>,
    pub(crate) settings: &'a Settings,
    pub(crate) site: Site,
    pub(crate) now: u32,
}

impl<F: Family> Context<'_, F> {
    #[inline(always)]
    pub(crate) fn family(&self) -> &FamilySettings<F::Address> {
        F::settings(self.settings)
    }
}

/// What a packet may be, as far as its destination tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Candidate {
    /// On its way to a Service.
    Request,
    /// On its way back to a client.
    Reply,
    /// Nothing of ours.
    Neither,
}

/// What a packet caught at `site` may be: all that is to be known of most packets, before
/// they are parsed any further.
#[inline(always)]
pub fn candidate<F: Family>(destination: F::Address, site: Site, settings: &Settings) -> Candidate {
    let family = F::settings(settings);
    match site {
        Site::ToPod => Candidate::Reply,
        Site::FromPod | Site::ToDevice { .. } if family.may_be_service(destination) => {
            Candidate::Request
        }
        Site::ToDevice { .. } => Candidate::Neither,
        _ if family.may_be_node(destination) => Candidate::Reply,
        _ => Candidate::Neither,
    }
}

/// Decides on a packet caught at `site`.
#[inline(always)]
pub fn decide<F: Family, T: Tables<F>>(
    packet: &Packet<F>,
    site: Site,
    settings: &Settings,
    work: &mut Work<F::Address>,
    tables: &mut T,
) -> Verdict {
    let candidate = candidate::<F>(packet.tuple().destination, site, settings);
    decide_candidate(candidate, packet, site, settings, work, tables)
}

/// Decides on a packet caught at `site` that is the `candidate` told by [`candidate`].
#[inline(always)]
pub fn decide_candidate<F: Family, T: Tables<F>>(
    candidate: Candidate,
    packet: &Packet<F>,
    site: Site,
    settings: &Settings,
    work: &mut Work<F::Address>,
    tables: &mut T,
) -> Verdict {
    let context = Context { packet, settings, site, now: tables.now() };
    match candidate {
        Candidate::Neither => Verdict::Pass(Reason::NotService),
        Candidate::Reply => reply::decide(&context, work, tables),
        Candidate::Request => {
            let verdict = match site {
                Site::ToDevice { forwarded: true, .. } => Verdict::Pass(Reason::UnknownAddress),
                _ => request::decide(&context, work, tables),
            };
            match (site, verdict) {
                (Site::ToDevice { .. }, Verdict::Pass(_))
                    if is_service_address(&context, tables) =>
                {
                    Verdict::Drop(Reason::UntranslatedLeaving)
                }
                _ => verdict,
            }
        }
    }
}

/// Whether the packet's destination is, or may become, a ClusterIP, so that it must
/// not leave the node untranslated.
#[inline(never)]
fn is_service_address<F: Family, T: Tables<F>>(context: &Context<F>, tables: &mut T) -> bool {
    let destination = context.packet.tuple().destination;
    context.family().is_in_service_cidr(destination)
        || tables.frontend(&crate::abi::frontend::FrontendKey::of_address(destination)).is_some()
}

/// Whether a packet carries what Services carry.
#[inline(always)]
pub(crate) fn is_balanced(kind: Kind) -> bool {
    matches!(kind, Kind::Tcp | Kind::Udp)
}

/// An address and port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Endpoint<A: Address> {
    /// The address, network byte order.
    pub address: A,
    /// The port, network byte order.
    pub port: Be16,
}
