//! What a job is: everything that decides its predictions, and nothing that doesn't.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::audit::Audit;
use crate::calibration::Calibration;
use crate::class::{Classes, Hierarchy, Prompt};
use crate::ensemble::{Contenders, PromptEnsemble};
use crate::ids::ClassIndex;
use crate::loss::Loss;
use crate::noise::NoiseScope;
use crate::policy::{Course, Policy, PolicyError};

/// Samples in a shard unless the job says otherwise.
pub const DEFAULT_SHARD_SIZE: u32 = 1000;

/// The element type the network runs in: on the CPU its weights are rounded to it and the arithmetic is f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ModelDtype {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
}

impl FromStr for ModelDtype {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "f32" => Ok(Self::F32),
            "f16" => Ok(Self::F16),
            "bf16" => Ok(Self::Bf16),
            other => Err(format!("unknown dtype '{other}': use f32, f16 or bf16")),
        }
    }
}

impl fmt::Display for ModelDtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        })
    }
}

/// An adapter that is merged into the model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lora {
    /// The file, or the directory with peft's or diffusers' file.
    pub path: String,
    /// How strongly: 1 is as it was trained.
    pub scale: f64,
}

impl FromStr for Lora {
    type Err = String;

    /// Reads `FILE[:SCALE]`.
    fn from_str(text: &str) -> Result<Self, String> {
        let (path, scale) = match text.rsplit_once(':').map(|(path, scale)| (path, scale.parse::<f64>())) {
            Some((path, Ok(scale))) => (path, scale),
            _ => (text, 1.0),
        };
        if path.is_empty() || !scale.is_finite() {
            return Err(format!("'{text}' is not an adapter: give FILE or FILE:SCALE, like style.safetensors:0.8"));
        }
        Ok(Self { path: path.to_owned(), scale })
    }
}

/// A contrastive model that picks the contenders a diffusion model is asked about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shortlist {
    /// The model: a directory, a URL or `hf://owner/name`.
    pub model: String,
    /// How many contenders it keeps.
    pub keep: u32,
}

impl FromStr for Shortlist {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parsed = text.rsplit_once(':').and_then(|(model, keep)| Some((model, keep.parse().ok()?)));
        match parsed {
            Some((model, keep)) if !model.is_empty() && keep > 0 => Ok(Self { model: model.to_owned(), keep }),
            _ => Err(format!("'{text}' is not a model and a number of classes: give MODEL:K, like models/clip:20")),
        }
    }
}

/// The whole specification of a job.
///
/// Paths (`images`, `model`, `lora`, `noise`) say where things were found; what they hold enters the fingerprint by content. How
/// the job is carried out (devices, workers, batch sizes) is not part of it, since it changes no result.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JobSpec {
    /// The dataset's location.
    pub images: String,
    /// The model: a directory, a URL or `hf://owner/name`.
    pub model: String,
    /// Adapters merged into the model, in this order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub lora: Vec<Lora>,
    /// Classes and prompts; none where every sample brings its own captions.
    pub classes: Classes,
    /// Groups of them that are asked about first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hierarchy: Option<Hierarchy>,
    /// How the prompts of a class make its score.
    #[serde(default, skip_serializing_if = "PromptEnsemble::is_default")]
    pub prompt_ensemble: PromptEnsemble,
    /// The column of the image list that holds every sample's own captions, or several columns with commas between them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub candidates: Option<String>,
    /// The column of Parquet files with the images, where it can't be told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_column: Option<String>,
    /// What shortens the list of contenders first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shortlist: Option<Shortlist>,
    /// Rounds and eliminations.
    pub policy: Policy,
    /// Which samples another policy also scores, for comparison.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub audit: Option<Audit>,
    /// What makes confidence of errors, where another job found it out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calibration: Option<Calibration>,
    /// Samples get no class whose confidence is below.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub abstain_below: Option<f64>,
    /// The error of an evaluation.
    pub loss: Loss,
    /// Element type of the network.
    pub dtype: ModelDtype,
    /// Image side in pixels; the model's native size where absent.
    pub size: Option<u32>,
    /// Shift of flow matching's timesteps towards the noise; none where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timestep_shift: Option<f32>,
    /// Seed of the counter-based noise.
    pub seed: u64,
    /// Whether samples share noise.
    pub noise_scope: NoiseScope,
    /// The noise file, where one replaces the counter-based noise.
    pub noise: Option<String>,
    /// How many of a sample's scores are kept, the best ones; all where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top_k: Option<u32>,
    /// Whether every single evaluation's error is kept.
    pub write_errors: bool,
    /// Where labels come from.
    pub label_from: Option<String>,
    /// Only the first so many samples of the sorted listing.
    pub limit: Option<u64>,
    /// Of these only so many, chosen by the seed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subset: Option<u64>,
    /// Samples in a shard.
    pub shard_size: u32,
}

impl JobSpec {
    /// What competes for every sample; none where each brings its own captions.
    pub fn contenders(&self) -> Option<Contenders> {
        let of_classes = || Contenders::of_classes(&self.classes, self.prompt_ensemble);
        let contenders = self.candidates.is_none().then(of_classes)?;
        Some(match &self.hierarchy {
            Some(hierarchy) => contenders.below(hierarchy, &self.classes),
            None => contenders,
        })
    }

    /// What the text encoder is given: the prompts of the classes, and then those of groups.
    pub fn prompts(&self) -> Vec<Prompt> {
        let groups = self.hierarchy.iter().flat_map(Hierarchy::groups).flat_map(|group| &group.prompts);
        let of_group = |text: &String| Prompt { text: text.clone(), class: ClassIndex(-1), label: None };
        self.classes.prompts.iter().cloned().chain(groups.map(of_group)).collect()
    }

    /// The course of every sample, for a model with `timesteps` training timesteps.
    pub fn course(&self, timesteps: u32) -> Result<Course, PolicyError> {
        let shortlist = self.shortlist.as_ref().map(|shortlist| shortlist.keep);
        let contenders = self.contenders();
        let course = Course::new(&self.policy, shortlist, timesteps, contenders.as_ref())?;
        match &self.audit {
            Some(audit) => course.with_audit(&audit.policy, timesteps, contenders.as_ref()),
            None => Ok(course),
        }
    }
}
