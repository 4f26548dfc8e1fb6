//! The parts of a report on a block: errors of a unit, or a sample that failed.

use elbo_core::failure::SampleFailure;
use elbo_proto::{bytes_of, shortened, v1};

use crate::engine::UnitErrors;

/// Something to report.
#[derive(Clone, Debug, PartialEq)]
pub enum Finding {
    /// A unit is finished.
    Unit(v1::UnitResult),
    /// A sample failed.
    Bad(v1::SampleFailure),
}

impl Finding {
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::Unit(result) => bytes_of(result),
            Self::Bad(failure) => bytes_of(failure),
        }
    }
}

impl From<UnitErrors> for Finding {
    fn from(finished: UnitErrors) -> Self {
        let UnitErrors { unit, sums, errors } = finished;
        Self::Unit(v1::UnitResult {
            id: Some(unit.id.into()),
            prompts: unit.prompts.iter().map(|p| p.0).collect(),
            slots: unit.slots.len() as u32,
            sum: sums.iter().map(|s| s.sum).collect(),
            sum_sq: sums.iter().map(|s| s.sum_sq).collect(),
            errors,
        })
    }
}

impl From<SampleFailure> for Finding {
    fn from(bad: SampleFailure) -> Self {
        Self::Bad(SampleFailure { error: shortened(bad.error), ..bad }.into())
    }
}
