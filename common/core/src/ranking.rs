//! How contenders rank: their scores, the survivors of a round, and the best class.

use std::collections::BTreeSet;

use crate::ensemble::Contenders;
use crate::ids::{PromptIndex, Round};
use crate::sums::Sums;

/// The sums of one prompt.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ScoredPrompt {
    /// The prompt.
    pub prompt: PromptIndex,
    /// Sums of all its errors.
    pub sums: Sums,
    /// The last round in which it was evaluated.
    pub round: Round,
}

/// The score of a contender: the mean over its prompts' mean errors.
#[derive(Clone, Debug, PartialEq)]
pub struct ContenderScore {
    /// The contender's number.
    pub contender: u32,
    /// Its score; lower is better.
    pub mean: f64,
    /// Its prompts, at least one.
    pub prompts: Vec<ScoredPrompt>,
}

impl ContenderScore {
    /// The last round in which the contender was evaluated.
    pub fn round(&self) -> Round {
        self.prompts.iter().map(|prompt| prompt.round).max().unwrap_or(Round(0))
    }

    /// The prompt with the lowest mean error.
    pub fn best_prompt(&self) -> Option<PromptIndex> {
        let best = self.prompts.iter().min_by(|a, b| a.sums.mean().total_cmp(&b.sums.mean()));
        best.map(|prompt| prompt.prompt)
    }

    /// The standard error of the score; `None` with fewer than two errors. Prompts are evaluated on the same slots, so their
    /// errors rise and fall together: the standard error of their mean is at most the mean of their standard errors, and close
    /// to it.
    pub fn std_error(&self) -> Option<f64> {
        let of_prompts: Option<Vec<f64>> = self.prompts.iter().map(|prompt| prompt.sums.std_error()).collect();
        of_prompts.map(|all| mean(all.into_iter()))
    }

    /// The number of errors in the score.
    pub fn errors(&self) -> u32 {
        self.prompts.iter().map(|prompt| prompt.sums.n).sum()
    }
}

fn mean(values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let count = values.len() as f64;
    values.sum::<f64>() / count
}

impl Contenders {
    /// The scores of the contenders of some prompts, by contender number.
    pub fn scores(&self, prompts: impl IntoIterator<Item = ScoredPrompt>) -> Vec<ContenderScore> {
        let mut prompts: Vec<_> = prompts.into_iter().map(|prompt| (self.of_prompt(prompt.prompt), prompt)).collect();
        prompts.sort_by_key(|(contender, _)| *contender);
        let of_contender = |of_one: &[(u32, ScoredPrompt)]| ContenderScore {
            contender: of_one[0].0,
            mean: mean(of_one.iter().map(|(_, prompt)| prompt.sums.mean())),
            prompts: of_one.iter().map(|(_, prompt)| *prompt).collect(),
        };
        prompts.chunk_by(|one, next| one.0 == next.0).map(of_contender).collect()
    }

    /// The best contender of every evaluated class, best class first. Classes are sorted by their last round, since those that
    /// left earlier have means over other slots, and then by score. Ties go to the lower first prompt.
    pub fn class_ranking(&self, prompts: &[ScoredPrompt]) -> Vec<ContenderScore> {
        let mut ranked = self.scores(prompts.iter().copied().filter(|p| p.sums.n > 0 && !self.is_group(p.prompt)));
        ranked.sort_by(|a, b| b.round().cmp(&a.round()).then(a.mean.total_cmp(&b.mean)));
        let mut classes = BTreeSet::new();
        ranked.retain(|score| classes.insert(self.class_of(score.prompts[0].prompt)));
        ranked
    }

