//! Which slots every round evaluates, and how many prompts survive it.

use serde::{Deserialize, Serialize};

use crate::ensemble::Contenders;

/// One (timestep, noise) pair. Every prompt of a sample is scored on the same slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Slot {
    /// Diffusion timestep, `0 .. num_train_timesteps`.
    pub timestep: u32,
    /// Noise index: the row of a noise file, or the counter of the generator.
    pub noise: u32,
}

/// The slots evaluated between two eliminations, and how many contenders stay afterwards.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RoundSlots {
    /// The slots in evaluation order.
    pub slots: Vec<Slot>,
    /// How many contenders stay after the round, where there are more.
    pub keep: u32,
    /// Which model scores it.
    pub scored_by: ScoredBy,
}

/// Which of a job's models scores a round.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ScoredBy {
    /// The job's model.
    #[default]
    Model,
    /// The one in front of it. Its errors are of another kind: they decide who stays, and count no further.
    Shortlist,
}

/// One stage of the reference schedule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stage {
    /// Timesteps evaluated in all when the stage ends (`n_samples` of the reference code).
    pub samples: u32,
    /// Contenders that stay (`to_keep`): prompts, or classes where a class scores the mean of its prompts.
    pub keep: u32,
}

/// Who is evaluated on what, and who is eliminated when.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "lowercase")]
pub enum Policy {
    /// The adaptive schedule of Li et al. (2023), reproduced exactly (their `eval_prob_adaptive`).
    Reference {
        /// Stages in order.
        stages: Vec<Stage>,
        /// Noises per timestep.
        trials: u32,
    },
    /// Every prompt on every slot of one evenly spaced grid, nobody eliminated.
    Exhaustive {
        /// Timesteps in the grid.
        samples: u32,
        /// Noises per timestep.
        trials: u32,
    },
}

/// A policy that can't be carried out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PolicyError {
    /// `--keep` and `--samples` disagree in length.
    #[error("--keep has {keep} stages and --samples has {samples}: give both the same number of values")]
    Lengths {
        /// Values given to `--keep`.
        keep: usize,
        /// Values given to `--samples`.
        samples: usize,
    },
    /// No stage at all, or a zero where at least one is needed.
    #[error("{0} must be at least 1")]
    Zero(&'static str),
    /// A stage asks for more timesteps than the model has.
    #[error("--samples {samples} is more than the model's {timesteps} timesteps: use at most {timesteps}")]
    TooManySamples {
        /// Timesteps asked for.
        samples: u32,
        /// Timesteps of the model.
        timesteps: u32,
    },
    /// A shortlist that is no shorter than the list, or shorter than what the first stage keeps.
    #[error(
        "--shortlist {keep} must be less than the {count} {noun} there are, and at least the {first} that --keep keeps"
    )]
    Shortlist {
        /// Contenders on the shortlist.
        keep: u32,
        /// Contenders of the job.
        count: usize,
        /// What they are called.
        noun: &'static str,
        /// What the first stage after it keeps.
        first: u32,
    },
    /// A stage keeps more contenders than there are.
    #[error("--keep {keep} is more than the {count} {noun} there are to choose from: use at most {count}")]
    KeepTooLarge {
        /// Contenders a stage keeps.
        keep: u32,
        /// Contenders of the job.
        count: usize,
        /// What they are called.
        noun: &'static str,
    },
    /// Stages that would bring back what was eliminated.
    #[error("--keep must not grow from stage to stage ({before} then {after}): what is eliminated does not come back")]
    KeepGrows {
        /// Kept by the earlier stage.
        before: u32,
        /// Kept by the later stage.
        after: u32,
    },
    /// Stages that do not add timesteps.
    #[error("--samples must grow from stage to stage ({before} then {after})")]
    SamplesShrink {
        /// Timesteps of the earlier stage.
        before: u32,
        /// Timesteps of the later stage.
        after: u32,
    },
    /// Exhaustive takes one grid size.
    #[error("--policy exhaustive evaluates one grid: give --samples one value, not {0}")]
    ExhaustiveStages(usize),
}

impl Policy {
    /// The reference policy from the two lists of the command line.
    pub fn reference(keep: &[u32], samples: &[u32], trials: u32) -> Result<Self, PolicyError> {
        if keep.len() != samples.len() {
            return Err(PolicyError::Lengths { keep: keep.len(), samples: samples.len() });
        }
        let stages: Vec<_> = keep.iter().zip(samples).map(|(&keep, &samples)| Stage { samples, keep }).collect();
        if stages.is_empty() || stages.iter().any(|s| s.samples == 0) {
            return Err(PolicyError::Zero("--samples"));
        }
        if stages.iter().any(|s| s.keep == 0) {
            return Err(PolicyError::Zero("--keep"));
        }
        if trials == 0 {
            return Err(PolicyError::Zero("--trials"));
        }
        for pair in stages.windows(2) {
            if pair[1].keep > pair[0].keep {
                return Err(PolicyError::KeepGrows { before: pair[0].keep, after: pair[1].keep });
            }
            if pair[1].samples <= pair[0].samples {
                return Err(PolicyError::SamplesShrink { before: pair[0].samples, after: pair[1].samples });
            }
        }
        Ok(Self::Reference { stages, trials })
    }

