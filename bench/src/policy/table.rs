//! The results of policies, as a readable table and as CSV.

use std::fmt;

use elbo_core::calibration::{Fitter, Outlook, Source};
use elbo_core::ids::PromptIndex;
use elbo_core::interval::wilson;
use elbo_core::policy::replay::{Replayed, decide_by};
use serde::Serialize;

use super::Errors;

/// The results of one policy.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    /// The policy.
    pub policy: String,
    /// The share of labelled samples whose prediction is right; `None` without labels.
    pub accuracy: Option<f64>,
    /// Its 95 % interval.
    pub accuracy_interval: Option<(f64, f64)>,
    /// The share of samples with the same prediction as all slots together give.
    pub agreement: f64,
    /// Its 95 % interval.
    pub agreement_interval: (f64, f64),
    /// Mean evaluations per sample.
    pub evaluations: f64,
    /// The standard error of that mean.
    pub evaluations_std_error: f64,
    /// How many times more evaluations the reference takes.
    pub saving: f64,
    /// Mean rounds per sample.
    pub rounds: f64,
    /// Expected calibration error of the confidence that is fitted to the labels, on samples it was not fitted to; `None`
    /// without labels.
    pub ece: Option<f64>,
}

/// The results of all policies.
#[derive(Clone, Debug, Serialize)]
pub struct Table {
    /// What was replayed.
    pub errors: String,
    /// Samples.
    pub samples: usize,
    /// Samples with a label.
    pub labelled: usize,
    /// One row for each policy.
    pub rows: Vec<Row>,
    #[serde(skip)]
    truth: Vec<Option<PromptIndex>>,
    #[serde(skip)]
    all: Vec<Replayed>,
    #[serde(skip)]
    contenders: elbo_core::ensemble::Contenders,
}

impl Table {
    /// A table for some of the samples, with a first row for all slots together.
    pub(super) fn new(errors: &Errors, samples: &[usize]) -> Self {
        let slots: Vec<usize> = (0..errors.scored.slots.len()).collect();
        let decide = |sample: &usize| decide_by(&errors.contenders, &errors.scored.errors[*sample], &slots);
        let truth: Vec<_> = samples.iter().map(|&s| errors.truth[s]).collect();
        let mut table = Self {
            errors: errors.title.clone(),
            samples: samples.len(),
            labelled: truth.iter().flatten().count(),
            rows: Vec::new(),
            truth,
            all: samples.iter().map(decide).collect(),
            contenders: errors.contenders.clone(),
        };
        let exhaustive = table.all.clone();
        table.add("exhaustive", &exhaustive);
        table
    }

    /// Adds a policy.
    pub(super) fn add(&mut self, policy: &str, replayed: &[Replayed]) {
        let same = |a: PromptIndex, b: PromptIndex| !self.contenders.are_rivals(&[a, b]);
        let right =
            replayed.iter().zip(&self.truth).filter(|(r, truth)| truth.is_some_and(|t| same(t, r.best))).count();
        let agreeing = replayed.iter().zip(&self.all).filter(|(r, all)| same(all.best, r.best)).count();
        let n = replayed.len().max(1) as f64;
        let mean = replayed.iter().map(|r| r.evaluations as f64).sum::<f64>() / n;
        let variance = replayed.iter().map(|r| (r.evaluations as f64 - mean).powi(2)).sum::<f64>() / (n - 1.0).max(1.0);
        let reference = self.rows.iter().find(|row| row.policy == "reference").map_or(mean, |row| row.evaluations);
        self.rows.push(Row {
            policy: policy.to_owned(),
            accuracy: (self.labelled > 0).then(|| right as f64 / self.labelled as f64),
            accuracy_interval: (self.labelled > 0).then(|| wilson(right as u64, self.labelled as u64)),
            agreement: agreeing as f64 / n,
            agreement_interval: wilson(agreeing as u64, replayed.len() as u64),
            evaluations: mean,
            evaluations_std_error: (variance / n).sqrt(),
            saving: reference / mean,
            rounds: replayed.iter().map(|r| f64::from(r.rounds)).sum::<f64>() / n,
            ece: self.calibration_error(replayed),
        });
    }

    /// The calibration error of the confidence.
    fn calibration_error(&self, replayed: &[Replayed]) -> Option<f64> {
        let mut fitter = Fitter::default();
        for (i, (r, truth)) in replayed.iter().zip(&self.truth).enumerate() {
            let Some(truth) = *truth else { continue };
            let right = !self.contenders.are_rivals(&[truth, r.best]);
            fitter.add(&i.to_string(), Outlook { evidence: r.evidence(), softmax: 0.0, right });
        }
        fitter.finish(Source::Labels, None)?.findings.map(|findings| findings.reliability.ece)
    }

    /// The rows as CSV.
    pub fn csv(&self) -> Result<String, csv::Error> {
        let mut writer = csv::Writer::from_writer(Vec::new());
        writer.write_record([
            "policy",
            "accuracy",
            "accuracy_low",
            "accuracy_high",
            "agreement",
            "agreement_low",
            "agreement_high",
            "evaluations",
            "evaluations_std_error",
            "saving",
            "rounds",
            "ece",
        ])?;
        for row in &self.rows {
            let optional = |value: Option<f64>| value.map_or(String::new(), |v| v.to_string());
            writer.write_record([
                row.policy.clone(),
                optional(row.accuracy),
                optional(row.accuracy_interval.map(|i| i.0)),
                optional(row.accuracy_interval.map(|i| i.1)),
                row.agreement.to_string(),
                row.agreement_interval.0.to_string(),
                row.agreement_interval.1.to_string(),
                row.evaluations.to_string(),
                row.evaluations_std_error.to_string(),
                row.saving.to_string(),
                row.rounds.to_string(),
                optional(row.ece),
            ])?;
        }
        let bytes = writer.into_inner().map_err(|error| error.into_error())?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{}: {} images, {} with a label; in brackets 95 % intervals",
            self.errors, self.samples, self.labelled
        )?;
        writeln!(
            f,
            "agreement: with all slots together; saving: against the reference; ECE: of confidence fitted to other labels\n"
        )?;
        writeln!(
            f,
            "{:<40} {:>22} {:>22} {:>18} {:>7} {:>6} {:>6}",
            "policy", "accuracy %", "agreement %", "evaluations/image", "saving", "rounds", "ECE %"
        )?;
        for row in &self.rows {
            let share = |share: f64, (low, high): (f64, f64)| {
                format!("{:.2} [{:.1}, {:.1}]", 100.0 * share, 100.0 * low, 100.0 * high)
            };
            let accuracy = match (row.accuracy, row.accuracy_interval) {
                (Some(accuracy), Some(interval)) => share(accuracy, interval),
                _ => "-".to_owned(),
            };
            let ece = row.ece.map_or("-".to_owned(), |ece| format!("{:.1}", 100.0 * ece));
            let evaluations = format!("{:.1} ± {:.1}", row.evaluations, 1.96 * row.evaluations_std_error);
            writeln!(
                f,
                "{:<40} {accuracy:>22} {:>22} {evaluations:>18} {:>6.1}x {:>6.1} {ece:>6}",
                row.policy,
                share(row.agreement, row.agreement_interval),
                row.saving,
                row.rounds
            )?;
        }
        Ok(())
    }
}
