//! A sample on its way through the rounds: the units of the current one, and the sums of those before.

use std::sync::Arc;

use elbo_common::ensemble::Contenders;
use elbo_common::ids::{LeaseKey, PromptIndex, Round, SampleId};
use elbo_common::policy::ScoredBy;
use elbo_common::sums::Sums;
use elbo_common::unit::{Cut, Unit, UnitId};

use super::lease::{HeldUnit, Holders};
use super::record::Verdict;
use super::sample::{Outcome, ScoredPrompt, Settled, SlotError};
use super::{JobShape, UnitResult};

/// Bytes that a prompt of an active sample takes at most: its place in the list, the sums of its round and those before,
/// and its last round. Once the sample has ended it takes less.
pub(super) const PROMPT_BYTES: usize = size_of::<PromptIndex>() + 2 * size_of::<Sums>() + size_of::<Round>();

const _: () = assert!(size_of::<ScoredPrompt>() <= PROMPT_BYTES);

#[derive(Clone, Debug)]
enum UnitState {
    /// Ready, where nobody computes it.
    Open(Holders),
    Done {
        sums: Box<[Sums]>,
        errors: Box<[f32]>,
        /// The number of the next lease when it was done: leases from there on had no reason to compute it.
        before: u64,
    },
}

/// A sample between its first evaluation and its last.
#[derive(Debug)]
pub(super) struct Active {
    sample: SampleId,
    contenders: Arc<Contenders>,
    round: Round,
    /// Slots of the round.
    slots: usize,
    remaining: Vec<PromptIndex>,
    /// The round's units; none once all rounds are over.
    units: Vec<UnitState>,
    /// What the rounds before have brought, by prompt; empty during the first round, which most samples of an open shard
    /// are in.
    totals: Vec<Sums>,
    /// The last round a prompt was evaluated in, by prompt.
    last_round: Vec<Round>,
    errors: Vec<SlotError>,
}

impl Active {
    /// A sample with so many captions of its own at the beginning of its first round.
    pub(super) fn begin(job: &JobShape, sample: SampleId, captions: usize) -> Self {
        let contenders = job.contenders_of(captions);
        let prompts = 0..contenders.prompt_count() as u32;
        let mut state = Self {
            sample,
            round: Round(0),
            slots: 0,
            remaining: prompts.map(PromptIndex).collect(),
            units: Vec::new(),
            totals: Vec::new(),
            last_round: Vec::new(),
            errors: Vec::new(),
            contenders,
        };
        state.enter_round(job);
        state
    }

    /// Starts the current round, passing over rounds without a new slot.
    fn enter_round(&mut self, job: &JobShape) {
        self.units = Vec::new();
        while let Some(round) = job.rounds().get(self.round.at()) {
            self.slots = round.slots.len();
            let units = self.cut().units();
            if units > 0 {
                self.units = vec![UnitState::Open(Holders::default()); units];
                return;
            }
            self.eliminate(job);
        }
    }

    fn eliminate(&mut self, job: &JobShape) {
        let round = &job.rounds()[self.round.at()];
        self.allocate();
        self.remaining = self.contenders.survivors(&self.remaining, &self.totals, round.keep);
        if round.scored_by == ScoredBy::Shortlist {
            // The job's model judges those that stay afresh.
            self.remaining.iter().for_each(|prompt| self.totals[prompt.at()] = Sums::default());
        }
        self.round = Round(self.round.0 + 1);
    }

    /// Makes room for the sums of all prompts.
    fn allocate(&mut self) {
        let prompts = self.contenders.prompt_count();
        self.totals.resize(prompts, Sums::default());
        self.last_round.resize(prompts, Round(0));
    }

    /// The current round.
    pub(super) fn round(&self) -> Round {
        self.round
    }

    /// How the current round is cut into units.
    pub(super) fn cut(&self) -> Cut {
        Cut::new(self.slots, self.remaining.len())
    }

    /// Whether all rounds are over.
    pub(super) fn is_over(&self) -> bool {
        self.units.is_empty()
    }

    fn position(&self, id: UnitId) -> Option<usize> {
        if id.round == self.round { self.cut().position(id) } else { None }
    }

    /// Whether a unit is of the current round and not leased or done.
    pub(super) fn is_ready(&self, id: UnitId) -> bool {
        self.position(id).is_some_and(|p| matches!(&self.units[p], UnitState::Open(holders) if holders.is_empty()))
    }

    /// Who computes a unit.
    pub(super) fn holders(&self, id: UnitId) -> Holders {
        match self.position(id).map(|p| &self.units[p]) {
            Some(UnitState::Open(holders)) => *holders,
            _ => Holders::default(),
        }
    }

    /// Leases a unit that is not done and has fewer than two leases, and describes it.
    pub(super) fn lease(&mut self, id: UnitId, key: LeaseKey) -> Option<Unit> {
        let position = self.position(id)?;
        let UnitState::Open(holders) = &mut self.units[position] else { return None };
        if !holders.add(key) {
            return None;
        }
        let cut = self.cut();
        Some(Unit { id, slots: cut.slot_range(id), prompts: self.remaining[cut.prompt_range(id)].to_vec() })
    }

