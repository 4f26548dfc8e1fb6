//! A job as a worker has it: its models, checked and loaded, and its prompts, encoded once per worker.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use elbo_core::ids::{PromptIndex, Round};
use elbo_core::job::JobSpec;
use elbo_core::noise::{NoiseError, NoiseSource};
use elbo_core::policy::{Course, PolicyError, ScoredBy};
use elbo_core::schedule::ScheduleError;
use elbo_core::score::{ScoreError, Scorer};
use elbo_core::text::excerpt;
use elbo_hub::fingerprint::{HashError, JobIdentity};
use elbo_hub::model_files::is_contrastive;
use elbo_hub::model_source::{JobModels, SourceError};
use elbo_models::{
    ContrastiveModel, DiffusionModel, Family, LoadOptions, Lora, ModelError, Reading, check_distinct, cut_off,
};

use crate::device::{Device, DeviceError};
use crate::stage::{Diffusion, Model, ModelStage};

/// Everything that an evaluation depends on, except its sample.
#[derive(Debug)]
pub struct LoadedJob {
    /// The models: the job's model last, and the shortlist's model before it.
    pub stages: Vec<ModelStage>,
    /// The slots of every round.
    pub course: Course,
    /// Whether single errors are reported instead of sums.
    pub reports_errors: bool,
}

/// A job this worker can't work on.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The job's description can't be understood.
    #[error("the coordinator's job can't be understood ({0}): run the same version of elbo everywhere")]
    Job(#[from] serde_json::Error),
    /// The model's files can't be read.
    #[error("{0}; model, adapters and noise must lie at the same place on every worker (or give it --model)")]
    Hash(#[from] HashError),
    /// The model is not the job's.
    #[error(
        "the model in {path} is not the one the job was started with: {file} differs; give every worker the same files"
    )]
    OtherModel {
        /// The directory.
        path: PathBuf,
        /// The first file that differs.
        file: String,
    },
    /// The noise file is not the job's.
    #[error("the noise file {0} is not the one the job was started with: give every worker the same file")]
    OtherNoise(String),
    /// An adapter is not the job's.
    #[error("the adapter {0} is not the one the job was started with: give every worker the same file")]
    OtherLora(String),
    /// The noise schedule's configuration is missing or invalid.
    #[error(transparent)]
    Schedule(#[from] ScheduleError),
    /// The model does not support the loss.
    #[error(transparent)]
    Score(#[from] ScoreError),
    /// The policy does not fit.
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// The noise does not fit.
    #[error(transparent)]
    Noise(#[from] NoiseError),
    /// The model knows classes by their labels and can't read captions.
    #[error("--candidates needs a model with a text encoder, and this one is conditioned on classes: use --classes")]
    NoCaptions,
    /// The model for the shortlist is not a contrastive model.
    #[error(
        "--shortlist needs a CLIP, SigLIP or OpenCLIP model, and {0} is not one: give one of these as --shortlist, in front of --model"
    )]
    Shortlist(PathBuf),
    /// The image size does not fit.
    #[error("--size {size} does not fit the model: it must be a multiple of {factor} pixels")]
    Size {
        /// The requested size.
        size: u32,
        /// It must be a multiple of this.
        factor: usize,
    },
    /// The device can't be used.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The model can't be found or fetched.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The device has no room for the model.
    #[error(
        "the device has no room for the model ({0}): use less with --dtype bf16, end other programs on the device, or use a device \
         with more memory"
    )]
    NoRoom(ModelError),
    /// The model can't be loaded.
    #[error(transparent)]
    Model(ModelError),
}

impl From<ModelError> for LoadError {
    fn from(error: ModelError) -> Self {
        if error.is_out_of_memory() { Self::NoRoom(error) } else { Self::Model(error) }
    }
}

impl LoadedJob {
    /// Loads the job's models on a device, from the directories in which they were found or to which they were fetched, and
    /// encodes the job's prompts.
    pub fn load(identity: &JobIdentity, models: &JobModels, device: Device) -> Result<Self, LoadError> {
        check_files(identity, models)?;
        let spec = &identity.spec;
        let device = device.open()?;
        let course = spec.course(elbo_hub::model_config::timesteps(&models.model)?)?;
        let mut stages = Vec::new();
        if let Some(shortlist) = &models.shortlist {
            if !is_contrastive(shortlist) {
                return Err(LoadError::Shortlist(shortlist.clone()));
            }
            stages.push(contrastive(spec, shortlist, &device)?);
        }
        stages.push(if is_contrastive(&models.model) {
            contrastive(spec, &models.model, &device)?
        } else {
            diffusion(spec, &models.model, &course, &device)?
        });
        let reports_errors = course.reports_errors(spec.write_errors);
        Ok(Self { stages, course, reports_errors })
    }

    /// The stage that scores a round.
    pub fn stage_of(&self, round: Round) -> usize {
        match self.course.scored_by(round) {
            ScoredBy::Shortlist => 0,
            ScoredBy::Model => self.stages.len() - 1,
        }
    }
}

