//! An address family in tests: which host has which address, and how headers are built. Shares
//! nothing with the code under test.

use lb_common::{
    abi::{
        address::{Address4, Address6, Ipv4, Ipv6, Prefix},
        settings::{FamilySettings, Settings},
    },
    packet::{quote::ParseQuote, tunnel::Tunnel},
};

/// Which part of a larger datagram a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fragment {
    /// The offset of its bytes in the datagram; a multiple of 8.
    pub offset: u16,
    /// Whether more fragments follow.
    pub more: bool,
    /// The identification of the datagram.
    pub identification: u16,
}

/// An address family in which packets can be built.
pub trait TestFamily: ParseQuote + Tunnel {
    /// 4 or 6.
    const NUMBER: u8;
    /// The EtherType.
    const ETHERTYPE: u16;
    /// Offset of the source address from the start of the frame; the destination follows.
    const ADDRESSES: usize;
    /// Offset of TTL or hop limit from the start of the frame.
    const TTL: usize;
    /// Bytes of an address.
    const ADDRESS_LENGTH: usize;
    /// ICMP type of an error about a packet, of any kind.
    const SOME_ICMP_ERROR: u8;

    /// A pod of this node.
    fn pod(number: u8) -> Self::Address;
    /// A pod of another node.
    fn remote_pod(number: u8) -> Self::Address;
    /// This node.
    fn node() -> Self::Address;
    /// The node of remote backends.
    fn other_node() -> Self::Address;
    /// An address in a ServiceCIDR.
    fn vip(number: u8) -> Self::Address;
    /// An address that may be a ClusterIP although it is in no ServiceCIDR.
    fn vip_outside_cidrs(number: u8) -> Self::Address;
    /// A client outside the cluster.
    fn outside() -> Self::Address;
    /// The loopback address.
    fn loopback() -> Self::Address;
    /// The prefixes of [`TestFamily::vip`] and [`TestFamily::vip_outside_cidrs`].
    fn service_prefixes() -> [Prefix<Self::Address>; 2];
    /// The address as it is in a packet.
    fn bytes(address: Self::Address) -> Vec<u8>;
    /// The settings of the family.
    fn settings_mut(settings: &mut Settings) -> &mut FamilySettings<Self::Address>;
    /// The address at the start of `bytes`.
    fn address(bytes: &[u8]) -> Self::Address;
    /// An IP header with what is between it and the body: options of IPv4 (whole words), or
    /// extension headers of IPv6 as (kind, bytes behind the next-header field). TTL or hop
    /// limit and the header's own checksum are 0.
    fn ip_header(
        addresses: [Self::Address; 2],
        protocol: u8,
        options: &[(u8, Vec<u8>)],
        fragment: Option<Fragment>,
        length: usize,
    ) -> Vec<u8>;
}

impl TestFamily for Ipv4 {
    const NUMBER: u8 = 4;
    const ETHERTYPE: u16 = 0x0800;
    const ADDRESSES: usize = 14 + 12;
    const TTL: usize = 14 + 8;
    const ADDRESS_LENGTH: usize = 4;
    const SOME_ICMP_ERROR: u8 = 3;

    fn pod(number: u8) -> Address4 {
        core::net::Ipv4Addr::new(10, 1, 0, number).into()
    }

    fn remote_pod(number: u8) -> Address4 {
        core::net::Ipv4Addr::new(10, 2, 0, number).into()
    }

    fn node() -> Address4 {
        core::net::Ipv4Addr::new(192, 0, 2, 10).into()
    }

    fn other_node() -> Address4 {
        core::net::Ipv4Addr::new(192, 0, 2, 11).into()
    }

    fn vip(number: u8) -> Address4 {
        core::net::Ipv4Addr::new(10, 96, 0, number).into()
    }

    fn vip_outside_cidrs(number: u8) -> Address4 {
        core::net::Ipv4Addr::new(10, 97, 0, number).into()
    }

    fn loopback() -> Address4 {
        core::net::Ipv4Addr::LOCALHOST.into()
    }

    fn outside() -> Address4 {
        core::net::Ipv4Addr::new(198, 51, 100, 7).into()
    }

    fn service_prefixes() -> [Prefix<Address4>; 2] {
        let mask = core::net::Ipv4Addr::new(255, 255, 255, 0).into();
        [Self::vip(0), Self::vip_outside_cidrs(0)].map(|address| Prefix { address, mask })
    }

    fn settings_mut(settings: &mut Settings) -> &mut FamilySettings<Address4> {
        &mut settings.ipv4
    }

    fn bytes(address: Address4) -> Vec<u8> {
        core::net::Ipv4Addr::from(address).octets().to_vec()
    }

