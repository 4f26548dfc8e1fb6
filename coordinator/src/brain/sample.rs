//! One sample on its way through the rounds.

use std::sync::Arc;

use elbo_common::ensemble::Contenders;
use elbo_common::ids::{LeaseId, PromptIndex, Round, SampleId};
use elbo_common::manifest::Sample;
use elbo_common::policy::ScoredBy;
use elbo_common::sums::Sums;
use elbo_common::unit::{Cut, Unit, UnitId};

use super::{JobShape, SampleFailure, UnitResult};

/// One evaluation's error, kept with `--write-errors`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SlotError {
    /// The prompt.
    pub prompt: PromptIndex,
    /// The round.
    pub round: Round,
    /// The slot's position in the round.
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
        /// Every error, by round, prompt and slot, where the job keeps them.
        errors: Vec<SlotError>,
    },
    /// Given up.
    Quarantined(SampleFailure),
}

/// A sample that needs no more evaluations.
#[derive(Clone, Debug, PartialEq)]
pub struct Finished {
    /// The sample.
    pub sample: SampleId,
    /// How it ended.
    pub outcome: Outcome,
}

#[derive(Clone, Debug)]
enum UnitState {
    Ready,
    Leased(LeaseId),
    Done { sums: Vec<Sums>, errors: Vec<f32> },
}

/// The state of one sample.
#[derive(Clone, Debug)]
pub(super) struct SampleState {
    id: SampleId,
    contenders: Arc<Contenders>,
    round: Round,
    remaining: Vec<PromptIndex>,
    units: Vec<UnitState>,
    totals: Vec<Sums>,
    last_round: Vec<Round>,
    errors: Vec<SlotError>,
    /// Evaluations merged or waiting to be.
    evaluations: u64,
    end: Option<End>,
}

#[derive(Clone, Debug)]
enum End {
    Scored,
    Quarantined(SampleFailure),
}

/// What became of a unit that was applied.
#[derive(Clone, Copy, Debug)]
pub(super) struct Settled {
    pub(super) lease: Option<LeaseId>,
    pub(super) evaluations: u64,
    /// The sample's round is complete: it is in the next one, or finished.
    pub(super) round_complete: bool,
}

impl SampleState {
    pub(super) fn new(job: &JobShape, sample: &Sample) -> Self {
        let contenders = job.contenders_of(sample.candidates.len());
        let prompts = contenders.prompt_count();
        let mut state = Self {
            id: sample.id,
            contenders,
            round: Round(0),
            remaining: (0..prompts as u32).map(PromptIndex).collect(),
            units: Vec::new(),
            totals: vec![Sums::default(); prompts],
            last_round: vec![Round(0); prompts],
            errors: Vec::new(),
            evaluations: 0,
            end: None,
        };
        state.enter_round(job);
        state
    }

    /// How the current round is cut into units.
    fn cut(&self, job: &JobShape) -> Cut {
        let slots = job.rounds.get(self.round.at()).map_or(0, |r| r.slots.len());
        Cut::new(slots, self.remaining.len())
    }

    /// The evaluations a unit of the current round costs.
    pub(super) fn unit_evaluations(&self, job: &JobShape, id: UnitId) -> u64 {
        self.cut(job).evaluations(id)
    }

    /// Evaluations that were planned for the sample and not needed in the end.
    pub(super) fn spared(&self, job: &JobShape) -> u64 {
        job.evaluations_of(&self.contenders).saturating_sub(self.evaluations)
    }

    /// Starts the current round, passing over rounds without a new slot.
    fn enter_round(&mut self, job: &JobShape) {
        while self.round.at() < job.rounds.len() {
            let units = self.cut(job).units();
            if units > 0 {
                self.units = vec![UnitState::Ready; units];
                for prompt in &self.remaining {
                    self.last_round[prompt.at()] = self.round;
                }
                return;
            }
            self.eliminate(job);
        }
        self.units.clear();
        self.end = Some(End::Scored);
    }

    fn eliminate(&mut self, job: &JobShape) {
        let round = &job.rounds[self.round.at()];
        self.remaining = self.contenders.survivors(&self.remaining, &self.totals, round.keep);
        if round.scored_by == ScoredBy::Shortlist {
            // The job's model judges those that stay afresh.
            self.remaining.iter().for_each(|prompt| self.totals[prompt.at()] = Sums::default());
        }
        self.round = Round(self.round.0 + 1);
    }

    pub(super) fn is_finished(&self) -> bool {
        self.end.is_some()
    }

    /// The ids of the current round's units.
    pub(super) fn unit_ids(&self, job: &JobShape) -> Vec<UnitId> {
        if self.is_finished() { Vec::new() } else { self.cut(job).ids(self.id, self.round).collect() }
    }

    fn position(&self, job: &JobShape, id: UnitId) -> Option<usize> {
        if self.is_finished() || id.round != self.round { None } else { self.cut(job).position(id) }
    }

    /// Whether a unit is of the current round and not leased or done.
    pub(super) fn is_ready(&self, job: &JobShape, id: UnitId) -> bool {
        self.position(job, id).is_some_and(|p| matches!(self.units[p], UnitState::Ready))
    }

