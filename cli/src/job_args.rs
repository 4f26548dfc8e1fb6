//! The job's flags: from the command line, `ELBO_*` variables and job.toml to a specification.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use clap::Args;
use elbo_common::class::{ClassError, Classes, ModelLabels};
use elbo_common::dataset;
use elbo_common::ensemble::{Contenders, PromptEnsemble};
use elbo_common::job::{DEFAULT_SHARD_SIZE, JobSpec, Lora, ModelDtype, Shortlist, rounds};
use elbo_common::loss::Loss;
use elbo_common::model_files::is_contrastive;
use elbo_common::model_source::ModelSource;
use elbo_common::noise::NoiseScope;
use elbo_common::policy::{Policy, RoundSlots};
use elbo_common::preset::Preset;
use elbo_common::store::Location;
use elbo_coordinator::MaxBad;
use serde::{Deserialize, Deserializer};

use crate::args::{JobSource, ProgressMode};
use crate::failure::usage;

/// Which prompts are evaluated on what.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum PolicyName {
    /// The schedule of Li et al. (2023): --keep and --samples
    Reference,
    /// Every prompt on every slot: --samples N
    Exhaustive,
}

/// Whether samples share the noise of a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum NoiseScopeName {
    /// Every sample draws its own noise
    Sample,
    /// All samples share one noise per slot
    Shared,
}

/// What a model takes for a class.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Takes {
    /// Prompts, at many timesteps.
    Prompts,
    /// Prompts, and sees an image once: a contrastive model.
    PromptsOnce,
    /// Labels it was trained on.
    Labels(ModelLabels),
}

impl Takes {
    /// What the model in a directory takes.
    pub(crate) fn of_model(directory: &Path) -> anyhow::Result<Self> {
        if is_contrastive(directory) {
            return Ok(Self::PromptsOnce);
        }
        Ok(ModelLabels::of_model(directory)?.map_or(Self::Prompts, Self::Labels))
    }
}

