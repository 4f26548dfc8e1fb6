//! Fits a calibration to samples for which it is known whether the prediction is right.
//!
//! The three parameters maximise the likelihood of the right predictions. A few samples that are all right would make the fit
//! certain of everything. So the targets are those of a uniform prior on the share that is right, as in Platt (1999), and
//! `growth` and `left` have wide priors of their own.

use std::collections::BTreeMap;

use argmin::core::{CostFunction, Error, Executor};
use argmin::solver::neldermead::NelderMead;
use argmin_math as _; // arithmetic of vectors, for the solver

use super::findings::{Findings, Reliability, Source};
use super::{Calibration, Confidence, Evidence};
use crate::draw::Draw;

/// The most samples used for a fit: if there are more, those with the lowest draws.
const MOST: usize = 10_000;
/// Number of folds in cross-validation: each is evaluated with a fit to the others.
const FOLDS: u8 = 5;
/// Prior standard deviation of `growth`; its prior mean is 0.
const GROWTH_SPREAD: f64 = 1.0;
/// Prior mean and standard deviation of the logarithm of `left`.
const LEFT: (f64, f64) = (-2.0, 4.0);
/// The most steps of the search.
const STEPS: u64 = 400;

/// A sample whose prediction can be checked.
#[derive(Clone, Debug, PartialEq)]
pub struct Outlook {
    /// The evidence for its confidence.
    pub evidence: Evidence,
    /// The softmax of its raw errors.
    pub softmax: f64,
    /// Whether its predicted class is right.
    pub right: bool,
}

/// Collects samples to fit a calibration to. Its memory does not grow with the job.
#[derive(Clone, Debug, Default)]
pub struct Fitter {
    /// Samples by their draw, which also determines the fold.
    chosen: BTreeMap<u64, Outlook>,
}

impl Fitter {
    /// Adds a sample.
    pub fn add(&mut self, key: &str, outlook: Outlook) {
        self.chosen.insert(Draw::new("calibration", None, key).number(), outlook);
        if self.chosen.len() > MOST {
            self.chosen.pop_last();
        }
    }

    /// How many samples it has kept.
    pub fn len(&self) -> usize {
        self.chosen.len()
    }

    /// Whether it has no samples.
    pub fn is_empty(&self) -> bool {
        self.chosen.is_empty()
    }

    /// The `given` calibration, or else one fitted to the samples, with its findings; `None` if there is nothing to fit to. A
    /// fitted calibration is evaluated by cross-validation, on samples it was not fitted to.
    pub fn finish(&self, source: Source, given: Option<Calibration>) -> Option<Confidence> {
        let all: Vec<&Outlook> = self.chosen.values().collect();
        let calibration = given.or_else(|| fit(&all))?;
        if all.is_empty() {
            return Some(Confidence { calibration, findings: None });
        }
        let judged = match given {
            Some(given) => all.iter().map(|outlook| (given.confidence(&outlook.evidence), outlook.right)).collect(),
            None => self.judge_folds(calibration),
        };
        let softmax = all.iter().map(|outlook| (outlook.softmax, outlook.right)).collect::<Vec<_>>();
        let findings = Findings::new(source, Reliability::of(&judged), Reliability::of(&softmax));
        Some(Confidence { calibration, findings: Some(findings) })
    }

    /// Every sample's confidence from a fit to the other folds, and whether its prediction is right.
    fn judge_folds(&self, of_all: Calibration) -> Vec<(f64, bool)> {
        let fold_of = |hash: &u64| (hash % u64::from(FOLDS)) as u8;
        let of_fold = |fold| {
            let others: Vec<&Outlook> =
                self.chosen.iter().filter(|(hash, _)| fold_of(hash) != fold).map(|(_, outlook)| outlook).collect();
            let calibration = fit(&others).unwrap_or(of_all);
            let own = self.chosen.iter().filter(move |(hash, _)| fold_of(hash) == fold);
            own.map(move |(_, outlook)| (calibration.confidence(&outlook.evidence), outlook.right))
        };
        (0..FOLDS).flat_map(of_fold).collect()
    }
}

/// The calibration fitted to some samples; `None` if there are none.
fn fit(samples: &[&Outlook]) -> Option<Calibration> {
    if samples.is_empty() {
        return None;
    }
    let logs = samples.iter().map(|s| libm::log(f64::from(s.evidence.evaluations.max(1))));
    let typical = libm::exp(logs.sum::<f64>() / samples.len() as f64);
    let mut margins: Vec<f32> = samples.iter().filter_map(|s| s.evidence.behind.first().copied()).collect();
    margins.retain(|margin| *margin > 0.0);
    margins.sort_by(f32::total_cmp);
    // The search starts at the scale of the margins, so that it works for every loss.
    let scale = margins.get(margins.len() / 2).map_or(1.0, |margin| f64::from(*margin));
    let right = samples.iter().filter(|s| s.right).count() as f64;
    let wrong = samples.len() as f64 - right;
    let problem =
        Likelihood { samples, typical, of_right: (right + 1.0) / (right + 2.0), of_wrong: 1.0 / (wrong + 2.0) };
    let start = [libm::log(scale) - 1.0, 0.0, LEFT.0];
    let corner = |moved: usize| (0..3).map(|i| start[i] + if i == moved { 1.0 } else { 0.0 }).collect::<Vec<f64>>();
    let search = NelderMead::new((0..4).map(corner).collect()).with_sd_tolerance(1e-6).ok()?;
    let found = Executor::new(problem, search).configure(|state| state.max_iters(STEPS)).run().ok()?;
    found.state.best_param.map(|best| calibration(&best, typical))
}

