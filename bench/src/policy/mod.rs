//! What policies would have made of errors that are known in full: accuracy, evaluations, agreement.
//!
//! [`recorded`] reads the errors of an exhaustive job, [`synthetic`] draws those of many classes from a stated model, and
//! [`table`] says how each policy did, with intervals.

pub mod recorded;
pub mod synthetic;
pub mod table;

use elbo_core::ensemble::Contenders;
use elbo_core::ids::PromptIndex;
use elbo_core::policy::pilot::{Pilot, Scored};
use elbo_core::policy::replay::{Replayed, replay, stand_ins};
use elbo_core::policy::{Course, Policy, PolicyError, Timesteps};
use elbo_core::preset::Preset;

pub use table::{Row, Table};

use crate::BenchError;
use crate::random::mix;

/// Samples with every error, and their right prompts where labels say so.
#[derive(Clone, Debug)]
pub struct Errors {
    /// What they are.
    pub title: String,
    /// The errors.
    pub scored: Scored,
    /// What competes for every sample.
    pub contenders: Contenders,
    /// A prompt of the right class, where it is known.
    pub truth: Vec<Option<PromptIndex>>,
    /// Timesteps of the model.
    pub timesteps: u32,
}

/// What is replayed.
#[derive(Clone, Debug)]
pub struct Options {
    /// The reference's schedule: `(keep, samples)`, or one of the published ones.
    pub reference: Reference,
    /// Levels of races.
    pub risks: Vec<f64>,
    /// Slots of a race at most.
    pub max_slots: u32,
    /// Samples that a pilot learns from, at the first level, chosen by `seed`; none for no pilot. All samples are then raced
    /// with what it learns, its own too.
    pub pilot: Option<usize>,
    /// Seed of the choice.
    pub seed: u64,
}

/// A reference schedule.
#[derive(Clone, Debug)]
pub enum Reference {
    /// Spelled out.
    Stages {
        /// Contenders that stay after each stage.
        keep: Vec<u32>,
        /// Timesteps by its end.
        samples: Vec<u32>,
    },
    /// Published.
    Preset(Preset),
}

impl Reference {
    fn policy(&self) -> Result<Policy, PolicyError> {
        match self {
            Self::Stages { keep, samples } => Policy::reference(keep, samples, 1),
            Self::Preset(preset) => Ok(preset.policy()),
        }
    }
}

/// Replays the policies; the pilot's findings, if there was one.
pub fn run(errors: &Errors, options: &Options) -> Result<(Table, Option<Pilot>), BenchError> {
    let slots = errors.scored.slots.len() as u32;
    let everyone: Vec<usize> = (0..errors.scored.errors.len()).collect();
    let mut table = Table::new(errors, &everyone);
    let reference = options.reference.policy()?;
    table.add("reference", &errors.replay(&reference, &everyone)?);
    for &risk in &options.risks {
        let policy = Policy::race(risk, options.max_slots.min(slots), Timesteps::default())?;
        table.add(&format!("race, risk {risk}"), &errors.replay(&policy, &everyone)?);
    }
    let Some(count) = options.pilot else { return Ok((table, None)) };
    let chosen = choose(everyone.len(), count, options.seed);
    let pilot_errors = chosen.iter().map(|&sample| errors.scored.errors[sample].clone()).collect();
    let scored = Scored { slots: errors.scored.slots.clone(), errors: pilot_errors };
    let level = options.risks.first().copied().unwrap_or(elbo_core::policy::DEFAULT_RISK);
    let pilot = Pilot::learn(&scored, &errors.contenders, errors.timesteps, level)?;
    let within = errors.scored.slots.iter().filter(|slot| pilot.window.contains(&slot.timestep)).count() as u32;
    for &risk in &options.risks {
        let policy = Policy::race(risk, options.max_slots.min(within), pilot.timesteps())?;
        let name = format!("race, risk {risk}, timesteps {}-{}", pilot.window.start, pilot.window.end);
        table.add(&name, &errors.replay(&policy, &everyone)?);
    }
    Ok((table, Some(pilot)))
}

impl Errors {
    /// A policy's run over some samples.
    fn replay(&self, policy: &Policy, samples: &[usize]) -> Result<Vec<Replayed>, BenchError> {
        let course = Course::new(policy, None, self.timesteps, Some(&self.contenders))?;
        let spans = match policy {
            Policy::Race { timesteps, .. } => timesteps.spans().to_vec(),
            Policy::Reference { .. } | Policy::Exhaustive { .. } => Vec::new(),
        };
        let within = |t: u32| spans.is_empty() || spans.iter().any(|span| (span.from..span.to).contains(&t));
        let open: Vec<usize> =
            (0..self.scored.slots.len()).filter(|&i| within(self.scored.slots[i].timestep)).collect();
        let slots: Vec<_> = open.iter().map(|&i| self.scored.slots[i]).collect();
        let at = stand_ins(course.slots(), &slots)
            .ok_or_else(|| BenchError::TooFewSlots { needed: course.slots().len(), recorded: slots.len() })?;
        let at: Vec<usize> = at.into_iter().map(|i| open[i]).collect();
        Ok(samples.iter().map(|&s| replay(&course, &self.contenders, &self.scored.errors[s], &at)).collect())
    }
}

/// `count` of `all` positions, ascending, chosen by a seed: a shuffle's first (Fisher & Yates).
fn choose(all: usize, count: usize, seed: u64) -> Vec<usize> {
    let mut positions: Vec<usize> = (0..all).collect();
    let mut state = seed;
    let count = count.min(all);
    for i in 0..count {
        let left = (all - i) as u64;
        positions.swap(i, i + (mix(&mut state) % left) as usize);
    }
    positions.truncate(count);
    positions.sort_unstable();
    positions
}
