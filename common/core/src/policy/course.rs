//! The course of a sample through a policy: the slots of each round, and which contenders survive it.

use std::ops::Range;

use serde::Serialize;

use super::reference::{self, Step};
use super::{Policy, PolicyError, Race, ScoredBy, Slot};
use crate::ensemble::Contenders;
use crate::ids::{PromptIndex, Round};
use crate::sums::Sums;

/// The most slots on which groups are compared before the remaining ones are opened.
const GROUP_SLOTS: usize = 8;

/// The slots of a job in the order of evaluation, and the eliminations between them.
#[derive(Clone, Debug, PartialEq)]
pub struct Course {
    slots: Vec<Slot>,
    /// How many contenders the shortlist keeps. Its round comes first and has its own slot.
    shortlist: Option<u32>,
    elimination: Elimination,
    /// The course of the audit, which audited samples go through afterwards.
    audit: Option<Box<Course>>,
}

/// When contenders are eliminated.
#[derive(Clone, Debug, PartialEq)]
enum Elimination {
    /// Each step keeps a fixed number of contenders after a fixed number of slots.
    Fixed(Vec<Step>),
    /// Contenders leave when a [`Race`] finds them significantly worse.
    Race(Race),
}

/// What is known about a sample's prompts when a round ends.
#[derive(Clone, Copy, Debug)]
pub struct Standing<'a> {
    /// The prompts of the round, ascending.
    pub remaining: &'a [PromptIndex],
    /// The sums of all their errors, by prompt.
    pub totals: &'a [Sums],
    /// Their errors by prompt and slot, if the course needs pairs.
    pub errors: &'a [Vec<f32>],
}

/// The prompts that survive a round, ascending.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Survivors {
    /// They continue with the next slots.
    GoOn(Vec<PromptIndex>),
    /// Their errors so far are discarded and they start again with the first slot, because another model now scores them or
    /// because they replace a group.
    StartAgain(Vec<PromptIndex>),
}

/// The cost of one round for one sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct RoundCost {
    /// Slots in the round.
    pub slots: u64,
    /// Prompts evaluated on each slot.
    pub prompts: u64,
    /// `slots` times `prompts`.
    pub evaluations: u64,
}

impl Course {
    /// The course of a policy for a model with `timesteps` training timesteps. `contenders` is `None` if each sample has its
    /// own captions. With `shortlist`, a first round keeps that many contenders.
    pub fn new(
        policy: &Policy,
        shortlist: Option<u32>,
        timesteps: u32,
        contenders: Option<&Contenders>,
    ) -> Result<Self, PolicyError> {
        if let (Some(keep), Some(contenders)) = (shortlist, contenders) {
            let (count, noun, first) = (contenders.len(), contenders.noun(), policy.first_keep());
            if keep as usize >= count || keep < first {
                return Err(PolicyError::Shortlist { keep, count, noun, first });
            }
        }
        let has_hierarchy = contenders.is_some_and(Contenders::has_hierarchy);
        if has_hierarchy && (shortlist.is_some() || !matches!(policy, Policy::Race { .. })) {
            return Err(PolicyError::Hierarchy);
        }
        let shortlist = shortlist.filter(|_| contenders.is_some());
        let (slots, elimination) = match policy {
            Policy::Reference { stages, trials } => {
                let (slots, steps) = reference::schedule(stages, *trials, timesteps, contenders)?;
                (slots, Elimination::Fixed(steps))
            }
            Policy::Exhaustive { samples, trials } => {
                let slots = reference::grid(*samples, *trials, timesteps)?;
                let keep = contenders.map_or(u32::MAX, |c| c.len() as u32);
                let all = Step { end: slots.len(), keep };
                (slots, Elimination::Fixed(vec![all]))
            }
            Policy::Race { risk, max_slots, timesteps: density } => {
                // A policy may also come from a job.json or a coordinator, where the flags' checks did not run.
                super::check_race(*risk, *max_slots)?;
                density.check(timesteps)?;
                (density.slots(timesteps, *max_slots), Elimination::Race(Race { risk: *risk }))
            }
        };
        let prompts = contenders.map_or(0, Contenders::prompt_count);
        for (count, what) in [(slots.len(), "timesteps times trials"), (prompts, "prompts")] {
            if count > crate::unit::MOST {
                return Err(PolicyError::TooMany { count, what });
            }
        }
        Ok(Self { slots, shortlist, elimination, audit: None })
    }

    /// Adds the course of another policy, which audited samples go through afterwards.
    pub fn with_audit(
        self,
        policy: &Policy,
        timesteps: u32,
        contenders: Option<&Contenders>,
    ) -> Result<Self, PolicyError> {
        // An audit compares only classes, not groups.
        let classes = contenders.map(Contenders::without_groups);
        let audit = Self::new(policy, None, timesteps, classes.as_ref())?;
        Ok(Self { audit: Some(Box::new(audit)), ..self })
    }

    /// The course of audited samples after this one. Its slots follow this course's slots.
    pub fn audit(&self) -> Option<&Self> {
        self.audit.as_deref()
    }

