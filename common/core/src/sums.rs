//! Partial sums of errors: what a worker reports and the coordinator reduces.

use serde::{Deserialize, Serialize};

/// Count, sum and sum of squares of the errors of one prompt on one sample.
///
/// Kept in f64, so that a sum of 1,000 f32 errors is exact to far below an f32 ulp. Floating-point addition is not associative,
/// so the job fixes the order of [`Sums::add`] and [`Sums::merge`] (slot order within a unit, unit order within a round). It
/// never depends on which worker finishes first.
///
/// ```
/// use elbo_core::sums::Sums;
///
/// let mut sums = Sums::of(&[1.0, 2.0]);
/// sums.merge(&Sums::of(&[3.0]));
/// assert_eq!((sums.n, sums.mean()), (3, 2.0));
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sums {
    /// Number of errors.
    pub n: u32,
    /// Their sum.
    pub sum: f64,
    /// The sum of their squares.
    pub sum_sq: f64,
}

impl Sums {
    /// The sums of the given errors, added in order.
    pub fn of(errors: &[f32]) -> Self {
        let mut sums = Self::default();
        errors.iter().for_each(|error| sums.add(*error));
        sums
    }

    /// Adds one evaluation's error.
    pub fn add(&mut self, error: f32) {
        let error = f64::from(error);
        self.n += 1;
        self.sum += error;
        self.sum_sq += error * error;
    }

    /// Adds the sums of errors that come later in the job's order.
    pub fn merge(&mut self, later: &Self) {
        self.n += later.n;
        self.sum += later.sum;
        self.sum_sq += later.sum_sq;
    }

    /// The mean error; infinite if there are none, so that an unscored prompt never wins.
    pub fn mean(&self) -> f64 {
        if self.n == 0 { f64::INFINITY } else { self.sum / f64::from(self.n) }
    }

    /// The standard error of the mean, `sqrt(variance / n)` with the unbiased variance; `None` with fewer than two errors.
    pub fn std_error(&self) -> Option<f64> {
        if self.n < 2 {
            return None;
        }
        let n = f64::from(self.n);
        let variance = (self.sum_sq - self.sum * self.sum / n) / (n - 1.0);
        Some((variance.max(0.0) / n).sqrt())
    }

    /// Whether these can be the sums of `n` errors: finite, not negative, and consistent with Cauchy-Schwarz.
    pub fn is_plausible(&self) -> bool {
        let slack = 1.0 + 1e-9;
        self.sum.is_finite()
            && self.sum_sq.is_finite()
            && self.sum >= 0.0
            && self.sum_sq >= 0.0
            && self.sum * self.sum <= f64::from(self.n) * self.sum_sq * slack
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mean_and_standard_error_match_the_textbook() {
        let mut sums = Sums::default();
        [1.0, 2.0, 3.0, 4.0].into_iter().for_each(|e| sums.add(e));
        assert_eq!(sums.mean(), 2.5);
        // Unbiased variance 5/3, over n = 4.
        assert!((sums.std_error().unwrap() - (5.0f64 / 12.0).sqrt()).abs() < 1e-12);
    }

    #[test]
    fn merging_keeps_count_and_sums() {
        let (mut a, mut b, mut all) = (Sums::default(), Sums::default(), Sums::default());
        for (i, e) in [0.5f32, 0.25, 0.125, 2.0].into_iter().enumerate() {
            if i < 2 {
                a.add(e)
            } else {
                b.add(e)
            }
            all.add(e);
        }
        a.merge(&b);
        assert_eq!(a, all);
    }

    #[test]
    fn an_unscored_prompt_never_wins_and_has_no_standard_error() {
        assert_eq!(Sums::default().mean(), f64::INFINITY);
        assert_eq!(Sums::default().std_error(), None);
    }

    #[test]
    fn impossible_sums_are_not_plausible() {
        let ok = Sums { n: 2, sum: 3.0, sum_sq: 5.0 };
        assert!(ok.is_plausible());
        assert!(!Sums { sum: f64::NAN, ..ok }.is_plausible());
        assert!(!Sums { sum: -1.0, ..ok }.is_plausible());
        assert!(!Sums { sum_sq: 1.0, ..ok }.is_plausible());
    }
}