/// The job's flags; keys of job.toml too, with `-` or `_`.
#[derive(Clone, Debug, Default, Args, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[command(next_help_heading = "Job")]
pub(crate) struct JobArgs {
    /// Images: a directory, a URL prefix like s3://bucket/images, or a list: a .txt file with a path or URL per line, or a .csv
    /// file with the column path (or key, image, file_name) and, if there are labels, label
    #[arg(long, env = "ELBO_IMAGES", value_name = "SRC")]
    pub(crate) images: Option<String>,
    /// Classes: one per line, or CSV with the columns prompt,classname,classidx; for class-conditional models classidx is
    /// the model's label [default there: all of its classes]
    #[arg(long, env = "ELBO_CLASSES", value_name = "FILE")]
    pub(crate) classes: Option<PathBuf>,
    /// For class-conditional models, which of their classes stand for which of yours: CSV with the columns
    /// model_class,classname,classidx
    #[arg(long, env = "ELBO_CLASS_MAP", value_name = "FILE", conflicts_with = "classes")]
    #[serde(alias = "class-map")]
    pub(crate) class_map: Option<PathBuf>,
    /// Prompt for every class, with {} for its name (repeatable) [default: "a photo of a {}"]
    #[arg(long, env = "ELBO_TEMPLATE", value_name = "TEXT")]
    #[serde(deserialize_with = "one_or_many")]
    pub(crate) template: Vec<String>,
    /// Image-text matching: every image is judged by its own captions, which stand in this column of the .csv list as a JSON
    /// array, or in several columns (COLUMN,COLUMN). The list's label is the right caption or its position; images with one
    /// value in its column pair share their slots' noise, for `elbo report`'s text, image and group scores
    #[arg(long, env = "ELBO_CANDIDATES", value_name = "COLUMN")]
    pub(crate) candidates: Option<String>,
    /// How a class's prompts make its score: max (its best prompt counts) or mean (--keep then counts classes) [default: max]
    #[arg(long, env = "ELBO_PROMPT_ENSEMBLE", value_name = "max|mean")]
    #[serde(alias = "prompt-ensemble", deserialize_with = "from_str")]
    pub(crate) prompt_ensemble: Option<PromptEnsemble>,
    /// Diffusion model in diffusers layout, or a CLIP, SigLIP or OpenCLIP model: a directory, hf://owner/name[@revision], or a
    /// URL like s3://bucket/model
    #[arg(long, env = "ELBO_MODEL", value_name = "SRC")]
    pub(crate) model: Option<String>,
    /// LoRA in peft's or diffusers' format to merge into the model, with a scale [default: 1] (repeatable)
    #[arg(long, env = "ELBO_LORA", value_name = "FILE[:SCALE]")]
    #[serde(deserialize_with = "one_or_many")]
    pub(crate) lora: Vec<String>,
    /// A CLIP, SigLIP or OpenCLIP model that picks the K prompts the model is asked about
    #[arg(long, env = "ELBO_SHORTLIST", value_name = "MODEL:K", conflicts_with = "candidates")]
    pub(crate) shortlist: Option<String>,
    /// Who is evaluated on what [default: reference; exhaustive with --candidates]
    #[arg(long, value_enum, env = "ELBO_POLICY")]
    pub(crate) policy: Option<PolicyName>,
    /// Prompts (classes with --prompt-ensemble mean) that stay after each stage [default: 5,1]
    #[arg(long, env = "ELBO_KEEP", value_delimiter = ',', value_name = "N,N")]
    #[serde(deserialize_with = "one_or_many")]
    pub(crate) keep: Vec<u32>,
    /// Timesteps evaluated in all by the end of each stage [default: 25,250; exhaustive: 100]
    #[arg(long, env = "ELBO_SAMPLES", value_delimiter = ',', value_name = "N,N")]
    #[serde(deserialize_with = "one_or_many")]
    pub(crate) samples: Vec<u32>,
    /// Noises per timestep [default: 1]
    #[arg(long, env = "ELBO_TRIALS", value_name = "N")]
    pub(crate) trials: Option<u32>,
    /// A published schedule: pets, cifar10, stl10, food, aircraft, flowers, objectnet or imagenet
    #[arg(long, env = "ELBO_PRESET", value_name = "NAME", conflicts_with = "policy")]
    #[serde(deserialize_with = "from_str")]
    pub(crate) preset: Option<Preset>,
    /// Error of an evaluation: l2, l1 or huber; vlb or l2+vlb for models with a learned variance [default: l2]
    #[arg(long, env = "ELBO_LOSS")]
    #[serde(deserialize_with = "from_str")]
    pub(crate) loss: Option<Loss>,
    /// Element type of the network: f32, f16 or bf16; on the CPU weights are rounded to it and computed with in f32
    /// [default: f32]
    #[arg(long, env = "ELBO_DTYPE")]
    #[serde(deserialize_with = "from_str")]
    pub(crate) dtype: Option<ModelDtype>,
    /// Image side in pixels [default: the model's]
    #[arg(long, env = "ELBO_SIZE", value_name = "PIXELS")]
    pub(crate) size: Option<u32>,
    /// Shift of flow matching's timesteps towards the noise (Stable Diffusion 3) [default: none]
    #[arg(long, env = "ELBO_TIMESTEP_SHIFT", value_name = "FACTOR")]
    #[serde(alias = "timestep-shift")]
    pub(crate) timestep_shift: Option<f32>,
    /// Seed of the noise [default: 0]
    #[arg(long, env = "ELBO_SEED")]
    pub(crate) seed: Option<u64>,
    /// Safetensors file whose tensor `noise` [N, C, H, W] replaces the seeded noise
    #[arg(long, env = "ELBO_NOISE", value_name = "FILE")]
    pub(crate) noise: Option<String>,
    /// Whether samples share noise [default: sample]
    #[arg(long, value_enum, env = "ELBO_NOISE_SCOPE")]
    #[serde(alias = "noise-scope")]
    pub(crate) noise_scope: Option<NoiseScopeName>,
    /// Also write every single evaluation's error
    #[arg(long, env = "ELBO_WRITE_ERRORS")]
    #[serde(alias = "write-errors")]
    pub(crate) write_errors: bool,
    /// Labels for the report: `parent` (the image's directory) or a CSV file with the columns key,label [default: the list's]
    #[arg(long, env = "ELBO_LABEL_FROM", value_name = "parent|FILE")]
    #[serde(alias = "label-from")]
    pub(crate) label_from: Option<String>,
    /// Only the first N images of the listing: sorted by path, or in a list's order
    #[arg(long, env = "ELBO_LIMIT", value_name = "N")]
    pub(crate) limit: Option<u64>,
    /// Images per shard, the unit of output [default: 1000]
    #[arg(long, env = "ELBO_SHARD_SIZE", value_name = "N")]
    #[serde(alias = "shard-size")]
    pub(crate) shard_size: Option<u32>,
    // Keys of job.toml alone: on the command line these belong to the commands that run a job.
    /// Where results go.
    #[arg(skip)]
    pub(crate) out: Option<String>,
    /// Device to compute on.
    #[arg(skip)]
    pub(crate) device: Option<String>,
    /// Embedded workers.
    #[arg(skip)]
    pub(crate) workers: Option<NonZeroUsize>,
    /// Evaluations in a batch.
    #[arg(skip)]
    pub(crate) batch: Option<NonZeroUsize>,
    /// Quarantined samples to bear.
    #[arg(skip)]
    #[serde(alias = "max-bad", deserialize_with = "from_str")]
    pub(crate) max_bad: Option<MaxBad>,
    /// How to show progress.
    #[arg(skip)]
    pub(crate) progress: Option<ProgressMode>,
}

