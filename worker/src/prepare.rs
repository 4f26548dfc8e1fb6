//! Turns a leased block into work for the engine: reads, decodes and encodes images while the device computes the previous
//! block.

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};

use bytes::Bytes;
use elbo_core::failure::{FailureStage, SampleFailure};
use elbo_core::ids::{PromptIndex, Round, SampleId};
use elbo_core::sample::Part;
use elbo_core::text::excerpt;
use elbo_core::unit::{Unit, UnitId};
use elbo_data::budget::Budget;
use elbo_data::{Image, Reader};
use elbo_kernels::gpu;
use elbo_models::{Conditions, ModelError, check_distinct, cut_off};
use elbo_net::RateLimitedLog;
use elbo_proto::v1;
use futures::StreamExt;

use crate::access::{Access, Unread};
use crate::engine::{Engine, UnitWork};
use crate::error::{BlockError, EncodeError};
use crate::latent::{Key, Latent, LatentCache};
use crate::loaded_job::LoadedJob;
use crate::metrics::metrics;
use crate::picture::{Picture, picture};
use crate::stage::ModelStage;

/// The most images read and decoded at a time, if there is memory for them.
const AHEAD: usize = 16;

/// A block ready for the engine.
#[derive(Debug)]
pub struct Prepared {
    /// Units of the samples that have a latent.
    pub units: Vec<UnitWork>,
    /// Every stage's conditions for their prompts.
    pub conditions: Vec<Arc<Conditions>>,
    /// Samples that have no latent.
    pub bad: Vec<SampleFailure>,
}

/// Why a sample has no latent.
enum Unprepared {
    /// The sample is at fault.
    Sample(SampleFailure),
    /// The block can't be prepared.
    Block(BlockError),
}

impl Unprepared {
    fn sample(sample: SampleId, stage: FailureStage, error: impl ToString) -> Self {
        Self::Sample(SampleFailure { sample, stage, error: error.to_string() })
    }
}

impl From<BlockError> for Unprepared {
    fn from(error: BlockError) -> Self {
        Self::Block(error)
    }
}

/// Turns blocks into work.
#[derive(Debug)]
pub struct Preparer {
    /// The device's engine, which encodes.
    pub engine: Arc<Engine>,
    /// The latents at hand.
    pub cache: LatentCache,
    /// Reads images.
    pub reader: Reader,
    /// The memory for decoding images.
    pub memory: Budget,
    /// Decides what is at fault when an image can't be read.
    pub access: Access,
    /// The job: its course, its models, and its prompts or the text encoders for its samples' captions.
    pub job: Arc<LoadedJob>,
    /// Samples read and encoded so far.
    pub prepared: Arc<AtomicU64>,
}

/// Every stage's conditions for a block's prompts.
struct BlockConditions {
    conditions: Vec<Arc<Conditions>>,
    /// The start and the number of each sample's prompts.
    of_sample: HashMap<SampleId, (u32, usize)>,
    /// Samples with captions that the model can't tell apart, with a message that names the captions.
    same: HashMap<SampleId, String>,
}

impl Preparer {
    /// Reads, decodes and encodes the samples of a block.
    pub async fn prepare(&self, block: v1::Block) -> Result<Prepared, BlockError> {
        let BlockConditions { conditions, of_sample, mut same } = self.conditions(&block.samples).await?;
        let units = block.units.into_iter().map(|u| self.unit(u, &of_sample)).collect::<Option<Vec<_>>>();
        let units = units.ok_or(BlockError::Foreign)?;
        let stages = self.stages_of(&units);
        let mut keys: HashMap<SampleId, Arc<str>> = HashMap::new();
        let mut latents: HashMap<Key, Latent> = HashMap::new();
        let mut prepared = Prepared { units: Vec::new(), conditions, bad: Vec::new() };
        let mut pending = futures::stream::iter(block.samples.into_iter().map(|sample| {
            let noise_key = if sample.noise_key.is_empty() { &sample.key } else { &sample.noise_key };
            keys.insert(SampleId(sample.id), Arc::from(noise_key.as_str()));
            let stages = stages.get(&SampleId(sample.id)).cloned().unwrap_or_default();
            let same = same.remove(&SampleId(sample.id));
            async {
                match same {
                    Some(error) => Err(Unprepared::sample(SampleId(sample.id), FailureStage::Encode, error)),
                    None => self.latents(sample, stages).await,
                }
            }
        }))
        // A slow image does not hold up others.
        .buffer_unordered(AHEAD);
        while let Some(of_sample) = pending.next().await {
            match of_sample {
                Ok(of_sample) => {
                    self.prepared.fetch_add(1, Ordering::Relaxed);
                    latents.extend(of_sample);
                }
                Err(Unprepared::Sample(bad)) => prepared.bad.push(bad),
                Err(Unprepared::Block(error)) => return Err(error),
            }
        }
        drop(pending);
        prepared.bad.sort_by_key(|bad| bad.sample);
        for unit in units {
            let (sample, stage) = (unit.id.sample, self.job.stage_of(unit.id.round));
            let key = keys.get(&sample).ok_or(BlockError::Foreign)?;
            if let Some(latent) = latents.get(&(sample, stage)) {
                let (key, latent) = (Arc::clone(key), Arc::clone(latent));
                let (first_condition, _) = of_sample.get(&sample).copied().ok_or(BlockError::Foreign)?;
                prepared.units.push(UnitWork { unit, key, latent, stage, first_condition });
            }
        }
        Ok(prepared)
    }

