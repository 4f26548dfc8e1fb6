//! An active sample: the units of its current round, and the sums of earlier rounds.

use std::ops::Range;
use std::sync::Arc;

use elbo_core::ensemble::Contenders;
use elbo_core::ids::{LeaseKey, PromptIndex, Round, SampleId};
use elbo_core::policy::{Course, ScoredBy, Walk};
use elbo_core::ranking::ScoredPrompt;
use elbo_core::sums::Sums;
use elbo_core::unit::{Cut, Unit, UnitId};
use elbo_proto::v1;

use super::lease::{Holders, LeasedUnit};
use super::outcome::{SampleOutcome, Settled, SlotError};
use super::record::ResultStatus;
use super::{JobShape, UnitResult};

/// The most bytes that a prompt of an active sample takes: the walk's state for it, and its sums in the current round. It
/// takes less once the sample has ended.
pub(super) const PROMPT_BYTES: usize = Walk::PROMPT_BYTES + size_of::<Sums>();

const _: () = assert!(size_of::<ScoredPrompt>() <= PROMPT_BYTES);

/// The results of a unit.
#[derive(Clone, Debug)]
enum Scores {
    /// Sums by prompt.
    Sums(Box<[Sums]>),
    /// Every error, prompt by prompt.
    Errors(Box<[f32]>),
}

#[derive(Clone, Debug)]
enum UnitState {
    /// Not done. Ready if it has no holders.
    Open(Holders),
    Done {
        scores: Scores,
        /// The number of the next lease when the unit was done. That lease and later ones had no reason to compute it.
        before: u64,
    },
}

/// A sample between its first evaluation and its last.
#[derive(Debug)]
pub(super) struct Active {
    sample: SampleId,
    contenders: Arc<Contenders>,
    walk: Walk,
    /// The units of the walk's current round; empty once all rounds are over.
    units: Vec<UnitState>,
    errors: Vec<SlotError>,
    audit: Audit,
}

/// Where a sample is in its audit.
#[derive(Debug)]
enum Audit {
    /// It has none, or it is over.
    None,
    /// The sample is still on the job's course.
    Due,
    /// The sample is on the audit's course.
    Running {
        /// The result of the job's course.
        judged: Vec<ScoredPrompt>,
        /// The round after the last one of the job's course.
        start: Round,
    },
}

impl Active {
    /// A sample with this many captions of its own, at the start of its first round.
    pub(super) fn begin(job: &JobShape, sample: SampleId, captions: usize, audited: bool) -> Self {
        let contenders = job.contenders_of(captions);
        let mut state = Self {
            sample,
            walk: Walk::new(contenders.first()),
            units: Vec::new(),
            errors: Vec::new(),
            audit: if audited && job.course().audit().is_some() { Audit::Due } else { Audit::None },
            contenders,
        };
        state.enter_round(job);
        state
    }

