//! Paired sequential elimination: a contender leaves as soon as it is significantly worse than the best one.
//!
//! All remaining contenders are scored on the same slots (Clark & Jaini, NeurIPS 2023, section 4), so noise that they share
//! cancels in the difference of their errors. After every round each contender is compared with the leader, which has the
//! lowest mean error, by a one-sided paired t-test at the level `risk`:
//!
//! - The variance of the difference is estimated from successive differences in the order of the timesteps (von Neumann, 1941;
//!   Wolter, "Introduction to Variance Estimation", chapter 8, for systematic samples). A trend of the difference along evenly
//!   spread timesteps does not add uncertainty to its mean.
//! - With few slots the variance is moderated by the variances of the other contenders, like a prior with [`PRIOR_DEGREES`]
//!   degrees of freedom (Smyth, 2004). Two slots that happen to agree then eliminate no contender.
//! - The leader of many contenders leads partly by luck, which makes the test too strict on the others. With more than ten
//!   contenders left, the level is divided by a power of their number over ten. The exponent [`CAUTION`] was chosen by
//!   measurement (`elbo bench policy --synthetic 1000`).
//!
//! The test assumes that mean differences are about normal. Repeated tests raise the share of images whose best contender is
//! lost; the shared slots and the growing number of slots lower it. `elbo bench policy` measures this share.

use statrs::distribution::{ContinuousCDF, StudentsT};

use super::Slot;
use crate::ensemble::Contenders;
use crate::ids::PromptIndex;

/// The least number of slots in the first round.
const FIRST_SLOTS: usize = 2;
/// Approximate evaluations per round of a sample: with few contenders left, a round has more slots.
const ROUND_EVALUATIONS: usize = 12;
/// A round has at least one slot per this many slots before it, so that a hard sample takes few rounds.
const LEAST_GROWTH: usize = 4;
/// Up to this many contenders, the level is `risk` itself.
const FEW: f64 = 10.0;
/// The exponent that lowers the level among more contenders. With 0.5, which was tried before, a race among a thousand drawn
/// classes took a fifth less and got one image in two hundred more wrong.
const CAUTION: f64 = 0.7;
/// The most weight of the other contenders' variances, in degrees of freedom.
const PRIOR_DEGREES: usize = 4;

/// The rule by which contenders leave.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Race {
    /// The level of each test with up to ten contenders left.
    pub risk: f64,
}

impl Race {
    /// How many slots the next round has after `done` slots, with this many prompts left.
    pub(super) fn round_slots(done: usize, prompts: usize) -> usize {
        let shared = (ROUND_EVALUATIONS + prompts / 2) / prompts.max(1);
        let least = if done == 0 { FIRST_SLOTS } else { done / LEAST_GROWTH };
        shared.max(least).max(1)
    }

    /// The prompts that survive a round: those of the contenders that may still be the best. `errors` holds the remaining
    /// prompts' errors, by prompt, on each of `slots`.
    pub fn survivors(
        &self,
        contenders: &Contenders,
        remaining: &[PromptIndex],
        errors: &[Vec<f32>],
        slots: &[Slot],
    ) -> Vec<PromptIndex> {
        let mut order: Vec<usize> = (0..slots.len()).collect();
        order.sort_by_key(|&i| (slots[i].timestep, i));
        let rows = contender_errors(contenders, remaining, errors, &order);
        let sums: Vec<f64> = rows.iter().map(|(_, row)| row.iter().sum()).collect();
        let Some(best) = (0..rows.len()).min_by(|&a, &b| sums[a].total_cmp(&sums[b])) else {
            return Vec::new();
        };
        let out = self.losers(&rows, best);
        let stays = |prompt: &PromptIndex| out.binary_search(&contenders.of_prompt(*prompt)).is_err();
        remaining.iter().copied().filter(stays).collect()
    }