    /// The stages that need each sample's latent.
    fn stages_of(&self, units: &[Unit]) -> HashMap<SampleId, BTreeSet<usize>> {
        let mut stages: HashMap<SampleId, BTreeSet<usize>> = HashMap::new();
        for unit in units {
            stages.entry(unit.id.sample).or_default().insert(self.job.stage_of(unit.id.round));
        }
        stages
    }

    /// The job's prompts, or the captions of a block's samples, encoded.
    async fn conditions(&self, samples: &[v1::Sample]) -> Result<BlockConditions, BlockError> {
        let of_job: Option<Vec<_>> = self.job.stages.iter().map(|stage| stage.conditions.clone()).collect();
        if let Some(conditions) = of_job {
            let prompts = (0, conditions.last().map_or(0, |conditions| conditions.len()));
            let of_sample = samples.iter().map(|sample| (SampleId(sample.id), prompts)).collect();
            return Ok(BlockConditions { conditions, of_sample, same: HashMap::new() });
        }
        let (captions, of_sample) = gather_captions(samples);
        if captions.is_empty() {
            return Err(BlockError::Foreign);
        }
        let job = Arc::clone(&self.job);
        let encoding = tokio::task::spawn_blocking(move || {
            let encode = |stage: &ModelStage| Ok(Arc::new(stage.text_conditions(&captions)?));
            let conditions = job.stages.iter().map(encode).collect::<Result<Vec<_>, ModelError>>()?;
            let same = same_captions(&job.stages, &captions, &of_sample)?;
            Ok(BlockConditions { conditions, of_sample, same })
        });
        let encoded = encoding.await.map_err(|_| ModelError::Input("the text encoder crashed".into())).flatten();
        encoded.map_err(BlockError::Captions)
    }

    /// Converts a unit of the contract; `None` if it is not of this job.
    fn unit(&self, unit: v1::Unit, of_sample: &HashMap<SampleId, (u32, usize)>) -> Option<Unit> {
        let id = unit.id?;
        let id = UnitId {
            sample: SampleId(id.sample),
            round: Round(id.round.try_into().ok()?),
            slots: id.slots.try_into().ok()?,
            prompts: id.prompts.try_into().ok()?,
        };
        let slots = unit.slot_begin as usize..unit.slot_end as usize;
        let (_, prompts) = of_sample.get(&id.sample)?;
        let fits = slots.start < slots.end
            && self.job.course.slot(id.round, slots.end - 1).is_some()
            && !unit.prompts.is_empty()
            && unit.prompts.iter().all(|&p| (p as usize) < *prompts);
        fits.then(|| Unit { id, slots, prompts: unit.prompts.into_iter().map(PromptIndex).collect() })
    }

