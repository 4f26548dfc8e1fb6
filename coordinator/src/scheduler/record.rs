//! The contents of reports: results and failures, checked before they are made durable, and their totals.

use elbo_core::failure::SampleFailure;
use elbo_core::ids::{LeaseKey, SampleId, ShardId};
use elbo_core::unit::UnitId;
use elbo_output::record::Totals;
use elbo_proto::{OutOfRange, v1};

/// The sums of one unit.
#[derive(Clone, Debug, PartialEq)]
pub struct UnitResult {
    /// The unit.
    pub id: UnitId,
    /// The worker's result, as it is stored.
    pub reported: v1::UnitResult,
}

impl UnitResult {
    /// How many evaluations it contains.
    pub fn evaluations(&self) -> u64 {
        u64::from(self.reported.slots).saturating_mul(self.reported.prompts.len() as u64)
    }
}

impl TryFrom<v1::UnitResult> for UnitResult {
    type Error = OutOfRange;

    fn try_from(reported: v1::UnitResult) -> Result<Self, OutOfRange> {
        Ok(Self { id: reported.id.ok_or(OutOfRange)?.try_into()?, reported })
    }
}

/// The new contents of one report: the unit of durability.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Record {
    /// Results of units that were not known before.
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
    /// A later coordinator granted the lease: this one is being replaced.
    #[error("lease {0} was granted by a later coordinator")]
    Replaced(LeaseKey),
    /// The lease was granted to another worker.
    #[error("lease {0} was granted to another worker")]
    NotHeld(LeaseKey),
    /// The lease is of an earlier coordinator, and the worker has not told this one that it holds it.
    #[error(
        "lease {0} is of an earlier coordinator, and the worker has not said that it holds it: join again and name the leases in hand"
    )]
    Unclaimed(LeaseKey),
    /// The lease does not include what was reported.
    #[error("lease {key} does not include what was reported for sample {sample}")]
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

/// Whether a result is new to its sample, and valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ResultStatus {
    /// It is new and valid.
    New,
    /// It was known already.
    Known {
        /// The first lease that was granted after the result was known, if that is remembered.
        before: Option<u64>,
    },
    /// The sample has not reached its round.
    Ahead,
    /// It contradicts the job.
    Invalid(&'static str),
}

/// Wasted evaluations, in all runs of a job.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Waste {
    /// Computed under a lease that was granted after the result was acknowledged. This must never happen.
    pub recomputed: u64,
    /// Computed by two workers at once: backups, and leases of workers that seemed dead.
    pub duplicated: u64,
}

/// A checked report.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Checked {
    /// The new parts, which must be made durable.
    pub record: Record,
    /// Results that were known already.
    pub duplicates: u32,
    /// Units from before their samples were retried. The samples start over, so these results are useless.
    pub void: Vec<UnitId>,
    /// Samples that the worker could not read, which other workers try first.
    pub postponed: Vec<SampleFailure>,
    /// Failures from before their samples were retried.
    pub outdated: Vec<SampleFailure>,
}

/// A shard's contribution to the job's totals.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ShardTotals {
    /// Samples in the shard.
    pub samples: u64,
    /// Samples in the shard that were quarantined.
    pub quarantined: u64,
    /// Evaluations behind its predictions.
    pub evaluations: u64,
    /// Evaluations that were planned and turned out not to be needed: those of quarantined samples, and of classes with
    /// fewer prompts than others.
    pub spared: u64,
}

impl ShardTotals {
    /// The totals of a job whose shards add up to this.
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
