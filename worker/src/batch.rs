//! The number of evaluations in a batch: measured, and kept for the next worker on such a device with such a job.
//!
//! The kept size is a hint: if the file can't be read or written, sizes are measured again.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use elbo_core::ids::{PromptIndex, Round, SampleId};
use elbo_core::policy::ScoredBy;
use elbo_core::unit::{Unit, UnitId};
use elbo_hub::fingerprint::JobIdentity;
use elbo_hub::model_source::own_cache;
use elbo_kernels::gpu;
use elbo_models::ModelError;

use crate::engine::{Evaluation, UnitWork, batches_of};
use crate::loaded_job::LoadedJob;

/// The batch size: kept from an earlier measurement for such a job on such a device, or measured now.
pub(crate) fn find(job: &LoadedJob, identity: &JobIdentity, lanes: usize) -> Result<usize, ModelError> {
    let device = job.stages.last().map_or_else(String::new, |stage| gpu::name(stage.device()).unwrap_or_else(cpu));
    let (situation, kept) = (Situation::new(&device, lanes, identity), KeptBatches::default());
    if let Some(batch) = kept.get(&situation) {
        return Ok(batch);
    }
    let batch = job.measure_batch(lanes)?;
    kept.put(&situation, batch);
    Ok(batch)
}

/// The name of this machine's processor, as Linux gives it.
fn cpu() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    name.map_or_else(|| std::env::consts::ARCH.to_owned(), |(_, name)| name.trim().to_owned())
}

impl LoadedJob {
    /// The batch size with the most evaluations per second, measured under real conditions: on every lane at once.
    fn measure_batch(&self, lanes: usize) -> Result<usize, ModelError> {
        /// No larger batch is tried beyond this: a lane should not be busy with one batch for long.
        const LONGEST_BATCH: Duration = Duration::from_millis(500);
        /// How long a GPU is kept busy first, so that its clocks are those of a long job.
        const WARM_UP: Duration = Duration::from_secs(1);
        let on_gpu = !self.stages.last().is_none_or(|stage| stage.device().is_cpu());
        // A GPU needs many evaluations to be fully used. Its lanes take turns, which shows over a few batches.
        let (largest, passes): (usize, usize) = if on_gpu { (512, 2) } else { (64, 1) };
        let (last, slots) = (self.stages.len() - 1, self.course.slots().len());
        let round = Round(u16::from(self.course.scored_by(Round(0)) == ScoredBy::Shortlist));
        let stage = &self.stages[last];
        let conditions = match &stage.conditions {
            Some(conditions) => Arc::clone(conditions),
            None => {
                // The network pads all captions to the same length.
                Arc::new(stage.text_conditions(&["a photo".into(), "a photo".into()])?)
            }
        };
        let of_stages = vec![Arc::clone(&conditions); self.stages.len()];
        let prompts: Vec<_> = (0..conditions.len() as u32).map(PromptIndex).collect();
        let latent = Arc::new(vec![0.0; stage.latent_len()]);
        let units: Vec<_> = (0..largest.div_ceil((slots * prompts.len()).max(1)) as u64)
            .map(|sample| {
                let id = UnitId { sample: SampleId(sample), round, slots: 0, prompts: 0 };
                let unit = Unit { id, slots: 0..slots, prompts: prompts.clone() };
                UnitWork {
                    unit,
                    key: Arc::from("batch size"),
                    latent: Arc::clone(&latent),
                    stage: last,
                    first_condition: 0,
                }
            })
            .collect();
        let round = |evaluations: &[Evaluation]| {
            side_by_side(lanes, || (0..passes).try_for_each(|_| self.errors(&units, &of_stages, evaluations).map(drop)))
        };
        let started = Instant::now();
        let (mut best, mut best_rate) = (1, 0.0);
        for batch in std::iter::successors(Some(1), |size| Some(2 * size)).take_while(|size| *size <= largest) {
            let evaluations = batches_of(&units, batch).swap_remove(0);
            // Lanes of a GPU compute one after another.
            let at_a_time = if on_gpu { lanes * passes } else { passes };
            let longest = LONGEST_BATCH * at_a_time as u32;
            let warm_up = on_gpu.then(|| WARM_UP.saturating_sub(started.elapsed()));
            let fastest = match fastest_of_three(warm_up, longest, &|| round(&evaluations)) {
                Err(error) if on_gpu && error.is_out_of_memory() && batch > 1 => {
                    gpu::recover(stage.device());
                    return Ok(best);
                }
                fastest => fastest?,
            };
            if fastest > longest {
                return Ok(best);
            }
            let rate = (lanes * passes * evaluations.len()) as f64 / fastest.as_secs_f64().max(1e-9);
            if rate > 1.02 * best_rate {
                (best, best_rate) = (batch, rate);
            }
        }
        Ok(best)
    }
}

