//! The contract's names of units and leases, and of what workers are at, to and from those the rest speaks of.

use elbo_core::activity::Activity;
use elbo_core::ids::{Epoch, LeaseId, LeaseKey, Round, SampleId};
use elbo_core::unit::UnitId;

use crate::v1;

impl From<UnitId> for v1::UnitId {
    fn from(id: UnitId) -> Self {
        let UnitId { sample, round, slots, prompts } = id;
        Self { sample: sample.0, round: round.0.into(), slots: slots.into(), prompts: prompts.into() }
    }
}

/// A unit no job can have.
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

impl v1::Block {
    /// The lease it was granted under.
    pub fn key(&self) -> LeaseKey {
        LeaseKey { epoch: Epoch(self.epoch), lease: LeaseId(self.lease) }
    }
}
