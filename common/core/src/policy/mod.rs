//! Policies: which slots each round evaluates, and which contenders survive it.

use serde::{Deserialize, Serialize};

mod course;
pub mod pilot;
mod race;
mod reference;
pub mod replay;
mod timesteps;
mod walk;

pub use course::{Course, RoundCost, Standing, Survivors};
pub use race::Race;
pub use timesteps::{Span, Timesteps, TimestepsError};
pub use walk::Walk;

/// The level of a race's tests unless the job says otherwise.
pub const DEFAULT_RISK: f64 = 0.05;

/// The most slots of a race unless the job says otherwise.
pub const DEFAULT_MAX_SLOTS: u32 = 250;

/// The upper limit for `max_slots` of a race.
const MOST_SLOTS: u32 = 100_000;

/// One (timestep, noise) pair. Every prompt of a sample is scored on the same slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot {
    /// Diffusion timestep, `0 .. num_train_timesteps`.
    pub timestep: u32,
    /// Noise index: the row of a noise file, or the counter of the generator.
    pub noise: u32,
}

/// Which of a job's models scores a round.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ScoredBy {
    /// The job's model.
    #[default]
    Model,
    /// The shortlist's model. Its errors are of another kind: they decide which contenders stay, and are then discarded.
    Shortlist,
}

/// One stage of the reference schedule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stage {
    /// Total timesteps evaluated by the end of the stage (`n_samples` of the reference code).
    pub samples: u32,
    /// Contenders that stay (`to_keep`): prompts, or classes if a class scores the mean of its prompts.
    pub keep: u32,
}

/// Which prompts are evaluated on which slots, and when they are eliminated.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "lowercase")]
pub enum Policy {
    /// The adaptive schedule of Li et al. (2023), reproduced exactly (their `eval_prob_adaptive`).
    Reference {
        /// Stages in order.
        stages: Vec<Stage>,
        /// Noises per timestep.
        trials: u32,
    },
    /// Every prompt on every slot of one evenly spaced grid, without eliminations.
    Exhaustive {
        /// Timesteps in the grid.
        samples: u32,
        /// Noises per timestep.
        trials: u32,
    },
    /// Contenders leave as soon as they are significantly worse than the best: see [`Race`].
    Race {
        /// The level of each test.
        risk: f64,
        /// The most slots per prompt.
        max_slots: u32,
        /// How the slots are distributed over the timesteps.
        #[serde(default, skip_serializing_if = "Timesteps::is_even")]
        timesteps: Timesteps,
    },
}

