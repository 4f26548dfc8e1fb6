//! Conversions of units, leases, failures and worker activities between the contract's types and those of `elbo_core`.

use elbo_core::activity::Activity;
use elbo_core::failure::{SampleFailure, UnknownStage};
use elbo_core::ids::{Epoch, LeaseId, LeaseKey, Round, SampleId};
use elbo_core::unit::UnitId;

use crate::v1;

impl From<UnitId> for v1::UnitId {
    fn from(id: UnitId) -> Self {
        let UnitId { sample, round, slots, prompts } = id;
        Self { sample: sample.0, round: round.0.into(), slots: slots.into(), prompts: prompts.into() }
    }
}

/// The unit's numbers are larger than any job can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfRange;

impl TryFrom<v1::UnitId> for UnitId {
    type Error = OutOfRange;

    fn try_from(id: v1::UnitId) -> Result<Self, OutOfRange> {
        let narrow = |value: u32| u16::try_from(value).map_err(|_| OutOfRange);
        let (round, slots, prompts) = (narrow(id.round)?, narrow(id.slots)?, narrow(id.prompts)?);
        Ok(Self { sample: SampleId(id.sample), round: Round(round), slots, prompts })
    }
}

impl From<LeaseKey> for v1::HeldLease {
    fn from(key: LeaseKey) -> Self {
        Self { epoch: key.epoch.0, lease: key.lease.0 }
    }
}

impl From<&v1::HeldLease> for LeaseKey {
    fn from(held: &v1::HeldLease) -> Self {
        Self { epoch: Epoch(held.epoch), lease: LeaseId(held.lease) }
    }
}

impl From<SampleFailure> for v1::SampleFailure {
    fn from(failure: SampleFailure) -> Self {
        Self { sample: failure.sample.0, stage: failure.stage.name().to_owned(), error: failure.error }
    }
}

impl TryFrom<v1::SampleFailure> for SampleFailure {
    type Error = UnknownStage;

    fn try_from(failure: v1::SampleFailure) -> Result<Self, UnknownStage> {
        Ok(Self { sample: SampleId(failure.sample), stage: failure.stage.parse()?, error: failure.error })
    }
}

impl From<Option<Activity>> for v1::Activity {
    fn from(activity: Option<Activity>) -> Self {
        match activity {
            None => Self::Unspecified,
            Some(Activity::Loading) => Self::Loading,
            Some(Activity::Waiting) => Self::Waiting,
            Some(Activity::Preparing) => Self::Preparing,
            Some(Activity::Computing) => Self::Computing,
        }
    }
}

impl From<v1::Activity> for Option<Activity> {
    fn from(activity: v1::Activity) -> Self {
        match activity {
            v1::Activity::Unspecified => None,
            v1::Activity::Loading => Some(Activity::Loading),
            v1::Activity::Waiting => Some(Activity::Waiting),
            v1::Activity::Preparing => Some(Activity::Preparing),
            v1::Activity::Computing => Some(Activity::Computing),
        }
    }
}

/// Why a worker gets no more leases.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeaveReason {
    /// The job is done.
    Done,
    /// The coordinator is stopping, and may come back.
    Stopping,
    /// Another job follows at its address.
    NextJob,
}

impl From<LeaveReason> for v1::Leave {
    fn from(reason: LeaveReason) -> Self {
        Self { done: reason == LeaveReason::Done, next: reason == LeaveReason::NextJob }
    }
}

impl From<v1::Leave> for LeaveReason {
    fn from(leave: v1::Leave) -> Self {
        match leave {
            v1::Leave { next: true, .. } => Self::NextJob,
            v1::Leave { done: true, .. } => Self::Done,
            v1::Leave { .. } => Self::Stopping,
        }
    }
}

impl v1::Block {
    /// The lease that granted the block.
    pub fn key(&self) -> LeaseKey {
        LeaseKey { epoch: Epoch(self.epoch), lease: LeaseId(self.lease) }
    }
}
