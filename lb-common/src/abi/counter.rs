//! COUNTERS: how often each program ended for which reason. Per CPU; every exit of every program
//! counts exactly one entry.

/// Declares an enum whose variants are numbered from 0 and have a snake_case name.
macro_rules! numbered {
    ($(#[$meta:meta])* $name:ident { $($(#[$doc:meta])* $variant:ident => $text:literal,)+ }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u32)]
        pub enum $name { $($(#[$doc])* $variant,)+ }

        impl $name {
            /// All of them, in the order of their numbers.
            pub const ALL: &[Self] = &[$(Self::$variant),+];

            /// The name that metrics and tools show.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $text,)+ }
            }
        }
    };
}

numbered! {
    /// Where a program is attached.
    Hook {
        /// tc ingress on the host side of a pod's interface.
        FromPod => "from_pod",
        /// tc egress on the host side of a pod's interface.
        ToPod => "to_pod",
        /// tc ingress of an external device.
        FromDevice => "from_device",
        /// tc egress of an external device.
        ToDevice => "to_device",
        /// tc egress of the loopback device.
        Loopback => "loopback",
        /// connect() of an IPv4 socket.
        Connect4 => "connect4",
        /// connect() of an IPv6 socket.
        Connect6 => "connect6",
        /// sendmsg() on an unconnected IPv4 datagram socket.
        Sendmsg4 => "sendmsg4",
        /// sendmsg() on an unconnected IPv6 datagram socket.
        Sendmsg6 => "sendmsg6",
        /// recvmsg() of an IPv4 datagram.
        Recvmsg4 => "recvmsg4",
        /// recvmsg() of an IPv6 datagram.
        Recvmsg6 => "recvmsg6",
        /// getpeername() on an IPv4 socket.
        Getpeername4 => "getpeername4",
        /// getpeername() on an IPv6 socket.
        Getpeername6 => "getpeername6",
        /// XDP of an external device, before tc.
        Xdp => "xdp_device",
    }
}

/// Declares [`Class`] from its table: variant, name, meaning. The meaning is the variant's
/// documentation too.
macro_rules! classes {
    ($(#[$meta:meta])* $($variant:ident $name:literal: $meaning:literal;)+) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Class { $(#[doc = $meaning] $variant,)+ }

        impl Class {
            /// All classes, in the order in which `docs/get.md` shows them.
            pub const ALL: &[Self] = &[$(Self::$variant),+];

            /// The name that `docs/get.md` and the help of the metric show.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)+ }
            }

            /// What becomes of the packet or call: a phrase for operators.
            pub const fn meaning(self) -> &'static str {
                match self { $(Self::$variant => $meaning,)+ }
            }
        }
    };
}

classes! {
    /// What becomes of a packet or call that is counted for a [`Reason`].
    Passed "passed":
        "left as it is: the kernel, or the next program, handles it";
    Translated "translated":
        "gets other addresses, and goes on to a backend or back to its client";
    Answered "answered":
        "answered in the Service's name";
    Refused "refused":
        "goes no further, and its sender gets an error: a TCP reset, an ICMP error, or a call that fails";
    Dropped "dropped":
        "dropped without an answer";
    Alarm "alarm":
        "dropped, and never counted in a healthy cluster: a map is full or inconsistent, the node has no address of the family, or the kernel refused a change";
}

/// Declares [`Reason`] from its table: number, variant, name, class, meaning. The meaning is the
/// variant's documentation too.
macro_rules! reasons {
    ($(#[$meta:meta])* $($number:literal $variant:ident $name:literal $class:ident: $meaning:literal;)+) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u32)]
        pub enum Reason { $(#[doc = $meaning] $variant = $number,)+ }

        impl Reason {
            /// All of them, in the order of their numbers.
            pub const ALL: &[Self] = &[$(Self::$variant),+];

            /// The name that metrics and tools show.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)+ }
            }

            /// What becomes of the packet or call.
            #[inline(always)]
            pub const fn class(self) -> Class {
                match self { $(Self::$variant => Class::$class,)+ }
            }

            /// When this is counted and what happens then: a phrase for operators, which `explain`,
            /// the help of the metric and `docs/get.md` show.
            pub const fn meaning(self) -> &'static str {
                match self { $(Self::$variant => $meaning,)+ }
            }
        }
    };
}

reasons! {
    /// Why a program ended as it did.
    ///
    /// The table is append-only. COUNTERS and DROPS are pinned under the version of the layout
    /// and indexed by the number, so a number keeps its meaning as long as
    /// [`ABI_VERSION`](super::ABI_VERSION) stays the same. A new reason takes the next free number
    /// and needs no new version; a renumbered or removed one does. The golden file of the layout
    /// (`tests/golden/layout.txt`) tells the two apart.
    ///
    /// These follow from a row: the verdict of a packet that opens no flow, what DROPS counts
    /// ([`Class`], but for `OF_NO_SERVICE_PORT`), the text of `explain`, the help of the metric,
    /// and the table in `docs/get.md`. The errno of a refused connect() does not.
    0 NotService "not_service" Passed:
        "neither addressed to a Service nor a reply of one: untouched";
    1 LeftToTc "left_to_tc" Passed:
        "XDP leaves the packet, untouched, to tc, which counts it again";
    2 NotIp "not_ip" Passed:
        "neither IPv4 nor IPv6, or of a tagged VLAN: untouched";
    3 Malformed "malformed" Passed:
        "a header is truncated or contradicts itself: untouched";
    4 NoFlow "no_flow" Passed:
        "belongs to no known flow and cannot open one here: untouched";
    5 FlowCreated "flow_created" Translated:
        "the first packet of a new flow: translated to the backend that was chosen";
    6 Request "request" Translated:
        "a packet of a known flow, from its client: translated";
    7 Reply "reply" Translated:
        "a packet of a known flow, from its backend: translated";
    8 SocketTranslated "socket_translated" Translated:
        "a call of a socket: its address is translated, so that its packets need no translation";
    9 SocketExempt "socket_exempt" Passed:
        "a call of a socket that is not translated at connect time: its packets are";
    10 EchoAnswered "echo_answered" Answered:
        "an ICMP echo request to a ClusterIP whose Service has an endpoint: answered";
    11 NoEndpoint "no_endpoint" Refused:
        "the Service has no endpoint that serves: refused";
    12 NoSuchPort "no_such_port" Refused:
        "the Service has no such port: refused";
    13 NoSuchProtocol "no_such_protocol" Refused:
        "a protocol that Services do not carry, to a ClusterIP: refused";
    14 NoLocalEndpoint "no_local_endpoint" Dropped:
        "the traffic policy is Local and no endpoint of this node serves: dropped (connect() is refused)";
    15 SourceNotAllowed "source_not_allowed" Dropped:
        "the client is not in `loadBalancerSourceRanges`: dropped (connect() is denied)";
    16 UnknownAddress "unknown_address" Passed:
        "no Service has this address: untouched";
    17 UntranslatedLeaving "untranslated_leaving" Dropped:
        "would leave the node untranslated although it is addressed to a ServiceCIDR or ClusterIP: dropped";
    18 UnknownTcpFlow "unknown_tcp_flow" Passed:
        "TCP that is neither part of a known flow nor a SYN: untouched";
    19 Fragment "fragment" Dropped:
        "an IP fragment to a ClusterIP that came before the first one of its datagram, or of a protocol that Services do not carry: dropped";
    20 IcmpError "icmp_error" Dropped:
        "an ICMP error to a ClusterIP, or about an encapsulated packet, that is about no known flow: dropped";
    21 IcmpTranslated "icmp_translated" Translated:
        "an ICMP error about a packet of a known flow: translated, with the packet that it quotes";
    22 NoSourcePort "no_source_port" Refused:
        "no free source port of this node was found for the flow: refused";
    23 FlowTableFull "flow_table_full" Alarm:
        "the flow table accepted no entry: dropped";
    24 NoNodeAddress "no_node_address" Alarm:
        "the node has no address of this family to send from: dropped";
    25 NoRoute "no_route" Dropped:
        "the kernel has no route to the backend or client: dropped";
    26 TtlExceeded "ttl_exceeded" Refused:
        "the TTL or hop limit of a packet that lb forwards is used up: the sender gets an ICMP error";
    27 TooBig "too_big" Refused:
        "larger than the MTU of the route to the backend or client: the sender gets an ICMP error";
    28 RewriteFailed "rewrite_failed" Alarm:
        "the kernel refused to change or read the packet: dropped";
    29 MartianSource "martian_source" Passed:
        "came in by an external device, to a Service, from an address that no host outside can have: untouched";
    30 TableInconsistent "table_inconsistent" Alarm:
        "a map entry refers to one that is not there: dropped (a call of connect() is left to the packet path)";
    31 Draining "draining" Passed:
        "a new flow while `cleanup --drain` runs: untouched";
    32 UnaskedTunnel "unasked_tunnel" Dropped:
        "encapsulated by another node, or by a pod, for a Service that does not use direct server return: dropped";
    33 Orphan "orphan" Refused:
        "TCP to a frontend, of a flow that is not known, where it would leave the node untranslated: its sender gets a reset";
    34 Returning "returning" Dropped:
        "to a load balancer's address or external IP, but to no port of a Service, and about to leave by the device that it arrived by: dropped, because router and node would send it back and forth";
}

const _: () = {
    let mut number = 0;
    while number < Reason::ALL.len() {
        assert!(Reason::ALL[number] as usize == number, "reasons are numbered without a gap");
        number += 1;
    }
};

impl Reason {
    /// The bits of the reasons that TRAFFIC counts: a packet is translated. A translated call is
    /// not a packet.
    pub const TRANSLATED: u64 =
        Self::bits_of(Class::Translated) & !Self::bit(Self::SocketTranslated);

    /// The bits of the reasons that DROPS counts: a service port rejects (refuses or drops) a
    /// packet or call.
    pub const REJECTED: u64 = (Self::bits_of(Class::Refused)
        | Self::bits_of(Class::Dropped)
        | Self::bits_of(Class::Alarm))
        & !Self::OF_NO_SERVICE_PORT;

    /// The bits of the reasons that belong to no service port: the destination has none, or the
    /// packet itself is the cause.
    const OF_NO_SERVICE_PORT: u64 = Self::bit(Self::NoSuchPort)
        | Self::bit(Self::NoSuchProtocol)
        | Self::bit(Self::UntranslatedLeaving)
        | Self::bit(Self::Fragment)
        | Self::bit(Self::IcmpError)
        | Self::bit(Self::TtlExceeded)
        | Self::bit(Self::Orphan)
        | Self::bit(Self::Returning);

    const fn bit(self) -> u64 {
        1 << self as u32
    }

    const fn bits_of(class: Class) -> u64 {
        let (mut bits, mut index) = (0, 0);
        while index < Self::ALL.len() {
            if Self::ALL[index].class() as u32 == class as u32 {
                bits |= Self::ALL[index].bit();
            }
            index += 1;
        }
        bits
    }
}

impl Hook {
    /// The entry of COUNTERS for `reason` at this hook.
    #[inline(always)]
    pub const fn counter(self, reason: Reason) -> u32 {
        self as u32 * REASONS_PER_HOOK + reason as u32
    }
}

/// Entries of COUNTERS for each hook, with room for reasons to come.
pub const REASONS_PER_HOOK: u32 = 64;

/// The number of entries of COUNTERS.
pub const COUNTERS: u32 = 32 * REASONS_PER_HOOK;

const _: () = assert!(Reason::ALL.len() <= REASONS_PER_HOOK as usize && Hook::ALL.len() <= 32);
