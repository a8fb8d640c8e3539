//! COUNTERS: why packets, and calls of connect(), went where they went. Per CPU;
//! every exit of every program bumps exactly one entry.

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
        /// connect() to an IPv4 address.
        Connect4 => "connect4",
        /// connect() to an IPv6 address.
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

numbered! {
    /// Why a program ended as it did.
    Reason {
        /// Not addressed to, nor coming from, a Service: untouched.
        NotService => "not_service",
        /// XDP leaves the packet, untouched, to tc.
        LeftToTc => "left_to_tc",
        /// Neither IPv4 nor IPv6: untouched.
        NotIp => "not_ip",
        /// Truncated or malformed: untouched.
        Malformed => "malformed",
        /// No flow of ours in the direction of replies: untouched.
        NoFlow => "no_flow",
        /// A new flow, translated.
        FlowCreated => "flow_created",
        /// A packet from a client of a known flow, translated.
        Request => "request",
        /// A packet from a backend of a known flow, translated.
        Reply => "reply",
        /// A call of a socket, translated to a backend.
        SocketTranslated => "socket_translated",
        /// A call of a socket that is exempt from connect-time translation.
        SocketExempt => "socket_exempt",
        /// ICMP echo to a ClusterIP, answered.
        EchoAnswered => "echo_answered",
        /// The Service has no endpoint: refused.
        NoEndpoint => "no_endpoint",
        /// A port of a live ClusterIP that no Service has: refused.
        NoSuchPort => "no_such_port",
        /// A protocol that Services do not carry, to a live ClusterIP: refused.
        NoSuchProtocol => "no_such_protocol",
        /// The policy is Local and this node has no endpoint: dropped (refused at connect time).
        NoLocalEndpoint => "no_local_endpoint",
        /// A client outside `loadBalancerSourceRanges`: dropped.
        SourceNotAllowed => "source_not_allowed",
        /// An address that no Service has, where it enters: untouched.
        UnknownAddress => "unknown_address",
        /// An address of a ServiceCIDR about to leave the node untranslated: dropped.
        UntranslatedLeaving => "untranslated_leaving",
        /// TCP that is neither SYN nor part of a known flow: left to the stack.
        UnknownTcpFlow => "unknown_tcp_flow",
        /// An IP fragment for a ClusterIP, before the first one of its datagram: dropped.
        Fragment => "fragment",
        /// An ICMP error to a ClusterIP, or about a tunnel, but about no known flow: dropped.
        IcmpError => "icmp_error",
        /// An ICMP error about a packet of a known flow, translated with what it quotes.
        IcmpTranslated => "icmp_translated",
        /// Every source port that was tried for the flow is taken: refused.
        NoSourcePort => "no_source_port",
        /// The flow table took no entry: dropped.
        FlowTableFull => "flow_table_full",
        /// The node has no address for a pod that reaches itself: dropped.
        NoNodeAddress => "no_node_address",
        /// No route to the backend: dropped.
        NoRoute => "no_route",
        /// The packet's TTL or hop limit ends here: its sender is told.
        TtlExceeded => "ttl_exceeded",
        /// Larger than the way to the backend or client lets through: its sender is told.
        TooBig => "too_big",
        /// The kernel would not let the packet be changed: dropped.
        RewriteFailed => "rewrite_failed",
        /// From outside, from an address that nobody there can have: left to the stack.
        MartianSource => "martian_source",
        /// A service or slot names what is not in its table: dropped.
        TableInconsistent => "table_inconsistent",
        /// `cleanup --drain` goes on, which lets in nothing new: left to the stack.
        Draining => "draining",
    }
}

impl Reason {
    /// The bits of the reasons for which a packet goes on translated.
    pub const TRANSLATED: u64 =
        Self::bits(&[Self::FlowCreated, Self::Request, Self::Reply, Self::IcmpTranslated]);

    /// The bits of those for which a service port turns a packet or call away.
    pub const TURNED_AWAY: u64 = Self::bits(&[
        Self::NoEndpoint,
        Self::NoLocalEndpoint,
        Self::SourceNotAllowed,
        Self::NoSourcePort,
        Self::FlowTableFull,
        Self::NoNodeAddress,
        Self::NoRoute,
        Self::TooBig,
        Self::RewriteFailed,
        Self::TableInconsistent,
    ]);

    const fn bits(reasons: &[Self]) -> u64 {
        let (mut bits, mut index) = (0, 0);
        while index < reasons.len() {
            bits |= 1 << reasons[index] as u32;
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

/// Entries of COUNTERS that each hook has; more than there are reasons now.
pub const REASONS_PER_HOOK: u32 = 64;

/// How many entries COUNTERS has.
pub const COUNTERS: u32 = 32 * REASONS_PER_HOOK;

const _: () = assert!(Reason::ALL.len() <= REASONS_PER_HOOK as usize && Hook::ALL.len() <= 32);