/// An invalid policy.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum PolicyError {
    /// Not every stage has both settings.
    #[error("{keep} stages keep contenders, and {samples} have timesteps: give both the same number of values")]
    Lengths {
        /// Stages that say how many contenders they keep.
        keep: usize,
        /// Stages that say how many timesteps they have.
        samples: usize,
    },
    /// No stages, or a zero where at least one is needed; with the setting.
    #[error("a policy's {0} must be at least 1")]
    Zero(&'static str),
    /// A stage asks for more timesteps than the model has.
    #[error("{samples} timesteps are more than the model's {timesteps}: use at most {timesteps}")]
    TooManySamples {
        /// Timesteps asked for.
        samples: u32,
        /// Timesteps of the model.
        timesteps: u32,
    },
    /// The shortlist is not shorter than the full list, or is shorter than what the first stage keeps.
    #[error(
        "a shortlist of {keep} must be shorter than the {count} {noun} there are, and hold the {first} that the first stage keeps"
    )]
    Shortlist {
        /// Contenders on the shortlist.
        keep: u32,
        /// Contenders of the job.
        count: usize,
        /// The plural noun for contenders.
        noun: &'static str,
        /// How many contenders the first stage after it keeps.
        first: u32,
    },
    /// A stage keeps more contenders than there are.
    #[error("a stage can't keep {keep} of {count} {noun}: use at most {count}")]
    KeepTooLarge {
        /// Contenders that the stage keeps.
        keep: u32,
        /// Contenders of the job.
        count: usize,
        /// The plural noun for contenders.
        noun: &'static str,
    },
    /// A later stage keeps more contenders than an earlier one.
    #[error(
        "the number kept must not grow from stage to stage ({before} then {after}): eliminated contenders do not come back"
    )]
    KeepGrows {
        /// Kept by the earlier stage.
        before: u32,
        /// Kept by the later stage.
        after: u32,
    },
    /// A later stage adds no timesteps.
    #[error("the number of timesteps must grow from stage to stage ({before} then {after})")]
    SamplesShrink {
        /// Timesteps of the earlier stage.
        before: u32,
        /// Timesteps of the later stage.
        after: u32,
    },
    /// The level of a race is out of range.
    #[error("a risk of {0} is not the level of a test: use a number above 0 and below 0.5, like {DEFAULT_RISK}")]
    Risk(f64),
    /// A race has too few slots for a test, or too many to be practical.
    #[error(
        "{0} slots are out of range for a race: a class leaves after two slots at the earliest, so use at least 2, and at most {MOST_SLOTS}"
    )]
    MaxSlots(u32),
    /// More slots or prompts than units can number.
    #[error("{count} {what} are more than a job can have: use at most {}", crate::unit::MOST)]
    TooMany {
        /// The number.
        count: usize,
        /// The plural noun for them.
        what: &'static str,
    },
    /// A hierarchy with a policy that does not use groups.
    #[error(
        "a hierarchy is for a race without a shortlist, among classes rather than captions: leave out the hierarchy, or what conflicts with it"
    )]
    Hierarchy,
    /// The distribution of slots is invalid, or does not fit the model.
    #[error("{0}: give timesteps of the model, from 0 on, in ascending order")]
    Timesteps(#[from] TimestepsError),
    /// The exhaustive policy takes a single grid size.
    #[error("the exhaustive policy evaluates one grid: give one number of timesteps, not {0}")]
    ExhaustiveStages(usize),
}

impl PolicyError {
    /// The settings at fault, as a job's description names them.
    pub fn settings(&self) -> &'static [&'static str] {
        match self {
            Self::Lengths { .. } => &["keep", "samples"],
            Self::Zero("keep") | Self::KeepTooLarge { .. } | Self::KeepGrows { .. } => &["keep"],
            Self::Zero("trials") => &["trials"],
            Self::Zero(_) | Self::TooManySamples { .. } | Self::SamplesShrink { .. } | Self::ExhaustiveStages(_) => {
                &["samples"]
            }
            Self::Shortlist { .. } => &["shortlist"],
            Self::Risk(_) => &["risk"],
            Self::MaxSlots(_) => &["max-slots"],
            Self::Hierarchy => &["hierarchy"],
            Self::Timesteps(_) => &["timesteps-from"],
            Self::TooMany { .. } => &[],
        }
    }
}

