//! The pilot: learns which timesteps suit a race, without labels, from samples scored over all timesteps.
//!
//! A good window of timesteps needs few evaluations and decides as all timesteps together would. Among the windows that agree
//! with all timesteps about as often as the best window does, the pilot picks the cheapest. The races and the decisions they
//! are compared with use different slots, every other one: on the same slots, wide windows would agree because they share
//! noise.

use std::fmt;
use std::ops::Range;

use serde::Serialize;

use super::replay::{Replayed, decide_by, replay, stand_ins};
use super::{Course, Policy, PolicyError, Slot, Timesteps};
use crate::ensemble::Contenders;

/// Windows begin and end at multiples of this fraction (one tenth) of the timesteps.
const GRID: u32 = 10;
/// The least number of these fractions in a window.
const NARROWEST: u32 = 4;
/// How many standard errors below the best window's agreement still count as equal (the rule of Breiman et al., 1984, for
/// trees).
const TOLERANCE: f64 = 0.5;

/// Number of timesteps that a pilot scores, evenly spread.
const SLOTS: u32 = 100;
/// Number of timesteps after which hopeless contenders are eliminated.
const FIRST_SLOTS: u32 = 10;
/// Number of contenders that stay for all timesteps.
const KEEP: u32 = 10;

/// Samples that were scored on the same slots.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Scored {
    /// The slots.
    pub slots: Vec<Slot>,
    /// Errors by sample, prompt and slot. A prompt that was not scored on all slots has none.
    pub errors: Vec<Vec<Vec<f32>>>,
}

/// The result of one window.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct WindowTrial {
    /// Its timesteps.
    pub window: Range<u32>,
    /// Mean evaluations per sample.
    pub evaluations: f64,
    /// The share of samples for which the race decides the same as the held-out slots together.
    pub agreement: f64,
}

/// The result of a pilot. It is serialised into `findings.json`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Pilot {
    /// Samples it learned from.
    pub samples: usize,
    /// The window to use in the race.
    pub window: Range<u32>,
    /// All windows it tried.
    pub trials: Vec<WindowTrial>,
}

impl Pilot {
    /// The policy of the pilot's own job with this many contenders: all timesteps for the contenders that have a chance.
    pub fn policy(contenders: u32, timesteps: u32) -> Result<Policy, PolicyError> {
        let keep = KEEP.min(contenders).max(1);
        let slots = SLOTS.min(timesteps);
        Policy::reference(&[keep, keep], &[FIRST_SLOTS.min(slots - 1).max(1), slots], 1)
    }

    /// Learns which window of a model's timesteps suits a race at the level `risk`.
    pub fn learn(scored: &Scored, contenders: &Contenders, timesteps: u32, risk: f64) -> Result<Self, PolicyError> {
        let mut by_time: Vec<usize> = (0..scored.slots.len()).collect();
        by_time.sort_by_key(|&i| scored.slots[i]);
        let (decide, raced): (Vec<_>, Vec<_>) = by_time.chunks(2).map(|pair| (pair[0], pair.get(1).copied())).unzip();
        let raced: Vec<usize> = raced.into_iter().flatten().collect();
        let all: Vec<_> = scored.errors.iter().map(|errors| decide_by(contenders, errors, &decide)).collect();
        let width = (timesteps / GRID).max(1);
        let mut trials = Vec::new();
        for from in 0..GRID {
            for to in (from + NARROWEST)..=GRID {
                let window = from * width..if to == GRID { timesteps } else { to * width };
                if let Some(races) = race(scored, &raced, contenders, timesteps, risk, &window)? {
                    let agreeing =
                        races.iter().zip(&all).filter(|(race, all)| !contenders.are_rivals(&[race.best, all.best]));
                    let count = races.len().max(1) as f64;
                    trials.push(WindowTrial {
                        window,
                        agreement: agreeing.count() as f64 / count,
                        evaluations: races.iter().map(|race| race.evaluations).sum::<u64>() as f64 / count,
                    });
                }
            }
        }
        let best = trials.iter().map(|trial| trial.agreement).fold(0.0, f64::max);
        let n = scored.errors.len() as f64;
        // For a share of one the binomial standard error would be zero, so one more sample of each kind is assumed (Laplace).
        let share = (best * n + 1.0) / (n + 2.0);
        let enough = best - TOLERANCE * (share * (1.0 - share) / n.max(1.0)).sqrt();
        let cheapest = (trials.iter().filter(|trial| trial.agreement >= enough))
            .min_by(|a, b| a.evaluations.total_cmp(&b.evaluations));
        let window = cheapest.map_or(0..timesteps, |trial| trial.window.clone());
        Ok(Self { samples: scored.errors.len(), window, trials })
    }

