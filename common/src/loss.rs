//! The error of one evaluation: how far the predicted noise is from the noise that was added.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Loss between the predicted and the true noise, averaged over channels and pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Loss {
    /// Mean squared error.
    L2,
    /// Mean absolute error.
    L1,
    /// Huber loss with delta 1: `0.5 d^2` where `|d| < 1`, else `|d| - 0.5`.
    Huber,
}

impl Loss {
    /// The mean loss between two slices of equal length.
    ///
    /// Differences are taken in f32, as the reference does; the mean is accumulated in f64 in index order, so that it
    /// does not depend on vector width.
    pub fn mean(self, predicted: &[f32], target: &[f32]) -> f32 {
        debug_assert_eq!(predicted.len(), target.len());
        let differences = predicted.iter().zip(target).map(|(p, t)| p - t);
        let sum: f64 = match self {
            Self::L2 => differences.map(|d| f64::from(d * d)).sum(),
            Self::L1 => differences.map(|d| f64::from(d.abs())).sum(),
            Self::Huber => differences
                .map(|d| {
                    let a = d.abs();
                    f64::from(if a < 1.0 { 0.5 * a * a } else { a - 0.5 })
                })
                .sum(),
        };
        (sum / predicted.len().max(1) as f64) as f32
    }
}

impl fmt::Display for Loss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::L2 => "l2",
            Self::L1 => "l1",
            Self::Huber => "huber",
        })
    }
}

impl FromStr for Loss {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "l2" => Ok(Self::L2),
            "l1" => Ok(Self::L1),
            "huber" => Ok(Self::Huber),
            other => Err(format!("unknown loss '{other}': use l2, l1 or huber")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_loss_follows_its_formula() {
        let (p, t) = ([0.0, 2.0, -3.0, 1.5], [0.5, 0.0, -3.0, 1.0]);
        assert_eq!(Loss::L2.mean(&p, &t), (0.25 + 4.0 + 0.0 + 0.25) / 4.0);
        assert_eq!(Loss::L1.mean(&p, &t), (0.5 + 2.0 + 0.0 + 0.5) / 4.0);
        assert_eq!(Loss::Huber.mean(&p, &t), (0.125 + 1.5 + 0.0 + 0.125) / 4.0);
    }
}
