//! Medians and how far they can be trusted.

use serde::Serialize;

/// The median of some measurements and the interval that holds the true one with about
/// 95 % confidence, from the order of the measurements alone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Estimate {
    /// The median.
    pub median: f64,
    /// The lower end of the interval.
    pub low: f64,
    /// The upper end of the interval.
    pub high: f64,
}

impl Estimate {
    /// Of `samples`; all zero where there is none.
    pub fn of(mut samples: Vec<f64>) -> Self {
        samples.sort_by(f64::total_cmp);
        let Some(last) = samples.len().checked_sub(1) else { return Self::default() };
        let count = samples.len() as f64;
        // Ranks of the sign test, normal approximation.
        let rank = ((count - 1.96 * count.sqrt()) / 2.0).floor().max(1.0) as usize - 1;
        let median = (samples[last / 2] + samples[samples.len() / 2]) / 2.0;
        Self { median, low: samples[rank.min(last)], high: samples[last - rank.min(last)] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interval_of_eleven_rounds_leaves_out_the_extremes() {
        let samples = [9.0, 1.0, 5.0, 3.0, 11.0, 7.0, 2.0, 10.0, 4.0, 8.0, 6.0];
        let estimate = Estimate::of(samples.to_vec());
        assert_eq!(estimate, Estimate { median: 6.0, low: 2.0, high: 10.0 });
        assert_eq!(Estimate::of(vec![1.0, 2.0]).median, 1.5);
        assert_eq!(Estimate::of(Vec::new()), Estimate::default());
    }
}