    fn address(bytes: &[u8]) -> Address4 {
        core::net::Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3]).into()
    }

    fn ip_header(
        addresses: [Address4; 2],
        protocol: u8,
        options: &[(u8, Vec<u8>)],
        fragment: Option<Fragment>,
        length: usize,
    ) -> Vec<u8> {
        let options: Vec<u8> = options.iter().flat_map(|(_, bytes)| bytes.clone()).collect();
        assert!(options.len().is_multiple_of(4) && options.len() <= 40, "options in words");
        let own = 20 + options.len();
        let identification = fragment.map_or(0x1234, |fragment| fragment.identification);
        let fragment = fragment
            .map_or(0x4000, |fragment| (fragment.offset / 8) | (u16::from(fragment.more) << 13));
        let mut header = vec![0x40 | (own / 4) as u8, 0x28];
        header.extend(((own + length) as u16).to_be_bytes());
        header.extend(identification.to_be_bytes());
        header.extend(fragment.to_be_bytes());
        header.extend([0, protocol, 0, 0]);
        addresses.iter().for_each(|address| header.extend(Self::bytes(*address)));
        header.extend(options);
        header
    }
}

fn group(prefix: [u16; 2], number: u8) -> Address6 {
    core::net::Ipv6Addr::new(prefix[0], prefix[1], 0, 0, 0, 0, 0, number.into()).into()
}

impl TestFamily for Ipv6 {
    const NUMBER: u8 = 6;
    const ETHERTYPE: u16 = 0x86dd;
    const ADDRESSES: usize = 14 + 8;
    const TTL: usize = 14 + 7;
    const ADDRESS_LENGTH: usize = 16;
    const SOME_ICMP_ERROR: u8 = 1;

    fn pod(number: u8) -> Address6 {
        group([0xfd00, 1], number)
    }

    fn remote_pod(number: u8) -> Address6 {
        group([0xfd00, 2], number)
    }

    fn node() -> Address6 {
        group([0x2001, 0xdb8], 10)
    }

    fn other_node() -> Address6 {
        group([0x2001, 0xdb8], 11)
    }

    fn vip(number: u8) -> Address6 {
        group([0xfd00, 0x96], number)
    }

    fn vip_outside_cidrs(number: u8) -> Address6 {
        group([0xfd00, 0x97], number)
    }

    fn loopback() -> Address6 {
        core::net::Ipv6Addr::LOCALHOST.into()
    }

    fn outside() -> Address6 {
        group([0x2001, 0xdb9], 7)
    }

    fn service_prefixes() -> [Prefix<Address6>; 2] {
        let ones = u16::MAX;
        let mask = core::net::Ipv6Addr::new(ones, ones, ones, ones, ones, ones, ones, 0).into();
        [Self::vip(0), Self::vip_outside_cidrs(0)].map(|address| Prefix { address, mask })
    }

    fn settings_mut(settings: &mut Settings) -> &mut FamilySettings<Address6> {
        &mut settings.ipv6
    }

    fn bytes(address: Address6) -> Vec<u8> {
        core::net::Ipv6Addr::from(address).octets().to_vec()
    }

    fn address(bytes: &[u8]) -> Address6 {
        let mut octets = [0; 16];
        octets.copy_from_slice(&bytes[..16]);
        core::net::Ipv6Addr::from(octets).into()
    }

    fn ip_header(
        addresses: [Address6; 2],
        protocol: u8,
        options: &[(u8, Vec<u8>)],
        fragment: Option<Fragment>,
        length: usize,
    ) -> Vec<u8> {
        const FRAGMENT: u8 = 44;
        let mut chain = options.to_vec();
        if let Some(fragment) = fragment {
            let [high, low] = (fragment.offset | u16::from(fragment.more)).to_be_bytes();
            let [first, second] = fragment.identification.to_be_bytes();
            chain.push((FRAGMENT, vec![0, high, low, 0, 0, first, second]));
        }
        let kinds: Vec<u8> = chain.iter().map(|(kind, _)| *kind).chain([protocol]).collect();
        let between: usize = chain.iter().map(|(_, bytes)| bytes.len() + 1).sum();
        let mut header = vec![0x62, 0x8a, 0xbc, 0xde];
        header.extend(((between + length) as u16).to_be_bytes());
        header.extend([kinds[0], 0]);
        addresses.iter().for_each(|address| header.extend(Self::bytes(*address)));
        for (index, (_, bytes)) in chain.iter().enumerate() {
            header.push(kinds[index + 1]);
            header.extend(bytes);
        }
        header
    }
}
