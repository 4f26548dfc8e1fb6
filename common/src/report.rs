//! What a job amounts to: accuracy where the dataset brings labels, and which samples deserve a look.
//!
//! A report is a function of the predictions, and of the manifest where samples bring their own captions; they are read one by
//! one, so it can be made of any number of them.

use std::borrow::Borrow;
use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;

use crate::class::Classes;
use crate::ensemble::PromptEnsemble;
use crate::ids::ClassIndex;
use crate::manifest::Sample;
use crate::predictions::{Outcome, Prediction};

mod confusion;
mod pairs;

pub use confusion::Confusion;
pub use pairs::{PairScores, Share};

use pairs::Pairs;

/// Most uncertain samples kept.
const UNCERTAIN_SHOWN: usize = 10;

/// A job's results in figures. Serialises to what `elbo report --json` prints; what is skipped is for people.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// Samples with a row.
    pub samples: u64,
    /// Samples with a prediction (status `ok`).
    pub labelled: u64,
    /// Samples without one.
    pub quarantined: u64,
    /// Accuracy over the samples with a prediction and a label that is a class; none where there are none.
    pub accuracy: Option<Accuracy>,
    /// Evaluations the predictions rest on.
    pub evaluations: u64,
    /// Evaluations computed more than once.
    pub evaluations_recomputed: u64,
    /// How the prompts of a class make its score.
    pub prompt_ensemble: PromptEnsemble,
    /// Text, image and group score, where images with their own captions come in pairs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pairs: Option<PairScores>,
    /// True classes against predicted ones.
    #[serde(skip)]
    pub confusion: Confusion,
    /// The ten samples with the smallest margin, smallest first.
    #[serde(skip)]
    pub uncertain: Vec<Uncertain>,
    /// Why samples were quarantined, and how many, most frequent first.
    #[serde(skip)]
    pub reasons: Vec<(String, u64)>,
}

/// Shares of right predictions, in [0, 1].
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Accuracy {
    /// The label's class is predicted.
    pub top1: f64,
    /// The label's class is among the five best scores.
    pub top5: f64,
    /// `top1` of each class that occurs as a label, averaged over these classes.
    pub mean_per_class: f64,
}

/// A sample whose two best classes are close.
#[derive(Clone, Debug, PartialEq)]
pub struct Uncertain {
    /// Its path relative to the source.
    pub key: String,
    /// Its label.
    pub label: Option<String>,
    /// The predicted class.
    pub class_name: String,
    /// The mean error of the second-best class less that of the best.
    pub margin: f32,
}

impl Report {
    /// The report of `predictions` among `classes`, of which `recomputed` evaluations were computed more than once.
    pub fn new<P: Borrow<Prediction>>(
        predictions: impl IntoIterator<Item = P>,
        classes: &Classes,
        prompt_ensemble: PromptEnsemble,
        recomputed: u64,
    ) -> Self {
        let mut counts = Counts { confusion: Confusion::new(classes), prompt_ensemble, ..Counts::default() };
        for prediction in predictions {
            counts.add(prediction.borrow(), classes);
        }
        counts.finish(recomputed)
    }

    /// The report of samples with their own captions, each with its prediction if there is one yet. A class is a position
    /// among a sample's captions.
    pub fn of_captions(rows: impl IntoIterator<Item = (Sample, Option<Prediction>)>, recomputed: u64) -> Self {
        let (mut counts, mut pairs) = (Counts::default(), Pairs::default());
        for (sample, prediction) in rows {
            if let Some(prediction) = &prediction {
                counts.add(prediction, &Classes::of_captions(&sample.candidates));
            }
            pairs.add(&sample, prediction.as_ref());
        }
        Self { pairs: pairs.finish(), ..counts.finish(recomputed) }
    }
}

/// What is counted on the way.
#[derive(Debug, Default)]
struct Counts {
    labelled: u64,
    quarantined: u64,
    top5: u64,
    evaluations: u64,
    prompt_ensemble: PromptEnsemble,
    confusion: Confusion,
    uncertain: Vec<Uncertain>,
    reasons: BTreeMap<String, u64>,
}

impl Counts {
    fn add(&mut self, prediction: &Prediction, classes: &Classes) {
        self.evaluations += u64::from(prediction.evaluations);
        let labelled = match &prediction.outcome {
            Outcome::Labelled(labelled) => labelled,
            Outcome::Quarantined { error } => {
                self.quarantined += 1;
                *self.reasons.entry(error.clone()).or_default() += 1;
                return;
            }
        };
        self.labelled += 1;
        if let Some(truth) = prediction.label.as_deref().and_then(|label| classes.with_label(label)) {
            self.confusion.add(truth, labelled.class);
            let first_five: Vec<ClassIndex> = labelled.scores.iter().take(5).map(|score| score.class).collect();
            self.top5 += u64::from(first_five.contains(&truth));
        }
        if let Some(margin) = labelled.margin {
            self.uncertain(prediction, &labelled.class_name, margin);
        }
    }

