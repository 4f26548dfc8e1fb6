//! A sample's walk through a course: what the current round evaluates, and the results of earlier rounds.

use std::ops::Range;

use super::{Course, ScoredBy, Standing, Survivors};
use crate::ensemble::Contenders;
use crate::ids::{PromptIndex, Round};
use crate::ranking::ScoredPrompt;
use crate::sums::Sums;

/// The rounds of one sample. The coordinator merges errors as they arrive; a [`replay`](super::replay) merges recorded ones.
#[derive(Clone, Debug)]
pub struct Walk {
    round: Round,
    /// The current round's slots, as positions in the course. Earlier slots of the job's model are done.
    slots: Range<usize>,
    remaining: Vec<PromptIndex>,
    /// The sums so far, by prompt. Empty until the first errors arrive, to save memory: most samples of an open shard are in
    /// their first round.
    totals: Vec<Sums>,
    /// The last round in which each prompt was evaluated.
    last_round: Vec<Round>,
    /// If eliminations need pairs: the errors of the remaining prompts on every slot done, by prompt. They are dropped when a
    /// prompt leaves.
    pairs: Vec<Vec<f32>>,
}

impl Walk {
    /// The most bytes per prompt, without its pairs.
    pub const PROMPT_BYTES: usize = size_of::<PromptIndex>() + size_of::<Sums>() + size_of::<Round>();

    /// A walk that starts with these prompts.
    pub fn new(first: Vec<PromptIndex>) -> Self {
        Self {
            round: Round(0),
            slots: 0..0,
            remaining: first,
            totals: Vec::new(),
            last_round: Vec::new(),
            pairs: Vec::new(),
        }
    }

    /// Enters the current round, or the next one with something to evaluate. Returns `false` if there is none.
    pub fn enter(&mut self, course: &Course, contenders: &Contenders) -> bool {
        while let Some(slots) = course.round(self.round, self.slots.end, contenders, &self.remaining) {
            self.slots = slots;
            if self.evaluations() > 0 {
                return true;
            }
            self.end_round(course, contenders);
        }
        false
    }

    /// The current round.
    pub fn round(&self) -> Round {
        self.round
    }

    /// The slots of the current round, as positions in the course.
    pub fn slots(&self) -> &Range<usize> {
        &self.slots
    }

    /// The prompts of the current round, ascending.
    pub fn remaining(&self) -> &[PromptIndex] {
        &self.remaining
    }

    /// The number of evaluations in the current round.
    pub fn evaluations(&self) -> u64 {
        (self.slots.len() * self.remaining.len()) as u64
    }

    /// Merges a remaining prompt's sums over some of the round's slots.
    pub fn merge_sums(&mut self, contenders: &Contenders, prompt: PromptIndex, sums: &Sums) {
        self.make_room(contenders);
        self.totals[prompt.at()].merge(sums);
        self.last_round[prompt.at()] = self.round;
    }

    /// Merges a remaining prompt's errors on the next slots of the round.
    pub fn merge_errors(&mut self, course: &Course, contenders: &Contenders, prompt: PromptIndex, errors: &[f32]) {
        self.merge_sums(contenders, prompt, &Sums::of(errors));
        if course.needs_pairs() && course.scored_by(self.round) == ScoredBy::Model {
            self.pairs.resize(contenders.prompt_count(), Vec::new());
            self.pairs[prompt.at()].extend_from_slice(errors);
        }
    }

    /// Eliminates contenders after the round is merged. Returns the prompts that start again, whose sums were reset.
    pub fn end_round(&mut self, course: &Course, contenders: &Contenders) -> &[PromptIndex] {
        self.make_room(contenders);
        let standing = Standing { remaining: &self.remaining, totals: &self.totals, errors: &self.pairs };
        let survivors = course.survivors(self.round, contenders, standing);
        self.round = Round(self.round.0 + 1);
        match survivors {
            Survivors::GoOn(stay) => {
                for prompt in &self.remaining {
                    if let Some(pairs) = self.pairs.get_mut(prompt.at())
                        && stay.binary_search(prompt).is_err()
                    {
                        *pairs = Vec::new();
                    }
                }
                self.remaining = stay;
                &[]
            }
            Survivors::StartAgain(stay) => {
                stay.iter().for_each(|prompt| self.totals[prompt.at()] = Sums::default());
                (self.slots, self.pairs, self.remaining) = (0..0, Vec::new(), stay);
                &self.remaining
            }
        }
    }

