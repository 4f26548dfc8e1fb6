//! A sample on its way through the rounds: the units of the current one, and the sums of those before.

use std::ops::Range;
use std::sync::Arc;

use elbo_core::ensemble::Contenders;
use elbo_core::ids::{LeaseKey, PromptIndex, Round, SampleId};
use elbo_core::policy::{Course, ScoredBy, Standing, Survivors};
use elbo_core::sums::Sums;
use elbo_core::unit::{Cut, Unit, UnitId};

use super::lease::{HeldUnit, Holders};
use super::outcome::{Outcome, ScoredPrompt, Settled, SlotError};
use super::record::Verdict;
use super::{JobShape, UnitResult};

/// Bytes that a prompt of an active sample takes at most: its place in the list, the sums of its round and those before,
/// and its last round. Once the sample has ended it takes less.
pub(super) const PROMPT_BYTES: usize = size_of::<PromptIndex>() + 2 * size_of::<Sums>() + size_of::<Round>();

const _: () = assert!(size_of::<ScoredPrompt>() <= PROMPT_BYTES);

/// What a unit's evaluations came to.
#[derive(Clone, Debug)]
enum Scores {
    /// Sums by prompt.
    Sums(Box<[Sums]>),
    /// Every error, prompt by prompt.
    Errors(Box<[f32]>),
}

#[derive(Clone, Debug)]
enum UnitState {
    /// Ready, where nobody computes it.
    Open(Holders),
    Done {
        scores: Scores,
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
    /// The round's slots, as positions in the course it belongs to. Those of the job's model before it are done.
    slots: Range<usize>,
    remaining: Vec<PromptIndex>,
    /// The round's units; none once all rounds are over.
    units: Vec<UnitState>,
    /// What the rounds before have brought, by prompt; empty during the first round, which most samples of an open shard
    /// are in.
    totals: Vec<Sums>,
    /// The last round a prompt was evaluated in, by prompt.
    last_round: Vec<Round>,
    /// The errors of the remaining prompts on every slot done, by prompt, where eliminations need pairs. A prompt that
    /// leaves leaves nothing behind.
    pairs: Vec<Vec<f32>>,
    errors: Vec<SlotError>,
    /// Whether the sample is to be audited when it is through.
    audited: bool,
    /// What the course came to, and the round after its last, once the audit is under way.
    judged: Option<(Vec<ScoredPrompt>, Round)>,
}

impl Active {
    /// A sample with so many captions of its own at the beginning of its first round.
    pub(super) fn begin(job: &JobShape, sample: SampleId, captions: usize, audited: bool) -> Self {
        let contenders = job.contenders_of(captions);
        let mut state = Self {
            sample,
            round: Round(0),
            slots: 0..0,
            remaining: contenders.first(),
            units: Vec::new(),
            totals: Vec::new(),
            last_round: Vec::new(),
            pairs: Vec::new(),
            errors: Vec::new(),
            audited,
            judged: None,
            contenders,
        };
        state.enter_round(job);
        state
    }

    /// The course the sample is on, and its round there.
    fn course<'j>(&self, job: &'j JobShape) -> (&'j Course, Round) {
        match (&self.judged, job.course().audit()) {
            (Some((_, start)), Some(audit)) => (audit, Round(self.round.0 - start.0)),
            _ => (job.course(), self.round),
        }
    }

    /// Starts the current round, passing over rounds without a new slot; after the last one the audit, if there is one.
    fn enter_round(&mut self, job: &JobShape) {
        self.units = Vec::new();
        loop {
            let (course, round) = self.course(job);
            match course.round(round, self.slots.end, &self.contenders, &self.remaining) {
                Some(slots) => self.slots = slots,
                None if self.begin_audit(job) => continue,
                None => return,
            }
            let units = self.cut().units();
            if units > 0 {
                self.units = vec![UnitState::Open(Holders::default()); units];
                return;
            }
            self.eliminate(job);
        }
    }

