//! The Internet checksum (RFC 1071) and its incremental update (RFC 1624).
//!
//! Sums are of 16-bit words as they are in memory. The result is stored as it is, whatever the byte
//! order of the machine.

use crate::abi::{
    address::{Address, Be16},
    flow::Tuple,
};

/// Adds the halves of `words` to a running sum; the carries stay in the upper bits.
#[inline(always)]
pub fn add(mut sum: u64, words: &[u32]) -> u64 {
    let mut index = 0;
    while index < words.len() {
        sum += words[index] as u64;
        index += 1;
    }
    sum
}

/// The change of a running sum when words that add up to `old`, at most 256 of them, are replaced
/// by words that add up to `new` (RFC 1624 equation 3: adds the complement).
#[inline(always)]
pub fn difference(old: u64, new: u64) -> u64 {
    /// Zero, as a sum of 256 words.
    const ZERO: u64 = 0xffff_ffff * 256;
    new + (ZERO - old)
}

/// The running sum of both addresses of a tuple.
#[inline(always)]
pub fn addresses<A: Address>(tuple: &Tuple<A>) -> u64 {
    add(add(0, tuple.source.words()), tuple.destination.words())
}

/// Folds a running sum of 32-bit words to the 32 bits that the kernel's checksum
/// helpers take as a difference.
#[inline(always)]
pub fn fold32(sum: u64) -> u32 {
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    ((sum & 0xffff_ffff) + (sum >> 32)) as u32
}

/// Folds a running sum to 16 bits.
#[inline(always)]
pub fn fold16(sum: u64) -> u16 {
    let sum = fold32(sum) as u64;
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}

/// The running sum of a pseudo header (RFC 9293 section 3.1, RFC 8200 section 8.1) for `length`
/// bytes of transport header and payload; `addresses` comes from [`addresses`](addresses()).
#[inline(always)]
pub fn pseudo(addresses: u64, protocol: u8, length: u16) -> u64 {
    addresses + Be16::new(length).be16 as u64 + Be16::new(protocol as u16).be16 as u64
}

/// The checksum field after the words that it covers have changed by `difference`, a running sum.
#[inline(always)]
pub fn updated(checksum: u16, difference: u64) -> u16 {
    !fold16(!checksum as u64 + difference)
}

/// The checksum field of an IPv4 header whose TTL was decremented by one (RFC 1141).
#[inline(always)]
pub fn ttl_decremented(checksum: u16) -> u16 {
    let sum = checksum as u32 + 0x100u16.to_be() as u32;
    (sum + (sum >= 0xffff) as u32) as u16
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn whole(words: &[u32]) -> u16 {
        !fold16(add(0, words))
    }

    proptest! {
        #[test]
        fn a_ttl_decrement_is_an_update(checksum: u16, ttl in 1..=255u8, protocol: u8) {
            let words = |ttl| [u32::from_ne_bytes([ttl, protocol, 0, 0])];
            let difference = difference(add(0, &words(ttl)), add(0, &words(ttl - 1)));
            prop_assert_eq!(ttl_decremented(checksum) % 0xffff, updated(checksum, difference) % 0xffff);
        }

        #[test]
        fn an_incremental_update_equals_a_whole_sum(
            mut words in proptest::collection::vec(any::<u32>(), 1..20),
            index in any::<proptest::sample::Index>(),
            new in any::<u32>(),
        ) {
            let before = whole(&words);
            let index = index.index(words.len());
            let difference = difference(words[index].into(), new.into());
            words[index] = new;
            let after = updated(before, difference);
            // 0x0000 and 0xffff are one number in ones' complement.
            prop_assert_eq!(after % 0xffff, whole(&words) % 0xffff);
        }
    }
}