    /// All prompts with their sums, by index. Prompts that were never evaluated have empty sums.
    pub fn scored(&self) -> Vec<ScoredPrompt> {
        let scores = self.totals.iter().zip(&self.last_round);
        let prompts = (0u32..).map(PromptIndex).zip(scores);
        prompts.map(|(prompt, (sums, round))| ScoredPrompt { prompt, sums: *sums, round: *round }).collect()
    }

    /// Allocates the sums of all prompts.
    fn make_room(&mut self, contenders: &Contenders) {
        self.totals.resize(contenders.prompt_count(), Sums::default());
        self.last_round.resize(contenders.prompt_count(), Round(0));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::class::{Classes, Hierarchy};
    use crate::policy::{Policy, Timesteps};

    fn indices(prompts: &[PromptIndex]) -> Vec<u32> {
        prompts.iter().map(|prompt| prompt.0).collect()
    }

    #[test]
    fn sums_of_several_rounds_add_up_and_eliminated_prompts_keep_theirs() {
        let contenders = Contenders::prompts(3);
        let policy = Policy::reference(&[2, 1], &[1, 3], 1).unwrap();
        let course = Course::new(&policy, None, 1000, Some(&contenders)).unwrap();
        let mut walk = Walk::new(contenders.first());
        let mut rounds = Vec::new();
        while walk.enter(&course, &contenders) {
            rounds.push((walk.round().0, walk.slots().clone(), indices(walk.remaining())));
            for prompt in walk.remaining().to_vec() {
                let errors = vec![1.0 + prompt.0 as f32; walk.slots().len()];
                walk.merge_errors(&course, &contenders, prompt, &errors);
            }
            assert!(walk.end_round(&course, &contenders).is_empty());
        }
        assert_eq!(rounds, [(0, 0..1, vec![0, 1, 2]), (1, 1..3, vec![0, 1])]);
        assert_eq!(indices(walk.remaining()), [0]);
        let scored: Vec<_> = walk.scored().iter().map(|p| (p.sums.n, p.sums.sum, p.round.0)).collect();
        assert_eq!(scored, [(3, 3.0, 1), (3, 6.0, 1), (1, 3.0, 0)]);
    }

    #[test]
    fn members_of_an_opened_group_start_again_with_the_first_slot() {
        let classes = Classes::parse("ant\nbee\ncar\n", &[]).unwrap();
        let hierarchy = Hierarchy::parse("class,parent\nant,insect\nbee,insect\n", &classes, &[]).unwrap();
        let contenders = Contenders::prompts(3).below(&hierarchy, &classes);
        let race = Policy::race(0.05, 40, Timesteps::default()).unwrap();
        let course = Course::new(&race, None, 1000, Some(&contenders)).unwrap();
        let mut walk = Walk::new(contenders.first());
        // The car and the insects, which nothing tells apart.
        assert_eq!(indices(walk.remaining()), [2, 3]);
        let mut again = Vec::new();
        while again.is_empty() && walk.enter(&course, &contenders) {
            for prompt in walk.remaining().to_vec() {
                let wave = walk.slots().clone().map(|slot| 1.0 + ((slot + prompt.at()) % 2) as f32);
                let errors: Vec<f32> = wave.collect();
                walk.merge_errors(&course, &contenders, prompt, &errors);
            }
            again = indices(walk.end_round(&course, &contenders));
        }
        assert_eq!(again, [0, 1, 2]);
        assert!(walk.enter(&course, &contenders) && walk.slots().start == 0);
        // What the car went through as a rival of the group counts no more.
        assert!(walk.scored()[..3].iter().all(|prompt| prompt.sums.n == 0));
    }
}