    /// Puts the sample on the audit's course, if it is to be audited and was not yet.
    fn begin_audit(&mut self, job: &JobShape) -> bool {
        if !std::mem::take(&mut self.audited) || job.course().audit().is_none() {
            return false;
        }
        let scored = self.scored();
        // A shortlist holds for both, what became of groups does not.
        let is_on_shortlist = |prompt: &PromptIndex| !self.left_by_shortlist(job, &scored[prompt.at()]);
        self.remaining = self.contenders.of_all_classes().filter(is_on_shortlist).collect();
        self.judged = Some((scored, self.round));
        (self.slots, self.totals, self.last_round, self.pairs) = (0..0, Vec::new(), Vec::new(), Vec::new());
        true
    }

    fn left_by_shortlist(&self, job: &JobShape, prompt: &ScoredPrompt) -> bool {
        prompt.round == Round(0) && job.course().scored_by(Round(0)) == ScoredBy::Shortlist
    }

    fn eliminate(&mut self, job: &JobShape) {
        self.allocate(job);
        let (course, round) = self.course(job);
        let standing = Standing { remaining: &self.remaining, totals: &self.totals, errors: &self.pairs };
        let Survivors { prompts: stay, afresh } = course.survivors(round, &self.contenders, standing);
        if afresh {
            stay.iter().for_each(|prompt| self.totals[prompt.at()] = Sums::default());
            self.errors.retain(|error| stay.binary_search(&error.prompt).is_err());
            self.slots = 0..0;
        }
        for prompt in &self.remaining {
            if let Some(pairs) = self.pairs.get_mut(prompt.at())
                && (afresh || stay.binary_search(prompt).is_err())
            {
                *pairs = Vec::new();
            }
        }
        self.remaining = stay;
        self.round = Round(self.round.0 + 1);
    }

    /// Makes room for the sums of all prompts.
    fn allocate(&mut self, job: &JobShape) {
        let prompts = self.contenders.prompt_count();
        self.totals.resize(prompts, Sums::default());
        self.last_round.resize(prompts, Round(0));
        if self.course(job).0.needs_pairs() {
            self.pairs.resize(prompts, Vec::new());
        }
    }

    /// The current round.
    pub(super) fn round(&self) -> Round {
        self.round
    }

