//! From a leased block to work for the engine: images are read, decoded and encoded while the device computes the block
//! before.

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};

use bytes::Bytes;
use elbo_core::class::{Classes, Prompt};
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
use crate::engine::{Engine, Problem, UnitWork};
use crate::error::BlockError;
use crate::latent::{Key, Latent, LatentCache};
use crate::metrics::metrics;
use crate::picture::{Picture, picture};
use crate::stage::Stage;

/// Images read and decoded at a time, as far as there is memory for them.
const AHEAD: usize = 16;

/// A sample whose image can't be turned into a latent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadSample {
    /// The sample.
    pub sample: SampleId,
    /// Where it failed: read, decode, preprocess or encode; or unread, where others may be able to read it.
    pub stage: &'static str,
    /// Why.
    pub error: String,
}

/// A block ready for the engine.
#[derive(Debug)]
pub struct Prepared {
    /// Units of the samples that have a latent.
    pub units: Vec<UnitWork>,
    /// What every stage's model needs to know of their prompts.
    pub conditions: Vec<Arc<Conditions>>,
    /// Samples that have none.
    pub bad: Vec<BadSample>,
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
    /// What decoding them may take.
    pub memory: Budget,
    /// What is at fault when one can't be read.
    pub access: Access,
    /// The job: its course, its models, and its prompts or the text encoders for its samples' captions.
    pub problem: Arc<Problem>,
    /// Samples read and encoded so far.
    pub prepared: Arc<AtomicU64>,
}

/// What every stage's model needs to know of a block's prompts.
struct BlockConditions {
    conditions: Vec<Arc<Conditions>>,
    /// Where each sample's prompts start, and how many it has.
    of_sample: HashMap<SampleId, (u32, usize)>,
    /// Samples whose captions can't be told apart, and which.
    same: HashMap<SampleId, String>,
}

impl Preparer {
    /// Reads, decodes and encodes what a block needs.
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
                    Some(error) => Ok(Err(BadSample { sample: SampleId(sample.id), stage: "encode", error })),
                    None => self.latents(sample, stages).await,
                }
            }
        }))
        // One that comes slowly holds up no other.
        .buffer_unordered(AHEAD);
        while let Some(of_sample) = pending.next().await {
            match of_sample? {
                Ok(of_sample) => {
                    self.prepared.fetch_add(1, Ordering::Relaxed);
                    latents.extend(of_sample);
                }
                Err(bad) => prepared.bad.push(bad),
            }
        }
        drop(pending);
        prepared.bad.sort_by_key(|bad| bad.sample);
        for unit in units {
            let (sample, stage) = (unit.id.sample, self.problem.stage_of(unit.id.round));
            let key = keys.get(&sample).ok_or(BlockError::Foreign)?;
            if let Some(latent) = latents.get(&(sample, stage)) {
                let (key, latent) = (Arc::clone(key), Arc::clone(latent));
                let (first_condition, _) = of_sample.get(&sample).copied().ok_or(BlockError::Foreign)?;
                prepared.units.push(UnitWork { unit, key, latent, stage, first_condition });
            }
        }
        Ok(prepared)
    }

    /// The stages whose models must look at each sample.
    fn stages_of(&self, units: &[Unit]) -> HashMap<SampleId, BTreeSet<usize>> {
        let mut stages: HashMap<SampleId, BTreeSet<usize>> = HashMap::new();
        for unit in units {
            stages.entry(unit.id.sample).or_default().insert(self.problem.stage_of(unit.id.round));
        }
        stages
    }

    /// The job's prompts, or the captions of a block's samples, encoded.
    async fn conditions(&self, samples: &[v1::Sample]) -> Result<BlockConditions, BlockError> {
        let of_job: Option<Vec<_>> = self.problem.stages.iter().map(|stage| stage.conditions.clone()).collect();
        if let Some(conditions) = of_job {
            let prompts = (0, conditions.last().map_or(0, |conditions| conditions.len()));
            let of_sample = samples.iter().map(|sample| (SampleId(sample.id), prompts)).collect();
            return Ok(BlockConditions { conditions, of_sample, same: HashMap::new() });
        }
        let (captions, of_sample) = gather_captions(samples);
        if captions.is_empty() {
            return Err(BlockError::Foreign);
        }
        let problem = Arc::clone(&self.problem);
        let encoding = tokio::task::spawn_blocking(move || {
            let encode = |stage: &Stage| Ok(Arc::new(stage.conditions_of(&captions)?));
            let conditions = problem.stages.iter().map(encode).collect::<Result<Vec<_>, ModelError>>()?;
            let same = same_captions(&problem.stages, &captions, &of_sample)?;
            Ok(BlockConditions { conditions, of_sample, same })
        });
        let encoded = encoding.await.map_err(|_| ModelError::Input("the text encoder crashed".into())).flatten();
        encoded.map_err(BlockError::Captions)
    }

    /// A unit of the contract as one of ours; `None` where it is not of this job.
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
            && self.problem.course.slot(id.round, slots.end - 1).is_some()
            && !unit.prompts.is_empty()
            && unit.prompts.iter().all(|&p| (p as usize) < *prompts);
        fits.then(|| Unit { id, slots, prompts: unit.prompts.into_iter().map(PromptIndex).collect() })
    }

    /// What the models of some stages make of a sample.
    async fn latents(
        &self,
        sample: v1::Sample,
        stages: BTreeSet<usize>,
    ) -> Result<Result<Vec<(Key, Latent)>, BadSample>, BlockError> {
        let id = SampleId(sample.id);
        let bad = |stage, error: String| Ok(Err(BadSample { sample: id, stage, error }));
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
                None => match self.access.read(&self.reader, &image_of(&sample)).await? {
                    Ok(bytes) => {
                        metrics().images_read.inc();
                        bytes
                    }
                    Err(Unread { stage, error }) => return bad(stage, error.to_string()),
                },
            };
            bytes = Some(file.clone());
            let preprocessing = self.problem.stages[stage].preprocessing();
            // Its share of the memory is held until it is encoded.
            let Picture { pixels, share: _share } = match picture(file, preprocessing, &self.memory).await {
                Ok(picture) => picture,
                Err(error) => return bad(error.stage(), error.to_string()),
            };
            match self.engine.encode(stage, pixels).await? {
                Ok(latent) => {
                    let latent = Arc::new(latent);
                    self.cache.put(key, Arc::clone(&latent));
                    latents.push((key, latent));
                }
                Err(error) if error.is_out_of_memory() || gpu::is_lost(self.problem.stages[stage].device()) => {
                    return Err(BlockError::Device(error.to_string()));
                }
                Err(error) => return bad("encode", error.to_string()),
            }
        }
        Ok(Ok(latents))
    }
}

