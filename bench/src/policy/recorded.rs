//! Reads the errors that an exhaustive job has written.

use std::collections::BTreeMap;
use std::pin::pin;

use elbo_core::ids::{PromptIndex, SampleId};
use elbo_output::Output;
use elbo_output::record::JobRecord;
use elbo_output::recorded;
use elbo_store::Store;
use futures::TryStreamExt;

use super::Errors;
use crate::BenchError;

/// Training timesteps of nearly every model.
const TIMESTEPS: u32 = 1000;

/// Reads all errors of a job's output. It must have an error for every sample, slot and prompt.
pub async fn read(store: &Store) -> Result<Errors, BenchError> {
    let location = store.location().to_string();
    let refused = |problem: String| BenchError::NoErrors { location: location.clone(), problem };
    let record = JobRecord::read(store).await?.ok_or_else(|| refused("it has no job.json".into()))?;
    let spec = &record.identity.spec;
    let contenders = spec.contenders().ok_or_else(|| refused("its images have their own captions".into()))?;
    let output = Output::new(store);
    let (samples, scored) = recorded::read(&output, contenders.prompt_count()).await?;
    if samples.is_empty() || scored.errors.iter().flatten().any(Vec::is_empty) {
        let how = "run the job with --policy exhaustive --samples 100 --write-errors";
        return Err(refused(format!("it does not have the errors of every image and prompt on the same slots: {how}")));
    }
    let mut labels: BTreeMap<SampleId, Option<PromptIndex>> = BTreeMap::new();
    let mut rows = pin!(output.predictions());
    while let Some(row) = rows.try_next().await? {
        let class = row.label.as_deref().and_then(|label| spec.classes.with_label(label));
        let prompt = class.and_then(|class| spec.classes.prompts.iter().position(|prompt| prompt.class == class));
        labels.insert(row.sample, prompt.map(|at| PromptIndex(at as u32)));
    }
    let truth = samples.iter().map(|sample| labels.get(sample).copied().flatten()).collect();
    Ok(Errors { title: location, scored, contenders, truth, timesteps: TIMESTEPS })
}
