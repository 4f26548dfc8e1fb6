//! The result of a job for a sample.

use crate::ids::{ClassIndex, Round, SampleId};
use crate::ranking::ContenderScore;

/// Status of a sample with a class.
pub const OK: &str = "ok";
/// Status of a sample that was scored, but whose confidence is too low for a class.
pub const UNCERTAIN: &str = "uncertain";
/// Status of a sample that could not be scored.
pub const QUARANTINED: &str = "quarantined";

/// The result of the job for one sample.
#[derive(Clone, Debug, PartialEq)]
pub struct Prediction {
    /// The sample.
    pub sample: SampleId,
    /// Its path relative to the source.
    pub key: String,
    /// The label from the dataset.
    pub label: Option<String>,
    /// The evaluations behind its scores.
    pub evaluations: u32,
    /// A class, or the reason why there is none.
    pub outcome: Outcome,
}

/// The outcome for a sample.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// It has a class (status `ok`).
    Labelled(Labelled),
    /// It was scored, but its confidence is lower than the job requires (status `uncertain`).
    Uncertain(Uncertain),
    /// It could not be evaluated (status `quarantined`).
    Quarantined {
        /// The reason.
        error: String,
    },
}

/// The class of a sample, with its confidence and scores.
#[derive(Clone, Debug, PartialEq)]
pub struct Labelled {
    /// The class with the lowest mean error.
    pub class: ClassIndex,
    /// Its name.
    pub class_name: String,
    /// Confidence in the class, in [0, 1].
    pub confidence: Option<f32>,
    /// The second-best class's mean error minus the best one's; `None` if there is no other class on the same slots.
    pub margin: Option<f32>,
    /// Every scored class, best first.
    pub scores: Vec<Score>,
}

/// The result for a sample whose confidence is too low for a class.
#[derive(Clone, Debug, PartialEq)]
pub struct Uncertain {
    /// Confidence in the best class, in [0, 1].
    pub confidence: f32,
    /// The second-best class's mean error minus the best one's; `None` if there is no other class on the same slots.
    pub margin: Option<f32>,
    /// Every scored class, best first.
    pub scores: Vec<Score>,
}

/// The score of one class.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Score {
    /// The class.
    pub class: ClassIndex,
    /// Its mean error.
    pub mean_error: f32,
    /// The standard error of that mean; `None` with fewer than two errors.
    pub std_error: Option<f32>,
    /// The number of errors in the mean.
    pub n: u32,
    /// The last round in which the class was evaluated.
    pub round: Round,
}

impl Score {
    /// The score of a class, which is that of its best contender.
    pub fn new(class: ClassIndex, best: &ContenderScore) -> Self {
        Self {
            class,
            mean_error: best.mean as f32,
            std_error: best.std_error().map(|error| error as f32),
            n: best.errors(),
            round: best.round(),
        }
    }
}

impl Prediction {
    /// The class and its scores, if there is a class.
    pub fn labelled(&self) -> Option<&Labelled> {
        match &self.outcome {
            Outcome::Labelled(labelled) => Some(labelled),
            Outcome::Uncertain(_) | Outcome::Quarantined { .. } => None,
        }
    }

    /// The scored classes, best first; empty if the sample could not be scored.
    pub fn scores(&self) -> &[Score] {
        match &self.outcome {
            Outcome::Labelled(Labelled { scores, .. }) | Outcome::Uncertain(Uncertain { scores, .. }) => scores,
            Outcome::Quarantined { .. } => &[],
        }
    }

    /// The second-best class's mean error minus the best one's.
    pub fn margin(&self) -> Option<f32> {
        match &self.outcome {
            Outcome::Labelled(Labelled { margin, .. }) | Outcome::Uncertain(Uncertain { margin, .. }) => *margin,
            Outcome::Quarantined { .. } => None,
        }
    }

    /// Confidence in the best class.
    pub fn confidence(&self) -> Option<f32> {
        match &self.outcome {
            Outcome::Labelled(labelled) => labelled.confidence,
            Outcome::Uncertain(uncertain) => Some(uncertain.confidence),
            Outcome::Quarantined { .. } => None,
        }
    }

    /// Why the sample could not be scored, if so.
    pub fn error(&self) -> Option<&str> {
        match &self.outcome {
            Outcome::Quarantined { error } => Some(error),
            Outcome::Labelled(_) | Outcome::Uncertain(_) => None,
        }
    }

    /// The value of the column `status`.
    pub fn status(&self) -> &'static str {
        match &self.outcome {
            Outcome::Labelled(_) => OK,
            Outcome::Uncertain(_) => UNCERTAIN,
            Outcome::Quarantined { .. } => QUARANTINED,
        }
    }
}