fn one_or_many<'de, D: Deserializer<'de>, T: Deserialize<'de>>(from: D) -> Result<Vec<T>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum OneOrMany<T> {
        One(T),
        Many(Vec<T>),
    }
    Ok(match OneOrMany::deserialize(from)? {
        OneOrMany::One(one) => vec![one],
        OneOrMany::Many(many) => many,
    })
}

fn from_str<'de, D: Deserializer<'de>, T: std::str::FromStr<Err = String>>(from: D) -> Result<Option<T>, D::Error> {
    String::deserialize(from)?.parse().map(Some).map_err(serde::de::Error::custom)
}

impl JobSource {
    /// The flags over the job file's keys.
    pub(crate) fn resolve(&self) -> anyhow::Result<JobArgs> {
        let Some(path) = &self.job else { return Ok(self.flags.clone()) };
        let text = std::fs::read_to_string(path)
            .map_err(|e| anyhow::anyhow!("reading the job file {}: {e}", path.display()))?;
        let file: JobArgs =
            toml::from_str(&text).map_err(|e| usage(format!("the job file {}: {e}", path.display())))?;
        Ok(self.flags.clone().over(file))
    }
}

impl JobArgs {
    /// These flags, with what they leave open taken from a file.
    fn over(self, file: Self) -> Self {
        let many = |flags: Vec<u32>, file: Vec<u32>| if flags.is_empty() { file } else { flags };
        Self {
            images: self.images.or(file.images),
            classes: self.classes.or(file.classes),
            class_map: self.class_map.or(file.class_map),
            template: if self.template.is_empty() { file.template } else { self.template },
            candidates: self.candidates.or(file.candidates),
            prompt_ensemble: self.prompt_ensemble.or(file.prompt_ensemble),
            model: self.model.or(file.model),
            lora: if self.lora.is_empty() { file.lora } else { self.lora },
            shortlist: self.shortlist.or(file.shortlist),
            policy: self.policy.or(file.policy),
            keep: many(self.keep, file.keep),
            samples: many(self.samples, file.samples),
            trials: self.trials.or(file.trials),
            preset: self.preset.or(file.preset),
            loss: self.loss.or(file.loss),
            dtype: self.dtype.or(file.dtype),
            size: self.size.or(file.size),
            timestep_shift: self.timestep_shift.or(file.timestep_shift),
            seed: self.seed.or(file.seed),
            noise: self.noise.or(file.noise),
            noise_scope: self.noise_scope.or(file.noise_scope),
            write_errors: self.write_errors || file.write_errors,
            label_from: self.label_from.or(file.label_from),
            limit: self.limit.or(file.limit),
            shard_size: self.shard_size.or(file.shard_size),
            out: self.out.or(file.out),
            device: self.device.or(file.device),
            workers: self.workers.or(file.workers),
            batch: self.batch.or(file.batch),
            max_bad: self.max_bad.or(file.max_bad),
            progress: self.progress.or(file.progress),
        }
    }

