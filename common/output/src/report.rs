//! The report of a job: accuracy if the dataset has labels, and the samples that deserve a look.
//!
//! A report is computed from the predictions, and from the manifest if samples have their own captions. Predictions are added
//! one by one and not kept, so their number is not limited by memory.

use std::collections::HashMap;
use std::fmt;

use elbo_core::audit::{AuditBuilder, AuditReport, Audited};
use elbo_core::calibration::Confidence;
use elbo_core::class::Classes;
use elbo_core::ensemble::PromptEnsemble;
use elbo_core::ids::ClassIndex;
use elbo_core::prediction::Prediction;
use elbo_core::sample::Sample;
use elbo_data::Account;
use serde::Serialize;

use crate::predictions::{BEST, BestClass, Judgement};
use crate::record::{Timings, Totals};

mod confidence;
mod confusion;
mod pairs;
mod reasons;
mod text;

pub use confusion::Confusion;
pub use pairs::{PairScores, Proportion};
pub use reasons::Reasons;

use pairs::Pairs;

/// How many samples with the closest decisions are kept.
const CLOSEST_SHOWN: usize = 10;

/// A job's results in figures. Serialised as the output of `elbo report --json`; skipped fields are only displayed.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// Samples with a row.
    pub samples: u64,
    /// Samples with a prediction (status `ok`).
    pub labelled: u64,
    /// Samples whose confidence is lower than the job requires (status `uncertain`).
    pub uncertain: u64,
    /// Samples that could not be scored.
    pub quarantined: u64,
    /// Those of them that are in no file yet, because their shards are not finished.
    #[serde(skip_serializing_if = "is_zero")]
    pub quarantined_unwritten: u64,
    /// Files that the listing passed over.
    #[serde(skip_serializing_if = "Account::is_empty")]
    pub passed_over: Account,
    /// Accuracy over the samples with a prediction and a label that is a class; `None` if there are no such samples.
    pub accuracy: Option<Accuracy>,
    /// Evaluations behind the predictions.
    pub evaluations: u64,
    /// Evaluations that were computed again although their results had been acknowledged.
    pub evaluations_recomputed: u64,
    /// Evaluations computed by two workers.
    pub evaluations_duplicated: u64,
    /// The calibration of a done job and how good it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub confidence: Option<Confidence>,
    /// The comparison with the reference policy, if samples were audited.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub audit: Option<AuditReport>,
    /// How a class's score follows from its prompts.
    pub prompt_ensemble: PromptEnsemble,
    /// Text, image and group score, if images with their own captions come in pairs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pairs: Option<PairScores>,
    /// True classes against predicted ones.
    #[serde(skip)]
    pub confusion: Confusion,
    /// The ten samples with the smallest margin, smallest first.
    #[serde(skip)]
    pub closest: Vec<Close>,
    /// Why samples were quarantined.
    #[serde(skip)]
    pub reasons: Reasons,
    /// How long the job took, if it is done.
    #[serde(skip)]
    pub timings: Option<Timings>,
}

fn is_zero(count: &u64) -> bool {
    *count == 0
}

/// Shares of correct predictions, in [0, 1].
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Accuracy {
    /// The label's class is predicted.
    pub top1: f64,
    /// The label's class is among the five best scores; `None` if the job kept fewer than five (`--top-k`).
    pub top5: Option<f64>,
    /// The mean of `top1` over the classes that occur as labels.
    pub mean_per_class: f64,
}

/// A sample whose two best classes have close scores.
#[derive(Clone, Debug, PartialEq)]
pub struct Close {
    /// Its path relative to the source.
    pub key: String,
    /// Its label.
    pub label: Option<String>,
    /// The best class.
    pub class_name: String,
    /// The second-best class's mean error minus the best one's.
    pub margin: f32,
}