    /// The contenders that are significantly worse than the leader, ascending.
    fn losers(&self, rows: &[(u32, Vec<f64>)], best: usize) -> Vec<u32> {
        let leader = &rows[best].1;
        let n = leader.len();
        if n < 2 {
            return Vec::new();
        }
        let rivals: Vec<(u32, Paired)> = (rows.iter().enumerate())
            .filter(|(i, _)| *i != best)
            .map(|(_, (who, row))| (*who, Paired::new(row, leader)))
            .collect();
        let pooled = rivals.iter().map(|(_, d)| d.variance).sum::<f64>() / rivals.len().max(1) as f64;
        let own = n - 1;
        let prior = PRIOR_DEGREES.min((rivals.len().max(1) - 1) * own);
        let degrees = (prior + own) as f64;
        let Ok(distribution) = StudentsT::new(0.0, 1.0, degrees) else { return Vec::new() };
        let level = self.risk * libm::pow(FEW / rows.len() as f64, CAUTION).min(1.0);
        let is_worse = |paired: &Paired| {
            let variance = (prior as f64 * pooled + own as f64 * paired.variance) / degrees;
            let error = (variance / n as f64).sqrt();
            // A duplicate prompt always has the same errors, so the later one is eliminated.
            paired.is_same || (paired.mean > 0.0 && (error == 0.0 || distribution.sf(paired.mean / error) < level))
        };
        rivals.iter().filter(|(_, paired)| is_worse(paired)).map(|(who, _)| *who).collect()
    }
}

/// The difference between a contender's errors and the leader's.
#[derive(Clone, Copy, Debug)]
struct Paired {
    mean: f64,
    variance: f64,
    is_same: bool,
}

impl Paired {
    fn new(row: &[f64], leader: &[f64]) -> Self {
        let n = row.len() as f64;
        let difference = |i: usize| row[i] - leader[i];
        let mean = (0..row.len()).map(difference).sum::<f64>() / n;
        let steps = (1..row.len()).map(|i| (difference(i) - difference(i - 1)).powi(2)).sum::<f64>();
        Self { mean, variance: steps / (2.0 * (n - 1.0)), is_same: row == leader }
    }
}

