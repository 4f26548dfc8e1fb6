//! What reports bring: results and failures, checked before they are made durable, and the totals they add up to.

use elbo_core::ids::{LeaseKey, SampleId, ShardId};
use elbo_core::unit::UnitId;
use elbo_output::record::Totals;

/// The sums of one unit as a worker reports them.
#[derive(Clone, Debug, PartialEq)]
pub struct UnitResult {
    /// The unit.
    pub id: UnitId,
    /// Its prompts, as the worker understood them.
    pub prompts: Vec<u32>,
    /// How many slots each prompt was evaluated on.
    pub slots: u32,
    /// Sum of errors by prompt.
    pub sum: Vec<f64>,
    /// Sum of squared errors by prompt.
    pub sum_sq: Vec<f64>,
    /// Every error, prompt by prompt, where the job keeps them.
    pub errors: Vec<f32>,
}

/// A sample no worker can evaluate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SampleFailure {
    /// The sample.
    pub sample: SampleId,
    /// Where it failed: read, decode, preprocess, encode or evaluate; or [`UNREAD`](super::UNREAD).
    pub stage: String,
    /// Why.
    pub error: String,
}

/// What one report adds: the unit of durability.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Record {
    /// Results of units that were not known.
    pub results: Vec<UnitResult>,
    /// Samples that failed.
    pub failures: Vec<SampleFailure>,
}

/// A report that can't be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReportError {
    /// The shard of a result is neither open nor done: open it and check again.
    #[error("shard {0} is not open")]
    NotOpen(ShardId),
    /// The lease was never granted.
    #[error("lease {0} was never granted by this coordinator")]
    UnknownLease(LeaseKey),
    /// A later coordinator has granted the lease: this one is being replaced.
    #[error("lease {0} is of a later coordinator than this one")]
    Replaced(LeaseKey),
    /// The lease was granted to another worker.
    #[error("lease {0} was granted to another worker")]
    NotHeld(LeaseKey),
    /// The worker has the lease of an earlier coordinator, and this one has not heard of that.
    #[error(
        "lease {0} is of an earlier coordinator, and the worker has not said that it holds it: join again with what is in hand"
    )]
    Unclaimed(LeaseKey),
    /// The lease was granted without that.
    #[error("lease {key} was granted without what is reported of sample {sample}")]
    NotOfLease {
        /// The lease.
        key: LeaseKey,
        /// The sample.
        sample: SampleId,
    },
    /// A result contradicts the job.
    #[error("the result of sample {sample}, round {round} was refused: {reason}")]
    Invalid {
        /// The sample.
        sample: u64,
        /// The round.
        round: u16,
        /// What is wrong.
        reason: &'static str,
    },
}

/// What a result is to its sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It is new and valid.
    New,
    /// It was known already: since before the lease of that number was granted, where that is remembered.
    Known {
        /// The first lease from when it was known.
        before: Option<u64>,
    },
    /// The sample has not come to its round.
    Ahead,
    /// It contradicts the job.
    Invalid(&'static str),
}

/// Evaluations that came to nothing, in all runs of a job.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Waste {
    /// Computed under a lease that was granted after they had been acknowledged, which must never be.
    pub recomputed: u64,
    /// Computed by two workers at once: backups, and leases of workers that seemed dead.
    pub duplicated: u64,
}

/// A checked report.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Checked {
    /// What is new and must be made durable.
    pub record: Record,
    /// Results that were known already.
    pub duplicates: u32,
    /// Units of an earlier try of their samples, which begin anew: their results are of no use any more.
    pub void: Vec<UnitId>,
    /// Samples that the worker could not read, and others are to look at first.
    pub postponed: Vec<SampleFailure>,
    /// Failures from before their samples were given another try.
    pub outdated: Vec<SampleFailure>,
}

/// What a done shard contributed to the job's totals.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ShardTotals {
    /// Samples in the shard.
    pub samples: u64,
    /// Samples of it that were quarantined.
    pub quarantined: u64,
    /// Evaluations its predictions rest on.
    pub evaluations: u64,
    /// Evaluations that were planned and turned out not to be needed: of samples given up, and of classes with fewer
    /// prompts than others.
    pub spared: u64,
}

impl ShardTotals {
    /// What a job amounts to whose shards are like this all together.
    pub fn of_job(self, waste: Waste) -> Totals {
        Totals {
            samples: self.samples,
            quarantined: self.quarantined,
            evaluations: self.evaluations,
            evaluations_recomputed: waste.recomputed,
            evaluations_duplicated: waste.duplicated,
        }
    }

    pub(crate) fn add(&mut self, other: Self) {
        self.samples += other.samples;
        self.quarantined += other.quarantined;
        self.evaluations += other.evaluations;
        self.spared += other.spared;
    }
}