impl Policy {
    /// The reference policy from the two lists on the command line.
    pub fn reference(keep: &[u32], samples: &[u32], trials: u32) -> Result<Self, PolicyError> {
        if keep.len() != samples.len() {
            return Err(PolicyError::Lengths { keep: keep.len(), samples: samples.len() });
        }
        let stages: Vec<_> = keep.iter().zip(samples).map(|(&keep, &samples)| Stage { samples, keep }).collect();
        if stages.is_empty() || stages.iter().any(|s| s.samples == 0) {
            return Err(PolicyError::Zero("samples"));
        }
        if stages.iter().any(|s| s.keep == 0) {
            return Err(PolicyError::Zero("keep"));
        }
        if trials == 0 {
            return Err(PolicyError::Zero("trials"));
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

    /// The exhaustive policy from the list on the command line.
    pub fn exhaustive(samples: &[u32], trials: u32) -> Result<Self, PolicyError> {
        match *samples {
            [] | [0] => Err(PolicyError::Zero("samples")),
            _ if trials == 0 => Err(PolicyError::Zero("trials")),
            [samples] => Ok(Self::Exhaustive { samples, trials }),
            _ => Err(PolicyError::ExhaustiveStages(samples.len())),
        }
    }

    /// A race at the level `risk`.
    pub fn race(risk: f64, max_slots: u32, timesteps: Timesteps) -> Result<Self, PolicyError> {
        check_race(risk, max_slots)?;
        Ok(Self::Race { risk, max_slots, timesteps })
    }

    /// The least number of contenders that the first elimination keeps.
    fn first_keep(&self) -> u32 {
        match self {
            Self::Reference { stages, .. } => stages.first().map_or(1, |stage| stage.keep),
            Self::Exhaustive { .. } | Self::Race { .. } => 1,
        }
    }
}

/// Checks the level and number of slots of a race.
fn check_race(risk: f64, max_slots: u32) -> Result<(), PolicyError> {
    if !(risk > 0.0 && risk < 0.5) {
        return Err(PolicyError::Risk(risk));
    }
    if !(2..=MOST_SLOTS).contains(&max_slots) {
        return Err(PolicyError::MaxSlots(max_slots));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::class::{Classes, Hierarchy};
    use crate::ensemble::{Contenders, PromptEnsemble};
    use crate::ids::{PromptIndex, Round};
    use crate::preset::Preset;

    fn course(policy: &Policy, timesteps: u32, contenders: Option<&Contenders>) -> Result<Course, PolicyError> {
        Course::new(policy, None, timesteps, contenders)
    }

    /// The slots of every round of a fixed course.
    fn rounds(course: &Course, contenders: &Contenders) -> Vec<Vec<Slot>> {
        let (mut done, mut rounds) = (0, Vec::new());
        while let Some(slots) = course.round(Round(rounds.len() as u16), done, contenders, &[]) {
            done = slots.end;
            rounds.push(course.slots()[slots].to_vec());
        }
        rounds
    }

    fn timesteps(round: &[Slot]) -> Vec<u32> {
        round.iter().map(|s| s.timestep).collect()
    }

    fn total(course: &Course, contenders: &Contenders) -> u64 {
        course.costs(contenders).iter().map(|c| c.evaluations).sum()
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
            let course = course(&preset.policy(), 1000, Some(&contenders)).unwrap();
            assert_eq!(total(&course, &contenders), expected, "{preset}");
        }
    }

    #[test]
    fn by_mean_keep_counts_classes_and_all_their_prompts_are_evaluated() {
        let templates = ["a {}", "the {}", "one {}"].map(str::to_owned);
        let classes = Classes::parse("ant\nbee\ncat\ndog", &templates).unwrap();
        let policy = Policy::reference(&[2, 1], &[2, 5], 1).unwrap();
        let cost = |ensemble| {
            let contenders = Contenders::of_classes(&classes, ensemble);
            total(&course(&policy, 1000, Some(&contenders)).unwrap(), &contenders)
        };
        // Two slots for all twelve prompts; then three slots for two prompts, or for two classes of three prompts.
        assert_eq!(cost(PromptEnsemble::Max), 2 * 12 + 3 * 2);
        assert_eq!(cost(PromptEnsemble::Mean), 2 * 12 + 3 * 6);

        let by_mean = Contenders::of_classes(&classes, PromptEnsemble::Mean);
        let greedy = Policy::reference(&[5, 1], &[2, 5], 1).unwrap();
        let message = course(&greedy, 1000, Some(&by_mean)).unwrap_err().to_string();
        assert!(message.contains("can't keep 5 of 4 classes"), "{message}");
        assert!(course(&greedy, 1000, None).is_ok(), "samples with few candidates keep them all");
    }

    #[test]
    fn a_race_compares_groups_first_and_opens_the_remaining_ones() {
        let classes = Classes::parse("ant\nbee\noak\nfir\ncar", &[]).unwrap();
        let tree = "thing\n insect\n  ant\n  bee\n tree\n  oak\n  fir\n car\n";
        let hierarchy = Hierarchy::parse(tree, &classes, &[]).unwrap();
        let contenders = Contenders::prompts(5).below(&hierarchy, &classes);
        // The prompts of groups follow those of classes, and the root group `thing` is opened at once.
        assert_eq!(contenders.first(), [4, 6, 7].map(PromptIndex));
        let race = Policy::race(0.05, 40, Timesteps::default()).unwrap();
        let course = course(&race, 1000, Some(&contenders)).unwrap();
        let slots = course.round(Round(0), 0, &contenders, &contenders.first()).unwrap();
        assert_eq!(slots, 0..4);
        let survivors = |round: u16, remaining: &[PromptIndex], means: [f32; 3], slots: usize| {
            // Means of the car, the insects and the trees. The classes inside the groups are not evaluated yet.
            let mean = |p: usize| [9.0, 9.0, 9.0, 9.0, means[0], 9.0, means[1], means[2]][p];
            let wave = |i: usize, p: usize| [0.0, 0.02, 0.01][(i + p) % 3];
            let errors: Vec<Vec<f32>> = (0..8).map(|p| (0..slots).map(|i| mean(p) + wave(i, p)).collect()).collect();
            let standing = Standing { remaining, totals: &[], errors: &errors };
            course.survivors(Round(round), &contenders, standing)
        };
        let opened = survivors(0, &contenders.first(), [2.0, 2.0, 1.0], 4);
        assert_eq!(opened, Survivors::StartAgain([2, 3].map(PromptIndex).to_vec()));
        assert_eq!(course.round(Round(1), 0, &contenders, &[2, 3].map(PromptIndex)), Some(0..6));
        // A class that remains alone has already been evaluated on these slots.
        let alone = survivors(0, &contenders.first(), [1.0, 2.0, 2.0], 4);
        assert_eq!(alone, Survivors::GoOn(vec![PromptIndex(4)]));
        assert_eq!(course.round(Round(1), 4, &contenders, &[PromptIndex(4)]), None);
        // Groups that can't be told apart are opened after eight slots.
        let groups = [6, 7].map(PromptIndex);
        assert_eq!(survivors(0, &contenders.first(), [2.0, 1.0, 1.0], 4), Survivors::GoOn(groups.to_vec()));
        assert_eq!(course.round(Round(1), 4, &contenders, &groups), Some(4..8));
        let both = survivors(1, &groups, [2.0, 1.0, 1.0], 8);
        assert_eq!(both, Survivors::StartAgain([0, 1, 2, 3].map(PromptIndex).to_vec()));
        // Eight slots for three prompts, then forty slots for five classes.
        assert_eq!(total(&course, &contenders), 8 * 3 + 40 * 5);

        let reference = Policy::reference(&[1], &[10], 1).unwrap();
        let refused = Course::new(&reference, None, 1000, Some(&contenders)).unwrap_err();
        assert!(refused.to_string().contains("a hierarchy is for a race"));
        let audited = course.with_audit(&reference, 1000, Some(&contenders)).unwrap();
        assert_eq!(total(audited.audit().unwrap(), &contenders), 10 * 5);
    }

    #[test]
    fn all_candidates_stay_if_a_stage_keeps_more() {
        let course = course(&Policy::reference(&[5, 1], &[2, 5], 1).unwrap(), 1000, None).unwrap();
        assert_eq!(total(&course, &Contenders::prompts(2)), 2 * 2 + 3 * 2);
        assert_eq!(total(&course, &Contenders::prompts(9)), 2 * 9 + 3 * 5);
    }

    #[test]
    fn a_stage_takes_every_stepth_point_of_the_largest_grid_less_those_done() {
        // M = 5, s = 200: grid 100, 300, 500, 700, 900. n = 2: step 2, G[1::2][:2] = 300, 700.
        let (policy, three) = (Policy::reference(&[2, 1], &[2, 5], 1).unwrap(), Contenders::prompts(3));
        let rounds = rounds(&course(&policy, 1000, Some(&three)).unwrap(), &three);
        assert_eq!(timesteps(&rounds[0]), [300, 700]);
        assert_eq!(timesteps(&rounds[1]), [100, 500, 900]);
    }

    #[test]
    fn noise_indices_follow_evaluation_rank_across_stages_and_trials() {
        let (policy, three) = (Policy::reference(&[2, 1], &[2, 5], 3).unwrap(), Contenders::prompts(3));
        let rounds = rounds(&course(&policy, 1000, Some(&three)).unwrap(), &three);
        let noises: Vec<Vec<u32>> = rounds.iter().map(|r| r.iter().map(|s| s.noise).collect()).collect();
        assert_eq!(noises[0], [0, 1, 2, 3, 4, 5]);
        assert_eq!(noises[1], [6, 7, 8, 9, 10, 11, 12, 13, 14]);
        assert_eq!(rounds[1][3], Slot { timestep: 500, noise: 9 });
    }

    #[test]
    fn exhaustive_scores_every_prompt_on_one_even_grid() {
        let (policy, seven) = (Policy::exhaustive(&[4], 1).unwrap(), Contenders::prompts(7));
        let course = course(&policy, 1000, Some(&seven)).unwrap();
        let rounds = rounds(&course, &seven);
        assert_eq!(rounds.len(), 1);
        assert_eq!(timesteps(&rounds[0]), [125, 375, 625, 875]);
        assert_eq!(total(&course, &seven), 4 * 7);
    }

    #[test]
    fn impossible_schedules_are_refused_with_the_remedy() {
        let message = |r: Result<Policy, PolicyError>| r.unwrap_err().to_string();
        assert!(message(Policy::reference(&[5, 1], &[20], 1)).contains("same number of values"));
        assert!(message(Policy::reference(&[1, 5], &[20, 100], 1)).contains("must not grow"));
        assert!(message(Policy::reference(&[5, 1], &[100, 20], 1)).contains("must grow"));
        assert!(message(Policy::reference(&[5, 1], &[0, 20], 1)).contains("at least 1"));
        assert!(message(Policy::exhaustive(&[20, 100], 1)).contains("one number of timesteps"));
        assert!(message(Policy::race(0.5, 10, Timesteps::default())).contains("below 0.5"));
        assert!(message(Policy::race(0.02, 1, Timesteps::default())).contains("at least 2"));
        assert!(message(Policy::race(0.02, u32::MAX, Timesteps::default())).contains("at most 100000"));
        let policy = Policy::reference(&[5, 1], &[20, 100], 1).unwrap();
        assert!(
            course(&policy, 1000, Some(&Contenders::prompts(4))).unwrap_err().to_string().contains("use at most 4")
        );
        assert!(
            course(&policy, 50, Some(&Contenders::prompts(10))).unwrap_err().to_string().contains("use at most 50")
        );
    }

    #[test]
    fn more_slots_or_prompts_than_units_can_number_are_refused() {
        let most = crate::unit::MOST;
        let once = Policy::exhaustive(&[1], 1).unwrap();
        assert!(course(&once, 1000, Some(&Contenders::prompts(most))).is_ok());
        let error = course(&once, 1000, Some(&Contenders::prompts(most + 1))).unwrap_err().to_string();
        assert_eq!(error, "4194241 prompts are more than a job can have: use at most 4194240");
        let often = Policy::exhaustive(&[1000], 5_000).unwrap();
        let error = course(&often, 1000, None).unwrap_err().to_string();
        assert!(error.starts_with("5000000 timesteps times trials are more"), "{error}");
    }
}