    /// The exhaustive policy from the command line's list.
    pub fn exhaustive(samples: &[u32], trials: u32) -> Result<Self, PolicyError> {
        match *samples {
            [] | [0] => Err(PolicyError::Zero("--samples")),
            _ if trials == 0 => Err(PolicyError::Zero("--trials")),
            [samples] => Ok(Self::Exhaustive { samples, trials }),
            _ => Err(PolicyError::ExhaustiveStages(samples.len())),
        }
    }

    /// The rounds for a model with `timesteps` training timesteps and a job with these contenders; none where every sample
    /// brings its own, of which a round keeps all if there are too few.
    pub fn rounds(&self, timesteps: u32, contenders: Option<&Contenders>) -> Result<Vec<RoundSlots>, PolicyError> {
        let all = contenders.map_or(u32::MAX, |c| c.len() as u32);
        let (stages, trials) = match self {
            Self::Reference { stages, trials } => (stages.clone(), *trials),
            Self::Exhaustive { samples, trials } => (vec![Stage { samples: *samples, keep: all }], *trials),
        };
        let most = stages.iter().map(|s| s.samples).max().unwrap_or(0);
        if most == 0 {
            return Err(PolicyError::Zero("--samples"));
        }
        if most > timesteps {
            return Err(PolicyError::TooManySamples { samples: most, timesteps });
        }
        if let (Some(c), Some(stage)) = (contenders, stages.iter().find(|s| s.keep > all)) {
            return Err(PolicyError::KeepTooLarge { keep: stage.keep, count: c.len(), noun: c.noun() });
        }
        let mut done = Vec::new();
        Ok(stages
            .iter()
            .map(|stage| {
                let fresh = new_timesteps(timesteps, most, stage.samples, &done);
                let slots = slots_by_rank(&fresh, done.len() as u32, trials);
                done.extend(fresh);
                RoundSlots { slots, keep: stage.keep, scored_by: ScoredBy::Model }
            })
            .collect())
    }
}

/// The timesteps a stage with `samples` adds to those `done`: ascending, from the grid of the largest stage.
fn new_timesteps(timesteps: u32, most: u32, samples: u32, done: &[u32]) -> Vec<u32> {
    let spacing = timesteps / most;
    let grid: Vec<u32> = (0..most).map(|i| spacing / 2 + i * spacing).collect();
    let step = (most / samples) as usize;
    grid.into_iter().skip(step / 2).step_by(step).take(samples as usize).filter(|t| !done.contains(t)).collect()
}