    /// Marks a ready unit as leased and describes it.
    pub(super) fn lease(&mut self, job: &JobShape, id: UnitId, lease: LeaseId) -> Option<Unit> {
        let position = self.position(job, id)?;
        self.units[position] = UnitState::Leased(lease);
        let cut = self.cut(job);
        Some(Unit { id, slots: cut.slot_range(id), prompts: self.remaining[cut.prompt_range(id)].to_vec() })
    }

    /// Takes a lease back.
    pub(super) fn unlease(&mut self, job: &JobShape, id: UnitId) {
        if let Some(position) = self.position(job, id)
            && matches!(self.units[position], UnitState::Leased(_))
        {
            self.units[position] = UnitState::Ready;
        }
    }

    /// `Ok(true)` for a new and valid result, `Ok(false)` for a known one.
    pub(super) fn check(&self, job: &JobShape, result: &UnitResult) -> Result<bool, &'static str> {
        if self.is_finished() || result.id.round < self.round {
            return Ok(false);
        }
        if result.id.round > self.round {
            return Err("the sample has not come to this round");
        }
        let cut = self.cut(job);
        let position = cut.position(result.id).ok_or("there is no such unit")?;
        let (slots, prompts) = (cut.slot_range(result.id).len(), &self.remaining[cut.prompt_range(result.id)]);
        if result.slots as usize != slots
            || !result.prompts.iter().copied().map(PromptIndex).eq(prompts.iter().copied())
        {
            return Err("its slots or prompts are not the unit's");
        }
        if result.sum.len() != prompts.len() || result.sum_sq.len() != prompts.len() {
            return Err("it needs one sum per prompt");
        }
        if result.errors.len() != if job.keep_errors { slots * prompts.len() } else { 0 } {
            return Err("it needs every single error where the job keeps them, and none elsewhere");
        }
        if !sums_of(result).iter().all(Sums::is_plausible) {
            return Err("its sums are not sums of errors");
        }
        Ok(!matches!(self.units[position], UnitState::Done { .. }))
    }

    /// Takes a new result in; `None` where it was known.
    pub(super) fn apply(&mut self, job: &JobShape, result: UnitResult) -> Option<Settled> {
        if self.check(job, &result) != Ok(true) {
            return None;
        }
        let position = self.position(job, result.id)?;
        let lease = match self.units[position] {
            UnitState::Leased(lease) => Some(lease),
            _ => None,
        };
        let evaluations = u64::from(result.slots) * result.prompts.len() as u64;
        self.evaluations += evaluations;
        self.units[position] = UnitState::Done { sums: sums_of(&result), errors: result.errors };
        let round_complete = self.units.iter().all(|u| matches!(u, UnitState::Done { .. }));
        if round_complete {
            self.merge_round(job);
            self.eliminate(job);
            self.enter_round(job);
        }
        Some(Settled { lease, evaluations, round_complete })
    }

    /// Merges the round's units in their order, which is the job's and not that of arrival.
    fn merge_round(&mut self, job: &JobShape) {
        let cut = self.cut(job);
        let units: Vec<_> = cut.ids(self.id, self.round).zip(std::mem::take(&mut self.units)).collect();
        let start = self.errors.len();
        for (id, state) in units {
            let UnitState::Done { sums, errors } = state else { continue };
            let (slots, prompts) = (cut.slot_range(id), &self.remaining[cut.prompt_range(id)]);
            for (i, (prompt, sums)) in prompts.iter().zip(&sums).enumerate() {
                self.totals[prompt.at()].merge(sums);
                if job.rounds[self.round.at()].scored_by == ScoredBy::Shortlist {
                    continue;
                }
                let of_prompt = errors.iter().skip(i * slots.len()).take(slots.len());
                self.errors.extend(slots.clone().zip(of_prompt).map(|(slot, &error)| SlotError {
                    prompt: *prompt,
                    round: self.round,
                    slot,
                    error,
                }));
            }
        }
        self.errors[start..].sort_by_key(|e| (e.prompt, e.slot));
    }

    /// Gives the sample up; the leases that held units of it.
    pub(super) fn quarantine(&mut self, job: &JobShape, failure: SampleFailure) -> Vec<(LeaseId, UnitId)> {
        let held = self
            .unit_ids(job)
            .into_iter()
            .zip(&self.units)
            .filter_map(|(id, unit)| match unit {
                UnitState::Leased(lease) => Some((*lease, id)),
                _ => None,
            })
            .collect();
        self.end = Some(End::Quarantined(failure));
        self.units.clear();
        self.errors.clear();
        held
    }

    /// How the sample ended; `None` while it has not.
    pub(super) fn finished(&self) -> Option<Finished> {
        let outcome = match self.end.clone()? {
            End::Quarantined(failure) => Outcome::Quarantined(failure),
            End::Scored => Outcome::Scored {
                prompts: (0u32..)
                    .map(PromptIndex)
                    .zip(self.totals.iter().zip(&self.last_round))
                    .map(|(prompt, (sums, round))| ScoredPrompt { prompt, sums: *sums, round: *round })
                    .collect(),
                errors: self.errors.clone(),
            },
        };
        Some(Finished { sample: self.id, outcome })
    }
}

fn sums_of(result: &UnitResult) -> Vec<Sums> {
    result.sum.iter().zip(&result.sum_sq).map(|(&sum, &sum_sq)| Sums { n: result.slots, sum, sum_sq }).collect()
}
