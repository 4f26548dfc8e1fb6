//! Which family of models a directory holds.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use serde::Deserialize;

use super::checkpoint::{ModelError, read_json, unsupported};

/// A family of models, told by `model_index.json`.
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
pub(super) struct ModelIndex {
    #[serde(rename = "_class_name")]
    class: String,
    /// Class names by label, of class-conditional models.
    #[serde(default)]
    pub(super) id2label: BTreeMap<u32, String>,
}

impl Family {
    /// The family of the model in `dir`.
    pub fn of(dir: &Path) -> Result<Self, ModelError> {
        Ok(Self::read(dir)?.0)
    }

    pub(super) fn read(dir: &Path) -> Result<(Self, ModelIndex), ModelError> {
        let path = dir.join("model_index.json");
        let index: ModelIndex = read_json(&path)?;
        let family = match index.class.as_str() {
            "StableDiffusionPipeline" => Self::StableDiffusion,
            "StableDiffusionXLPipeline" => Self::Sdxl,
            "StableDiffusion3Pipeline" => Self::Sd3,
            "DiTPipeline" => Self::Dit,
            other => return Err(unsupported(&path, "_class_name", other)),
        };
        Ok((family, index))
    }

    /// The directory of the network.
    pub(super) fn network(self) -> &'static str {
        match self {
            Self::StableDiffusion | Self::Sdxl => "unet",
            Self::Sd3 | Self::Dit => "transformer",
        }
    }
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
