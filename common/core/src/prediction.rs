//! What a job says of a sample.

use crate::ids::{ClassIndex, Round, SampleId};

/// Status of a sample with a class.
pub const OK: &str = "ok";
/// Status of one that was scored, and whose best class is too unsure to be its class.
pub const UNCERTAIN: &str = "uncertain";
/// Status of one that could not be scored.
pub const QUARANTINED: &str = "quarantined";

/// What the job says of one sample.
#[derive(Clone, Debug, PartialEq)]
pub struct Prediction {
    /// The sample.
    pub sample: SampleId,
    /// Its path relative to the source.
    pub key: String,
    /// The label the dataset brings.
    pub label: Option<String>,
    /// The evaluations its scores rest on.
    pub evaluations: u32,
    /// A class, or the reason why there is none.
    pub outcome: Outcome,
}

/// How a sample ended.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// It has a class (status `ok`).
    Labelled(Labelled),
    /// It was scored, and its best class is less sure than the job asks for (status `uncertain`).
    Uncertain(Uncertain),
    /// It could not be evaluated (status `quarantined`).
    Quarantined {
        /// Why not.
        error: String,
    },
}

/// The class of a sample and what speaks for it.
#[derive(Clone, Debug, PartialEq)]
pub struct Labelled {
    /// The class with the lowest mean error.
    pub class: ClassIndex,
    /// Its name.
    pub class_name: String,
    /// Confidence in the class, in [0, 1].
    pub confidence: Option<f32>,
    /// The mean error of the second-best class less that of the best; none where there is no other on the same slots.
    pub margin: Option<f32>,
    /// Every scored class, best first.
    pub scores: Vec<Score>,
}

/// What is known of a sample that was not given a class.
#[derive(Clone, Debug, PartialEq)]
pub struct Uncertain {
    /// Confidence in the best class, in [0, 1].
    pub confidence: f32,
    /// The mean error of the second-best class less that of the best; none where there is no other on the same slots.
    pub margin: Option<f32>,
    /// Every scored class, best first.
    pub scores: Vec<Score>,
}

/// The score of one class.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Score {
    /// The class.
    pub class: ClassIndex,
    /// The mean of its errors.
    pub mean_error: f32,
    /// The standard error of that mean; none below two errors.
    pub std_error: Option<f32>,
    /// How many errors it is the mean of.
    pub n: u32,
    /// The last round in which the class was evaluated.
    pub round: Round,
}

impl Prediction {
    /// The class and its scores, where there is a class.
    pub fn labelled(&self) -> Option<&Labelled> {
        match &self.outcome {
            Outcome::Labelled(labelled) => Some(labelled),
            Outcome::Uncertain(_) | Outcome::Quarantined { .. } => None,
        }
    }

    /// The scored classes, best first; none where the sample could not be scored.
    pub fn scores(&self) -> &[Score] {
        match &self.outcome {
            Outcome::Labelled(Labelled { scores, .. }) | Outcome::Uncertain(Uncertain { scores, .. }) => scores,
            Outcome::Quarantined { .. } => &[],
        }
    }

    /// The mean error of the second-best class less that of the best.
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

    /// Why it could not be scored, where that is so.
    pub fn error(&self) -> Option<&str> {
        match &self.outcome {
            Outcome::Quarantined { error } => Some(error),
            Outcome::Labelled(_) | Outcome::Uncertain(_) => None,
        }
    }

    /// What the column `status` says.
    pub fn status(&self) -> &'static str {
        match &self.outcome {
            Outcome::Labelled(_) => OK,
            Outcome::Uncertain(_) => UNCERTAIN,
            Outcome::Quarantined { .. } => QUARANTINED,
        }
    }
}