    /// The classes, from their file or from a class-conditional model, whose labels they are; none where every image
    /// brings its own captions.
    pub(crate) fn read_classes(&self, takes: &Takes) -> anyhow::Result<Classes> {
        let labels = match takes {
            Takes::Labels(labels) => Some(labels),
            Takes::Prompts | Takes::PromptsOnce => None,
        };
        if self.candidates.is_some() {
            self.check_candidates(labels)?;
            return Ok(Classes::default());
        }
        let template = |error| match error {
            ClassError::Template(_) => usage(error),
            other => other.into(),
        };
        match (labels, &self.classes, &self.class_map) {
            (None, Some(path), None) => Classes::read(path, &self.template).map_err(template),
            (None, None, None) => Err(usage("--classes is missing: give a file with the classes")),
            (None, _, Some(_)) => {
                Err(usage("--class-map is for class-conditional models: give this one --classes with prompts"))
            }
            (Some(_), Some(_), Some(_)) => Err(usage("--classes and --class-map exclude each other: give one of them")),
            (Some(labels), None, Some(path)) => Ok(Classes::read_map(path, labels)?),
            (Some(labels), Some(path), None) => {
                Ok(Classes::read(path, &self.template).map_err(template)?.for_labels(labels)?)
            }
            (Some(labels), None, None) => Ok(Classes::of_model(labels)),
        }
    }

    /// Refuses what says nothing, or something else, where every image brings its own captions.
    fn check_candidates(&self, labels: Option<&ModelLabels>) -> anyhow::Result<()> {
        let refused = [
            (labels.is_some(), "a class-conditional model", "it knows classes and reads no captions"),
            (self.class_map.is_some(), "--class-map", "captions are no classes of a model"),
            (self.classes.is_some(), "--classes", "every image is judged by its own captions"),
            (!self.template.is_empty(), "--template", "captions are taken as they are"),
            (self.prompt_ensemble == Some(PromptEnsemble::Mean), "--prompt-ensemble mean", "a caption is one prompt"),
        ];
        if let Some((_, flag, reason)) = refused.iter().find(|(given, ..)| *given) {
            return Err(usage(format!("{flag} and --candidates exclude each other, since {reason}: leave one out")));
        }
        match self.images.as_deref() {
            Some(images) if !dataset::is_list(images) => Err(usage(
                "--candidates names a column of a list of images: give --images a .csv file rather than a directory",
            )),
            _ => Ok(()),
        }
    }

    /// How the prompts of a class make its score.
    pub(crate) fn ensemble(&self) -> PromptEnsemble {
        self.prompt_ensemble.unwrap_or_default()
    }

    /// What makes the shortlist.
    fn to_shortlist(&self) -> anyhow::Result<Option<Shortlist>> {
        self.shortlist.as_deref().map(|text| text.parse().map_err(usage)).transpose()
    }

    /// Where the model that makes the shortlist is.
    pub(crate) fn shortlist_source(&self) -> anyhow::Result<Option<ModelSource>> {
        let shortlist = self.to_shortlist()?;
        shortlist.map(|shortlist| ModelSource::parse(&shortlist.model).map_err(usage)).transpose()
    }

    /// The policy for a contrastive model, which sees each image once.
    fn once(&self) -> anyhow::Result<Policy> {
        let meaningless = [
            (self.policy.is_some() || self.preset.is_some(), "--policy and --preset"),
            (
                !self.keep.is_empty() || !self.samples.is_empty() || self.trials.is_some(),
                "--keep, --samples and --trials",
            ),
            (self.loss.is_some(), "--loss"),
            (self.noise.is_some() || self.noise_scope.is_some(), "--noise and --noise-scope"),
            (self.timestep_shift.is_some(), "--timestep-shift"),
            (self.size.is_some(), "--size"),
            (!self.lora.is_empty(), "--lora"),
            (self.shortlist.is_some(), "--shortlist"),
        ];
        match meaningless.iter().find(|(given, _)| *given) {
            Some((_, flags)) => Err(usage(format!(
                "{flags} have no meaning for a contrastive model, which sees an image once: leave them out"
            ))),
            None => Policy::exhaustive(&[1], 1).map_err(usage),
        }
    }

    /// The rounds of a job with these contenders and a model with so many timesteps.
    pub(crate) fn to_rounds(
        &self,
        takes: &Takes,
        timesteps: u32,
        contenders: Option<&Contenders>,
    ) -> anyhow::Result<Vec<RoundSlots>> {
        let policy = self.to_policy(takes, contenders)?;
        rounds(&policy, self.to_shortlist()?.as_ref(), timesteps, contenders).map_err(usage)
    }

