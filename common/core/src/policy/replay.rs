//! A course run over errors that were recorded before: what a policy would have decided, without a model.

use std::collections::{BTreeMap, BTreeSet};

use super::{Course, ScoredBy, Slot, Standing};
use crate::calibration::Evidence;
use crate::ensemble::Contenders;
use crate::ids::{PromptIndex, Round};
use crate::sums::Sums;

/// What a course came to for one sample.
#[derive(Clone, Debug, PartialEq)]
pub struct Replayed {
    /// The best prompt of the best contender.
    pub best: PromptIndex,
    /// Evaluations.
    pub evaluations: u64,
    /// Rounds.
    pub rounds: u16,
    /// By how much the mean errors of the last round's other classes exceed the best one's, ascending.
    pub behind: Vec<f32>,
}

impl Replayed {
    /// The best of some prompts that were scored on the same slots, after so many evaluations and rounds.
    fn new(contenders: &Contenders, prompts: &[PromptIndex], totals: &[Sums], evaluations: u64, rounds: u16) -> Self {
        let mut groups: BTreeMap<u32, Vec<(f64, PromptIndex)>> = BTreeMap::new();
        for &prompt in prompts {
            groups.entry(contenders.of_prompt(prompt)).or_default().push((totals[prompt.at()].mean(), prompt));
        }
        let score = |group: Vec<(f64, PromptIndex)>| {
            let mean = group.iter().map(|(mean, _)| mean).sum::<f64>() / group.len() as f64;
            let lowest = group.into_iter().min_by(|a, b| a.0.total_cmp(&b.0));
            lowest.map(|(_, prompt)| (mean, prompt))
        };
        let mut ranked: Vec<_> = groups.into_values().filter_map(score).collect();
        ranked.sort_by(|a, b| a.0.total_cmp(&b.0));
        let mut classes = BTreeSet::new();
        ranked.retain(|(_, prompt)| classes.insert(contenders.class_of(*prompt)));
        let (lowest, best) = ranked.first().copied().unwrap_or((0.0, PromptIndex(0)));
        let behind = ranked.iter().skip(1).map(|(mean, _)| (mean - lowest) as f32).collect();
        Self { best, evaluations, rounds, behind }
    }

    /// What its confidence rests on.
    pub fn evidence(&self) -> Evidence {
        Evidence::new(self.behind.clone(), self.evaluations as u32)
    }
}

/// For every slot of a course, which recorded slot stands for it: the nearest in time that is not taken; none where there
/// are too few. Whatever noise a slot had is as good as any other.
pub fn stand_ins(course: &[Slot], recorded: &[Slot]) -> Option<Vec<usize>> {
    let mut free: Vec<usize> = (0..recorded.len()).collect();
    let stand_in = |slot: &Slot| {
        let nearest = (0..free.len()).min_by_key(|&i| recorded[free[i]].timestep.abs_diff(slot.timestep))?;
        Some(free.remove(nearest))
    };
    course.iter().map(stand_in).collect()
}

/// What some slots together say of a sample with these errors, by prompt and recorded slot.
pub fn decide_by(contenders: &Contenders, errors: &[Vec<f32>], slots: &[usize]) -> Replayed {
    let all = scored_prompts(errors);
    let mut totals = vec![Sums::default(); errors.len()];
    for prompt in &all {
        let errors: Vec<f32> = slots.iter().map(|slot| errors[prompt.at()][*slot]).collect();
        totals[prompt.at()] = Sums::of(&errors);
    }
    let evaluations = (all.len() * slots.len()) as u64;
    Replayed::new(contenders, &all, &totals, evaluations, 1)
}

/// The prompts that have errors.
fn scored_prompts(errors: &[Vec<f32>]) -> Vec<PromptIndex> {
    let prompts = (0..).map(PromptIndex).zip(errors);
    prompts.filter(|(_, errors)| !errors.is_empty()).map(|(prompt, _)| prompt).collect()
}

/// Runs a course over a sample's errors, by prompt and recorded slot; `at` are the [`stand_ins`] of the course's slots.
pub fn replay(course: &Course, contenders: &Contenders, errors: &[Vec<f32>], at: &[usize]) -> Replayed {
    let mut remaining = scored_prompts(errors);
    let (mut totals, mut seen) = (vec![Sums::default(); errors.len()], vec![Vec::new(); errors.len()]);
    let (mut done, mut evaluations, mut round) = (0, 0, Round(0));
    let mut last = remaining.clone();
    while let Some(slots) = course.round(round, done, contenders, &remaining) {
        debug_assert_eq!(course.scored_by(round), ScoredBy::Model, "a shortlist's errors are not recorded");
        evaluations += (slots.len() * remaining.len()) as u64;
        for prompt in &remaining {
            let errors = at[slots.clone()].iter().map(|slot| errors[prompt.at()][*slot]);
            seen[prompt.at()].extend(errors);
            totals[prompt.at()].merge(&Sums::of(&seen[prompt.at()][done..]));
        }
        done = slots.end;
        let standing = Standing { remaining: &remaining, totals: &totals, errors: &seen };
        let stay = course.survivors(round, contenders, standing);
        debug_assert!(!stay.afresh, "groups' errors are not recorded");
        last = std::mem::replace(&mut remaining, stay.prompts);
        round = Round(round.0 + 1);
    }
    Replayed::new(contenders, &last, &totals, evaluations, round.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::{Policy, Timesteps};

    fn slots(timesteps: &[u32]) -> Vec<Slot> {
        timesteps.iter().zip(0..).map(|(&timestep, noise)| Slot { timestep, noise }).collect()
    }

    #[test]
    fn a_slot_is_stood_in_for_by_the_nearest_that_is_free() {
        let recorded = slots(&[100, 300, 500, 700]);
        assert_eq!(stand_ins(&slots(&[310, 290, 690]), &recorded), Some(vec![1, 0, 3]));
        assert_eq!(stand_ins(&slots(&[1, 2, 3, 4, 5]), &recorded), None);
    }

    #[test]
    fn the_reference_keeps_the_lowest_and_pays_for_whom_it_kept() {
        let contenders = Contenders::prompts(3);
        let policy = Policy::reference(&[2, 1], &[1, 3], 1).unwrap();
        let course = Course::new(&policy, None, 1000, Some(&contenders)).unwrap();
        // The second is best on the first slot and loses by all three; the third is out after the first.
        let errors = vec![vec![2.0, 1.0, 1.0], vec![1.0, 3.0, 3.0], vec![5.0, 0.0, 0.0]];
        let at = stand_ins(course.slots(), course.slots()).unwrap();
        let found = replay(&course, &contenders, &errors, &at);
        assert_eq!((found.best, found.evaluations, found.rounds), (PromptIndex(0), 3 + 2 * 2, 2));
    }

    #[test]
    fn a_race_ends_when_one_class_is_left() {
        let contenders = Contenders::prompts(10);
        let policy = Policy::race(0.02, 20, Timesteps::default()).unwrap();
        let course = Course::new(&policy, None, 1000, Some(&contenders)).unwrap();
        let wave = |slot: usize| [0.0, 0.01, 0.02][slot % 3];
        let errors: Vec<Vec<f32>> =
            (0..10).map(|p| (0..20).map(|s| 1.0 + if p == 4 { 0.0 } else { 1.0 + wave(s + p) }).collect()).collect();
        let at = stand_ins(course.slots(), course.slots()).unwrap();
        let found = replay(&course, &contenders, &errors, &at);
        assert_eq!((found.best, found.evaluations, found.rounds), (PromptIndex(4), 2 * 10, 1));
    }
}
