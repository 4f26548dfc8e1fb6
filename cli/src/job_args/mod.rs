//! The job's flags: from the command line, `ELBO_*` variables and job.toml to a specification.

mod spec;

use std::num::{NonZeroU32, NonZeroUsize};
use std::path::PathBuf;

use bytesize::ByteSize;
use clap::Args;
use elbo_coordinator::MaxBad;
use elbo_core::audit::Share;
use elbo_core::ensemble::PromptEnsemble;
use elbo_core::job::ModelDtype;
use elbo_core::loss::Loss;
use elbo_core::preset::Preset;
use elbo_data::Origin;
use elbo_store::files;
use merge::Merge;
use serde::{Deserialize, Deserializer};

pub(crate) use self::spec::Takes;

use crate::failure::usage;
use crate::progress::ProgressMode;

/// Which prompts are evaluated on which slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum PolicyName {
    /// Eliminates a class as soon as it is significantly worse than the best: --risk and --max-slots
    Race,
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

/// The job's flags, which are also keys of job.toml, with `-` or `_`.
#[derive(Clone, Debug, Default, Args, Deserialize, Merge)]
#[serde(default, deny_unknown_fields)]
#[merge(strategy = merge::option::overwrite_none)]
#[command(next_help_heading = "Job")]
pub(crate) struct JobArgs {
    /// Images: a directory or URL prefix (s3://, gs://, az://, https://) with images, WebDataset .tar shards or .parquet files
    /// below it; a pattern of these, like 's3://bucket/shard-{000..099}.tar' or 'photos/**/*.jpg'; or a list: a .txt file with
    /// a path or URL per line, or a .csv or .tsv file with a column path (or key, image, file_name, filename, url)
    #[arg(long, env = "ELBO_IMAGES", value_name = "SRC")]
    pub(crate) images: Option<String>,
    /// Classes: one per line, a JSON list of names, or CSV with the columns prompt,classname,classidx (separated by commas,
    /// semicolons or tabs); for class-conditional models classidx is the model's label [default there: all of its classes]
    #[arg(long, env = "ELBO_CLASSES", value_name = "FILE")]
    pub(crate) classes: Option<PathBuf>,
    /// For class-conditional models, which of the model's classes stand for which of yours: CSV with the columns
    /// model_class,classname,classidx
    #[arg(long, env = "ELBO_CLASS_MAP", value_name = "FILE", conflicts_with = "classes")]
    #[serde(alias = "class-map")]
    pub(crate) class_map: Option<PathBuf>,
    /// Groups of classes, as in WordNet, that a race asks about first: CSV with the columns class,parent (parents may have
    /// parents), or one name per line, indented below its group. --template makes the groups' prompts
    #[arg(long, env = "ELBO_HIERARCHY", value_name = "FILE", conflicts_with_all = ["candidates", "class_map"])]
    pub(crate) hierarchy: Option<PathBuf>,
    /// Prompt for each class, with {} for its name (repeatable) [default: "a photo of a {}"]
    #[arg(long, env = "ELBO_TEMPLATE", value_name = "TEXT")]
    #[serde(deserialize_with = "one_or_many")]
    #[merge(strategy = merge::vec::overwrite_empty)]
    pub(crate) template: Vec<String>,
    /// Image-text matching: compare each image's own captions instead of classes. The captions are an array in this column of
    /// the .csv list or .parquet files, or in several columns (COLUMN,COLUMN); in .tar shards, they are this field of the
    /// .json members, or the lines of the members with this extension (like txt). The label is the right caption or its
    /// position. Images with the same value in the list's column pair share the noise of their slots, for the text, image and
    /// group scores of `elbo report`
    #[arg(long, env = "ELBO_CANDIDATES", value_name = "COLUMN")]
    pub(crate) candidates: Option<String>,
    /// The column of .parquet files with the images [default: the one that can hold images, or is called image]
    #[arg(long, env = "ELBO_IMAGE_COLUMN", value_name = "COLUMN")]
    #[serde(alias = "image-column")]
    pub(crate) image_column: Option<String>,
    /// Origins besides its own that a list or .parquet file from the network may name: https://host[:port], s3://bucket, *
    /// for every origin, file:// for files on this machine and the workers
    #[arg(long, env = "ELBO_LIST_ORIGINS", value_delimiter = ',', value_name = "ORIGIN,ORIGIN")]
    #[serde(alias = "list-origins", deserialize_with = "many_from_str")]
    #[merge(strategy = merge::vec::overwrite_empty)]
    pub(crate) list_origins: Vec<Origin>,
    /// Fail before computing if the listing passes over anything: files with unknown extensions, hidden files, labels without
    /// images, and anything else that is not a sample
    #[arg(long, env = "ELBO_STRICT")]
    #[merge(strategy = merge::bool::overwrite_false)]
    pub(crate) strict: bool,
    /// How to combine the scores of a class's prompts: max (the best prompt counts) or mean (--keep then counts classes)
    /// [default: max]
    #[arg(long, env = "ELBO_PROMPT_ENSEMBLE", value_name = "max|mean")]
    #[serde(alias = "prompt-ensemble", deserialize_with = "from_str")]
    pub(crate) prompt_ensemble: Option<PromptEnsemble>,
    /// Diffusion model in diffusers layout, or a CLIP, SigLIP or OpenCLIP model: a directory, hf://owner/name[@revision], or a
    /// URL like s3://bucket/model
    #[arg(long, env = "ELBO_MODEL", value_name = "SRC")]
    pub(crate) model: Option<String>,
    /// LoRA (a file, or peft's directory) to merge into the model, with a scale [default: 1] (repeatable)
    #[arg(long, env = "ELBO_LORA", value_name = "FILE[:SCALE]")]
    #[serde(deserialize_with = "one_or_many")]
    #[merge(strategy = merge::vec::overwrite_empty)]
    pub(crate) lora: Vec<String>,
    /// A CLIP, SigLIP or OpenCLIP model that picks the K prompts that the model evaluates
    #[arg(long, env = "ELBO_SHORTLIST", value_name = "MODEL:K", conflicts_with = "candidates")]
    pub(crate) shortlist: Option<String>,
    /// How classes are eliminated [default: race; reference with --keep, --samples or --preset, exhaustive with --candidates]
    #[arg(long, value_enum, env = "ELBO_POLICY")]
    pub(crate) policy: Option<PolicyName>,
    /// Significance level of a race's tests; a lower level takes more evaluations and loses the best class less often
    /// [default: 0.05]
    #[arg(long, env = "ELBO_RISK", value_name = "P")]
    pub(crate) risk: Option<f64>,
    /// Maximum slots (timesteps with a noise) per race [default: 250]
    #[arg(long, env = "ELBO_MAX_SLOTS", value_name = "N")]
    #[serde(alias = "max-slots")]
    pub(crate) max_slots: Option<u32>,
    /// JSON file with the distribution of a race's timesteps, as `elbo bench policy --timesteps-to` writes it [default:
    /// uniform]
    #[arg(long, env = "ELBO_TIMESTEPS_FROM", value_name = "FILE")]
    #[serde(alias = "timesteps-from")]
    pub(crate) timesteps_from: Option<PathBuf>,
    /// First score N images, chosen by the seed, over all timesteps; the race then uses the timesteps where their classes
    /// differ. Worth it for tens of thousands of images; needs no labels
    #[arg(long, env = "ELBO_PILOT", value_name = "N", conflicts_with = "timesteps_from")]
    pub(crate) pilot: Option<NonZeroU32>,
    /// Share of the images, like 1%, that the reference also scores (with --keep, --samples and --trials), for a comparison
    /// in the report
    #[arg(long, env = "ELBO_AUDIT", value_name = "SHARE")]
    #[serde(deserialize_with = "from_str")]
    pub(crate) audit: Option<Share>,
    /// Give no class to images with a lower confidence than this; their status is `uncertain`. Confidence is calibrated when
    /// the job ends, on the images with labels, or on the audit, if there is one and fewer than 30 images have labels
    #[arg(long, env = "ELBO_ABSTAIN_BELOW", value_name = "P")]
    #[serde(alias = "abstain-below")]
    pub(crate) abstain_below: Option<f64>,
    /// Output of another job, with labels, whose calibration gives the confidence; for images without labels
    #[arg(long, env = "ELBO_CALIBRATION_FROM", value_name = "OUT")]
    #[serde(alias = "calibration-from")]
    pub(crate) calibration_from: Option<String>,
    /// Prompts (classes with --prompt-ensemble mean) kept after each stage of the reference [default: 5,1]
    #[arg(long, env = "ELBO_KEEP", value_delimiter = ',', value_name = "N,N")]
    #[serde(deserialize_with = "one_or_many")]
    #[merge(strategy = merge::vec::overwrite_empty)]
    pub(crate) keep: Vec<u32>,
    /// Total timesteps evaluated by the end of each stage [default: 25,250; exhaustive: 100]
    #[arg(long, env = "ELBO_SAMPLES", value_delimiter = ',', value_name = "N,N")]
    #[serde(deserialize_with = "one_or_many")]
    #[merge(strategy = merge::vec::overwrite_empty)]
    pub(crate) samples: Vec<u32>,
    /// Noises per timestep [default: 1]
    #[arg(long, env = "ELBO_TRIALS", value_name = "N")]
    pub(crate) trials: Option<u32>,
    /// A published schedule: pets, cifar10, stl10, food, aircraft, flowers, objectnet or imagenet
    #[arg(long, env = "ELBO_PRESET", value_name = "NAME", conflicts_with = "policy")]
    #[serde(deserialize_with = "from_str")]
    pub(crate) preset: Option<Preset>,
    /// Loss that gives the error of an evaluation: l2, l1 or huber; vlb or l2+vlb for models with a learned variance
    /// [default: l2]
    #[arg(long, env = "ELBO_LOSS")]
    #[serde(deserialize_with = "from_str")]
    pub(crate) loss: Option<Loss>,
    /// Element type of the network: f32, f16 or bf16; the CPU rounds weights to it and computes in f32 [default: f32]
    #[arg(long, env = "ELBO_DTYPE")]
    #[serde(deserialize_with = "from_str")]
    pub(crate) dtype: Option<ModelDtype>,
    /// Image side in pixels [default: the model's]
    #[arg(long, env = "ELBO_SIZE", value_name = "PIXELS")]
    pub(crate) size: Option<u32>,
    /// Factor that shifts flow-matching timesteps towards the noise (Stable Diffusion 3) [default: none]
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
    /// Keep only the best N scores of each image, for jobs with many classes; predictions and margins stay the same, but the
    /// report's top-5 accuracy needs N of at least 5 [default: all]
    #[arg(long, env = "ELBO_TOP_K", value_name = "N")]
    #[serde(alias = "top-k")]
    pub(crate) top_k: Option<NonZeroU32>,
    /// Also write the error of every evaluation
    #[arg(long, env = "ELBO_WRITE_ERRORS")]
    #[serde(alias = "write-errors")]
    #[merge(strategy = merge::bool::overwrite_false)]
    pub(crate) write_errors: bool,
    /// Labels for the report: `parent` (the image's directory), a CSV file with the columns key,label, a column of the list or
    /// Parquet files (for .tar shards the extension of a member, or a field of the .json member), or `none` [default: the
    /// column label; .cls, the .json field label, or .txt]
    #[arg(long, env = "ELBO_LABEL_FROM", value_name = "parent|FILE|column:NAME|none")]
    #[serde(alias = "label-from")]
    pub(crate) label_from: Option<String>,
    /// Use only the first N images of the listing, which is sorted by path, or in the order of a list
    #[arg(long, env = "ELBO_LIMIT", value_name = "N")]
    pub(crate) limit: Option<u64>,
    /// Images per shard, the unit of output [default: 1000]
    #[arg(long, env = "ELBO_SHARD_SIZE", value_name = "N")]
    #[serde(alias = "shard-size")]
    pub(crate) shard_size: Option<u32>,
    // Keys of job.toml only: on the command line these belong to the commands that run a job.
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
    /// Memory for images that are read ahead.
    #[arg(skip)]
    #[serde(alias = "decode-memory", deserialize_with = "from_str")]
    pub(crate) decode_memory: Option<ByteSize>,
    /// How many samples may be quarantined.
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

fn many_from_str<'de, D: Deserializer<'de>, T: std::str::FromStr<Err = String>>(from: D) -> Result<Vec<T>, D::Error> {
    let texts: Vec<String> = one_or_many(from)?;
    texts.iter().map(|text| text.parse().map_err(serde::de::Error::custom)).collect()
}

/// The job's flags and an optional file with them.
#[derive(Debug, Args)]
pub(crate) struct JobSource {
    /// TOML file with the job's flags as keys; flags override it
    #[arg(long, env = "ELBO_JOB", value_name = "FILE")]
    pub(crate) job: Option<PathBuf>,
    /// The flags.
    #[command(flatten)]
    pub(crate) flags: JobArgs,
}

impl JobSource {
    /// The flags, with missing values taken from the job file.
    pub(crate) fn resolve(&self) -> anyhow::Result<JobArgs> {
        let Some(path) = &self.job else { return Ok(self.flags.clone()) };
        let text = files::read_given_to_string(path)
            .map_err(|e| anyhow::anyhow!("reading the job file {}: {e}", path.display()))?;
        let file = toml::from_str(&text).map_err(|e| usage(format!("the job file {}: {e}", path.display())))?;
        let mut flags = self.flags.clone();
        flags.merge(file);
        Ok(flags)
    }
}

impl JobArgs {
    /// The number of images of a pilot.
    pub(crate) fn pilot_images(&self) -> Option<u64> {
        self.pilot.map(|images| u64::from(images.get()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_file_accepts_flag_names_with_either_separator() {
        let file: JobArgs = toml::from_str(
            "images = 'x'\nkeep = [3, 1]\ntop-k = 5\nsamples = [5, 10]\nlabel-from = 'parent'\nnoise_scope = 'shared'\nloss = 'l1'\nmax-bad = '2%'\nbatch = 8\ndecode-memory = '64MiB'\nprogress = 'json'",
        )
        .unwrap();
        assert_eq!((file.keep.as_slice(), file.top_k.map(NonZeroU32::get)), (&[3, 1][..], Some(5)));
        assert_eq!(file.label_from.as_deref(), Some("parent"));
        assert_eq!(file.noise_scope, Some(NoiseScopeName::Shared));
        assert_eq!(file.loss, Some(Loss::L1));
        assert_eq!(file.max_bad, Some(MaxBad::Percent(2.0)));
        assert_eq!(file.decode_memory, Some(ByteSize::mib(64)));
        assert_eq!((file.batch.map(NonZeroUsize::get), file.progress), (Some(8), Some(ProgressMode::Json)));
        let lists: JobArgs = toml::from_str("list-origins = ['https://cdn.example', 'file://']").unwrap();
        assert_eq!(lists.list_origins, ["https://cdn.example".parse().unwrap(), Origin::Files]);
        let error = toml::from_str::<JobArgs>("list_origins = 'cdn.example'").unwrap_err().to_string();
        assert!(error.contains("https://host"), "{error}");
        let error = toml::from_str::<JobArgs>("imags = 'x'").unwrap_err().to_string();
        assert!(error.contains("unknown field `imags`"));
    }

    #[test]
    fn the_example_in_deploy_is_a_job_file() {
        let file: JobArgs = toml::from_str(include_str!("../../../deploy/job.toml")).unwrap();
        assert_eq!((file.preset, file.out.as_deref()), (Some(Preset::Pets), Some("s3://bucket/labels")));
    }

    #[test]
    fn flags_override_the_file() {
        let file: JobArgs =
            toml::from_str("seed = 1\nlimit = 9\nkeep = [5, 1]\nsamples = [50]\nstrict = true").unwrap();
        let mut flags = JobArgs { seed: Some(2), keep: vec![3], write_errors: true, ..JobArgs::default() };
        flags.merge(file);
        assert_eq!((flags.seed, flags.limit), (Some(2), Some(9)));
        assert_eq!((flags.keep, flags.samples), (vec![3], vec![50]));
        assert!(flags.strict && flags.write_errors);
    }
}
