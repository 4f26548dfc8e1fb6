//! The outcomes of units and samples.

use elbo_core::failure::SampleFailure;
use elbo_core::ids::{PromptIndex, SampleId};
use elbo_core::ranking::ScoredPrompt;

use super::lease::LeasedUnit;

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

/// How a sample ended.
#[derive(Clone, Debug, PartialEq)]
pub enum SampleOutcome {
    /// Scored through all rounds.
    Scored {
        /// Every prompt, by index.
        prompts: Vec<ScoredPrompt>,
        /// Every error, by round, prompt and slot, if the job writes them.
        errors: Vec<SlotError>,
        /// Every prompt as scored by the audit, if the sample is audited.
        audit: Option<Vec<ScoredPrompt>>,
    },
    /// Given up.
    Quarantined(SampleFailure),
    /// Scored before its shard was reopened: its row stays as it was written.
    Kept,
}

/// A sample that needs no more evaluations.
#[derive(Clone, Debug, PartialEq)]
pub struct Finished {
    /// The sample.
    pub sample: SampleId,
    /// How it ended.
    pub outcome: SampleOutcome,
}

/// The effect of applying a unit's result.
#[derive(Clone, Copy, Debug)]
pub(super) struct Settled {
    /// The unit, its leases and its evaluations.
    pub(super) held: LeasedUnit,
    /// Whether the sample's round is complete: the sample is in the next round, or finished.
    pub(super) round_complete: bool,
}
