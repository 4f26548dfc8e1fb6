//! The job: everything that decides its predictions, and nothing else.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::audit::Audit;
use crate::calibration::Calibration;
use crate::class::{Classes, Hierarchy};
use crate::ensemble::{Contenders, PromptEnsemble};
use crate::loss::Loss;
use crate::noise::NoiseScope;
use crate::policy::{Course, Policy, PolicyError};

/// Samples per shard unless the job says otherwise.
pub const DEFAULT_SHARD_SIZE: u32 = 1000;

/// The element type of the network. On the CPU the weights are rounded to it, and the arithmetic is f32.
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

/// An adapter to merge into the model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lora {
    /// The file, or the directory with the file of peft or diffusers.
    pub path: String,
    /// Its strength: 1 is as trained.
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

/// A contrastive model that selects the contenders for the diffusion model.
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
/// Paths (`images`, `model`, `lora`, `noise`) say where files were found; the fingerprint covers their content. How the job is
/// run (devices, workers, batch sizes) is not part of it, since it does not change results.
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
    /// Classes and prompts; empty if every sample has its own captions.
    pub classes: Classes,
    /// Groups of classes that are compared first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hierarchy: Option<Hierarchy>,
    /// How a class's score follows from its prompts.
    #[serde(default, skip_serializing_if = "PromptEnsemble::is_default")]
    pub prompt_ensemble: PromptEnsemble,
    /// The column of the image list that holds each sample's captions, or several columns separated by commas.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub candidates: Option<String>,
    /// The image column of Parquet files, if it can't be detected.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_column: Option<String>,
    /// The shortlist in front of the policy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shortlist: Option<Shortlist>,
    /// Which evaluations run and when contenders are eliminated.
    pub policy: Policy,
    /// Which samples another policy also scores, for comparison.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub audit: Option<Audit>,
    /// The calibration taken from another job.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calibration: Option<Calibration>,
    /// Samples whose confidence is below this get no class.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub abstain_below: Option<f64>,
    /// The error of an evaluation.
    pub loss: Loss,
    /// Element type of the network.
    pub dtype: ModelDtype,
    /// Image side in pixels; the model's native size if absent.
    pub size: Option<u32>,
    /// Shift of flow matching's timesteps towards the noise; no shift if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timestep_shift: Option<f32>,
    /// Seed of the counter-based noise.
    pub seed: u64,
    /// Whether samples share noise.
    pub noise_scope: NoiseScope,
    /// The noise file, if one replaces the counter-based noise.
    pub noise: Option<String>,
    /// How many of a sample's scores are kept, best first; all if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top_k: Option<u32>,
    /// Whether the error of every evaluation is kept.
    pub write_errors: bool,
    /// Where labels come from.
    pub label_from: Option<String>,
    /// Use only this many samples, the first of the sorted listing.
    pub limit: Option<u64>,
    /// Use only this many of those, chosen by the seed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subset: Option<u64>,
    /// Samples in a shard.
    pub shard_size: u32,
}

impl JobSpec {
    /// The contenders for every sample; `None` if each sample has its own captions.
    pub fn contenders(&self) -> Option<Contenders> {
        let of_classes = || Contenders::of_classes(&self.classes, self.prompt_ensemble);
        let contenders = self.candidates.is_none().then(of_classes)?;
        Some(match &self.hierarchy {
            Some(hierarchy) => contenders.below(hierarchy, &self.classes),
            None => contenders,
        })
    }

    /// The texts of all prompts: those of classes, then those of groups.
    pub fn texts(&self) -> Vec<String> {
        let mut texts = self.classes.texts();
        texts.extend(self.hierarchy.iter().flat_map(Hierarchy::groups).flat_map(|group| group.prompts.iter().cloned()));
        texts
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
