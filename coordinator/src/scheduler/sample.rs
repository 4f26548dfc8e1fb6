//! One sample: untouched, on its way through the rounds, or ended.

use elbo_core::ids::{LeaseKey, Round, SampleId};
use elbo_core::sample::Sample;
use elbo_core::unit::{Cut, Unit, UnitId};

use super::active::Active;
use super::lease::{HeldUnit, Holders};
use super::outcome::{Finished, Outcome, Settled};
use super::record::Verdict;
use super::{JobShape, SampleFailure, UnitResult, room};

/// The state of one sample.
#[derive(Debug)]
pub(super) struct SampleState {
    id: SampleId,
    /// How many captions of its own it has.
    captions: u32,
    /// Whether it is audited.
    audited: bool,
    stage: Stage,
    /// Evaluations merged or waiting to be.
    evaluations: u64,
}

#[derive(Debug)]
enum Stage {
    /// Every unit of the first round is ready: nothing else needs to be known.
    Untouched,
    Active(Box<Active>),
    Ended(Outcome),
}

impl SampleState {
    pub(super) fn new(job: &JobShape, sample: &Sample) -> Self {
        let captions = sample.candidates.len();
        let audited = job.audits(&sample.key);
        let mut state =
            Self { id: sample.id, captions: captions as u32, audited, stage: Stage::Untouched, evaluations: 0 };
        if job.prompts_of(captions) == 0 {
            // There is nothing to evaluate.
            state.active(job);
            state.end_if_over();
        }
        state
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
            Stage::Untouched => true,
            Stage::Active(active) => active.round() == Round(0),
            Stage::Ended(_) => false,
        }
    }

    /// The sample's rounds, begun if need be; `None` once it has ended.
    fn active(&mut self, job: &JobShape) -> Option<&mut Active> {
        if let Stage::Untouched = self.stage {
            self.stage = Stage::Active(Box::new(Active::begin(job, self.id, self.captions as usize, self.audited)));
        }
        match &mut self.stage {
            Stage::Active(active) => Some(active),
            Stage::Untouched | Stage::Ended(_) => None,
        }
    }

    fn end_if_over(&mut self) {
        if let Stage::Active(active) = &mut self.stage
            && active.is_over()
        {
            self.stage = Stage::Ended(active.take_outcome());
        }
    }

    /// The round and its cut into units; `None` once the sample has ended.
    fn round(&self, job: &JobShape) -> Option<(Round, Cut)> {
        match &self.stage {
            Stage::Untouched => Some((Round(0), self.first_cut(job))),
            Stage::Active(active) => Some((active.round(), active.cut())),
            Stage::Ended(_) => None,
        }
    }

    /// The evaluations a unit of the current round costs.
    pub(super) fn unit_evaluations(&self, job: &JobShape, id: UnitId) -> u64 {
        self.round(job).map_or(0, |(_, cut)| cut.evaluations(id))
    }

    /// Bytes that a unit of the current round takes in a block, at most.
    pub(super) fn unit_bytes(&self, job: &JobShape, id: UnitId) -> usize {
        let prompts = self.round(job).map_or(0, |(_, cut)| cut.prompt_range(id).len());
        room::of_unit(prompts, job.prompts_of(self.captions as usize))
    }

    /// Evaluations that were planned for the sample and not needed in the end.
    pub(super) fn spared(&self, job: &JobShape) -> u64 {
        job.planned_of(self.captions as usize).saturating_sub(self.evaluations)
    }

    pub(super) fn is_finished(&self) -> bool {
        matches!(self.stage, Stage::Ended(_))
    }

    /// The ids of the current round's units.
    pub(super) fn unit_ids(&self, job: &JobShape) -> Vec<UnitId> {
        self.round(job).map(|(round, cut)| cut.ids(self.id, round).collect()).unwrap_or_default()
    }

    /// Whether a unit is of the current round and not leased or done.
    pub(super) fn is_ready(&self, job: &JobShape, id: UnitId) -> bool {
        match &self.stage {
            Stage::Untouched => id.round == Round(0) && self.first_cut(job).position(id).is_some(),
            Stage::Active(active) => active.is_ready(id),
            Stage::Ended(_) => false,
        }
    }

    /// Who computes a unit.
    pub(super) fn holders(&self, id: UnitId) -> Holders {
        match &self.stage {
            Stage::Active(active) => active.holders(id),
            Stage::Untouched | Stage::Ended(_) => Holders::default(),
        }
    }

    /// Leases a unit that is not done and has fewer than two leases, and describes it.
    pub(super) fn lease(&mut self, job: &JobShape, id: UnitId, key: LeaseKey) -> Option<Unit> {
        self.active(job)?.lease(job, id, key)
    }

    /// Takes a lease back; whether the unit is ready now.
    pub(super) fn unlease(&mut self, id: UnitId, key: LeaseKey) -> bool {
        match &mut self.stage {
            Stage::Active(active) => active.unlease(id, key),
            Stage::Untouched | Stage::Ended(_) => false,
        }
    }

    /// What a result is to the sample.
    pub(super) fn check(&mut self, job: &JobShape, result: &UnitResult) -> Verdict {
        self.active(job).map_or(Verdict::Known { before: None }, |active| active.check(job, result))
    }

    /// Takes a new result in, before the lease of that number is granted; `None` where it was known.
    pub(super) fn apply(&mut self, job: &JobShape, result: UnitResult, before: u64) -> Option<Settled> {
        let settled = self.active(job)?.apply(job, result, before)?;
        self.evaluations += settled.held.evaluations;
        self.end_if_over();
        Some(settled)
    }

    /// Ends a sample that an earlier commit has written, after so many evaluations.
    pub(super) fn keep(&mut self, evaluations: u64) {
        (self.stage, self.evaluations) = (Stage::Ended(Outcome::Kept), evaluations);
    }

    /// Gives the sample up; the units of it that are leased.
    pub(super) fn quarantine(&mut self, failure: SampleFailure) -> Vec<HeldUnit> {
        let Stage::Active(active) = &mut self.stage else {
            self.stage = Stage::Ended(Outcome::Quarantined(failure));
            return Vec::new();
        };
        let held = active.leased();
        // What fails while it is audited has its class already: only the audit is lost.
        let outcome = active.outcome_before_audit().unwrap_or(Outcome::Quarantined(failure));
        self.stage = Stage::Ended(outcome);
        held
    }

    /// Whether the sample was given up.
    pub(super) fn is_quarantined(&self) -> bool {
        matches!(self.stage, Stage::Ended(Outcome::Quarantined(_)))
    }

    /// How the sample ended; `None` if it has not.
    pub(super) fn into_finished(self) -> Option<Finished> {
        match self.stage {
            Stage::Ended(outcome) => Some(Finished { sample: self.id, outcome }),
            Stage::Untouched | Stage::Active(_) => None,
        }
    }
}