    /// Every slot of this course and its audit, in the order of their positions.
    pub fn all_slots(&self) -> impl Iterator<Item = Slot> + '_ {
        self.slots.iter().chain(self.audit.iter().flat_map(|audit| &audit.slots)).copied()
    }

    /// The slots scored by the job's model, in the order of evaluation. Slot positions index this list.
    pub fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// Which model scores a round.
    pub fn scored_by(&self, round: Round) -> ScoredBy {
        if self.shortlist.is_some() && round == Round(0) { ScoredBy::Shortlist } else { ScoredBy::Model }
    }

    /// The slot at a position of a round.
    pub fn slot(&self, round: Round, position: usize) -> Option<Slot> {
        match self.scored_by(round) {
            ScoredBy::Shortlist => (position == 0).then_some(Slot { timestep: 0, noise: 0 }),
            ScoredBy::Model => self.all_slots().nth(position),
        }
    }

    /// Whether eliminations compare pairs, and so need every error of the remaining prompts.
    pub fn needs_pairs(&self) -> bool {
        matches!(self.elimination, Elimination::Race(_))
    }

    /// Whether workers report every error instead of sums. `written` says whether the job writes errors.
    pub fn reports_errors(&self, written: bool) -> bool {
        written || self.needs_pairs()
    }

    /// The positions of the slots in a round, for a sample whose `remaining` prompts have been evaluated on `done` slots;
    /// `None` if the sample is finished. The range may be empty.
    pub fn round(
        &self,
        round: Round,
        done: usize,
        contenders: &Contenders,
        remaining: &[PromptIndex],
    ) -> Option<Range<usize>> {
        if self.scored_by(round) == ScoredBy::Shortlist {
            return Some(0..1);
        }
        match &self.elimination {
            Elimination::Fixed(steps) => steps.get(self.step(round)).map(|step| done..step.end),
            Elimination::Race(_) => {
                let decided = done > 0 && !contenders.are_rivals(remaining);
                let most = self.most_slots(contenders, remaining);
                let slots = Race::round_slots(done, remaining.len()).min(most.saturating_sub(done));
                (!decided && slots > 0).then_some(done..done + slots)
            }
        }
    }

    /// How many slots the first round has for a sample with this many prompts.
    pub fn first_slots(&self, prompts: usize) -> usize {
        match (&self.elimination, self.shortlist) {
            (_, Some(_)) => 1,
            (Elimination::Fixed(steps), None) => steps.first().map_or(0, |step| step.end),
            (Elimination::Race(_), None) => Race::round_slots(0, prompts).min(self.slots.len()),
        }
    }

    /// The most slots that these prompts go through in a race.
    fn most_slots(&self, contenders: &Contenders, remaining: &[PromptIndex]) -> usize {
        if contenders.have_groups(remaining) { GROUP_SLOTS.min(self.slots.len()) } else { self.slots.len() }
    }

    fn step(&self, round: Round) -> usize {
        round.at() - usize::from(self.shortlist.is_some())
    }

    /// The prompts that survive a round.
    pub fn survivors(&self, round: Round, contenders: &Contenders, standing: Standing<'_>) -> Survivors {
        let Standing { remaining, totals, errors } = standing;
        match (&self.elimination, self.scored_by(round)) {
            (_, ScoredBy::Shortlist) => {
                let keep = self.shortlist.unwrap_or(u32::MAX);
                Survivors::StartAgain(contenders.survivors(remaining, totals, keep))
            }
            (Elimination::Fixed(steps), _) => {
                let keep = steps.get(self.step(round)).map_or(u32::MAX, |step| step.keep);
                Survivors::GoOn(contenders.survivors(remaining, totals, keep))
            }
            (Elimination::Race(race), _) => {
                let done = remaining.first().map_or(0, |prompt| errors[prompt.at()].len());
                let stay = race.survivors(contenders, remaining, errors, &self.slots[..done]);
                let level_ends = done >= self.most_slots(contenders, remaining) || !contenders.are_rivals(&stay);
                if contenders.have_groups(&stay) && level_ends {
                    Survivors::StartAgain(contenders.opened(&stay))
                } else {
                    Survivors::GoOn(stay)
                }
            }
        }
    }

    /// The cost of each round for a sample with these contenders. It is exact if the course is fixed and all contenders have
    /// equally many prompts, else an upper bound. All rounds of a race after the first are counted as one.
    pub fn costs(&self, contenders: &Contenders) -> Vec<RoundCost> {
        let cost = |slots: usize, prompts: u64| RoundCost {
            slots: slots as u64,
            prompts,
            evaluations: slots as u64 * prompts,
        };
        let mut prompts = contenders.of_all_classes().count() as u64;
        let mut costs = Vec::new();
        let mut level = contenders.first();
        while self.needs_pairs() && contenders.have_groups(&level) {
            costs.push(cost(GROUP_SLOTS.min(self.slots.len()), level.len() as u64));
            level = contenders.opened(&level);
        }
        if let Some(keep) = self.shortlist {
            costs.push(cost(1, prompts));
            prompts = prompts.min(contenders.most_prompts(keep));
        }
        match &self.elimination {
            Elimination::Fixed(steps) => {
                let mut done = 0;
                for step in steps {
                    costs.push(cost(step.end - done, prompts));
                    prompts = prompts.min(contenders.most_prompts(step.keep));
                    done = step.end;
                }
            }
            Elimination::Race(_) => {
                let first = Race::round_slots(0, prompts as usize).min(self.slots.len());
                costs.extend([cost(first, prompts), cost(self.slots.len() - first, prompts)]);
            }
        }
        costs
    }
}