/// The errors of every remaining contender, with the slots in the given order: those of its prompt, or the mean over its
/// prompts. Contenders are in ascending order.
fn contender_errors(
    contenders: &Contenders,
    remaining: &[PromptIndex],
    errors: &[Vec<f32>],
    order: &[usize],
) -> Vec<(u32, Vec<f64>)> {
    let mut rows: Vec<(u32, Vec<f64>, f64)> = Vec::new();
    let mut prompts: Vec<_> = remaining.iter().map(|prompt| (contenders.of_prompt(*prompt), prompt.at())).collect();
    prompts.sort_unstable();
    for (who, prompt) in prompts {
        let of_prompt = order.iter().map(|&slot| f64::from(errors[prompt][slot]));
        match rows.last_mut().filter(|(last, ..)| *last == who) {
            Some((_, row, count)) => {
                row.iter_mut().zip(of_prompt).for_each(|(sum, error)| *sum += error);
                *count += 1.0;
            }
            None => rows.push((who, of_prompt.collect(), 1.0)),
        }
    }
    rows.into_iter().map(|(who, row, count)| (who, row.into_iter().map(|sum| sum / count).collect())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::class::Classes;
    use crate::ensemble::PromptEnsemble;

    fn slots(count: u32) -> Vec<Slot> {
        (0..count).map(|i| Slot { timestep: 100 * i, noise: i }).collect()
    }

    fn prompts(count: u32) -> Vec<PromptIndex> {
        (0..count).map(PromptIndex).collect()
    }

    fn survivors(risk: f64, errors: &[Vec<f32>]) -> Vec<u32> {
        let count = errors.len() as u32;
        let contenders = Contenders::prompts(errors.len());
        let slots = slots(errors[0].len() as u32);
        let stay = Race { risk }.survivors(&contenders, &prompts(count), errors, &slots);
        stay.iter().map(|p| p.0).collect()
    }

    #[test]
    fn the_test_is_the_paired_t_test_with_successive_differences() {
        // Differences 1, 3, 2, 4: mean 2.5, variance (4 + 1 + 4) / 6 = 1.5, t = 2.5 / sqrt(1.5 / 4) = 4.0825 with three degrees
        // of freedom, since a single rival adds none: scipy.stats.t.sf gives p = 0.013270.
        let errors = vec![vec![1.0, 1.0, 1.0, 1.0], vec![2.0, 4.0, 3.0, 5.0]];
        assert_eq!(survivors(0.01327, &errors), [0, 1]);
        assert_eq!(survivors(0.01328, &errors), [0]);
    }

    #[test]
    fn few_slots_are_moderated_by_the_other_contenders() {
        // Contender 1 differs by 1 on both slots: alone that would be certain. The others' variances are 0, 0.5, 8 and 8;
        // pooled 4.125. With three prior degrees and one of its own: 3.094, t = 1 / sqrt(3.094 / 2) = 0.804, and
        // scipy.stats.t.sf gives p = 0.23322.
        let rows = [[0.0f32, 0.0], [1.0, 1.0], [1.0, 2.0], [1.0, 5.0], [1.0, 5.0]];
        let errors: Vec<_> = rows.iter().map(|row| row.to_vec()).collect();
        assert!(survivors(0.2332, &errors).contains(&1));
        assert!(!survivors(0.2333, &errors).contains(&1));
    }

    #[test]
    fn the_level_is_lower_among_many_contenders() {
        // A difference of 2.4 standard errors at eleven degrees of freedom (p = 0.018), on twelve slots.
        let row = |offset: f32| (0..12).map(|i| offset + if i % 2 == 0 { 0.5 } else { -0.5 }).collect::<Vec<f32>>();
        let leader: Vec<f32> = vec![0.0; 12];
        let with = |others: usize| {
            let rival = row(2.4 * (0.5f32).sqrt() / (12f32).sqrt());
            let mut errors = vec![leader.clone(), rival];
            errors.extend(vec![row(100.0); others]);
            survivors(0.02, &errors).contains(&1)
        };
        assert!(!with(3), "among five it leaves");
        assert!(with(200), "among two hundred it stays");
    }

    #[test]
    fn of_identical_contenders_only_the_first_stays() {
        assert_eq!(survivors(0.01, &[vec![3.0, 1.0], vec![3.0, 1.0], vec![1.0, 3.0]]), [0, 2]);
    }

    #[test]
    fn a_single_slot_eliminates_no_contender() {
        assert_eq!(survivors(0.4, &[vec![0.0], vec![100.0]]), [0, 1]);
    }

    #[test]
    fn a_trend_along_the_timesteps_adds_no_uncertainty() {
        // The difference grows steadily from 1 to 8: the plain variance is 6, that of the steps 0.5.
        let leader = vec![0.0; 8];
        let rival: Vec<f32> = (1..=8).map(|i| i as f32).collect();
        // t = 4.5 / sqrt(0.5 / 8) = 18 at seven degrees of freedom; with the plain variance it would be 5.2 (p = 6e-4).
        assert_eq!(survivors(1e-5, &[leader, rival]), [0]);
    }

    #[test]
    fn the_prompts_of_a_class_stay_or_leave_together_by_mean() {
        let csv = "prompt,classname,classidx\na,cat,7\nb,dog,2\nc,cat,7\n";
        let contenders = Contenders::of_classes(&Classes::parse(csv, &[]).unwrap(), PromptEnsemble::Mean);
        let errors = [vec![9.0, 9.1, 9.2], vec![5.0, 5.2, 5.1], vec![1.0, 1.1, 1.2]];
        let stay = |errors: &[Vec<f32>]| Race { risk: 0.05 }.survivors(&contenders, &prompts(3), errors, &slots(3));
        // The mean of the cat's prompts is 5, 5.1, 5.2, which can't be told from the dog's.
        assert_eq!(stay(&errors), prompts(3));
        assert_eq!(
            stay(&[vec![1.0, 1.1, 1.2], errors[1].clone(), errors[2].clone()]),
            [PromptIndex(0), PromptIndex(2)]
        );
    }

    #[test]
    fn rounds_grow_as_contenders_leave_and_slots_add_up() {
        assert_eq!([1000, 10, 4, 2].map(|prompts| Race::round_slots(0, prompts)), [2, 2, 3, 6]);
        assert_eq!([1000, 10, 4, 2].map(|prompts| Race::round_slots(2, prompts)), [1, 1, 3, 6]);
        assert_eq!(Race::round_slots(80, 2), 20);
    }
}
