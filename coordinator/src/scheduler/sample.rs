//! One sample: untouched, active, or ended.

use elbo_core::failure::SampleFailure;
use elbo_core::ids::{LeaseKey, Round, SampleId};
use elbo_core::sample::Sample;
use elbo_core::unit::{Cut, Unit, UnitId};

use super::active::Active;
use super::lease::{Holders, LeasedUnit};
use super::outcome::{Finished, SampleOutcome, Settled};
use super::record::ResultStatus;
use super::{JobShape, UnitResult, room};

/// The state of one sample.
#[derive(Debug)]
pub(super) struct SampleState {
    id: SampleId,
    /// How many captions of its own it has.
    captions: u32,
    /// Whether it is audited.
    audited: bool,
    stage: SampleStage,
    /// Evaluations merged or waiting to be merged.
    evaluations: u64,
}

#[derive(Debug)]
enum SampleStage {
    /// Every unit of the first round is ready, so no further state is needed.
    Untouched,
    Active(Box<Active>),
    Ended(SampleOutcome),
}

impl SampleState {
    pub(super) fn new(job: &JobShape, sample: &Sample) -> Self {
        let captions = sample.candidates.len();
        let audited = job.audits(&sample.key);
        Self { id: sample.id, captions: captions as u32, audited, stage: SampleStage::Untouched, evaluations: 0 }
    }

    /// How the first round is cut into units.
    fn first_cut(&self, job: &JobShape) -> Cut {
        let prompts = job.first_prompts(self.captions as usize);
        Cut::new(job.course().first_slots(prompts), prompts)
    }

    /// The evaluations of the first round.
    pub(super) fn first_evaluations(&self, job: &JobShape) -> u64 {
        let prompts = job.first_prompts(self.captions as usize);
        (job.course().first_slots(prompts) * prompts) as u64
    }

    pub(super) fn is_in_first_round(&self) -> bool {
        match &self.stage {
            SampleStage::Untouched => true,
            SampleStage::Active(active) => active.round() == Round(0),
            SampleStage::Ended(_) => false,
        }
    }

    /// The sample's active state, begun if necessary; `None` once it has ended.
    fn active(&mut self, job: &JobShape) -> Option<&mut Active> {
        if let SampleStage::Untouched = self.stage {
            self.stage =
                SampleStage::Active(Box::new(Active::begin(job, self.id, self.captions as usize, self.audited)));
        }
        match &mut self.stage {
            SampleStage::Active(active) => Some(active),
            SampleStage::Untouched | SampleStage::Ended(_) => None,
        }
    }

    fn end_if_over(&mut self) {
        if let SampleStage::Active(active) = &mut self.stage
            && active.is_over()
        {
            self.stage = SampleStage::Ended(active.take_outcome());
        }
    }

    /// The round and its cut into units; `None` once the sample has ended.
    fn round(&self, job: &JobShape) -> Option<(Round, Cut)> {
        match &self.stage {
            SampleStage::Untouched => Some((Round(0), self.first_cut(job))),
            SampleStage::Active(active) => Some((active.round(), active.cut())),
            SampleStage::Ended(_) => None,
        }
    }

    /// The evaluations a unit of the current round costs.
    pub(super) fn unit_evaluations(&self, job: &JobShape, id: UnitId) -> u64 {
        self.round(job).map_or(0, |(_, cut)| cut.evaluations(id))
    }

    /// The most bytes that a unit of the current round takes in a block.
    pub(super) fn unit_bytes(&self, job: &JobShape, id: UnitId) -> usize {
        let prompts = self.round(job).map_or(0, |(_, cut)| cut.prompt_range(id).len());
        room::of_unit(prompts, job.prompts_of(self.captions as usize))
    }

    /// Evaluations that were planned for the sample and turned out not to be needed.
    pub(super) fn spared(&self, job: &JobShape) -> u64 {
        job.planned_of(self.captions as usize).saturating_sub(self.evaluations)
    }

    pub(super) fn is_finished(&self) -> bool {
        matches!(self.stage, SampleStage::Ended(_))
    }

    /// The ids of the current round's units.
    pub(super) fn unit_ids(&self, job: &JobShape) -> Vec<UnitId> {
        self.round(job).map(|(round, cut)| cut.ids(self.id, round).collect()).unwrap_or_default()
    }

    /// Whether a unit is of the current round and not leased or done.
    pub(super) fn is_ready(&self, job: &JobShape, id: UnitId) -> bool {
        match &self.stage {
            SampleStage::Untouched => id.round == Round(0) && self.first_cut(job).position(id).is_some(),
            SampleStage::Active(active) => active.is_ready(id),
            SampleStage::Ended(_) => false,
        }
    }

    /// The leases on a unit.
    pub(super) fn holders(&self, id: UnitId) -> Holders {
        match &self.stage {
            SampleStage::Active(active) => active.holders(id),
            SampleStage::Untouched | SampleStage::Ended(_) => Holders::default(),
        }
    }

    /// Leases a unit that is not done and has fewer than two leases, and describes it.
    pub(super) fn lease(&mut self, job: &JobShape, id: UnitId, key: LeaseKey) -> Option<Unit> {
        self.active(job)?.lease(job, id, key)
    }

    /// Removes a lease from a unit. Returns whether the unit is ready now.
    pub(super) fn unlease(&mut self, id: UnitId, key: LeaseKey) -> bool {
        match &mut self.stage {
            SampleStage::Active(active) => active.unlease(id, key),
            SampleStage::Untouched | SampleStage::Ended(_) => false,
        }
    }

    /// Whether a result is new to the sample, and valid.
    pub(super) fn check(&mut self, job: &JobShape, result: &UnitResult) -> ResultStatus {
        self.active(job).map_or(ResultStatus::Known { before: None }, |active| active.check(job, result))
    }

    /// Takes in a new result; `None` if it was already known. `before` is the number of the next lease to be granted.
    pub(super) fn apply(&mut self, job: &JobShape, result: UnitResult, before: u64) -> Option<Settled> {
        let settled = self.active(job)?.apply(job, result, before)?;
        self.evaluations += settled.held.evaluations;
        self.end_if_over();
        Some(settled)
    }

    /// Ends a sample that an earlier commit has written, after this many evaluations.
    pub(super) fn keep(&mut self, evaluations: u64) {
        (self.stage, self.evaluations) = (SampleStage::Ended(SampleOutcome::Kept), evaluations);
    }

    /// Gives the sample up. Returns its leased units.
    pub(super) fn quarantine(&mut self, failure: SampleFailure) -> Vec<LeasedUnit> {
        let SampleStage::Active(active) = &mut self.stage else {
            self.stage = SampleStage::Ended(SampleOutcome::Quarantined(failure));
            return Vec::new();
        };
        let held = active.leased();
        // A sample that fails during its audit has its class already: only the audit is lost.
        let outcome = active.outcome_before_audit().unwrap_or(SampleOutcome::Quarantined(failure));
        self.stage = SampleStage::Ended(outcome);
        held
    }

    /// Whether the sample was given up.
    pub(super) fn is_quarantined(&self) -> bool {
        matches!(self.stage, SampleStage::Ended(SampleOutcome::Quarantined(_)))
    }

    /// The sample's outcome; `None` if it has not ended.
    pub(super) fn into_finished(self) -> Option<Finished> {
        match self.stage {
            SampleStage::Ended(outcome) => Some(Finished { sample: self.id, outcome }),
            SampleStage::Untouched | SampleStage::Active(_) => None,
        }
    }
}