    /// Keeps the sample if its margin is among the smallest so far; equal margins stay in order.
    fn uncertain(&mut self, prediction: &Prediction, class_name: &str, margin: f32) {
        let at = self.uncertain.partition_point(|other| other.margin.total_cmp(&margin).is_le());
        if at < UNCERTAIN_SHOWN {
            let (key, label) = (prediction.key.clone(), prediction.label.clone());
            self.uncertain.insert(at, Uncertain { key, label, class_name: class_name.to_owned(), margin });
            self.uncertain.truncate(UNCERTAIN_SHOWN);
        }
    }

    fn finish(self, evaluations_recomputed: u64) -> Report {
        let judged = self.confusion.total();
        let accuracy = (judged > 0).then(|| Accuracy {
            top1: self.confusion.right() as f64 / judged as f64,
            top5: self.top5 as f64 / judged as f64,
            mean_per_class: self.confusion.mean_recall(),
        });
        let mut reasons: Vec<_> = self.reasons.into_iter().collect();
        reasons.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        Report {
            samples: self.labelled + self.quarantined,
            labelled: self.labelled,
            quarantined: self.quarantined,
            accuracy,
            evaluations: self.evaluations,
            evaluations_recomputed,
            prompt_ensemble: self.prompt_ensemble,
            pairs: None,
            confusion: self.confusion,
            uncertain: self.uncertain,
            reasons,
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} samples: {} labelled, {} quarantined", self.samples, self.labelled, self.quarantined)?;
        write!(f, "{} evaluations", self.evaluations)?;
        if self.labelled > 0 {
            write!(f, ", {:.1} a labelled sample", self.evaluations as f64 / self.labelled as f64)?;
        }
        writeln!(f, "; {} computed more than once", self.evaluations_recomputed)?;
        if self.prompt_ensemble == PromptEnsemble::Mean {
            writeln!(f, "a class scored the mean of its prompts (--prompt-ensemble mean)")?;
        }
        match self.accuracy {
            Some(Accuracy { top1, top5, mean_per_class }) => {
                writeln!(f, "\naccuracy over {} samples with a known label", self.confusion.total())?;
                for (name, share) in [("top 1", top1), ("top 5", top5), ("mean per class", mean_per_class)] {
                    writeln!(f, "  {name:<14} {:6.2} %", share * 100.0)?;
                }
                if !self.confusion.is_nameless() {
                    write!(f, "\n{}", self.confusion)?;
                }
            }
            None => writeln!(f, "\nno accuracy: no labelled sample has a label that is a class")?,
        }
        if let Some(pairs) = &self.pairs {
            write!(f, "\n{pairs}")?;
        }
        if !self.uncertain.is_empty() {
            writeln!(f, "\nmost uncertain samples (margin of the mean error, predicted class, label)")?;
            for sample in &self.uncertain {
                let label = sample.label.as_deref().unwrap_or("-");
                writeln!(f, "  {:.3e}  {}  {}  {}", sample.margin, sample.key, sample.class_name, label)?;
            }
        }
        if !self.reasons.is_empty() {
            writeln!(f, "\nquarantined because of")?;
            self.reasons.iter().try_for_each(|(reason, count)| writeln!(f, "  {count:>6}  {reason}"))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{Round, SampleId};
    use crate::predictions::{Labelled, Score};

    const NAMES: [&str; 7] = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu"];

    /// A prediction whose classes are ranked as given.
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

    #[test]
    fn accuracy_counts_what_has_a_prediction_and_a_known_label() {
        let report = Report::new(
            [
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
            &classes(),
            PromptEnsemble::Mean,
            7,
        );
        assert_eq!(
            serde_json::to_value(&report).unwrap(),
            serde_json::json!({
                "samples": 7, "labelled": 6, "quarantined": 1,
                "accuracy": {"top1": 0.5, "top5": 0.75, "mean_per_class": (1.0 / 3.0 + 1.0) / 2.0},
                "evaluations": 60, "evaluations_recomputed": 7, "prompt_ensemble": "mean"
            })
        );
    }

    #[test]
    fn without_known_labels_there_is_no_accuracy() {
        let report = Report::new([prediction(0, None, &[1, 0], 0.5), bad(1, "x")], &classes(), PromptEnsemble::Max, 0);
        let json = serde_json::to_string(&report).unwrap();
        assert!(json.contains(r#""accuracy":null"#), "{json}");
        assert!(report.to_string().contains("no accuracy"));
    }

    #[test]
    fn the_most_uncertain_samples_and_the_reasons_are_shown() {
        let mut rows: Vec<_> = (0..30).map(|i| prediction(i, None, &[1, 0], ((i * 7) % 30) as f32)).collect();
        rows.extend([bad(30, "empty"), bad(31, "truncated"), bad(32, "truncated")]);
        let report = Report::new(&rows, &classes(), PromptEnsemble::Max, 0);
        let margins: Vec<_> = report.uncertain.iter().map(|u| u.margin).collect();
        assert_eq!(margins, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]);
        assert_eq!(report.reasons, [("truncated".to_owned(), 2), ("empty".to_owned(), 1)]);
        let text = report.to_string();
        assert!(
            text.contains("33 samples: 30 labelled, 3 quarantined") && text.contains("     2  truncated"),
            "{text}"
        );
    }
}