    /// Takes a lease back; whether the unit is ready now.
    pub(super) fn unlease(&mut self, id: UnitId, key: LeaseKey) -> bool {
        let Some(position) = self.position(id) else { return false };
        let UnitState::Open(holders) = &mut self.units[position] else { return false };
        holders.remove(key);
        holders.is_empty()
    }

    /// The units that are leased.
    pub(super) fn leased(&self) -> Vec<HeldUnit> {
        let cut = self.cut();
        let units = cut.ids(self.sample, self.round).zip(&self.units);
        let held = units.filter_map(|(unit, state)| match state {
            UnitState::Open(holders) if !holders.is_empty() => {
                Some(HeldUnit { unit, holders: *holders, evaluations: cut.evaluations(unit) })
            }
            _ => None,
        });
        held.collect()
    }

    /// What a result is to the sample.
    pub(super) fn check(&self, job: &JobShape, result: &UnitResult) -> Verdict {
        if result.id.round < self.round {
            return Verdict::Known { before: None };
        }
        if result.id.round > self.round {
            return Verdict::Invalid("the sample has not come to this round");
        }
        let cut = self.cut();
        let Some(position) = cut.position(result.id) else { return Verdict::Invalid("there is no such unit") };
        let (slots, prompts) = (cut.slot_range(result.id).len(), &self.remaining[cut.prompt_range(result.id)]);
        if result.slots as usize != slots
            || !result.prompts.iter().copied().map(PromptIndex).eq(prompts.iter().copied())
        {
            return Verdict::Invalid("its slots or prompts are not the unit's");
        }
        if result.sum.len() != prompts.len() || result.sum_sq.len() != prompts.len() {
            return Verdict::Invalid("it needs one sum per prompt");
        }
        if result.errors.len() != if job.keeps_errors() { slots * prompts.len() } else { 0 } {
            return Verdict::Invalid("it needs every single error where the job keeps them, and none elsewhere");
        }
        if !sums_of(result).all(|sums| sums.is_plausible()) {
            return Verdict::Invalid("its sums are not sums of errors");
        }
        match self.units[position] {
            UnitState::Open(_) => Verdict::New,
            UnitState::Done { before, .. } => Verdict::Known { before: Some(before) },
        }
    }

    /// Takes a new result in, before the lease of that number is granted; `None` where it was known.
    pub(super) fn apply(&mut self, job: &JobShape, result: UnitResult, before: u64) -> Option<Settled> {
        if self.check(job, &result) != Verdict::New {
            return None;
        }
        let position = self.position(result.id)?;
        let evaluations = u64::from(result.slots) * result.prompts.len() as u64;
        let held = HeldUnit { unit: result.id, holders: self.holders(result.id), evaluations };
        self.units[position] =
            UnitState::Done { sums: sums_of(&result).collect(), errors: result.errors.into(), before };
        let round_complete = self.units.iter().all(|u| matches!(u, UnitState::Done { .. }));
        if round_complete {
            self.merge_round(job);
            self.eliminate(job);
            self.enter_round(job);
        }
        Some(Settled { held, round_complete })
    }

    /// Merges the round's units in their order, which is the job's and not that of arrival.
    fn merge_round(&mut self, job: &JobShape) {
        self.allocate();
        self.remaining.iter().for_each(|prompt| self.last_round[prompt.at()] = self.round);
        let cut = self.cut();
        let units: Vec<_> = cut.ids(self.sample, self.round).zip(std::mem::take(&mut self.units)).collect();
        let start = self.errors.len();
        for (id, state) in units {
            let UnitState::Done { sums, errors, .. } = state else { continue };
            let (slots, prompts) = (cut.slot_range(id), &self.remaining[cut.prompt_range(id)]);
            for (i, (prompt, sums)) in prompts.iter().zip(&sums).enumerate() {
                self.totals[prompt.at()].merge(sums);
                if job.rounds()[self.round.at()].scored_by == ScoredBy::Shortlist {
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

    /// How the sample ended, once all rounds are over.
    pub(super) fn take_outcome(&mut self) -> Outcome {
        let scores = self.totals.iter().zip(&self.last_round);
        Outcome::Scored {
            prompts: (0u32..)
                .map(PromptIndex)
                .zip(scores)
                .map(|(prompt, (sums, round))| ScoredPrompt { prompt, sums: *sums, round: *round })
                .collect(),
            errors: std::mem::take(&mut self.errors),
        }
    }
}

fn sums_of(result: &UnitResult) -> impl Iterator<Item = Sums> + '_ {
    result.sum.iter().zip(&result.sum_sq).map(|(&sum, &sum_sq)| Sums { n: result.slots, sum, sum_sq })
}
