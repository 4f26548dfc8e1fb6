//! The error of one evaluation: how far the predicted noise is from the noise that was added.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// How the error of an evaluation is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Loss {
    /// Mean squared error.
    #[serde(rename = "l2")]
    L2,
    /// Mean absolute error.
    #[serde(rename = "l1")]
    L1,
    /// Huber loss with delta 1.
    #[serde(rename = "huber")]
    Huber,
    /// The term of the variational bound with the learned variance, in bits per dimension.
    #[serde(rename = "vlb")]
    Vlb,
    /// The mean squared error plus the term of the variational bound.
    #[serde(rename = "l2+vlb")]
    L2Vlb,
}

/// A distance between prediction and target, averaged over channels and pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Distance {
    /// `d^2`.
    L2,
    /// `|d|`.
    L1,
    /// `0.5 d^2` where `|d| < 1`, else `|d| - 0.5`.
    Huber,
}

impl Loss {
    /// Every loss with its name on the command line.
    pub const ALL: [(&'static str, Self); 5] =
        [("l2", Self::L2), ("l1", Self::L1), ("huber", Self::Huber), ("vlb", Self::Vlb), ("l2+vlb", Self::L2Vlb)];

    /// The distance it contains, if any.
    pub fn distance(self) -> Option<Distance> {
        match self {
            Self::L2 | Self::L2Vlb => Some(Distance::L2),
            Self::L1 => Some(Distance::L1),
            Self::Huber => Some(Distance::Huber),
            Self::Vlb => None,
        }
    }

    /// Whether it contains the variational bound's term, which needs a learned variance.
    pub fn needs_variance(self) -> bool {
        matches!(self, Self::Vlb | Self::L2Vlb)
    }
}

impl Distance {
    /// The mean distance between two slices of equal length.
    ///
    /// Differences are in f32, as in the reference. The mean is accumulated in f64 in index order, so that it does not depend
    /// on the vector width.
    pub fn mean(self, predicted: &[f32], target: &[f32]) -> f64 {
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
        sum / predicted.len().max(1) as f64
    }
}

impl fmt::Display for Loss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(Self::ALL.iter().find(|(_, loss)| loss == self).map_or("", |(name, _)| name))
    }
}

impl FromStr for Loss {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let named = Self::ALL.iter().find(|(name, _)| *name == text);
        named.map(|(_, loss)| *loss).ok_or_else(|| format!("unknown loss '{text}': use l2, l1, huber, vlb or l2+vlb"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_distance_follows_its_formula() {
        let (p, t) = ([0.0, 2.0, -3.0, 1.5], [0.5, 0.0, -3.0, 1.0]);
        assert_eq!(Distance::L2.mean(&p, &t), (0.25 + 4.0 + 0.0 + 0.25) / 4.0);
        assert_eq!(Distance::L1.mean(&p, &t), (0.5 + 2.0 + 0.0 + 0.5) / 4.0);
        assert_eq!(Distance::Huber.mean(&p, &t), (0.125 + 1.5 + 0.0 + 0.125) / 4.0);
    }

    #[test]
    fn names_are_parsed_back() {
        for (name, loss) in Loss::ALL {
            assert_eq!((name.parse(), loss.to_string().as_str()), (Ok(loss), name));
            assert_eq!(serde_json::to_string(&loss).unwrap(), format!("{name:?}"));
        }
    }
}