/// The fastest of three rounds, since disturbances only slow rounds down; or the first round that takes `longest`. With
/// `warm_up`, first runs rounds that are not counted: for that long, and at least one.
fn fastest_of_three(
    warm_up: Option<Duration>,
    longest: Duration,
    round: &dyn Fn() -> Result<Duration, ModelError>,
) -> Result<Duration, ModelError> {
    if let Some(warm_up) = warm_up {
        // On a GPU, the first round of each size makes plans for that size.
        let started = Instant::now();
        round()?;
        while started.elapsed() < warm_up {
            round()?;
        }
    }
    let mut fastest = round()?;
    for _ in 1..3 {
        if fastest > longest {
            break;
        }
        fastest = fastest.min(round()?);
    }
    Ok(fastest)
}

/// The time that `lanes` lanes take to each do some work at the same time.
fn side_by_side(lanes: usize, work: impl Fn() -> Result<(), ModelError> + Sync) -> Result<Duration, ModelError> {
    let started = Instant::now();
    std::thread::scope(|scope| {
        let running: Vec<_> = (0..lanes.max(1)).map(|_| scope.spawn(&work)).collect();
        let crashed = |_| Err(ModelError::Crashed("a lane ended while its batch size was measured".into()));
        // Wait for all of them, even if the first fails.
        let ended: Vec<_> = running.into_iter().map(|lane| lane.join().unwrap_or_else(crashed)).collect();
        ended.into_iter().collect::<Result<(), _>>()
    })?;
    Ok(started.elapsed())
}

/// The conditions for which a batch size was measured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Situation(String);

impl Situation {
    /// A job's model on a device (by its name) with this many lanes.
    pub(crate) fn new(device: &str, lanes: usize, identity: &JobIdentity) -> Self {
        let spec = &identity.spec;
        let files = identity.model_files.iter().map(|(file, hash)| format!("{file}={hash}\n")).collect::<String>();
        let model = &blake3::hash(files.as_bytes()).to_hex()[..16];
        let (dtype, size, prompts) = (spec.dtype, spec.size.unwrap_or(0), spec.texts().len());
        let version = env!("CARGO_PKG_VERSION");
        Self(format!(
            "{device}, {lanes} lanes together, model={model}, {dtype}, size={size}, prompts={prompts}, elbo={version}"
        ))
    }
}

/// The file that keeps batch sizes.
#[derive(Clone, Debug)]
pub(crate) struct KeptBatches(PathBuf);

impl Default for KeptBatches {
    /// `batches.json` in this program's cache.
    fn default() -> Self {
        Self(own_cache().join("batches.json"))
    }
}

impl KeptBatches {
    fn all(&self) -> BTreeMap<String, usize> {
        let text = std::fs::read(&self.0).unwrap_or_default();
        serde_json::from_slice(&text).unwrap_or_default()
    }

    /// The size kept for a situation.
    pub(crate) fn get(&self, situation: &Situation) -> Option<usize> {
        self.all().get(&situation.0).copied().filter(|batch| *batch > 0)
    }

    /// Keeps a size.
    pub(crate) fn put(&self, situation: &Situation, batch: usize) {
        let mut all = self.all();
        all.insert(situation.0.clone(), batch);
        let temporary = self.0.with_extension(format!("{}.part", std::process::id()));
        let kept = serde_json::to_vec_pretty(&all).map_err(std::io::Error::from).and_then(|text| {
            self.0.parent().map_or(Ok(()), std::fs::create_dir_all)?;
            std::fs::write(&temporary, text)?;
            std::fs::rename(&temporary, &self.0)
        });
        if let Err(error) = kept {
            tracing::debug!(path = %self.0.display(), %error, "the batch size is not kept");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_kept_by_situation_and_a_damaged_file_counts_as_empty() {
        let dir = tempfile::tempdir().unwrap();
        let kept = KeptBatches(dir.path().join("cache/batches.json"));
        let (here, there) = (Situation("here".into()), Situation("there".into()));
        assert_eq!(kept.get(&here), None);
        kept.put(&here, 16);
        kept.put(&there, 64);
        assert_eq!((kept.get(&here), kept.get(&there)), (Some(16), Some(64)));
        assert_eq!(std::fs::read_dir(dir.path().join("cache")).unwrap().count(), 1);
        std::fs::write(&kept.0, "{").unwrap();
        assert_eq!(kept.get(&here), None);
        kept.put(&here, 8);
        assert_eq!(kept.get(&here), Some(8));
    }
}
