//! The Internet checksum (RFC 1071) and its incremental update (RFC 1624).
//!
//! Sums are of 16-bit words as they stand in memory: the result is stored as it is,
//! whatever the byte order of the machine.

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

/// Takes `words` away from a running sum (RFC 1624 equation 3: adds the complement).
#[inline(always)]
pub fn subtract(mut sum: u64, words: &[u32]) -> u64 {
    let mut index = 0;
    while index < words.len() {
        sum += !words[index] as u64;
        index += 1;
    }
    sum
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

/// The checksum field after the words it covers changed by `difference` (a running sum).
#[inline(always)]
pub fn updated(checksum: u16, difference: u64) -> u16 {
    !fold16(!checksum as u64 + difference)
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
        fn an_incremental_update_equals_a_whole_sum(
            mut words in proptest::collection::vec(any::<u32>(), 1..20),
            index in any::<proptest::sample::Index>(),
            new in any::<u32>(),
        ) {
            let before = whole(&words);
            let index = index.index(words.len());
            let difference = add(subtract(0, &[words[index]]), &[new]);
            words[index] = new;
            let after = updated(before, difference);
            // 0x0000 and 0xffff are one number in ones' complement.
            prop_assert_eq!(after % 0xffff, whole(&words) % 0xffff);
        }
    }
}
