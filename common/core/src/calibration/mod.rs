//! Calibrated confidence: how often a prediction like this one is right.
//!
//! The softmax of the raw errors is not a useful probability. The mean errors of different classes differ by thousandths, so
//! with `N` classes every image gets about `1/N`; [`Findings`] shows this. A temperature turns the errors into probabilities
//! (Guo et al., ICML 2017). It is fitted where the right classes are known: see [`Fitter`].
//!
//! Let `d_k` be the mean error of class `k` minus that of the best class, over the classes in the best class's last round. Then
//!
//! ```text
//! confidence = 1 / (sum_k exp(-d_k / T(e)) + left * exp(-d_2 / T(e)))       T(e) = temperature * (e / typical)^growth
//! ```
//!
//! - If the last round has many classes, only the nearest [`NEAREST`] count.
//! - `e` is the number of evaluations spent on the image. Hard images take more evaluations, and this predicts mistakes better
//!   than the margin does (Clark & Jaini, NeurIPS 2023, appendix).
//! - `left` stands for the classes eliminated in earlier rounds, which sometimes include the right one. It counts them as that
//!   many classes at the distance of the second best. Without it, a race among a thousand classes that ends with two could
//!   never give a confidence below one half.

mod findings;
mod fit;

pub use findings::{Bin, Findings, Reliability, Source};
pub use fit::{Fitter, Outlook};

use serde::{Deserialize, Serialize};

use crate::class::Classes;
use crate::prediction::{Labelled, Outcome, Prediction, Score, Uncertain};

/// How many classes beside the best one enter a confidence. More would hardly change the value.
const NEAREST: usize = 32;

/// The parameters that turn errors into confidence.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Unchecked")]
pub struct Calibration {
    /// The temperature at `typical` evaluations, in the unit of the errors.
    pub temperature: f64,
    /// The exponent with which the temperature grows with the number of evaluations.
    pub growth: f64,
    /// The weight of eliminated classes: counted as this many classes at the distance of the second best.
    pub left: f64,
    /// Geometric mean of the evaluations per image.
    pub typical: f64,
}

/// A calibration as serialised, before validation.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Unchecked {
    temperature: f64,
    growth: f64,
    left: f64,
    typical: f64,
}

impl TryFrom<Unchecked> for Calibration {
    type Error = String;

    fn try_from(from: Unchecked) -> Result<Self, String> {
        let Unchecked { temperature, growth, left, typical } = from;
        let positive = |value: f64| value > 0.0 && value.is_finite();
        if positive(temperature) && positive(typical) && growth.is_finite() && left >= 0.0 && left.is_finite() {
            return Ok(Self { temperature, growth, left, typical });
        }
        Err("a calibration needs a positive temperature and typical, and a left that is not negative".into())
    }
}

/// A job's calibration and how good it is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Confidence {
    /// Turns errors into confidence.
    pub calibration: Calibration,
    /// How good the calibration is; `None` if there was nothing to evaluate it on.
    pub findings: Option<Findings>,
}

/// The evidence that a confidence is computed from.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Evidence {
    /// Mean errors of the other classes in the best class's last round, minus the best class's mean error; ascending.
    behind: Vec<f32>,
    evaluations: u32,
}

impl Evidence {
    /// From the other classes' mean errors minus the best one's, ascending.
    pub fn new(mut behind: Vec<f32>, evaluations: u32) -> Self {
        behind.truncate(NEAREST);
        Self { behind, evaluations }
    }

    /// The evidence for a prediction; `None` if the sample could not be scored.
    pub fn of_row(row: &Prediction) -> Option<Self> {
        let scores = row.scores();
        (!scores.is_empty()).then(|| Self::of(scores, row.margin(), row.evaluations))
    }

    /// From a sample's scores, best first, and its margin. Some scores may not have been kept.
    fn of(scores: &[Score], margin: Option<f32>, evaluations: u32) -> Self {
        let (mut behind, mut rest) = (Vec::new(), scores.iter());
        if let Some(best) = rest.next() {
            // Classes of earlier rounds have means over other slots, which can't be compared.
            let rivals = rest.take_while(|score| score.round == best.round).take(NEAREST);
            behind.extend(rivals.map(|score| (score.mean_error - best.mean_error).max(0.0)));
        }
        if behind.is_empty() {
            behind.extend(margin);
        }
        Self { behind, evaluations }
    }
}

impl Outlook {
    /// From a prediction and whether its class is right; `None` if the sample was not scored.
    pub fn of(row: &Prediction, right: bool) -> Option<Self> {
        let evidence = Evidence::of_row(row)?;
        let scores = row.scores();
        let weight = |score: &Score| libm::exp(f64::from(scores[0].mean_error) - f64::from(score.mean_error));
        Some(Self { evidence, softmax: 1.0 / scores.iter().map(weight).sum::<f64>(), right })
    }
}

impl Calibration {
    /// Adds the confidence to a prediction. The sample gets one of `classes` only if the confidence is at least
    /// `abstain_below`.
    pub fn apply(&self, row: Prediction, abstain_below: Option<f64>, classes: &Classes) -> Prediction {
        let Some(evidence) = Evidence::of_row(&row) else { return row };
        let confidence = self.confidence(&evidence) as f32;
        let (margin, scores) = match row.outcome {
            Outcome::Labelled(Labelled { margin, scores, .. })
            | Outcome::Uncertain(Uncertain { margin, scores, .. }) => (margin, scores),
            Outcome::Quarantined { .. } => return row,
        };
        let is_sure = abstain_below.is_none_or(|least| f64::from(confidence) >= least);
        let outcome = match scores.first().filter(|_| is_sure) {
            Some(best) => Outcome::Labelled(Labelled {
                class: best.class,
                class_name: classes.name(best.class).to_owned(),
                confidence: Some(confidence),
                margin,
                scores,
            }),
            None => Outcome::Uncertain(Uncertain { confidence, margin, scores }),
        };
        Prediction { outcome, ..row }
    }

