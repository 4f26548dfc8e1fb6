//! What comes of units and samples.

use elbo_core::ids::{PromptIndex, Round, SampleId};
use elbo_core::sums::Sums;

use super::SampleFailure;
use super::lease::HeldUnit;

/// One evaluation's error, kept with `--write-errors`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SlotError {
    /// The prompt.
    pub prompt: PromptIndex,
    /// The slot's position in the course.
    pub slot: usize,
    /// The job's loss.
    pub error: f32,
}

/// A prompt's final sums.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ScoredPrompt {
    /// The prompt.
    pub prompt: PromptIndex,
    /// All its errors.
    pub sums: Sums,
    /// The last round it was evaluated in.
    pub round: Round,
}

/// How a sample ended.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// Scored through all rounds.
    Scored {
        /// Every prompt, by index.
        prompts: Vec<ScoredPrompt>,
        /// Every error, by round, prompt and slot, where the job writes them.
        errors: Vec<SlotError>,
        /// Every prompt by the audit, where the sample is audited.
        audit: Option<Vec<ScoredPrompt>>,
    },
    /// Given up.
    Quarantined(SampleFailure),
    /// Scored before its shard was opened again: its row stays as it was written.
    Kept,
}

/// A sample that needs no more evaluations.
#[derive(Clone, Debug, PartialEq)]
pub struct Finished {
    /// The sample.
    pub sample: SampleId,
    /// How it ended.
    pub outcome: Outcome,
}

/// What became of a unit that was applied.
#[derive(Clone, Copy, Debug)]
pub(super) struct Settled {
    /// The unit, who had it, and what it took.
    pub(super) held: HeldUnit,
    /// The sample's round is complete: it is in the next one, or finished.
    pub(super) round_complete: bool,
}