/// Builds a [`Report`].
#[derive(Clone, Debug, Default)]
pub struct ReportBuilder {
    classes: Classes,
    prompt_ensemble: PromptEnsemble,
    top_k: Option<u32>,
    /// The class of each label seen: searching a name among a thousand classes is slow for a million samples.
    meanings: HashMap<String, Option<ClassIndex>>,
    pairs: Pairs,
    labelled: u64,
    uncertain: u64,
    quarantined: u64,
    unwritten: u64,
    top5: u64,
    evaluations: u64,
    confusion: Confusion,
    closest: Vec<Close>,
    reasons: Reasons,
    audit: AuditBuilder,
}

impl ReportBuilder {
    /// A report on predictions among `classes`, which are empty if every sample has its own captions. `top_k` is the number of
    /// scores that the job kept.
    pub fn new(classes: &Classes, prompt_ensemble: PromptEnsemble, top_k: Option<u32>) -> Self {
        Self {
            classes: classes.clone(),
            prompt_ensemble,
            top_k,
            confusion: Confusion::new(classes),
            audit: AuditBuilder::new(classes),
            ..Self::default()
        }
    }

    /// Adds a prediction.
    pub fn add(&mut self, row: &Judgement) {
        let truth = row.label.as_ref().and_then(|label| match self.meanings.get(label) {
            Some(meaning) => *meaning,
            None => *self.meanings.entry(label.clone()).or_insert(self.classes.with_label(label)),
        });
        self.count(row, truth, None);
    }

    /// Adds a sample with its own captions, and its prediction if there is one yet. A class is a position among the captions.
    pub fn add_captioned(&mut self, sample: &Sample, prediction: Option<&Prediction>) {
        if let Some(prediction) = prediction {
            let captions = Classes::of_captions(&sample.candidates);
            let truth = prediction.label.as_deref().and_then(|label| captions.with_label(label));
            self.count(&prediction.into(), truth, Some(&captions));
        }
        self.pairs.add(sample, prediction);
    }

    /// Adds a quarantined sample whose row is not written yet.
    pub fn add_unwritten(&mut self, key: &str, error: &str) {
        self.quarantined += 1;
        self.unwritten += 1;
        self.reasons.add(key, error);
    }

    /// Adds an audited sample.
    pub fn add_audited(&mut self, row: &Audited) {
        self.audit.add(row);
    }

    /// Counts a sample. Its classes are its `own`, or else the job's.
    fn count(&mut self, row: &Judgement, truth: Option<ClassIndex>, own: Option<&Classes>) {
        self.evaluations += u64::from(row.evaluations);
        let best_class = match &row.best_class {
            Ok(best_class) => best_class,
            Err(error) => {
                self.quarantined += 1;
                self.reasons.add(&row.key, error);
                return;
            }
        };
        if !best_class.is_sure {
            self.uncertain += 1;
        } else {
            self.labelled += 1;
            if let Some(truth) = truth {
                self.confusion.add(truth, best_class.class);
                self.top5 += u64::from(best_class.best.contains(&truth));
            }
        }
        self.keep_if_close(row, best_class, own);
    }

    /// Keeps the sample if its margin is among the smallest so far. Samples with equal margins stay in order.
    fn keep_if_close(&mut self, row: &Judgement, best_class: &BestClass, own: Option<&Classes>) {
        let Some(margin) = best_class.margin else { return };
        let at = self.closest.partition_point(|other| other.margin.total_cmp(&margin).is_le());
        if at < CLOSEST_SHOWN {
            let class_name = own.unwrap_or(&self.classes).name(best_class.class).to_owned();
            self.closest.insert(at, Close { key: row.key.clone(), label: row.label.clone(), class_name, margin });
            self.closest.truncate(CLOSEST_SHOWN);
        }
    }

