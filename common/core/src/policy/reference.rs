//! The adaptive schedule of Li et al. (ICCV 2023), exactly as their `eval_prob_adaptive` computes it.

use super::{PolicyError, Slot, Stage};
use crate::ensemble::Contenders;

/// The end of a stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Step {
    /// Total slots evaluated by then.
    pub(super) end: usize,
    /// How many contenders stay.
    pub(super) keep: u32,
}

/// The slots of all stages in order, and the end of each stage. `contenders` is `None` if each sample has its own captions; a
/// stage then keeps them all if there are fewer than `keep`.
pub(super) fn schedule(
    stages: &[Stage],
    trials: u32,
    timesteps: u32,
    contenders: Option<&Contenders>,
) -> Result<(Vec<Slot>, Vec<Step>), PolicyError> {
    let most = stages.iter().map(|stage| stage.samples).max().unwrap_or(0);
    check(most, timesteps)?;
    if let Some(c) = contenders
        && let Some(stage) = stages.iter().find(|stage| stage.keep as usize > c.len())
    {
        return Err(PolicyError::KeepTooLarge { keep: stage.keep, count: c.len(), noun: c.noun() });
    }
    let (mut done, mut slots, mut steps) = (Vec::new(), Vec::new(), Vec::new());
    for stage in stages {
        let fresh = new_timesteps(timesteps, most, stage.samples, &done);
        slots.extend(slots_by_rank(&fresh, done.len() as u32, trials));
        done.extend(fresh);
        steps.push(Step { end: slots.len(), keep: stage.keep });
    }
    Ok((slots, steps))
}

/// The slots of a single grid with `samples` timesteps.
pub(super) fn grid(samples: u32, trials: u32, timesteps: u32) -> Result<Vec<Slot>, PolicyError> {
    check(samples, timesteps)?;
    Ok(slots_by_rank(&new_timesteps(timesteps, samples, samples, &[]), 0, trials))
}

fn check(samples: u32, timesteps: u32) -> Result<(), PolicyError> {
    match samples {
        0 => Err(PolicyError::Zero("samples")),
        _ if samples > timesteps => Err(PolicyError::TooManySamples { samples, timesteps }),
        _ => Ok(()),
    }
}

/// The timesteps that a stage with `samples` timesteps adds to those already `done`: ascending, from the grid of the largest
/// stage.
fn new_timesteps(timesteps: u32, most: u32, samples: u32, done: &[u32]) -> Vec<u32> {
    let spacing = timesteps / most;
    let grid: Vec<u32> = (0..most).map(|i| spacing / 2 + i * spacing).collect();
    let step = (most / samples) as usize;
    grid.into_iter().skip(step / 2).step_by(step).take(samples as usize).filter(|t| !done.contains(t)).collect()
}

/// The slots of a stage's new timesteps. The noise index follows the order of evaluation, not the timestep.
fn slots_by_rank(fresh: &[u32], done: u32, trials: u32) -> Vec<Slot> {
    fresh
        .iter()
        .zip(done..)
        .flat_map(|(&timestep, rank)| (0..trials).map(move |q| Slot { timestep, noise: trials * rank + q }))
        .collect()
}
