//! Finds the model family of a directory.

use std::fmt;
use std::path::Path;

use elbo_hub::model_files::{MODEL_INDEX, components};
use serde::Deserialize;

use super::error::ModelError;
use super::settings::{read, read_json, unsupported};

/// A model family, as named by `model_index.json`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Stable Diffusion 1.x and 2.x.
    StableDiffusion,
    /// Stable Diffusion XL.
    Sdxl,
    /// Stable Diffusion 3 and 3.5.
    Sd3,
    /// Class-conditional DiT.
    Dit,
}

/// diffusers' `model_index.json`.
#[derive(Debug, Deserialize)]
struct ModelIndex {
    #[serde(rename = "_class_name")]
    class: String,
}

impl Family {
    /// The family of the model in `dir`.
    pub fn of(dir: &Path) -> Result<Self, ModelError> {
        let path = dir.join(MODEL_INDEX);
        let index: ModelIndex = read_json(&path)?;
        match index.class.as_str() {
            "StableDiffusionPipeline" | "LatentConsistencyModelPipeline" => Ok(Self::StableDiffusion),
            "StableDiffusionXLPipeline" => Ok(Self::Sdxl),
            "StableDiffusion3Pipeline" => Ok(Self::Sd3),
            "DiTPipeline" => Ok(Self::Dit),
            other => Err(unsupported(&path, "_class_name", other)),
        }
    }

    /// Suffixes and directories of the text encoders; T5 may be absent.
    pub(super) fn text_encoders(self, dir: &Path) -> Vec<(&'static str, String)> {
        let suffixes: &[&'static str] = match self {
            Self::StableDiffusion => &[""],
            Self::Sdxl => &["", "_2"],
            Self::Sd3 if has_t5(dir) => &["", "_2", "_3"],
            Self::Sd3 => &["", "_2"],
            Self::Dit => &[],
        };
        suffixes.iter().map(|suffix| (*suffix, format!("text_encoder{suffix}"))).collect()
    }

    /// The directory of the network.
    pub fn network(self) -> &'static str {
        match self {
            Self::StableDiffusion | Self::Sdxl => "unet",
            Self::Sd3 | Self::Dit => "transformer",
        }
    }
}

/// Whether a Stable Diffusion 3 model has T5: `model_index.json` names it, and it is there.
pub(super) fn has_t5(dir: &Path) -> bool {
    let named = read(&dir.join(MODEL_INDEX)).ok().and_then(|bytes| components(&bytes).ok());
    named.is_some_and(|components| components.contains("text_encoder_3")) && dir.join("text_encoder_3").is_dir()
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::StableDiffusion => "Stable Diffusion",
            Self::Sdxl => "Stable Diffusion XL",
            Self::Sd3 => "Stable Diffusion 3",
            Self::Dit => "DiT",
        })
    }
}