    /// The policy for a job with these contenders, or one in which every image brings its own.
    pub(crate) fn to_policy(&self, takes: &Takes, contenders: Option<&Contenders>) -> anyhow::Result<Policy> {
        if *takes == Takes::PromptsOnce {
            return self.once();
        }
        let trials = self.trials.unwrap_or(1);
        let matching = contenders.is_none().then_some(PolicyName::Exhaustive);
        let policy = match (self.policy.or(matching.filter(|_| self.preset.is_none())), self.preset) {
            (Some(PolicyName::Exhaustive), None) => {
                if !self.keep.is_empty() {
                    return Err(usage(
                        "--keep has no meaning with --policy exhaustive (the default with --candidates), which eliminates \
                         nobody: leave it out, or add --policy reference",
                    ));
                }
                Policy::exhaustive(if self.samples.is_empty() { &[100] } else { &self.samples }, trials)
            }
            (None | Some(PolicyName::Reference), preset) => {
                // The default schedule fits few classes too; one that was asked for is taken by its word.
                let few = contenders.map_or(5, |c| c.len() as u32).clamp(1, 5);
                let default_keep = preset.map_or(vec![few, 1], |p| p.keep().to_vec());
                let default_samples = preset.map_or(vec![25, 250], |p| p.samples().to_vec());
                let keep = if self.keep.is_empty() { default_keep } else { self.keep.clone() };
                let samples = if self.samples.is_empty() { default_samples } else { self.samples.clone() };
                Policy::reference(&keep, &samples, trials)
            }
            (Some(PolicyName::Exhaustive), Some(_)) => {
                return Err(usage("--preset and --policy exclude each other: a preset names its policy"));
            }
        };
        policy.map_err(usage)
    }

    /// The model, without which nothing else can be decided.
    pub(crate) fn model_source(&self) -> anyhow::Result<ModelSource> {
        if self.images.is_none() {
            return Err(usage("--images is missing: give a directory or a list of images"));
        }
        let model = self
            .model
            .as_deref()
            .ok_or_else(|| usage("--model is missing: give a model in diffusers layout, or hf://owner/name"))?;
        ModelSource::parse(model).map_err(usage)
    }

    /// What competes for every image; none where each brings its own captions.
    pub(crate) fn contenders(&self, classes: &Classes) -> Option<Contenders> {
        self.candidates.is_none().then(|| Contenders::of_classes(classes, self.ensemble()))
    }

    /// The specification these flags give, for a model of one kind.
    pub(crate) fn to_spec(&self, takes: &Takes) -> anyhow::Result<JobSpec> {
        let model = self.model_source()?;
        let images = self.images.as_deref().unwrap_or_default();
        let classes = self.read_classes(takes)?;
        let contenders = self.contenders(&classes);
        let policy = self.to_policy(takes, contenders.as_ref())?;
        // What does not fit the usual thousand timesteps or the classes is refused before anything is opened.
        self.to_rounds(takes, u32::MAX, contenders.as_ref())?;
        let shortlist = match (self.to_shortlist()?, self.shortlist_source()?) {
            (Some(shortlist), Some(source)) => Some(Shortlist { model: source.to_string(), ..shortlist }),
            _ => None,
        };
        if self.limit == Some(0) {
            return Err(usage("--limit 0 leaves no image: give at least 1"));
        }
        let shard_size = self.shard_size.unwrap_or(DEFAULT_SHARD_SIZE);
        if shard_size == 0 {
            return Err(usage("--shard-size must be at least 1"));
        }
        Ok(JobSpec {
            images: Location::parse(images)?.to_string(),
            model: model.to_string(),
            lora: self.lora.iter().map(|text| lora(text)).collect::<anyhow::Result<_>>()?,
            classes,
            prompt_ensemble: self.ensemble(),
            candidates: self.candidates.clone(),
            shortlist,
            policy,
            loss: self.loss.or(self.preset.map(Preset::loss)).unwrap_or(Loss::L2),
            dtype: self.dtype.unwrap_or(ModelDtype::F32),
            size: self.size,
            timestep_shift: self.timestep_shift,
            seed: self.seed.unwrap_or(0),
            noise_scope: match self.noise_scope {
                Some(NoiseScopeName::Shared) => NoiseScope::Shared,
                Some(NoiseScopeName::Sample) | None => NoiseScope::Sample,
            },
            noise: self.noise.as_deref().map(|path| absolute(Path::new(path))).transpose()?,
            write_errors: self.write_errors,
            label_from: match self.label_from.as_deref() {
                None => None,
                Some("parent") => Some("parent".into()),
                Some(file) => Some(absolute(Path::new(file))?),
            },
            limit: self.limit,
            shard_size,
        })
    }
}

