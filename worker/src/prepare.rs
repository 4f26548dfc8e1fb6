//! From a leased block to work for the engine: images are read, decoded and encoded while the device computes the block
//! before.

use std::collections::HashMap;
use std::sync::Arc;

use elbo_common::dataset::Reader;
use elbo_common::ids::{PromptIndex, Round, SampleId};
use elbo_common::unit::{Unit, UnitId};
use elbo_proto::v1;
use futures::StreamExt;

use crate::engine::{Engine, EngineStopped, UnitWork};
use crate::latent::{Latent, LatentCache};
use crate::models::Conditions;
use crate::preprocess::Preprocessing;

/// Images read and decoded at a time.
const AHEAD: usize = 16;

/// A sample whose image can't be turned into a latent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadSample {
    /// The sample.
    pub sample: SampleId,
    /// Where it failed: read, decode, preprocess or encode.
    pub stage: &'static str,
    /// Why.
    pub error: String,
}

/// A block ready for the engine.
#[derive(Debug)]
pub struct Prepared {
    /// Units of the samples that have a latent.
    pub units: Vec<UnitWork>,
    /// What the network needs to know of their prompts.
    pub conditions: Arc<Conditions>,
    /// Samples that have none.
    pub bad: Vec<BadSample>,
}

/// A block that contradicts the contract.
#[derive(Clone, Copy, Debug, thiserror::Error)]
pub enum BlockError {
    /// It speaks of samples, rounds or prompts that are not the job's.
    #[error(
        "the block speaks of a sample, round or prompt this job does not have: run the same version of elbo everywhere"
    )]
    Foreign,
    /// The engine is gone.
    #[error(transparent)]
    Stopped(#[from] EngineStopped),
}

/// Turns blocks into work.
#[derive(Debug)]
pub struct Preparer {
    /// The device's engine, which encodes.
    pub engine: Arc<Engine>,
    /// Latents at hand.
    pub cache: LatentCache,
    /// Reads images.
    pub reader: Reader,
    /// What the model wants done to an image.
    pub preprocessing: Preprocessing,
    /// Slots of every round, to check blocks against.
    pub slots: Vec<usize>,
    /// The job's prompts.
    pub conditions: Arc<Conditions>,
}

impl Preparer {
    /// Reads, decodes and encodes what a block needs.
    pub async fn prepare(&self, block: v1::Block) -> Result<Prepared, BlockError> {
        let units =
            block.units.into_iter().map(|u| self.unit(u)).collect::<Option<Vec<_>>>().ok_or(BlockError::Foreign)?;
        let mut keys: HashMap<SampleId, Arc<str>> = HashMap::new();
        let mut latents: HashMap<SampleId, Latent> = HashMap::new();
        let conditions = Arc::clone(&self.conditions);
        let mut prepared = Prepared { units: Vec::new(), conditions, bad: Vec::new() };
        let mut pending = futures::stream::iter(block.samples.into_iter().map(|sample| {
            keys.insert(SampleId(sample.id), Arc::from(sample.key.as_str()));
            self.latent(sample)
        }))
        .buffered(AHEAD);
        while let Some(latent) = pending.next().await {
            match latent? {
                Ok((sample, latent)) => drop(latents.insert(sample, latent)),
                Err(bad) => prepared.bad.push(bad),
            }
        }
        drop(pending);
        for unit in units {
            let key = keys.get(&unit.id.sample).ok_or(BlockError::Foreign)?;
            if let Some(latent) = latents.get(&unit.id.sample) {
                let (key, latent) = (Arc::clone(key), Arc::clone(latent));
                prepared.units.push(UnitWork { unit, key, latent, first_condition: 0 });
            }
        }
        Ok(prepared)
    }

    /// A unit of the contract as one of ours; `None` where it is not of this job.
    fn unit(&self, unit: v1::Unit) -> Option<Unit> {
        let id = unit.id?;
        let id = UnitId {
            sample: SampleId(id.sample),
            round: Round(id.round.try_into().ok()?),
            slots: id.slots.try_into().ok()?,
            prompts: id.prompts.try_into().ok()?,
        };
        let slots = unit.slot_begin as usize..unit.slot_end as usize;
        let fits = slots.start < slots.end
            && slots.end <= *self.slots.get(id.round.at())?
            && !unit.prompts.is_empty()
            && unit.prompts.iter().all(|&p| (p as usize) < self.conditions.len());
        fits.then(|| Unit { id, slots, prompts: unit.prompts.into_iter().map(PromptIndex).collect() })
    }

    async fn latent(&self, sample: v1::Sample) -> Result<Result<(SampleId, Latent), BadSample>, EngineStopped> {
        let id = SampleId(sample.id);
        if let Some(latent) = self.cache.get(id) {
            return Ok(Ok((id, latent)));
        }
        let bad = |stage, error: String| Ok(Err(BadSample { sample: id, stage, error }));
        let bytes = match self.reader.read(&sample.location).await {
            Ok(bytes) => bytes,
            Err(error) => return bad("read", error.to_string()),
        };
        let preprocessing = self.preprocessing.clone();
        let decoded = tokio::task::spawn_blocking(move || preprocessing.apply(&bytes)).await;
        let pixels = match decoded {
            Ok(Ok(pixels)) => pixels,
            Ok(Err(error)) => return bad(error.stage(), error.to_string()),
            Err(_) => return bad("decode", "the decoder crashed on it".into()),
        };
        match self.engine.encode(pixels).await? {
            Ok(latent) => {
                let latent = Arc::new(latent);
                self.cache.put(id, Arc::clone(&latent));
                Ok(Ok((id, latent)))
            }
            Err(error) => bad("encode", error.to_string()),
        }
    }
}