/// Slots of a stage's new timesteps: the noise index follows the rank of evaluation, not the timestep.
fn slots_by_rank(fresh: &[u32], done: u32, trials: u32) -> Vec<Slot> {
    fresh
        .iter()
        .zip(done..)
        .flat_map(|(&timestep, rank)| (0..trials).map(move |q| Slot { timestep, noise: trials * rank + q }))
        .collect()
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

/// The evaluations each round costs for one sample with these contenders: exact where they are even, else the most it can be.
pub fn costs(rounds: &[RoundSlots], contenders: &Contenders) -> Vec<RoundCost> {
    let mut prompts = contenders.prompt_count() as u64;
    rounds
        .iter()
        .map(|round| {
            let slots = round.slots.len() as u64;
            let cost = RoundCost { slots, prompts, evaluations: slots * prompts };
            prompts = prompts.min(contenders.most_prompts(round.keep));
            cost
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::class::Classes;
    use crate::ensemble::PromptEnsemble;
    use crate::preset::Preset;

    fn timesteps(round: &RoundSlots) -> Vec<u32> {
        round.slots.iter().map(|s| s.timestep).collect()
    }

    fn total(rounds: &[RoundSlots], contenders: &Contenders) -> u64 {
        costs(rounds, contenders).iter().map(|c| c.evaluations).sum()
    }

    #[test]
    fn presets_cost_what_the_shipped_reference_schedules_cost() {
        for (preset, prompts, expected) in [
            (Preset::Pets, 37, 2_050),
            (Preset::Cifar10, 10, 2_750),
            (Preset::Stl10, 10, 3_000),
            (Preset::Food, 101, 5_570),
            (Preset::Aircraft, 100, 5_550),
            (Preset::Flowers, 102, 5_590),
            (Preset::Objectnet, 113, 14_400),
            (Preset::Imagenet, 1000, 124_500),
        ] {
            let contenders = Contenders::prompts(prompts);
            let rounds = preset.policy().rounds(1000, Some(&contenders)).unwrap();
            assert_eq!(total(&rounds, &contenders), expected, "{preset}");
        }
    }

    #[test]
    fn by_mean_keep_counts_classes_and_their_prompts_are_paid_for_together() {
        let templates = ["a {}", "the {}", "one {}"].map(str::to_owned);
        let classes = Classes::parse("ant\nbee\ncat\ndog", &templates).unwrap();
        let policy = Policy::reference(&[2, 1], &[2, 5], 1).unwrap();
        let cost = |ensemble| {
            let contenders = Contenders::of_classes(&classes, ensemble);
            total(&policy.rounds(1000, Some(&contenders)).unwrap(), &contenders)
        };
        // Two slots for all twelve prompts; then three slots for two prompts, or for two classes of three prompts.
        assert_eq!(cost(PromptEnsemble::Max), 2 * 12 + 3 * 2);
        assert_eq!(cost(PromptEnsemble::Mean), 2 * 12 + 3 * 6);

        let by_mean = Contenders::of_classes(&classes, PromptEnsemble::Mean);
        let greedy = Policy::reference(&[5, 1], &[2, 5], 1).unwrap();
        let message = greedy.rounds(1000, Some(&by_mean)).unwrap_err().to_string();
        assert!(message.contains("--keep 5 is more than the 4 classes"), "{message}");
        assert!(greedy.rounds(1000, None).is_ok(), "samples with few candidates keep them all");
    }

    #[test]
    fn candidates_fewer_than_a_stage_keeps_all_stay() {
        let rounds = Policy::reference(&[5, 1], &[2, 5], 1).unwrap().rounds(1000, None).unwrap();
        assert_eq!(total(&rounds, &Contenders::prompts(2)), 2 * 2 + 3 * 2);
        assert_eq!(total(&rounds, &Contenders::prompts(9)), 2 * 9 + 3 * 5);
    }

    #[test]
    fn a_stage_takes_every_stepth_point_of_the_largest_grid_less_those_done() {
        // M = 5, s = 200: grid 100, 300, 500, 700, 900. n = 2: step 2, G[1::2][:2] = 300, 700.
        let rounds =
            Policy::reference(&[2, 1], &[2, 5], 1).unwrap().rounds(1000, Some(&Contenders::prompts(3))).unwrap();
        assert_eq!(timesteps(&rounds[0]), [300, 700]);
        assert_eq!(timesteps(&rounds[1]), [100, 500, 900]);
    }

    #[test]
    fn noise_indices_follow_evaluation_rank_across_stages_and_trials() {
        let rounds =
            Policy::reference(&[2, 1], &[2, 5], 3).unwrap().rounds(1000, Some(&Contenders::prompts(3))).unwrap();
        let noises: Vec<Vec<u32>> = rounds.iter().map(|r| r.slots.iter().map(|s| s.noise).collect()).collect();
        assert_eq!(noises[0], [0, 1, 2, 3, 4, 5]);
        assert_eq!(noises[1], [6, 7, 8, 9, 10, 11, 12, 13, 14]);
        assert_eq!(rounds[1].slots[3], Slot { timestep: 500, noise: 9 });
    }

    #[test]
    fn exhaustive_scores_every_prompt_on_one_even_grid() {
        let rounds = Policy::exhaustive(&[4], 1).unwrap().rounds(1000, Some(&Contenders::prompts(7))).unwrap();
        assert_eq!(rounds.len(), 1);
        assert_eq!(timesteps(&rounds[0]), [125, 375, 625, 875]);
        assert_eq!(rounds[0].keep, 7);
    }

    #[test]
    fn impossible_schedules_are_refused_with_the_remedy() {
        let message = |r: Result<Policy, PolicyError>| r.unwrap_err().to_string();
        assert!(message(Policy::reference(&[5, 1], &[20], 1)).contains("same number of values"));
        assert!(message(Policy::reference(&[1, 5], &[20, 100], 1)).contains("must not grow"));
        assert!(message(Policy::reference(&[5, 1], &[100, 20], 1)).contains("must grow"));
        assert!(message(Policy::reference(&[5, 1], &[0, 20], 1)).contains("at least 1"));
        assert!(message(Policy::exhaustive(&[20, 100], 1)).contains("one value"));
        let policy = Policy::reference(&[5, 1], &[20, 100], 1).unwrap();
        assert!(policy.rounds(1000, Some(&Contenders::prompts(4))).unwrap_err().to_string().contains("use at most 4"));
        assert!(policy.rounds(50, Some(&Contenders::prompts(10))).unwrap_err().to_string().contains("use at most 50"));
    }
}
