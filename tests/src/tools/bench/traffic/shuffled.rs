//! Random order, the same in every run.

/// xorshift64.
#[derive(Debug)]
pub struct Random(u64);

impl Random {
    /// The same seed every time.
    #[expect(clippy::new_without_default, reason = "a seed is no default value")]
    pub fn new() -> Self {
        Self(0x9e37_79b9_7f4a_7c15)
    }

    /// Fisher and Yates.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            items.swap(last, (self.0 % (last as u64 + 1)) as usize);
        }
    }
}
