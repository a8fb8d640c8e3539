//! Addresses as text, without an allocation and, of IPv4, without the machinery of `format!`: `get flows`
//! prints four of them for each of a million flows.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    ops::Deref,
};

use serde::{Serialize, Serializer};

/// The longest: `[` 39 characters `]:` and a port.
const LONGEST: usize = 47;

/// An address, with or without a port.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct AddressText {
    bytes: [u8; LONGEST],
    length: u8,
}

impl AddressText {
    const EMPTY: Self = Self { bytes: [0; LONGEST], length: 0 };

    /// `ADDRESS:PORT`, or `[ADDRESS]:PORT` of IPv6.
    pub(super) fn with_port(address: IpAddr, port: u16) -> Self {
        let mut text = Self::EMPTY;
        match address {
            IpAddr::V4(ip) => {
                text.dotted(ip.octets());
                text.push(b':');
                text.number(port);
            }
            IpAddr::V6(_) => text.display(SocketAddr::new(address, port)),
        }
        text
    }

    /// The address alone.
    pub(super) fn of(address: IpAddr) -> Self {
        let mut text = Self::EMPTY;
        match address {
            IpAddr::V4(ip) => text.dotted(ip.octets()),
            IpAddr::V6(_) => text.display(address),
        }
        text
    }

    fn display(&mut self, value: impl fmt::Display) {
        // It fits.
        let _ = fmt::Write::write_fmt(self, format_args!("{value}"));
    }

    fn dotted(&mut self, octets: [u8; 4]) {
        for (index, octet) in octets.into_iter().enumerate() {
            if index > 0 {
                self.push(b'.');
            }
            self.number(octet.into());
        }
    }

    fn number(&mut self, number: u16) {
        let mut power = match number {
            0..10 => 1,
            10..100 => 10,
            100..1_000 => 100,
            1_000..10_000 => 1_000,
            _ => 10_000,
        };
        while power > 0 {
            self.push(b'0' + (number / power % 10) as u8);
            power /= 10;
        }
    }

    fn push(&mut self, byte: u8) {
        if let Some(place) = self.bytes.get_mut(usize::from(self.length)) {
            *place = byte;
            self.length += 1;
        }
    }
}

impl fmt::Write for AddressText {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        text.bytes().for_each(|byte| self.push(byte));
        Ok(())
    }
}

impl Deref for AddressText {
    type Target = str;

    fn deref(&self) -> &str {
        let bytes = self.bytes.get(..usize::from(self.length)).unwrap_or_default();
        std::str::from_utf8(bytes).unwrap_or_default()
    }
}

impl fmt::Debug for AddressText {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&**self, formatter)
    }
}

impl Serialize for AddressText {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_written_as_the_standard_library_does() {
        let addresses = [
            "0.0.0.0",
            "10.96.0.1",
            "255.255.255.255",
            "1.20.100.9",
            "::",
            "2001:db8::1",
            "::ffff:10.0.0.1",
            "1111:2222:3333:4444:5555:6666:7777:8888",
        ];
        for address in addresses.map(|text| text.parse::<IpAddr>().unwrap()) {
            assert_eq!(*AddressText::of(address), *address.to_string());
            for port in [0, 9, 10, 80, 99, 100, 999, 1_000, 9_999, 10_000, 65_535] {
                let expected = SocketAddr::new(address, port).to_string();
                assert_eq!(*AddressText::with_port(address, port), *expected);
            }
        }
    }
}
