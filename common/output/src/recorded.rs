//! Errors that a job has written (`--write-errors`), in the form that policies are replayed on.

use std::collections::{BTreeMap, BTreeSet};
use std::pin::pin;

use elbo_core::ids::SampleId;
use elbo_core::policy::Slot;
use elbo_core::policy::pilot::Scored;
use futures::TryStreamExt;

use crate::{Output, OutputError};

/// Reads the errors of an output whose job has this many prompts, and the samples they belong to. Prompts that were not scored
/// on every slot are left empty; samples without a complete prompt are left out.
pub async fn read(output: &Output, prompts: usize) -> Result<(Vec<SampleId>, Scored), OutputError> {
    let mut errors: BTreeMap<SampleId, BTreeMap<Slot, Vec<f32>>> = BTreeMap::new();
    let mut rows = pin!(output.errors());
    while let Some(row) = rows.try_next().await? {
        let slot = Slot { timestep: row.timestep, noise: row.noise };
        let of_slot = errors.entry(row.sample).or_default().entry(slot).or_insert_with(|| vec![f32::NAN; prompts]);
        if let Some(error) = of_slot.get_mut(row.prompt.at()) {
            *error = row.error;
        }
    }
    let slots: BTreeSet<Slot> = errors.values().flat_map(BTreeMap::keys).copied().collect();
    let of_prompt = |of_slot: &BTreeMap<Slot, Vec<f32>>, prompt: usize| {
        let row: Vec<f32> = of_slot.values().map(|errors| errors[prompt]).collect();
        if row.len() == slots.len() && row.iter().all(|error| !error.is_nan()) { row } else { Vec::new() }
    };
    let of_sample = |(sample, of_slot): (SampleId, BTreeMap<Slot, Vec<f32>>)| {
        let errors: Vec<Vec<f32>> = (0..prompts).map(|prompt| of_prompt(&of_slot, prompt)).collect();
        errors.iter().any(|row| !row.is_empty()).then_some((sample, errors))
    };
    let (samples, errors) = errors.into_iter().filter_map(of_sample).unzip();
    Ok((samples, Scored { slots: slots.iter().copied().collect(), errors }))
}