    /// The confidence in the best class, in (0, 1].
    ///
    /// The result is the same on every platform: powers don't come from the C library.
    pub fn confidence(&self, evidence: &Evidence) -> f64 {
        let spent = f64::from(evidence.evaluations.max(1)) / self.typical;
        // The clamp keeps the temperature finite and above zero for evaluation counts far from those of the fit.
        let temperature = self.temperature * libm::exp((self.growth * libm::log(spent)).clamp(-30.0, 30.0));
        let weight = |behind: &f32| libm::exp(-f64::from(*behind) / temperature);
        let rivals: f64 = evidence.behind.iter().map(weight).sum();
        let nearest = evidence.behind.first().map_or(1.0, weight);
        1.0 / (1.0 + rivals + self.left * nearest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{ClassIndex, Round};

    fn score(mean_error: f32, round: u16) -> Score {
        Score { class: ClassIndex(0), mean_error, std_error: None, n: 1, round: Round(round) }
    }

    fn calibration(growth: f64, left: f64) -> Calibration {
        Calibration { temperature: 0.5, growth, left, typical: 100.0 }
    }

    #[test]
    fn confidence_is_the_softmax_of_the_last_rounds_errors_at_the_temperature() {
        let evidence = Evidence::of(&[score(1.0, 2), score(1.5, 2), score(2.0, 2), score(0.1, 1)], Some(0.5), 100);
        let expected = 1.0 / (1.0 + (-1.0f64).exp() + (-2.0f64).exp());
        assert!((calibration(1.0, 0.0).confidence(&evidence) - expected).abs() < 1e-12);
        let with_left = 1.0 / (1.0 + 4.0 * (-1.0f64).exp() + (-2.0f64).exp());
        assert!((calibration(1.0, 3.0).confidence(&evidence) - with_left).abs() < 1e-12);
    }

    #[test]
    fn more_evaluations_lower_confidence_by_the_exponent() {
        let of = |evaluations| Evidence::of(&[score(1.0, 0), score(1.5, 0)], Some(0.5), evaluations);
        // At four times the evaluations and an exponent of a half the temperature is twice as high.
        let expected = 1.0 / (1.0 + (-0.5f64).exp());
        assert!((calibration(0.5, 0.0).confidence(&of(400)) - expected).abs() < 1e-12);
        assert_eq!(calibration(0.0, 0.0).confidence(&of(400)), calibration(0.0, 0.0).confidence(&of(1)));
    }

    #[test]
    fn without_scores_the_margin_counts_and_without_a_rival_only_left() {
        let all = Evidence::of(&[score(1.0, 0), score(1.5, 0)], Some(0.5), 9);
        assert_eq!(Evidence::of(&[score(1.0, 0)], Some(0.5), 9), all);
        let alone = Evidence::of(&[score(1.0, 1), score(0.5, 0)], None, 9);
        assert_eq!(calibration(0.0, 0.25).confidence(&alone), 0.8);
        assert!(calibration(1.0, 1.0).confidence(&Evidence::default()) > 0.0);
    }

    #[test]
    fn a_row_gets_its_confidence_and_keeps_its_class_if_sure_enough() {
        let classes = Classes::parse("ant\nbee", &[]).unwrap();
        let scores = vec![score(1.0, 0), Score { class: ClassIndex(1), ..score(1.5, 0) }];
        let labelled = Labelled {
            class: ClassIndex(0),
            class_name: "ant".into(),
            confidence: None,
            margin: Some(0.5),
            scores: scores.clone(),
        };
        let row = |outcome| Prediction {
            sample: crate::ids::SampleId(3),
            key: "k".into(),
            label: None,
            evaluations: 100,
            outcome,
        };
        let confidence = (1.0 / (1.0 + (-1.0f64).exp())) as f32;
        let sure = Outcome::Labelled(Labelled { confidence: Some(confidence), ..labelled.clone() });
        let unsure = Outcome::Uncertain(Uncertain { confidence, margin: Some(0.5), scores });
        let apply =
            |outcome: &Outcome, least| calibration(0.0, 0.0).apply(row(outcome.clone()), least, &classes).outcome;
        assert_eq!(apply(&Outcome::Labelled(labelled.clone()), Some(0.7)), sure);
        assert_eq!(apply(&Outcome::Labelled(labelled), Some(0.8)), unsure);
        // Applying it again gives the same result.
        assert_eq!(apply(&unsure, None), sure);
        assert_eq!(apply(&sure, Some(0.8)), unsure);
        let bad = Outcome::Quarantined { error: "no image".into() };
        assert_eq!(apply(&bad, Some(0.8)), bad);
    }

    #[test]
    fn invalid_calibrations_are_refused() {
        let read = |text: &str| serde_json::from_str::<Calibration>(text);
        let fine = calibration(0.5, 1.0);
        assert_eq!(read(&serde_json::to_string(&fine).unwrap()).unwrap(), fine);
        let cold = r#"{"temperature": 0, "growth": 0, "left": 0, "typical": 1}"#;
        assert!(read(cold).unwrap_err().to_string().contains("positive temperature"));
    }
}
