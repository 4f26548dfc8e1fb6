//! How reliable the confidence is.

use serde::{Deserialize, Serialize};

/// Number of equally wide bins that confidences are sorted into (Guo et al., 2017).
const BINS: usize = 15;

/// The ground truth that a calibration was fitted to or evaluated against.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// Labels of the dataset: confidence estimates the share of images whose class is right.
    Labels,
    /// The audit, if there are no labels: confidence estimates the share of images whose class equals the reference policy's.
    Audit,
}

/// One bin: samples of similar confidence, and how often their class was right.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Bin {
    /// Lower end of the confidences.
    pub from: f64,
    /// Upper end of the confidences.
    pub to: f64,
    /// Samples in the bin.
    pub samples: u64,
    /// Their mean confidence.
    pub confidence: f64,
    /// The share of them whose class is right.
    pub accuracy: f64,
}

/// Confidence against accuracy: the data of a reliability diagram (DeGroot & Fienberg, 1983).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Reliability {
    /// Number of samples.
    pub samples: u64,
    /// Their mean confidence.
    pub confidence: f64,
    /// The share of them whose class is right.
    pub accuracy: f64,
    /// Expected calibration error: the mean over the samples of the gap between their bin's confidence and accuracy.
    pub ece: f64,
    /// The bins that contain samples, in ascending order.
    pub bins: Vec<Bin>,
}

impl Reliability {
    /// From pairs of a confidence in [0, 1] and whether the prediction was right.
    pub fn of(judged: &[(f64, bool)]) -> Self {
        let mut sums = [(0u64, 0.0, 0u64); BINS];
        for (confidence, right) in judged {
            let (samples, sum, justified) = &mut sums[((confidence * BINS as f64) as usize).min(BINS - 1)];
            *samples += 1;
            *sum += confidence;
            *justified += u64::from(*right);
        }
        let bins: Vec<Bin> = (sums.iter().enumerate())
            .filter(|(_, (samples, ..))| *samples > 0)
            .map(|(i, &(samples, sum, right))| Bin {
                from: i as f64 / BINS as f64,
                to: (i + 1) as f64 / BINS as f64,
                samples,
                confidence: sum / samples as f64,
                accuracy: right as f64 / samples as f64,
            })
            .collect();
        let count = judged.len().max(1) as f64;
        let mean = |value: fn(&Bin) -> f64| bins.iter().map(|bin| bin.samples as f64 * value(bin)).sum::<f64>() / count;
        Self {
            samples: judged.len() as u64,
            confidence: mean(|bin| bin.confidence),
            accuracy: mean(|bin| bin.accuracy),
            ece: mean(|bin| (bin.confidence - bin.accuracy).abs()),
            bins,
        }
    }
}

/// How good a calibration is, measured where the truth is known.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Findings {
    /// What it was evaluated against.
    pub source: Source,
    /// Measured on samples that it was not fitted to.
    pub reliability: Reliability,
    /// Mean softmax of the raw errors, for comparison: about one over the number of classes.
    pub softmax: f64,
    /// Expected calibration error of that softmax.
    pub softmax_ece: f64,
}

impl Findings {
    /// From the reliability of the confidences and of the softmax of the raw errors.
    pub(super) fn new(source: Source, reliability: Reliability, softmax: Reliability) -> Self {
        Self { source, reliability, softmax: softmax.confidence, softmax_ece: softmax.ece }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_expected_calibration_error_weighs_bins_by_their_samples() {
        // Three of four right at 0.7 (|0.7 - 0.75| in 4 of 5), and a wrong one at 0.95.
        let judged = [(0.7, true), (0.7, true), (0.7, true), (0.7, false), (0.95, false)];
        let found = Reliability::of(&judged);
        assert!((found.ece - (4.0 * 0.05 + 0.95) / 5.0).abs() < 1e-12, "{}", found.ece);
        assert_eq!((found.samples, found.accuracy, found.bins.len()), (5, 0.6, 2));
        assert_eq!((found.bins[0].samples, found.bins[0].accuracy), (4, 0.75));
        assert_eq!(Reliability::of(&[(1.0, true)]).bins[0].to, 1.0);
        assert_eq!(Reliability::of(&[]), Reliability::default());
    }
}