fn lora(text: &str) -> anyhow::Result<Lora> {
    let Lora { path, scale } = text.parse().map_err(usage)?;
    Ok(Lora { path: absolute(Path::new(&path))?, scale })
}

fn absolute(path: &Path) -> anyhow::Result<String> {
    Ok(std::path::absolute(path)?.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_file_takes_the_flags_names_with_either_separator() {
        let file: JobArgs = toml::from_str(
            "images = 'x'\nkeep = [3, 1]\nsamples = [5, 10]\nlabel-from = 'parent'\nnoise_scope = 'shared'\nloss = 'l1'\nmax-bad = '2%'\nbatch = 8\nprogress = 'json'",
        )
        .unwrap();
        assert_eq!(file.keep, [3, 1]);
        assert_eq!(file.label_from.as_deref(), Some("parent"));
        assert_eq!(file.noise_scope, Some(NoiseScopeName::Shared));
        assert_eq!(file.loss, Some(Loss::L1));
        assert_eq!(file.max_bad, Some(MaxBad::Percent(2.0)));
        assert_eq!((file.batch.map(NonZeroUsize::get), file.progress), (Some(8), Some(ProgressMode::Json)));
        let error = toml::from_str::<JobArgs>("imags = 'x'").unwrap_err().to_string();
        assert!(error.contains("unknown field `imags`"));
    }

    #[test]
    fn the_example_in_deploy_is_a_job_file() {
        let file: JobArgs = toml::from_str(include_str!("../../deploy/job.toml")).unwrap();
        assert_eq!((file.preset, file.out.as_deref()), (Some(Preset::Pets), Some("s3://bucket/labels")));
    }

    #[test]
    fn flags_override_the_file() {
        let file = JobArgs { seed: Some(1), limit: Some(9), ..JobArgs::default() };
        let flags = JobArgs { seed: Some(2), ..JobArgs::default() };
        let merged = flags.over(file);
        assert_eq!((merged.seed, merged.limit), (Some(2), Some(9)));
    }

    #[test]
    fn the_default_schedule_fits_few_classes_but_an_explicit_one_is_taken_by_its_word() {
        let three = Contenders::prompts(3);
        let policy = JobArgs::default().to_policy(&Takes::Prompts, Some(&three)).unwrap();
        assert_eq!(policy, Policy::reference(&[3, 1], &[25, 250], 1).unwrap());
        let explicit = JobArgs { keep: vec![5, 1], samples: vec![25, 250], ..JobArgs::default() };
        assert!(explicit.to_policy(&Takes::Prompts, Some(&three)).unwrap().rounds(1000, Some(&three)).is_err());
    }

    #[test]
    fn images_with_their_own_captions_are_judged_exhaustively_unless_a_policy_is_asked_for() {
        let matching = JobArgs { candidates: Some("captions".into()), ..JobArgs::default() };
        assert_eq!(matching.to_policy(&Takes::Prompts, None).unwrap(), Policy::exhaustive(&[100], 1).unwrap());
        let asked = JobArgs { policy: Some(PolicyName::Reference), ..matching.clone() };
        assert_eq!(asked.to_policy(&Takes::Prompts, None).unwrap(), Policy::reference(&[5, 1], &[25, 250], 1).unwrap());
        let preset = JobArgs { preset: Some(Preset::Pets), ..matching.clone() };
        assert_eq!(preset.to_policy(&Takes::Prompts, None).unwrap(), Preset::Pets.policy());
        let keep = JobArgs { keep: vec![1], ..matching };
        assert!(keep.to_policy(&Takes::Prompts, None).unwrap_err().to_string().contains("add --policy reference"));
    }

    #[test]
    fn what_makes_prompts_of_classes_excludes_captions() {
        let refused = |flags: JobArgs| {
            let flags = JobArgs { candidates: Some("c".into()), ..flags };
            flags.read_classes(&Takes::Prompts).unwrap_err().to_string()
        };
        assert!(
            refused(JobArgs { classes: Some("c".into()), ..JobArgs::default() }).contains("--classes and --candidates")
        );
        assert!(refused(JobArgs { template: vec!["{}".into()], ..JobArgs::default() }).contains("--template"));
        let mean = JobArgs { prompt_ensemble: Some(PromptEnsemble::Mean), ..JobArgs::default() };
        assert!(refused(mean).contains("--prompt-ensemble mean"));
        assert!(refused(JobArgs { images: Some("photos".into()), ..JobArgs::default() }).contains("a .csv file"));
    }
}
