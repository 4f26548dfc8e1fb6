//! Replays policies on completely known errors, to get their accuracy, evaluations and agreement.
//!
//! [`recorded`] reads the errors of an exhaustive job, [`synthetic`] draws errors of many classes from a model, and [`table`]
//! shows each policy's results with intervals.

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

/// Samples with all their errors, and their right prompts if they have labels.
#[derive(Clone, Debug)]
pub struct Errors {
    /// A description of the errors.
    pub title: String,
    /// The errors.
    pub scored: Scored,
    /// The contenders of every sample.
    pub contenders: Contenders,
    /// A prompt of the right class, if known.
    pub truth: Vec<Option<PromptIndex>>,
    /// Timesteps of the model.
    pub timesteps: u32,
}

/// What to replay.
#[derive(Clone, Debug)]
pub struct PolicyBenchOptions {
    /// The reference's schedule.
    pub reference: Reference,
    /// Risk levels of the races.
    pub risks: Vec<f64>,
    /// Maximum slots per race.
    pub max_slots: u32,
    /// Number of samples that a pilot learns from, at the first risk level, chosen by `seed`; `None` for no pilot. The
    /// timesteps it learns are then used to race all samples, including the pilot's.
    pub pilot: Option<usize>,
    /// Seed for choosing the pilot's samples.
    pub seed: u64,
}

/// A reference schedule.
#[derive(Clone, Debug)]
pub enum Reference {
    /// Explicit stages.
    Stages {
        /// Contenders kept after each stage.
        keep: Vec<u32>,
        /// Total timesteps by the end of each stage.
        samples: Vec<u32>,
    },
    /// A published schedule.
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

/// Replays the policies. Also returns what the pilot learned, if there was one.
pub fn run(errors: &Errors, options: &PolicyBenchOptions) -> Result<(Table, Option<Pilot>), BenchError> {
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
    /// Replays a policy on some samples.
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

/// Chooses `count` of `all` positions by a seed, in ascending order: the first of a shuffle (Fisher & Yates).
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