/// The samples of which two captions are the same to one of the models; and says which captions are not read to their end.
fn same_captions(
    stages: &[Stage],
    captions: &[Prompt],
    of_sample: &HashMap<SampleId, (u32, usize)>,
) -> Result<HashMap<SampleId, String>, ModelError> {
    static CUT_OFF: LazyLock<RateLimitedLog> = LazyLock::new(RateLimitedLog::default);
    let texts: Vec<String> = captions.iter().map(|caption| caption.text.clone()).collect();
    let mut same = HashMap::new();
    for stage in stages {
        let Some(readings) = stage.readings(&texts)? else { continue };
        if let Some(warning) = cut_off("captions of a block", &texts, &readings).filter(|_| CUT_OFF.is_due()) {
            tracing::warn!("{warning}");
        }
        for (sample, (start, count)) in of_sample {
            let own = *start as usize..*start as usize + count;
            let shown = |at: usize| format!("caption {at} '{}'", excerpt(&texts[own.start + at]));
            if let Err(error) = check_distinct(&readings[own.clone()], |_, _| true, shown) {
                same.insert(*sample, error.to_string());
            }
        }
    }
    Ok(same)
}

/// Where a sample's image lies.
pub(crate) fn image_of(sample: &v1::Sample) -> Image {
    let part = sample.part.as_ref().map(|part| match part {
        v1::sample::Part::Member(v1::Member { offset }) => Part::Member { offset: *offset },
        v1::sample::Part::Cell(v1::Cell { row, column }) => Part::Cell { row: *row, column: column.clone() },
    });
    let etag = Some(sample.etag.clone()).filter(|etag| !etag.is_empty());
    Image { location: sample.location.clone(), part, size: sample.size, etag }
}

/// The captions of a block's samples one list after the other, each different list once: where each sample's start among
/// them, and how many it has.
///
/// Lists rather than captions are shared, since an evaluation finds a caption by its position in its sample's list.
fn gather_captions(samples: &[v1::Sample]) -> (Vec<Prompt>, HashMap<SampleId, (u32, usize)>) {
    let (mut prompts, mut starts, mut of_sample) = (Vec::new(), HashMap::new(), HashMap::new());
    for sample in samples {
        let captions = &sample.captions;
        let start = *starts.entry(captions).or_insert_with(|| {
            let start = prompts.len() as u32;
            prompts.extend(Classes::of_captions(captions).prompts);
            start
        });
        of_sample.insert(SampleId(sample.id), (start, captions.len()));
    }
    (prompts, of_sample)
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
        let (prompts, of_sample) = gather_captions(&samples);
        assert_eq!(prompts.iter().map(|p| p.text.as_str()).collect::<Vec<_>>(), ["a", "b", "b", "a", "c"]);
        let at = |id| of_sample[&SampleId(id)];
        assert_eq!([at(4), at(5), at(6)], [(0, 2), (2, 3), (0, 2)]);
    }
}