    /// The report of a job, with the totals, timings and confidence from its record if it is done.
    pub fn finish(self, totals: Option<Totals>, timings: Option<Timings>, confidence: Option<Confidence>) -> Report {
        let judged = self.confusion.total();
        let kept = self.top_k.map_or(usize::MAX, |k| k as usize);
        let has_five = kept >= BEST.min(self.classes.names.len());
        let accuracy = (judged > 0).then(|| Accuracy {
            top1: self.confusion.right() as f64 / judged as f64,
            top5: has_five.then_some(self.top5 as f64 / judged as f64),
            mean_per_class: self.confusion.mean_recall(),
        });
        Report {
            samples: self.labelled + self.uncertain + self.quarantined,
            labelled: self.labelled,
            uncertain: self.uncertain,
            quarantined: self.quarantined,
            quarantined_unwritten: self.unwritten,
            passed_over: Account::default(),
            accuracy,
            evaluations: self.evaluations,
            evaluations_recomputed: totals.map_or(0, |totals| totals.evaluations_recomputed),
            evaluations_duplicated: totals.map_or(0, |totals| totals.evaluations_duplicated),
            confidence,
            audit: self.audit.finish(),
            prompt_ensemble: self.prompt_ensemble,
            pairs: self.pairs.finish(),
            confusion: self.confusion,
            closest: self.closest,
            reasons: self.reasons,
            timings,
        }
    }
}