    /// How the current round is cut into units.
    pub(super) fn cut(&self) -> Cut {
        Cut::new(self.slots.len(), self.remaining.len())
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
    pub(super) fn lease(&mut self, job: &JobShape, id: UnitId, key: LeaseKey) -> Option<Unit> {
        let position = self.position(id)?;
        let UnitState::Open(holders) = &mut self.units[position] else { return None };
        if !holders.add(key) {
            return None;
        }
        let cut = self.cut();
        Some(Unit { id, slots: self.unit_slots(job, id), prompts: self.remaining[cut.prompt_range(id)].to_vec() })
    }

    /// The slots of a unit of the current round, as positions among all of the job.
    fn unit_slots(&self, job: &JobShape, id: UnitId) -> Range<usize> {
        let before = if self.judged.is_some() { job.course().slots().len() } else { 0 };
        let (start, slots) = (before + self.slots.start, self.cut().slot_range(id));
        start + slots.start..start + slots.end
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
            return Verdict::Ahead;
        }
        let cut = self.cut();
        let Some(position) = cut.position(result.id) else { return Verdict::Invalid("there is no such unit") };
        let (slots, prompts) = (cut.slot_range(result.id).len(), &self.remaining[cut.prompt_range(result.id)]);
        if result.slots as usize != slots
            || !result.prompts.iter().copied().map(PromptIndex).eq(prompts.iter().copied())
        {
            return Verdict::Invalid("its slots or prompts are not the unit's");
        }
        let (errors, sums) = if job.takes_errors() { (slots * prompts.len(), 0) } else { (0, prompts.len()) };
        if result.errors.len() != errors || result.sum.len() != sums || result.sum_sq.len() != sums {
            return Verdict::Invalid(
                "it needs every single error where the job takes them, and one sum per prompt elsewhere",
            );
        }
        if !sums_of(result).all(|sums| sums.is_plausible()) || !result.errors.iter().all(|e| e.is_finite() && *e >= 0.0)
        {
            return Verdict::Invalid("its sums are not sums of errors, or its errors are none");
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
        let scores = match job.takes_errors() {
            true => Scores::Errors(result.errors.into()),
            false => Scores::Sums(sums_of(&result).collect()),
        };
        self.units[position] = UnitState::Done { scores, before };
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
        self.allocate(job);
        self.remaining.iter().for_each(|prompt| self.last_round[prompt.at()] = self.round);
        let cut = self.cut();
        let units: Vec<_> = cut.ids(self.sample, self.round).zip(std::mem::take(&mut self.units)).collect();
        let start = self.errors.len();
        let (course, round) = self.course(job);
        let of_model = course.scored_by(round) == ScoredBy::Model;
        for (id, state) in units {
            let UnitState::Done { scores, .. } = state else { continue };
            let slots = self.unit_slots(job, id);
            let prompts = self.remaining[cut.prompt_range(id)].to_vec();
            match scores {
                Scores::Sums(sums) => {
                    prompts.iter().zip(&sums).for_each(|(prompt, sums)| self.totals[prompt.at()].merge(sums));
                }
                Scores::Errors(errors) => {
                    for (prompt, errors) in prompts.iter().zip(errors.chunks_exact(slots.len())) {
                        self.merge_errors(job, *prompt, slots.clone(), errors, of_model);
                    }
                }
            }
        }
        self.errors[start..].sort_by_key(|e| (e.prompt, e.slot));
    }

    /// Merges a prompt's errors on some slots; those of the job's model are kept, where the job needs them later.
    fn merge_errors(
        &mut self,
        job: &JobShape,
        prompt: PromptIndex,
        slots: Range<usize>,
        errors: &[f32],
        of_model: bool,
    ) {
        self.totals[prompt.at()].merge(&Sums::of(errors));
        if of_model && self.course(job).0.needs_pairs() {
            self.pairs[prompt.at()].extend_from_slice(errors);
        }
        // What an audit looks at is no part of what the prediction rests on.
        if of_model && job.keeps_errors() && self.judged.is_none() && !self.contenders.is_group(prompt) {
            self.errors.extend(slots.zip(errors).map(|(slot, &error)| SlotError { prompt, slot, error }));
        }
    }

    /// Every prompt with its sums, by index.
    fn scored(&self) -> Vec<ScoredPrompt> {
        let scores = self.totals.iter().zip(&self.last_round);
        let prompts = (0u32..).map(PromptIndex).zip(scores);
        prompts.map(|(prompt, (sums, round))| ScoredPrompt { prompt, sums: *sums, round: *round }).collect()
    }

    /// How the sample ended before its audit; `None` if that is not under way.
    pub(super) fn outcome_before_audit(&mut self) -> Option<Outcome> {
        let (prompts, _) = self.judged.take()?;
        Some(Outcome::Scored { prompts, errors: std::mem::take(&mut self.errors), audit: None })
    }

    /// How the sample ended, once all rounds are over.
    pub(super) fn take_outcome(&mut self) -> Outcome {
        let (last, errors) = (self.scored(), std::mem::take(&mut self.errors));
        match self.judged.take() {
            Some((prompts, _)) => Outcome::Scored { prompts, errors, audit: Some(last) },
            None => Outcome::Scored { prompts: last, errors, audit: None },
        }
    }
}

fn sums_of(result: &UnitResult) -> impl Iterator<Item = Sums> + '_ {
    result.sum.iter().zip(&result.sum_sq).map(|(&sum, &sum_sq)| Sums { n: result.slots, sum, sum_sq })
}