    /// The prompts that survive a round: those of the `keep` contenders with the lowest scores, in ascending order.
    ///
    /// A contender scores the mean over its prompts' means of *all* their errors so far. Ties go to the lower first prompt.
    /// `totals` is indexed by prompt.
    pub fn survivors(&self, remaining: &[PromptIndex], totals: &[Sums], keep: u32) -> Vec<PromptIndex> {
        let scored =
            |prompt: &PromptIndex| ScoredPrompt { prompt: *prompt, sums: totals[prompt.at()], round: Round(0) };
        let mut ranked = self.scores(remaining.iter().map(scored));
        ranked.sort_by(|a, b| a.mean.total_cmp(&b.mean));
        ranked.truncate(keep as usize);
        let mut stay: Vec<_> = ranked.iter().flat_map(|score| &score.prompts).map(|prompt| prompt.prompt).collect();
        stay.sort_unstable();
        stay
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ensemble::PromptEnsemble;
    use crate::ensemble::tests::{all, uneven};

    fn totals(means: &[f64]) -> Vec<Sums> {
        means.iter().map(|&sum| Sums { n: 1, sum, sum_sq: sum * sum }).collect()
    }

    #[test]
    fn ties_go_to_the_lower_prompt() {
        let equal = totals(&[2.0, 1.0, 1.0, 3.0]);
        assert_eq!(Contenders::prompts(4).survivors(&all(4), &equal, 1), [PromptIndex(1)]);
        assert_eq!(Contenders::prompts(4).survivors(&all(4), &equal, 3), [0, 1, 2].map(PromptIndex));
    }

    #[test]
    fn survivors_are_judged_by_the_mean_of_all_their_errors() {
        let totals = [Sums { n: 4, sum: 4.0, sum_sq: 4.0 }, Sums { n: 2, sum: 3.0, sum_sq: 5.0 }];
        assert_eq!(Contenders::prompts(2).survivors(&all(2), &totals, 1), [PromptIndex(0)]);
    }

    #[test]
    fn by_max_the_best_prompts_stay_whatever_their_class() {
        let means = totals(&[0.1, 0.9, 0.4, 0.3, 0.2]);
        let contenders = uneven(PromptEnsemble::Max);
        assert_eq!(contenders.survivors(&all(5), &means, 2), [0, 4].map(PromptIndex));
    }

    #[test]
    fn by_mean_the_best_classes_stay_with_all_their_prompts() {
        // The means of the classes 7, 2 and 5 are 0.5, 0.5 and 0.6: a single good prompt does not save a class.
        let means = totals(&[0.125, 0.75, 0.5, 0.6, 0.625]);
        let contenders = uneven(PromptEnsemble::Mean);
        // A tie goes to the class whose first prompt comes first.
        assert_eq!(contenders.survivors(&all(5), &means, 1), [0, 1, 4].map(PromptIndex));
        assert_eq!(contenders.survivors(&all(5), &means, 2), [0, 1, 2, 4].map(PromptIndex));
        assert_eq!(contenders.survivors(&[2, 3].map(PromptIndex), &means, 1), [PromptIndex(2)]);
    }

    #[test]
    fn keeping_more_than_there_are_keeps_all() {
        assert_eq!(Contenders::prompts(2).survivors(&all(2), &totals(&[1.0, 2.0]), 5), all(2));
    }

    fn scored(index: u32, round: u16, n: u32, mean: f64) -> ScoredPrompt {
        let sums = Sums { n, sum: mean * f64::from(n), sum_sq: mean * mean * f64::from(n) };
        ScoredPrompt { prompt: PromptIndex(index), sums, round: Round(round) }
    }

    #[test]
    fn a_class_that_stayed_longer_beats_one_with_a_lower_mean_over_fewer_slots() {
        let prompts = [scored(0, 0, 2, 0.9), scored(2, 1, 5, 0.8), scored(3, 0, 2, 0.1), scored(4, 1, 5, 0.7)];
        let ranked = uneven(PromptEnsemble::Max).class_ranking(&prompts);
        let order: Vec<_> = ranked.iter().map(|score| (score.best_prompt().unwrap().0, score.errors())).collect();
        // Class 7 scores as its prompt 4 does.
        assert_eq!(order, [(4, 5), (2, 5), (3, 2)]);
    }

    #[test]
    fn classes_that_were_not_evaluated_are_not_ranked() {
        let unscored = ScoredPrompt { prompt: PromptIndex(1), sums: Sums::default(), round: Round(0) };
        let ranked = Contenders::prompts(2).class_ranking(&[scored(0, 0, 3, 0.5), unscored]);
        assert_eq!(ranked.iter().map(|score| score.contender).collect::<Vec<_>>(), [0]);
    }
}
