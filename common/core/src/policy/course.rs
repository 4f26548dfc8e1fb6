//! The course of a sample through a policy: which slots its rounds evaluate, and who is left after each.

use std::ops::Range;

use serde::Serialize;

use super::reference::{self, Step};
use super::{Policy, PolicyError, Race, ScoredBy, Slot};
use crate::ensemble::Contenders;
use crate::ids::{PromptIndex, Round};
use crate::sums::Sums;

/// Slots that groups of classes are compared on at most before those that are left are opened.
const GROUP_SLOTS: usize = 8;

/// The slots of a job in the order of evaluation, and when contenders are eliminated.
#[derive(Clone, Debug, PartialEq)]
pub struct Course {
    slots: Vec<Slot>,
    /// How many contenders stay after a first round in which another model scores them, on a slot of its own.
    shortlist: Option<u32>,
    elimination: Elimination,
    /// What audited samples go through afterwards.
    audit: Option<Box<Course>>,
}

/// Who leaves when.
#[derive(Clone, Debug, PartialEq)]
enum Elimination {
    /// After so many slots so many contenders are kept.
    Fixed(Vec<Step>),
    /// Whoever has lost leaves.
    Race(Race),
}

/// What is known of a sample's prompts when a round ends.
#[derive(Clone, Copy, Debug)]
pub struct Standing<'a> {
    /// The prompts that were evaluated, ascending.
    pub remaining: &'a [PromptIndex],
    /// The sums of all their errors, by prompt.
    pub totals: &'a [Sums],
    /// Their single errors by prompt and slot, where the course needs pairs.
    pub errors: &'a [Vec<f32>],
}

/// Who goes on after a round.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Survivors {
    /// Their prompts, ascending.
    pub prompts: Vec<PromptIndex>,
    /// What they have been through does not count any more, and they start again with the first slot: another model looks at
    /// them now, or they have come in the place of a group.
    pub afresh: bool,
}

/// What one round costs for one sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct RoundCost {
    /// Slots evaluated.
    pub slots: u64,
    /// Prompts evaluated on each.
    pub prompts: u64,
    /// Their product.
    pub evaluations: u64,
}

impl Course {
    /// The course a policy sets for a model with `timesteps` training timesteps and a job with these contenders, none where
    /// every sample brings its own; after a round in which a shortlist of so many is made, where there is one.
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
                // A policy may come from a job.json or a coordinator, and not by way of the flags.
                super::check_race(*risk, *max_slots)?;
                density.check(timesteps)?;
                (density.slots(timesteps, *max_slots), Elimination::Race(Race { risk: *risk }))
            }
        };
        let prompts = contenders.map_or(0, Contenders::prompt_count);
        for (count, what) in [(slots.len(), "timesteps times --trials"), (prompts, "prompts")] {
            if count > crate::unit::MOST {
                return Err(PolicyError::TooMany { count, what });
            }
        }
        Ok(Self { slots, shortlist, elimination, audit: None })
    }

    /// The course with another policy that audited samples go through afterwards.
    pub fn with_audit(
        self,
        policy: &Policy,
        timesteps: u32,
        contenders: Option<&Contenders>,
    ) -> Result<Self, PolicyError> {
        // An audit is among the classes alone.
        let classes = contenders.map(Contenders::without_groups);
        let audit = Self::new(policy, None, timesteps, classes.as_ref())?;
        Ok(Self { audit: Some(Box::new(audit)), ..self })
    }

    /// What audited samples go through afterwards. Its slots follow this course's.
    pub fn audit(&self) -> Option<&Self> {
        self.audit.as_deref()
    }

    /// Every slot that is looked at, in the order of their positions.
    pub fn all_slots(&self) -> impl Iterator<Item = Slot> + '_ {
        self.slots.iter().chain(self.audit.iter().flat_map(|audit| &audit.slots)).copied()
    }

    /// The slots of the job's model, in the order of evaluation: positions of slots count from the first of them.
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

    /// Whether eliminations need every single error of the remaining prompts, because they compare pairs.
    pub fn needs_pairs(&self) -> bool {
        matches!(self.elimination, Elimination::Race(_))
    }

    /// Whether workers report every single error, from which sums follow, and not sums; of a job that writes errors or not.
    pub fn reports_errors(&self, written: bool) -> bool {
        written || self.needs_pairs()
    }

    /// The positions of the slots that a round evaluates, for a sample whose `remaining` prompts have been through `done`
    /// slots; none where it is over. A round may have no new slot.
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

    /// How many slots the first round evaluates for a sample with so many prompts.
    pub fn first_slots(&self, prompts: usize) -> usize {
        match (&self.elimination, self.shortlist) {
            (_, Some(_)) => 1,
            (Elimination::Fixed(steps), None) => steps.first().map_or(0, |step| step.end),
            (Elimination::Race(_), None) => Race::round_slots(0, prompts).min(self.slots.len()),
        }
    }

    /// How many slots some prompts of a race go through at most.
    fn most_slots(&self, contenders: &Contenders, remaining: &[PromptIndex]) -> usize {
        if contenders.have_groups(remaining) { GROUP_SLOTS.min(self.slots.len()) } else { self.slots.len() }
    }

    fn step(&self, round: Round) -> usize {
        round.at() - usize::from(self.shortlist.is_some())
    }

    /// Who stays after a round.
    pub fn survivors(&self, round: Round, contenders: &Contenders, standing: Standing<'_>) -> Survivors {
        let Standing { remaining, totals, errors } = standing;
        match (&self.elimination, self.scored_by(round)) {
            (_, ScoredBy::Shortlist) => {
                let keep = self.shortlist.unwrap_or(u32::MAX);
                Survivors { prompts: contenders.survivors(remaining, totals, keep), afresh: true }
            }
            (Elimination::Fixed(steps), _) => {
                let keep = steps.get(self.step(round)).map_or(u32::MAX, |step| step.keep);
                Survivors { prompts: contenders.survivors(remaining, totals, keep), afresh: false }
            }
            (Elimination::Race(race), _) => {
                let done = remaining.first().map_or(0, |prompt| errors[prompt.at()].len());
                let stay = race.survivors(contenders, remaining, errors, &self.slots[..done]);
                let level_ends = done >= self.most_slots(contenders, remaining) || !contenders.are_rivals(&stay);
                match contenders.have_groups(&stay) && level_ends {
                    true => Survivors { prompts: contenders.opened(&stay), afresh: true },
                    false => Survivors { prompts: stay, afresh: false },
                }
            }
        }
    }

    /// What each round costs for a sample with these contenders: exact where they are even and the course fixed, else the
    /// most it can be. The rounds of a race after the first count as one.
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
