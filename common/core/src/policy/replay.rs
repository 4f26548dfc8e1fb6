//! Runs a course on recorded errors: what a policy would have decided, without running a model.

use super::{Course, ScoredBy, Slot, Walk};
use crate::calibration::Evidence;
use crate::ensemble::Contenders;
use crate::ids::{PromptIndex, Round};
use crate::ranking::{ContenderScore, ScoredPrompt};
use crate::sums::Sums;

/// The result of a course for one sample.
#[derive(Clone, Debug, PartialEq)]
pub struct Replayed {
    /// The best prompt of the best contender.
    pub best: PromptIndex,
    /// Evaluations used.
    pub evaluations: u64,
    /// Rounds used.
    pub rounds: u16,
    /// Mean errors of the other classes in the last round, minus the best class's mean error; ascending.
    pub behind: Vec<f32>,
}

impl Replayed {
    /// The result for a sample's prompts after this many evaluations and rounds.
    fn new(contenders: &Contenders, prompts: &[ScoredPrompt], evaluations: u64, rounds: u16) -> Self {
        let ranking = contenders.class_ranking(prompts);
        let best = ranking.first();
        let rivals = ranking.iter().skip(1).take_while(|rival| best.is_some_and(|best| rival.round() == best.round()));
        let lowest = best.map_or(0.0, |best| best.mean);
        let behind = rivals.map(|rival| (rival.mean - lowest) as f32).collect();
        let best = best.and_then(ContenderScore::best_prompt).unwrap_or(PromptIndex(0));
        Self { best, evaluations, rounds, behind }
    }

    /// The evidence for its confidence.
    pub fn evidence(&self) -> Evidence {
        Evidence::new(self.behind.clone(), self.evaluations as u32)
    }
}

/// The recorded slot that stands in for each slot of a course: the one with the nearest timestep that is not taken yet; `None`
/// if there are too few. The noise of a slot does not matter.
pub fn stand_ins(course: &[Slot], recorded: &[Slot]) -> Option<Vec<usize>> {
    let mut free: Vec<usize> = (0..recorded.len()).collect();
    let stand_in = |slot: &Slot| {
        let nearest = (0..free.len()).min_by_key(|&i| recorded[free[i]].timestep.abs_diff(slot.timestep))?;
        Some(free.remove(nearest))
    };
    course.iter().map(stand_in).collect()
}

/// The decision from the given slots alone. `errors` are a sample's errors, by prompt and recorded slot.
pub fn decide_by(contenders: &Contenders, errors: &[Vec<f32>], slots: &[usize]) -> Replayed {
    let scored = |prompt: PromptIndex| {
        let errors: Vec<f32> = slots.iter().map(|slot| errors[prompt.at()][*slot]).collect();
        ScoredPrompt { prompt, sums: Sums::of(&errors), round: Round(0) }
    };
    let prompts: Vec<_> = recorded_prompts(errors).map(scored).collect();
    Replayed::new(contenders, &prompts, (prompts.len() * slots.len()) as u64, 1)
}

/// The prompts that have recorded errors.
fn recorded_prompts(errors: &[Vec<f32>]) -> impl Iterator<Item = PromptIndex> + '_ {
    (0..).map(PromptIndex).zip(errors).filter(|(_, errors)| !errors.is_empty()).map(|(prompt, _)| prompt)
}

/// Runs a course on a sample's errors, by prompt and recorded slot. `at` holds the [`stand_ins`] of the course's slots.
///
/// ```
/// use elbo_core::ensemble::Contenders;
/// use elbo_core::ids::PromptIndex;
/// use elbo_core::policy::replay::{replay, stand_ins};
/// use elbo_core::policy::{Course, Policy};
///
/// // Two prompts stay after one timestep, and the best of them after three.
/// let policy = Policy::reference(&[2, 1], &[1, 3], 1)?;
/// let contenders = Contenders::prompts(3);
/// let course = Course::new(&policy, None, 1000, Some(&contenders))?;
/// let errors = [vec![2.0, 1.0, 1.0], vec![1.0, 3.0, 3.0], vec![5.0, 0.0, 0.0]];
/// let slots = stand_ins(course.slots(), course.slots()).expect("as many slots");
/// let found = replay(&course, &contenders, &errors, &slots);
/// assert_eq!((found.best, found.evaluations), (PromptIndex(0), 3 + 2 * 2));
/// # Ok::<_, elbo_core::policy::PolicyError>(())
/// ```
pub fn replay(course: &Course, contenders: &Contenders, errors: &[Vec<f32>], at: &[usize]) -> Replayed {
    let mut walk = Walk::new(recorded_prompts(errors).collect());
    let mut evaluations = 0;
    while walk.enter(course, contenders) {
        debug_assert_eq!(course.scored_by(walk.round()), ScoredBy::Model, "a shortlist's errors are not recorded");
        evaluations += walk.evaluations();
        let slots = &at[walk.slots().clone()];
        for prompt in walk.remaining().to_vec() {
            let errors: Vec<f32> = slots.iter().map(|slot| errors[prompt.at()][*slot]).collect();
            walk.merge_errors(course, contenders, prompt, &errors);
        }
        let again = walk.end_round(course, contenders);
        debug_assert!(again.is_empty(), "groups' errors are not recorded");
    }
    Replayed::new(contenders, &walk.scored(), evaluations, walk.round().0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::{Policy, Timesteps};

    fn slots(timesteps: &[u32]) -> Vec<Slot> {
        timesteps.iter().zip(0..).map(|(&timestep, noise)| Slot { timestep, noise }).collect()
    }

    #[test]
    fn the_nearest_free_slot_stands_in_for_a_slot() {
        let recorded = slots(&[100, 300, 500, 700]);
        assert_eq!(stand_ins(&slots(&[310, 290, 690]), &recorded), Some(vec![1, 0, 3]));
        assert_eq!(stand_ins(&slots(&[1, 2, 3, 4, 5]), &recorded), None);
    }

    #[test]
    fn the_reference_keeps_the_lowest_and_evaluates_only_what_it_kept() {
        let contenders = Contenders::prompts(3);
        let policy = Policy::reference(&[2, 1], &[1, 3], 1).unwrap();
        let course = Course::new(&policy, None, 1000, Some(&contenders)).unwrap();
        // The second is best on the first slot but loses over all three; the third is eliminated after the first.
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