    /// A uniform distribution of slots over the window.
    pub fn timesteps(&self) -> Timesteps {
        Timesteps::within(self.window.clone()).unwrap_or_default()
    }
}

impl fmt::Display for Pilot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Range { start, end } = self.window;
        write!(f, "pilot: learned from {} images to use the timesteps from {start} to {end}", self.samples)?;
        let of = |window: &Range<u32>| self.trials.iter().find(|trial| trial.window == *window);
        let widest = self.trials.iter().max_by_key(|trial| trial.window.len());
        match (of(&self.window), widest) {
            (Some(chosen), Some(all)) => write!(
                f,
                ": {:.1} evaluations an image and {:.1} % agreement with all timesteps, instead of {:.1} and {:.1} %",
                chosen.evaluations,
                100.0 * chosen.agreement,
                all.evaluations,
                100.0 * all.agreement
            ),
            _ => Ok(()),
        }
    }
}

/// Races every sample on the given slots within a window; `None` if there are too few slots.
fn race(
    scored: &Scored,
    raced: &[usize],
    contenders: &Contenders,
    timesteps: u32,
    risk: f64,
    window: &Range<u32>,
) -> Result<Option<Vec<Replayed>>, PolicyError> {
    let within: Vec<usize> = raced.iter().copied().filter(|&i| window.contains(&scored.slots[i].timestep)).collect();
    let slots: Vec<Slot> = within.iter().map(|&i| scored.slots[i]).collect();
    if slots.len() < 2 {
        return Ok(None);
    }
    let density = Timesteps::within(window.clone())?;
    let course = Course::new(&Policy::race(risk, slots.len() as u32, density)?, None, timesteps, Some(contenders))?;
    let at: Option<Vec<usize>> = stand_ins(course.slots(), &slots);
    let at: Vec<usize> = at.unwrap_or_default().into_iter().map(|i| within[i]).collect();
    Ok(Some(scored.errors.iter().map(|errors| replay(&course, contenders, errors, &at)).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Eighty samples of four classes. They differ only between 400 and 800; elsewhere errors are large and random.
    fn scored() -> Scored {
        let slots: Vec<Slot> = (0..100).map(|i| Slot { timestep: 5 + 10 * i, noise: i }).collect();
        let mut state = 7u64;
        let mut uniform = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u64 << 24) as f32
        };
        let errors = (0..80).map(|sample| {
            let of_class = |class: usize, uniform: &mut dyn FnMut() -> f32| -> Vec<f32> {
                let wrong = f32::from(class != sample % 4);
                let error = |slot: &Slot, noise: f32| match slot.timestep {
                    400..800 => 1.0 + wrong + 0.5 * noise,
                    _ => 1.0 + 4.0 * noise,
                };
                slots.iter().map(|slot| error(slot, uniform())).collect()
            };
            (0..4).map(|class| of_class(class, &mut uniform)).collect()
        });
        let errors = errors.collect();
        Scored { slots, errors }
    }

    #[test]
    fn a_pilot_picks_the_window_where_classes_differ() {
        let pilot = Pilot::learn(&scored(), &Contenders::prompts(4), 1000, 0.02).unwrap();
        let (from, to) = (pilot.window.start, pilot.window.end);
        assert!((300..=400).contains(&from) && (800..=900).contains(&to), "{:?}", pilot.window);
        let everywhere = pilot.trials.iter().find(|trial| trial.window == (0..1000)).unwrap();
        let chosen = pilot.trials.iter().find(|trial| trial.window == pilot.window).unwrap();
        assert!(chosen.evaluations < 0.5 * everywhere.evaluations, "{chosen:?} {everywhere:?}");
        assert_eq!(pilot.timesteps(), Timesteps::within(from..to).unwrap());
    }

    #[test]
    fn without_slots_a_pilot_picks_all_timesteps() {
        let nothing = Scored::default();
        assert_eq!(Pilot::learn(&nothing, &Contenders::prompts(4), 1000, 0.02).unwrap().window, 0..1000);
    }
}
