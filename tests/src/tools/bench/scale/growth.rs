//! Whether something grows while it should not: a line through samples.

/// Samples of one quantity, with the seconds at which they were taken.
#[derive(Clone, Debug, Default)]
pub struct Samples(Vec<(f64, f64)>);

impl Samples {
    /// Adds a sample.
    pub fn push(&mut self, seconds: f64, value: f64) {
        self.0.push((seconds, value));
    }

    /// The mean of all samples; 0 without any.
    pub fn mean(&self) -> f64 {
        let sum: f64 = self.0.iter().map(|(_, value)| value).sum();
        sum / self.0.len().max(1) as f64
    }

    /// How much the quantity grows in an hour, by least squares; 0 with less than two samples.
    pub fn growth_per_hour(&self) -> f64 {
        let count = self.0.len() as f64;
        let middle = self.0.iter().map(|(seconds, _)| seconds).sum::<f64>() / count.max(1.0);
        let mean = self.mean();
        let (mut above, mut below) = (0.0, 0.0);
        for (seconds, value) in &self.0 {
            above += (seconds - middle) * (value - mean);
            below += (seconds - middle).powi(2);
        }
        if below > 0.0 { above / below * 3600.0 } else { 0.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(values: impl IntoIterator<Item = f64>) -> Samples {
        let mut samples = Samples::default();
        values.into_iter().enumerate().for_each(|(at, value)| samples.push(at as f64, value));
        samples
    }

    #[test]
    fn growth_is_the_slope_of_the_line_and_noise_is_none() {
        assert_eq!(of([]).growth_per_hour(), 0.0);
        assert_eq!(of([5.0]).growth_per_hour(), 0.0);
        assert_eq!(of([5.0; 10]).growth_per_hour(), 0.0);
        assert_eq!(of((0..10).map(f64::from)).growth_per_hour(), 3600.0);
        assert_eq!(of([1.0, 3.0, 1.0, 3.0, 1.0]).growth_per_hour(), 0.0);
        assert_eq!(of([1.0, 3.0]).mean(), 2.0);
    }
}