/// The calibration from the search's parameters: the logarithm of the temperature, the exponent, and the logarithm of `left`.
fn calibration(parameters: &[f64], typical: f64) -> Calibration {
    let positive = |log: f64| libm::exp(log.clamp(-60.0, 60.0));
    Calibration { temperature: positive(parameters[0]), growth: parameters[1], left: positive(parameters[2]), typical }
}

/// The negative log likelihood of the right predictions under a calibration.
struct Likelihood<'a> {
    samples: &'a [&'a Outlook],
    typical: f64,
    /// The target confidence of a right prediction.
    of_right: f64,
    /// The target confidence of a wrong prediction.
    of_wrong: f64,
}

impl CostFunction for Likelihood<'_> {
    type Param = Vec<f64>;
    type Output = f64;

    fn cost(&self, parameters: &Vec<f64>) -> Result<f64, Error> {
        let calibration = calibration(parameters, self.typical);
        let loss = |sample: &&Outlook| {
            let target = if sample.right { self.of_right } else { self.of_wrong };
            let confidence = calibration.confidence(&sample.evidence).clamp(1e-12, 1.0 - 1e-12);
            -(target * libm::log(confidence) + (1.0 - target) * libm::log(1.0 - confidence))
        };
        let prior = (parameters[1] / GROWTH_SPREAD).powi(2) + ((parameters[2] - LEFT.0) / LEFT.1).powi(2);
        Ok(self.samples.iter().map(loss).sum::<f64>() + 0.5 * prior)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{ClassIndex, Round};
    use crate::prediction::Score;

    fn outlook(behind: &[f32], evaluations: u32, right: bool) -> Outlook {
        let score = |mean_error| Score { class: ClassIndex(0), mean_error, std_error: None, n: 1, round: Round(0) };
        let scores: Vec<_> = [0.0].iter().chain(behind).map(|behind| score(*behind)).collect();
        Outlook { evidence: Evidence::of(&scores, behind.first().copied(), evaluations), softmax: 0.1, right }
    }

    /// Two hundred samples: a larger margin and fewer evaluations make the prediction more often right.
    fn samples() -> Vec<Outlook> {
        let sample = |i: u32| {
            let (step, evaluations) = ((i * 7) % 20, 20 + (i * 13) % 90);
            let bound = 45 + 3 * step as i32 + if evaluations < 60 { 10 } else { -5 };
            let margin = 0.001f32 * (1 + step) as f32;
            outlook(&[margin, margin * 3.0], evaluations, ((i * 31) % 100) < bound.min(99) as u32)
        };
        (0..200).map(sample).collect()
    }

    #[test]
    fn the_fit_is_the_one_scipy_finds() {
        // scipy.optimize.minimize (BFGS) on the same likelihood and priors.
        let all = samples();
        let found = fit(&all.iter().collect::<Vec<_>>()).unwrap();
        let close = |found: f64, expected: f64| assert!((found / expected - 1.0).abs() < 5e-3, "{found} {expected}");
        close(found.temperature, 0.006861325764158809);
        close(found.growth, 0.5074366218651173);
        close(found.left, 0.35002597361243576);
        close(found.typical, 57.83570618227104);
        for (sample, expected) in all.iter().zip([0.39615814, 0.77154663, 0.89566375]) {
            close(found.confidence(&sample.evidence), expected);
        }
    }

    #[test]
    fn a_few_right_samples_do_not_make_predictions_certain() {
        let all: Vec<_> = (1..=8).map(|i| outlook(&[0.001 * i as f32], 50, true)).collect();
        let found = fit(&all.iter().collect::<Vec<_>>()).unwrap();
        let mean = all.iter().map(|sample| found.confidence(&sample.evidence)).sum::<f64>() / 8.0;
        // Laplace's rule of succession: nine of ten.
        assert!((0.8..0.95).contains(&mean), "{mean}");
        assert_eq!(fit(&[]), None);
    }

    #[test]
    fn a_fit_ignores_sample_order_and_is_evaluated_on_other_samples() {
        let collect = |order: &mut dyn Iterator<Item = usize>| {
            let mut fitter = Fitter::default();
            order.for_each(|i| fitter.add(&format!("{i}.png"), samples()[i].clone()));
            fitter.finish(Source::Labels, None).unwrap()
        };
        let confidence = collect(&mut (0..200));
        assert_eq!(collect(&mut (0..200).rev()), confidence);
        let findings = confidence.findings.unwrap();
        let reliability = &findings.reliability;
        assert_eq!(reliability.samples, 200);
        assert!((findings.softmax - 0.1).abs() < 1e-12);
        assert!(reliability.ece < 0.1 && findings.softmax_ece > 0.6, "{findings:?}");
        assert!((reliability.confidence - reliability.accuracy).abs() < 0.05, "{findings:?}");
    }

    #[test]
    fn a_given_calibration_is_evaluated_unchanged() {
        let mut fitter = Fitter::default();
        let given = Calibration { temperature: 1e-9, growth: 0.0, left: 0.0, typical: 1.0 };
        let unjudged = Confidence { calibration: given, findings: None };
        assert_eq!(fitter.finish(Source::Labels, Some(given)), Some(unjudged));
        samples().into_iter().enumerate().for_each(|(i, sample)| fitter.add(&i.to_string(), sample));
        let found = fitter.finish(Source::Labels, Some(given)).unwrap();
        // It is certain of everything, but only 72 of a hundred predictions are right.
        assert_eq!(found.calibration, given);
        let findings = found.findings.unwrap();
        assert!((findings.reliability.ece - 0.28).abs() < 1e-6, "{findings:?}");
    }

    #[test]
    fn only_some_of_many_samples_are_kept() {
        let mut fitter = Fitter::default();
        (0..MOST + 100).for_each(|i| fitter.add(&i.to_string(), outlook(&[0.1], 1, true)));
        assert_eq!(fitter.len(), MOST);
    }
}