    /// A sample's latents for some stages.
    async fn latents(&self, sample: v1::Sample, stages: BTreeSet<usize>) -> Result<Vec<(Key, Latent)>, Unprepared> {
        let id = SampleId(sample.id);
        let mut latents = Vec::new();
        let mut bytes: Option<Bytes> = None;
        for stage in stages {
            let key = (id, stage);
            if let Some(latent) = self.cache.get(key) {
                latents.push((key, latent));
                continue;
            }
            let file = match bytes.take() {
                Some(bytes) => bytes,
                None => match self.access.read(&self.reader, &image_of(&sample)).await {
                    Ok(bytes) => {
                        metrics().images_read.inc();
                        bytes
                    }
                    Err(Unread::Image { stage, error }) => return Err(Unprepared::sample(id, stage, error)),
                    Err(Unread::Access(error)) => return Err(error.into()),
                },
            };
            bytes = Some(file.clone());
            let preprocessing = self.job.stages[stage].preprocessing();
            // Hold its share of the memory until it is encoded.
            let Picture { pixels, share: _share } = match picture(file, preprocessing, &self.memory).await {
                Ok(picture) => picture,
                Err(error) => return Err(Unprepared::sample(id, error.stage(), error)),
            };
            let latent = match self.engine.encode(stage, pixels).await {
                Ok(latent) => Arc::new(latent),
                Err(EncodeError::Stopped(stopped)) => return Err(BlockError::from(stopped).into()),
                Err(EncodeError::Model(error))
                    if error.is_out_of_memory() || gpu::is_lost(self.job.stages[stage].device()) =>
                {
                    return Err(BlockError::Device(error.to_string()).into());
                }
                Err(EncodeError::Model(error)) => {
                    return Err(Unprepared::sample(id, FailureStage::Encode, error));
                }
            };
            self.cache.put(key, Arc::clone(&latent));
            latents.push((key, latent));
        }
        Ok(latents)
    }
}

/// The samples with two captions that are the same to one of the models. Also warns about captions that are cut off.
fn same_captions(
    stages: &[ModelStage],
    captions: &[String],
    of_sample: &HashMap<SampleId, (u32, usize)>,
) -> Result<HashMap<SampleId, String>, ModelError> {
    static CUT_OFF: LazyLock<RateLimitedLog> = LazyLock::new(RateLimitedLog::default);
    let mut same = HashMap::new();
    for stage in stages {
        let readings = stage.readings(captions)?;
        if let Some(warning) = cut_off("captions of a block", captions, &readings).filter(|_| CUT_OFF.is_due()) {
            tracing::warn!("{warning}");
        }
        for (sample, (start, count)) in of_sample {
            let own = *start as usize..*start as usize + count;
            let shown = |at: usize| format!("caption {at} '{}'", excerpt(&captions[own.start + at]));
            if let Err(error) = check_distinct(&readings[own.clone()], |_, _| true, shown) {
                same.insert(*sample, error.to_string());
            }
        }
    }
    Ok(same)
}

/// The location of a sample's image.
pub(crate) fn image_of(sample: &v1::Sample) -> Image {
    let part = sample.part.as_ref().map(|part| match part {
        v1::sample::Part::Member(v1::Member { offset }) => Part::Member { offset: *offset },
        v1::sample::Part::Cell(v1::Cell { row, column }) => Part::Cell { row: *row, column: column.clone() },
    });
    let etag = Some(sample.etag.clone()).filter(|etag| !etag.is_empty());
    Image { location: sample.location.clone(), part, size: sample.size, etag }
}

/// The captions of a block's samples, one list after another, each distinct list once. Also returns where each sample's
/// list starts, and its length.
///
/// Lists are shared, not captions, since an evaluation finds a caption by its position in its sample's list.
fn gather_captions(samples: &[v1::Sample]) -> (Vec<String>, HashMap<SampleId, (u32, usize)>) {
    let (mut gathered, mut starts, mut of_sample) = (Vec::new(), HashMap::new(), HashMap::new());
    for sample in samples {
        let captions = &sample.captions;
        let start = *starts.entry(captions).or_insert_with(|| {
            let start = gathered.len() as u32;
            gathered.extend_from_slice(captions);
            start
        });
        of_sample.insert(SampleId(sample.id), (start, captions.len()));
    }
    (gathered, of_sample)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_with_the_same_captions_share_them_and_lists_stay_whole() {
        let sample = |id, captions: &[&str]| v1::Sample {
            id,
            captions: captions.iter().map(ToString::to_string).collect(),
            ..v1::Sample::default()
        };
        let samples = [sample(4, &["a", "b"]), sample(5, &["b", "a", "c"]), sample(6, &["a", "b"])];
        let (captions, of_sample) = gather_captions(&samples);
        assert_eq!(captions, ["a", "b", "b", "a", "c"]);
        let at = |id| of_sample[&SampleId(id)];
        assert_eq!([at(4), at(5), at(6)], [(0, 2), (2, 3), (0, 2)]);
    }
}