impl Report {
    /// Writes the cost of the job, in total and per image.
    fn cost(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} evaluations", self.evaluations)?;
        let scored = self.labelled + self.uncertain;
        if scored > 0 {
            let noun = if self.uncertain == 0 { "labelled" } else { "scored" };
            write!(f, ", {:.1} a {noun} image", self.evaluations as f64 / scored as f64)?;
        }
        let twice = self.evaluations_recomputed + self.evaluations_duplicated;
        writeln!(f, "; {twice} computed more than once")?;
        match self.timings {
            Some(Timings { starts: 1, seconds }) if self.samples > 0 && seconds > 0.0 => {
                let samples = self.samples as f64;
                writeln!(f, "{seconds:.1} s, {:.3} s an image ({:.1} images/s)", seconds / samples, samples / seconds)
            }
            // The time of a coordinator that was killed is not recorded.
            Some(Timings { starts, seconds }) if starts > 1 => {
                writeln!(f, "{seconds:.1} s in the last of {starts} runs; how long the others took is not recorded")
            }
            _ => Ok(()),
        }
    }

    fn accuracy(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(Accuracy { top1, top5, mean_per_class }) = self.accuracy else {
            return writeln!(f, "\nno accuracy: no labelled sample has a label that is a class");
        };
        writeln!(f, "\naccuracy over {} samples with a known label", self.confusion.total())?;
        for (name, share) in [("top 1", Some(top1)), ("top 5", top5), ("mean per class", Some(mean_per_class))] {
            match share {
                Some(share) => writeln!(f, "  {name:<14} {:6.2} %", share * 100.0)?,
                None => writeln!(f, "  {name:<14}      -   (--top-k kept fewer than five scores)")?,
            }
        }
        if self.confusion.is_nameless() { Ok(()) } else { write!(f, "\n{}", self.confusion) }
    }

    /// Writes why samples are quarantined, and the remedy.
    fn quarantine(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\n{}", self.reasons)?;
        if self.quarantined_unwritten > 0 {
            writeln!(
                f,
                "{} of them are of unfinished shards, whose files are not written yet",
                self.quarantined_unwritten
            )?;
        }
        writeln!(f, "once the cause is fixed, the same command with --retry-quarantined tries them")?;
        writeln!(f, "again; a higher --max-bad allows more of them")
    }

    fn closest(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "\nmost uncertain samples (margin of the mean error, sample, class, label)")?;
        for sample in &self.closest {
            let (key, class) = (text::tail(&sample.key, 30), text::head(&sample.class_name, 16));
            let label = text::head(sample.label.as_deref().unwrap_or("-"), 16);
            writeln!(f, "  {:>10}  {key}  {class}  {}", format!("{:.3e}", sample.margin), label.trim_end())?;
        }
        Ok(())
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} samples: {} labelled, ", self.samples, self.labelled)?;
        if self.uncertain > 0 {
            write!(f, "{} uncertain, ", self.uncertain)?;
        }
        writeln!(f, "{} quarantined", self.quarantined)?;
        for passed in self.passed_over.passed_over() {
            writeln!(f, "passed over, {passed}")?;
        }
        self.cost(f)?;
        if self.prompt_ensemble == PromptEnsemble::Mean {
            writeln!(f, "a class scored the mean of its prompts (--prompt-ensemble mean)")?;
        }
        self.accuracy(f)?;
        if let Some(confidence) = &self.confidence {
            writeln!(f)?;
            confidence::write(confidence, f)?;
        }
        if let Some(audit) = &self.audit {
            write!(f, "\n{audit}")?;
        }
        if let Some(pairs) = &self.pairs {
            write!(f, "\n{pairs}")?;
        }
        if !self.closest.is_empty() {
            self.closest(f)?;
        }
        if self.reasons.is_empty() { Ok(()) } else { self.quarantine(f) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use elbo_core::ids::{Round, SampleId};
    use elbo_core::prediction::{Labelled, Outcome, Score};

    const NAMES: [&str; 7] = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu"];

    /// A prediction whose classes are ranked in the given order.
    fn prediction(id: u64, label: Option<&str>, ranked: &[i32], margin: f32) -> Prediction {
        let score =
            |&class| Score { class: ClassIndex(class), mean_error: 0.1, std_error: None, n: 1, round: Round(0) };
        let labelled = Labelled {
            class: ClassIndex(ranked[0]),
            class_name: NAMES[ranked[0] as usize].into(),
            confidence: None,
            margin: Some(margin),
            scores: ranked.iter().map(score).collect(),
        };
        Prediction {
            sample: SampleId(id),
            key: format!("{id}.png"),
            label: label.map(str::to_owned),
            evaluations: 10,
            outcome: Outcome::Labelled(labelled),
        }
    }

    fn bad(id: u64, error: &str) -> Prediction {
        let outcome = Outcome::Quarantined { error: error.into() };
        Prediction { outcome, evaluations: 0, ..prediction(id, Some("ant"), &[0], 0.0) }
    }

    fn classes() -> Classes {
        Classes::parse(&NAMES.join("\n"), &[]).unwrap()
    }

    fn report(rows: &[Prediction], ensemble: PromptEnsemble, totals: Option<Totals>) -> Report {
        let mut builder = ReportBuilder::new(&classes(), ensemble, None);
        rows.iter().for_each(|row| builder.add(&row.into()));
        builder.finish(totals, None, None)
    }

    #[test]
    fn accuracy_counts_samples_with_a_prediction_and_a_known_label() {
        let report = report(
            &[
                prediction(0, Some("ant"), &[0, 1, 2, 3, 4, 5, 6], 0.5),
                prediction(1, Some("ant"), &[1, 2, 3, 4, 0, 5, 6], 0.1),
                // Sixth of the scores: not in the top five.
                prediction(2, Some("ant"), &[1, 2, 3, 4, 5, 0, 6], 0.2),
                // A label may be an index.
                prediction(3, Some("3"), &[3, 0, 1, 2, 4, 5, 6], 0.3),
                prediction(4, Some("unicorn"), &[3, 0, 1, 2, 4, 5, 6], 0.4),
                prediction(5, None, &[3, 0, 1, 2, 4, 5, 6], 0.6),
                bad(6, "not an image"),
            ],
            PromptEnsemble::Mean,
            Some(Totals {
                samples: 7,
                quarantined: 1,
                evaluations: 60,
                evaluations_recomputed: 7,
                evaluations_duplicated: 5,
            }),
        );
        assert_eq!(
            serde_json::to_value(&report).unwrap(),
            serde_json::json!({
                "samples": 7, "labelled": 6, "uncertain": 0, "quarantined": 1,
                "accuracy": {"top1": 0.5, "top5": 0.75, "mean_per_class": (1.0 / 3.0 + 1.0) / 2.0},
                "evaluations": 60, "evaluations_recomputed": 7, "evaluations_duplicated": 5,
                "prompt_ensemble": "mean"
            })
        );
    }

    #[test]
    fn without_known_labels_there_is_no_accuracy() {
        let report = report(&[prediction(0, None, &[1, 0], 0.5), bad(1, "x")], PromptEnsemble::Max, None);
        let json = serde_json::to_string(&report).unwrap();
        assert!(json.contains(r#""accuracy":null"#), "{json}");
        assert!(report.to_string().contains("no accuracy"));
    }

    #[test]
    fn the_most_uncertain_samples_and_the_reasons_are_shown() {
        let mut rows: Vec<_> = (0..30).map(|i| prediction(i, None, &[1, 0], ((i * 7) % 30) as f32)).collect();
        rows.extend([bad(30, "empty"), bad(31, "truncated"), bad(32, "truncated")]);
        let report = report(&rows, PromptEnsemble::Max, None);
        let margins: Vec<_> = report.closest.iter().map(|u| u.margin).collect();
        assert_eq!(margins, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]);
        assert_eq!(report.reasons.counted(), [("truncated", 2), ("empty", 1)]);
        let text = report.to_string();
        assert!(
            text.contains("33 samples: 30 labelled, 3 quarantined") && text.contains("      2  truncated"),
            "{text}"
        );
    }

    #[test]
    fn unwritten_quarantined_samples_count_with_their_reason() {
        let mut builder = ReportBuilder::new(&classes(), PromptEnsemble::Max, None);
        builder.add(&(&bad(0, "read: gone")).into());
        builder.add_unwritten("1.png", "read: gone");
        let report = builder.finish(None, None, None);
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(
            (&json["samples"], &json["quarantined"], &json["quarantined_unwritten"]),
            (&2.into(), &2.into(), &1.into())
        );
        let text = report.to_string();
        for told in ["      2  read: gone", "1 of them are of unfinished shards", "--retry-quarantined", "--max-bad"] {
            assert!(text.contains(told), "'{told}' is not in: {text}");
        }
    }

    #[test]
    fn top_five_accuracy_is_unknown_if_fewer_scores_were_kept() {
        let of = |top_k, ranked: &[i32]| {
            let mut builder = ReportBuilder::new(&classes(), PromptEnsemble::Max, top_k);
            builder.add(&(&prediction(0, Some("ant"), ranked, 0.5)).into());
            builder.finish(None, None, None)
        };
        let cut = of(Some(4), &[1, 2, 3, 4]);
        assert_eq!(serde_json::to_value(&cut).unwrap()["accuracy"]["top5"], serde_json::Value::Null);
        assert!(cut.to_string().contains("top 5               -   (--top-k"), "{cut}");
        assert_eq!(of(Some(5), &[1, 2, 3, 4, 0]).accuracy.unwrap().top5, Some(1.0));
        // With two classes, the best two are all of them.
        let two = Classes::parse("ant\nbee", &[]).unwrap();
        let mut builder = ReportBuilder::new(&two, PromptEnsemble::Max, Some(2));
        builder.add(&(&prediction(0, Some("ant"), &[1, 0], 0.5)).into());
        assert_eq!(builder.finish(None, None, None).accuracy.unwrap().top5, Some(1.0));
    }

    #[test]
    fn time_per_image_is_shown_if_it_is_known() {
        let of = |starts| {
            let mut builder = ReportBuilder::new(&classes(), PromptEnsemble::Max, None);
            (0..4).for_each(|i| builder.add(&(&prediction(i, None, &[0, 1], 0.5)).into()));
            builder.finish(None, Some(Timings { starts, seconds: 8.0 }), None).to_string()
        };
        assert!(of(1).contains("8.0 s, 2.000 s an image (0.5 images/s)"), "{}", of(1));
        assert!(of(3).contains("8.0 s in the last of 3 runs"), "{}", of(3));
    }

    #[test]
    fn long_names_do_not_break_the_lines_of_a_terminal() {
        let mut row = prediction(0, Some("ant"), &[0, 1], 1.2345e-12);
        row.key = "photos/".repeat(30);
        row.label = Some("a label ".repeat(20));
        let report = report(&[row, bad(1, &"endless ".repeat(50))], PromptEnsemble::Max, None).to_string();
        assert!(report.lines().all(|line| text::width(line) <= text::WIDTH), "{report}");
    }
}