    /// The course the sample is on.
    fn course<'j>(&self, job: &'j JobShape) -> &'j Course {
        match (&self.audit, job.course().audit()) {
            (Audit::Running { .. }, Some(audit)) => audit,
            _ => job.course(),
        }
    }

    /// Enters the walk's next round. After the last one, enters the audit's first round, if the sample is audited.
    fn enter_round(&mut self, job: &JobShape) {
        self.units = Vec::new();
        while !self.walk.enter(self.course(job), &self.contenders) {
            if !matches!(self.audit, Audit::Due) {
                return;
            }
            self.begin_audit(job);
        }
        self.units = vec![UnitState::Open(Holders::default()); self.cut().units()];
    }

    fn begin_audit(&mut self, job: &JobShape) {
        let judged = self.walk.scored();
        // The audit keeps the eliminations of a shortlist, but not those of groups.
        let left_by_shortlist = |prompt: &PromptIndex| {
            judged[prompt.at()].round == Round(0) && job.course().scored_by(Round(0)) == ScoredBy::Shortlist
        };
        let first = self.contenders.of_all_classes().filter(|prompt| !left_by_shortlist(prompt)).collect();
        self.audit = Audit::Running { judged, start: self.walk.round() };
        self.walk = Walk::new(first);
    }

    /// The current round. The rounds of an audit are numbered after those of the job's course.
    pub(super) fn round(&self) -> Round {
        match self.audit {
            Audit::Running { start, .. } => Round(start.0 + self.walk.round().0),
            Audit::None | Audit::Due => self.walk.round(),
        }
    }

    /// How the current round is cut into units.
    pub(super) fn cut(&self) -> Cut {
        Cut::new(self.walk.slots().len(), self.walk.remaining().len())
    }

    /// Whether all rounds are over.
    pub(super) fn is_over(&self) -> bool {
        self.units.is_empty()
    }

    fn position(&self, id: UnitId) -> Option<usize> {
        if id.round == self.round() { self.cut().position(id) } else { None }
    }

    /// Whether a unit is of the current round and not leased or done.
    pub(super) fn is_ready(&self, id: UnitId) -> bool {
        self.position(id).is_some_and(|p| matches!(&self.units[p], UnitState::Open(holders) if holders.is_empty()))
    }

    /// The leases on a unit.
    pub(super) fn holders(&self, id: UnitId) -> Holders {
        match self.position(id).map(|p| &self.units[p]) {
            Some(UnitState::Open(holders)) => *holders,
            _ => Holders::default(),
        }
    }

    /// Leases a unit that is not done and has fewer than two leases, and describes it.
    pub(super) fn lease(&mut self, job: &JobShape, id: UnitId, key: LeaseKey) -> Option<Unit> {
        let position = self.position(id)?;
        let UnitState::Open(holders) = &mut self.units[position] else { return None };
        if !holders.add(key) {
            return None;
        }
        let cut = self.cut();
        Some(Unit {
            id,
            slots: self.unit_slots(job, id),
            prompts: self.walk.remaining()[cut.prompt_range(id)].to_vec(),
        })
    }

    /// The slots of a unit of the current round, as positions among all slots of the job.
    fn unit_slots(&self, job: &JobShape, id: UnitId) -> Range<usize> {
        let before = if matches!(self.audit, Audit::Running { .. }) { job.course().slots().len() } else { 0 };
        let (start, slots) = (before + self.walk.slots().start, self.cut().slot_range(id));
        start + slots.start..start + slots.end
    }

    /// Removes a lease from a unit. Returns whether the unit is ready now.
    pub(super) fn unlease(&mut self, id: UnitId, key: LeaseKey) -> bool {
        let Some(position) = self.position(id) else { return false };
        let UnitState::Open(holders) = &mut self.units[position] else { return false };
        holders.remove(key);
        holders.is_empty()
    }

    /// The units that are leased.
    pub(super) fn leased(&self) -> Vec<LeasedUnit> {
        let cut = self.cut();
        let units = cut.ids(self.sample, self.round()).zip(&self.units);
        let held = units.filter_map(|(unit, state)| match state {
            UnitState::Open(holders) if !holders.is_empty() => {
                Some(LeasedUnit { unit, holders: *holders, evaluations: cut.evaluations(unit) })
            }
            _ => None,
        });
        held.collect()
    }

    /// Whether a result is new to the sample, and valid.
    pub(super) fn check(&self, job: &JobShape, result: &UnitResult) -> ResultStatus {
        if result.id.round < self.round() {
            return ResultStatus::Known { before: None };
        }
        if result.id.round > self.round() {
            return ResultStatus::Ahead;
        }
        let cut = self.cut();
        let Some(position) = cut.position(result.id) else { return ResultStatus::Invalid("there is no such unit") };
        let reported = &result.reported;
        let (slots, prompts) = (cut.slot_range(result.id).len(), &self.walk.remaining()[cut.prompt_range(result.id)]);
        if reported.slots as usize != slots
            || !reported.prompts.iter().copied().map(PromptIndex).eq(prompts.iter().copied())
        {
            return ResultStatus::Invalid("its slots or prompts are not the unit's");
        }
        let (errors, sums) = if job.takes_errors() { (slots * prompts.len(), 0) } else { (0, prompts.len()) };
        if reported.errors.len() != errors || reported.sum.len() != sums || reported.sum_sq.len() != sums {
            return ResultStatus::Invalid(
                "it needs one sum per prompt, or every single error if the job takes single errors",
            );
        }
        if !sums_of(reported).all(|sums| sums.is_plausible())
            || !reported.errors.iter().all(|e| e.is_finite() && *e >= 0.0)
        {
            return ResultStatus::Invalid("its sums or errors are not valid");
        }
        match self.units[position] {
            UnitState::Open(_) => ResultStatus::New,
            UnitState::Done { before, .. } => ResultStatus::Known { before: Some(before) },
        }
    }

    /// Takes in a new result; `None` if it was already known. `before` is the number of the next lease to be granted.
    pub(super) fn apply(&mut self, job: &JobShape, result: UnitResult, before: u64) -> Option<Settled> {
        if self.check(job, &result) != ResultStatus::New {
            return None;
        }
        let position = self.position(result.id)?;
        let held = LeasedUnit { unit: result.id, holders: self.holders(result.id), evaluations: result.evaluations() };
        let scores = if job.takes_errors() {
            Scores::Errors(result.reported.errors.into())
        } else {
            Scores::Sums(sums_of(&result.reported).collect())
        };
        self.units[position] = UnitState::Done { scores, before };
        let round_complete = self.units.iter().all(|u| matches!(u, UnitState::Done { .. }));
        if round_complete {
            self.merge_round(job);
            self.end_round(job);
            self.enter_round(job);
        }
        Some(Settled { held, round_complete })
    }

    /// Merges the round's units in the job's order, not the order of arrival.
    fn merge_round(&mut self, job: &JobShape) {
        let (cut, start) = (self.cut(), self.errors.len());
        let units: Vec<_> = cut.ids(self.sample, self.round()).zip(std::mem::take(&mut self.units)).collect();
        for (id, state) in units {
            let UnitState::Done { scores, .. } = state else { continue };
            let slots = self.unit_slots(job, id);
            let prompts = self.walk.remaining()[cut.prompt_range(id)].to_vec();
            match scores {
                Scores::Sums(sums) => {
                    let sums = prompts.iter().zip(&sums);
                    sums.for_each(|(prompt, sums)| self.walk.merge_sums(&self.contenders, *prompt, sums));
                }
                Scores::Errors(errors) => {
                    for (prompt, errors) in prompts.iter().zip(errors.chunks_exact(slots.len())) {
                        self.walk.merge_errors(self.course(job), &self.contenders, *prompt, errors);
                        self.keep_errors(job, *prompt, slots.clone(), errors);
                    }
                }
            }
        }
        self.errors[start..].sort_by_key(|e| (e.prompt, e.slot));
    }

    /// Keeps a prompt's errors on some slots, if the job writes errors and they come from the model on the job's own
    /// course.
    fn keep_errors(&mut self, job: &JobShape, prompt: PromptIndex, slots: Range<usize>, errors: &[f32]) {
        // The prediction does not depend on the audit's errors.
        if job.keeps_errors()
            && !matches!(self.audit, Audit::Running { .. })
            && job.course().scored_by(self.walk.round()) == ScoredBy::Model
            && !self.contenders.is_group(prompt)
        {
            self.errors.extend(slots.zip(errors).map(|(slot, &error)| SlotError { prompt, slot, error }));
        }
    }

    /// Ends the merged round. Drops the errors of prompts that start again.
    fn end_round(&mut self, job: &JobShape) {
        let course = self.course(job);
        let again = self.walk.end_round(course, &self.contenders);
        self.errors.retain(|error| again.binary_search(&error.prompt).is_err());
    }

    /// The sample's outcome without its audit; `None` if no audit is under way.
    pub(super) fn outcome_before_audit(&mut self) -> Option<SampleOutcome> {
        let Audit::Running { judged, .. } = std::mem::replace(&mut self.audit, Audit::None) else { return None };
        Some(SampleOutcome::Scored { prompts: judged, errors: std::mem::take(&mut self.errors), audit: None })
    }

    /// The sample's outcome, once all rounds are over.
    pub(super) fn take_outcome(&mut self) -> SampleOutcome {
        let (last, errors) = (self.walk.scored(), std::mem::take(&mut self.errors));
        match std::mem::replace(&mut self.audit, Audit::None) {
            Audit::Running { judged, .. } => SampleOutcome::Scored { prompts: judged, errors, audit: Some(last) },
            Audit::None | Audit::Due => SampleOutcome::Scored { prompts: last, errors, audit: None },
        }
    }
}

fn sums_of(result: &v1::UnitResult) -> impl Iterator<Item = Sums> + '_ {
    result.sum.iter().zip(&result.sum_sq).map(|(&sum, &sum_sq)| Sums { n: result.slots, sum, sum_sq })
}