fn contrastive(spec: &JobSpec, directory: &Path, device: &candle_core::Device) -> Result<ModelStage, LoadError> {
    let model = ContrastiveModel::load(directory, &LoadOptions::new(device.clone(), spec.dtype))?;
    let mut stage = ModelStage { model: Model::Contrastive(Box::new(model)), conditions: None };
    if spec.candidates.is_none() {
        let texts = spec.texts();
        check_texts(spec, &texts, &stage.readings(&texts)?)?;
        stage.conditions = Some(Arc::new(stage.text_conditions(&texts)?));
    }
    Ok(stage)
}

fn diffusion(
    spec: &JobSpec,
    directory: &Path,
    course: &Course,
    device: &candle_core::Device,
) -> Result<ModelStage, LoadError> {
    let mut schedule = elbo_hub::model_config::schedule(directory)?;
    if let Some(shift) = spec.timestep_shift {
        schedule = schedule.with_shift(shift)?;
    }
    let mut model = DiffusionModel::load_with(directory, &load_options(spec, directory, device)?)?;
    if let Some(size) = spec.size {
        let factor = model.size_factor();
        if size == 0 || !(size as usize).is_multiple_of(factor) {
            return Err(LoadError::Size { size, factor });
        }
        model.set_size(size as usize);
    }
    let slots: Vec<_> = course.all_slots().collect();
    let noise = match &spec.noise {
        None => NoiseSource::Counter { seed: spec.seed, scope: spec.noise_scope },
        Some(path) => {
            let table = elbo_data::given::noise(Path::new(path))?;
            table.check(model.latent_shape(), slots.iter().map(|s| s.noise as usize + 1).max().unwrap_or(0))?;
            NoiseSource::Table(table)
        }
    };
    let mut timesteps: Vec<u32> = slots.iter().map(|s| s.timestep).collect();
    timesteps.sort_unstable();
    timesteps.dedup();
    let network = model.network();
    let learned_variance = network.out_channels() != network.in_channels();
    let inputs: Vec<f32> = timesteps.iter().map(|t| schedule.time(*t)).collect();
    let times = network.time_cache(&timesteps, &inputs)?;
    let scorer = Scorer::new(schedule, spec.loss, network.in_channels(), learned_variance)?;
    let conditions = match spec.candidates {
        // Captions are encoded block by block.
        Some(_) if model.family() == Family::Dit => return Err(LoadError::NoCaptions),
        Some(_) => None,
        None if model.family() == Family::Dit => Some(Arc::new(model.label_conditions(&spec.classes.labels())?)),
        None => {
            let texts = spec.texts();
            check_texts(spec, &texts, &model.readings(&texts)?)?;
            let conditions = model.text_conditions(&texts)?;
            model.drop_text_encoders();
            Some(Arc::new(conditions))
        }
    };
    Ok(ModelStage {
        model: Model::Diffusion(Box::new(Diffusion { model, scorer, noise, times, turn: Mutex::default() })),
        conditions,
    })
}

/// Refuses prompts of two classes that are the same to the model, and warns about prompts that are cut off.
fn check_texts(spec: &JobSpec, texts: &[String], readings: &[Reading]) -> Result<(), ModelError> {
    let Some(contenders) = spec.contenders() else { return Ok(()) };
    let index = |at: usize| PromptIndex(at as u32);
    let shown = |at: usize| {
        let name = spec.classes.prompts.get(at).and_then(|prompt| spec.classes.names.get(&prompt.class));
        let of = name.map_or_else(|| "a group".to_owned(), |name| format!("class '{}'", excerpt(name)));
        format!("the prompt '{}' of {of}", excerpt(&texts[at]))
    };
    check_distinct(readings, |a, b| contenders.may_be_compared(index(a), index(b)), shown)?;
    if let Some(warning) = cut_off("prompts", texts, readings) {
        tracing::warn!("{warning}");
    }
    Ok(())
}

/// The options to load a job's model.
fn load_options(spec: &JobSpec, directory: &Path, device: &candle_core::Device) -> Result<LoadOptions, ModelError> {
    let mut options = LoadOptions::new(device.clone(), spec.dtype);
    for lora in &spec.lora {
        options.loras.push(Arc::new(Lora::open(Path::new(&lora.path), lora.scale, directory)?));
    }
    Ok(options)
}

/// Refuses files that differ from those the job was started with.
fn check_files(identity: &JobIdentity, models: &JobModels) -> Result<(), LoadError> {
    let here = JobIdentity::new(identity.spec.clone(), models)?;
    let shortlist = models.shortlist.as_deref().unwrap_or(&models.model);
    for (directory, expected, found) in [
        (models.model.as_path(), &identity.model_files, &here.model_files),
        (shortlist, &identity.shortlist_files, &here.shortlist_files),
    ] {
        if let Some((file, _)) = expected.iter().find(|(file, hash)| found.get(*file) != Some(hash)) {
            return Err(LoadError::OtherModel { path: directory.to_owned(), file: file.clone() });
        }
    }
    for (lora, (hash, other)) in identity.spec.lora.iter().zip(identity.lora_files.iter().zip(&here.lora_files)) {
        if hash != other {
            return Err(LoadError::OtherLora(lora.path.clone()));
        }
    }
    if here.noise_file != identity.noise_file {
        return Err(LoadError::OtherNoise(identity.spec.noise.clone().unwrap_or_default()));
    }
    Ok(())
}
