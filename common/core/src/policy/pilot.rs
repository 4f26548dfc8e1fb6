//! Where a race should look, learned without labels from samples that were scored over all timesteps.
//!
//! A window of timesteps is as good as the race it makes: it decides with few evaluations, and as all timesteps together
//! would. Of the windows whose decisions agree with those about as often as the best window's do, the cheapest is taken.
//! Races and decisions rest on different slots, every other one: on the same, wider windows would agree by their noise.

use std::fmt;
use std::ops::Range;

use serde::Serialize;

use super::replay::{Replayed, decide_by, replay, stand_ins};
use super::{Course, Policy, PolicyError, Slot, Timesteps};
use crate::ensemble::Contenders;

/// Windows begin and end at multiples of this part of all timesteps.
const GRID: u32 = 10;
/// A window spans at least so many parts.
const NARROWEST: u32 = 4;
/// Standard errors by which a window may agree less than the best one does (the rule of Breiman et al., 1984, for trees).
const TOLERANCE: f64 = 0.5;

/// Timesteps that a pilot scores, evenly spread over all.
const SLOTS: u32 = 100;
/// Of them, those after which hopeless contenders leave.
const FIRST_SLOTS: u32 = 10;
/// Contenders that stay for all.
const KEEP: u32 = 10;

/// Samples scored on the same slots.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Scored {
    /// The slots.
    pub slots: Vec<Slot>,
    /// By sample, prompt and slot; of a prompt that was not scored on all of them there is none.
    pub errors: Vec<Vec<Vec<f32>>>,
}

/// How a window did.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct WindowTrial {
    /// Its timesteps.
    pub window: Range<u32>,
    /// Evaluations of a sample.
    pub evaluations: f64,
    /// The share of samples for which its race decided as the slots that were set apart do together.
    pub agreement: f64,
}

/// What a pilot found. Serialises to what `findings.json` says of it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Pilot {
    /// Samples that it learned from.
    pub samples: usize,
    /// The window to race in.
    pub window: Range<u32>,
    /// All windows that were tried.
    pub trials: Vec<WindowTrial>,
}

impl Pilot {
    /// The policy of a pilot's own job among so many contenders: all timesteps for those that have a chance.
    pub fn policy(contenders: u32, timesteps: u32) -> Result<Policy, PolicyError> {
        let keep = KEEP.min(contenders).max(1);
        let slots = SLOTS.min(timesteps);
        Policy::reference(&[keep, keep], &[FIRST_SLOTS.min(slots - 1).max(1), slots], 1)
    }

    /// Learns from some samples which window of a model's timesteps suits a race at the level `risk`.
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
        // Of a share of one the binomial standard error would be nothing: one more of each is assumed (Laplace).
        let share = (best * n + 1.0) / (n + 2.0);
        let enough = best - TOLERANCE * (share * (1.0 - share) / n.max(1.0)).sqrt();
        let cheapest = (trials.iter().filter(|trial| trial.agreement >= enough))
            .min_by(|a, b| a.evaluations.total_cmp(&b.evaluations));
        let window = cheapest.map_or(0..timesteps, |trial| trial.window.clone());
        Ok(Self { samples: scored.errors.len(), window, trials })
    }

    /// The density of slots that is uniform in the window.
    pub fn timesteps(&self) -> Timesteps {
        Timesteps::within(self.window.clone()).unwrap_or_default()
    }
}

impl fmt::Display for Pilot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Range { start, end } = self.window;
        write!(f, "pilot: {} images say to look at the timesteps from {start} to {end}", self.samples)?;
        let of = |window: &Range<u32>| self.trials.iter().find(|trial| trial.window == *window);
        let widest = self.trials.iter().max_by_key(|trial| trial.window.len());
        match (of(&self.window), widest) {
            (Some(chosen), Some(all)) => write!(
                f,
                ": {:.1} evaluations an image and {:.1} % decided as by all, instead of {:.1} and {:.1} %",
                chosen.evaluations,
                100.0 * chosen.agreement,
                all.evaluations,
                100.0 * all.agreement
            ),
            _ => Ok(()),
        }
    }
}

/// The race of every sample on some slots within a window; none where there are too few.
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

    /// Eighty samples of four classes, told apart between 400 and 800 and nowhere else, where errors are large and wild.
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
    fn a_pilot_looks_where_classes_differ() {
        let pilot = Pilot::learn(&scored(), &Contenders::prompts(4), 1000, 0.02).unwrap();
        let (from, to) = (pilot.window.start, pilot.window.end);
        assert!((300..=400).contains(&from) && (800..=900).contains(&to), "{:?}", pilot.window);
        let everywhere = pilot.trials.iter().find(|trial| trial.window == (0..1000)).unwrap();
        let chosen = pilot.trials.iter().find(|trial| trial.window == pilot.window).unwrap();
        assert!(chosen.evaluations < 0.5 * everywhere.evaluations, "{chosen:?} {everywhere:?}");
        assert_eq!(pilot.timesteps(), Timesteps::within(from..to).unwrap());
    }

    #[test]
    fn without_slots_a_pilot_looks_everywhere() {
        let nothing = Scored::default();
        assert_eq!(Pilot::learn(&nothing, &Contenders::prompts(4), 1000, 0.02).unwrap().window, 0..1000);
    }
}
