//! The autoencoder's `config.json`. Settings that would change latents in unsupported ways are refused by name.
//!
//! `out_channels`, `up_block_types`, `use_post_quant_conv` and `sample_size` concern only decoding and tiling, and
//! `force_upcast` only the precision in diffusers.

use std::path::Path;

use serde::Deserialize;

use crate::error::ModelError;
use crate::family::Family;
use crate::settings::read_config;
use crate::settings::unsupported;

/// The settings of an AutoencoderKL, with diffusers' defaults.
#[derive(Debug, Deserialize)]
#[serde(default)]
pub(super) struct VaeConfig {
    #[serde(rename = "_class_name")]
    class: Option<String>,
    pub(super) in_channels: usize,
    pub(super) latent_channels: usize,
    pub(super) block_out_channels: Vec<usize>,
    pub(super) layers_per_block: usize,
    pub(super) norm_num_groups: usize,
    down_block_types: Vec<String>,
    act_fn: String,
    pub(super) scaling_factor: f64,
    pub(super) shift_factor: Option<f64>,
    latents_mean: Option<Vec<f64>>,
    latents_std: Option<Vec<f64>>,
    pub(super) use_quant_conv: bool,
    pub(super) mid_block_add_attention: bool,
}

impl Default for VaeConfig {
    fn default() -> Self {
        Self {
            class: None,
            in_channels: 3,
            latent_channels: 4,
            block_out_channels: vec![64],
            layers_per_block: 1,
            norm_num_groups: 32,
            down_block_types: vec!["DownEncoderBlock2D".to_owned()],
            act_fn: "silu".to_owned(),
            scaling_factor: 0.18215,
            shift_factor: None,
            latents_mean: None,
            latents_std: None,
            use_quant_conv: true,
            mid_block_add_attention: true,
        }
    }
}

impl VaeConfig {
    /// Reads and checks a configuration.
    pub(super) fn read(path: &Path) -> Result<Self, ModelError> {
        let config: Self = read_config(path)?;
        config.check(path)?;
        Ok(config)
    }

    /// Mean and standard deviation of every channel of the posterior's mean.
    pub(super) fn statistics(&self) -> Option<(&[f64], &[f64])> {
        Some((self.latents_mean.as_deref()?, self.latents_std.as_deref()?))
    }

    fn check(&self, path: &Path) -> Result<(), ModelError> {
        if let Some(other) = self.class.as_deref().filter(|class| *class != "AutoencoderKL") {
            return Err(unsupported(path, "_class_name", other));
        }
        if let Some(other) = self.down_block_types.iter().find(|t| *t != "DownEncoderBlock2D") {
            return Err(unsupported(path, "down_block_types", other));
        }
        if self.act_fn != "silu" && self.act_fn != "swish" {
            return Err(unsupported(path, "act_fn", &self.act_fn));
        }
        if self.block_out_channels.len() != self.down_block_types.len() || self.block_out_channels.is_empty() {
            return Err(unsupported(path, "block_out_channels", &self.block_out_channels));
        }
        let groups = self.norm_num_groups;
        if groups == 0 || self.block_out_channels.iter().any(|channels| !channels.is_multiple_of(groups)) {
            return Err(unsupported(path, "norm_num_groups", groups));
        }
        if self.in_channels != 3 {
            return Err(unsupported(path, "in_channels", self.in_channels));
        }
        for (key, value) in [("latent_channels", self.latent_channels), ("layers_per_block", self.layers_per_block)] {
            if value == 0 {
                return Err(unsupported(path, key, value));
            }
        }
        if !self.scaling_factor.is_normal() {
            return Err(unsupported(path, "scaling_factor", self.scaling_factor));
        }
        self.check_statistics(path)
    }

    fn check_statistics(&self, path: &Path) -> Result<(), ModelError> {
        let fits = |values: &[f64]| values.len() == self.latent_channels;
        match (&self.latents_mean, &self.latents_std) {
            (None, None) => Ok(()),
            // diffusers ignores one without the other.
            (Some(mean), std) if !fits(mean) || std.is_none() => Err(unsupported(path, "latents_mean", mean)),
            (_, Some(std)) if !fits(std) || self.latents_mean.is_none() || std.iter().any(|std| !std.is_normal()) => {
                Err(unsupported(path, "latents_std", std))
            }
            (Some(mean), _) if self.shift_factor.is_some_and(|shift| shift != 0.0) => {
                Err(unsupported(path, "latents_mean beside a shift_factor", mean))
            }
            _ => Ok(()),
        }
    }

    /// Refuses settings that the family's pipeline in diffusers ignores, since it is unclear whether the network was
    /// trained with them.
    pub(super) fn check_family(&self, family: Family, path: &Path) -> Result<(), ModelError> {
        if let Some(mean) = self.latents_mean.as_ref().filter(|_| family != Family::Sdxl) {
            return Err(unsupported(path, &format!("latents_mean of a {family} model"), mean));
        }
        match self.shift_factor.filter(|shift| *shift != 0.0) {
            Some(shift) if family != Family::Sd3 => {
                Err(unsupported(path, &format!("shift_factor of a {family} model"), shift))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(family: Family, settings: &serde_json::Value) -> Result<(), String> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("config.json");
        std::fs::write(&path, settings.to_string()).unwrap();
        let checked = VaeConfig::read(&path).and_then(|config| config.check_family(family, &path));
        checked.map_err(|error| error.to_string())
    }

    #[test]
    fn statistics_are_for_the_pipelines_that_apply_them() {
        let both = serde_json::json!({ "latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 3.0, 4.0] });
        check(Family::Sdxl, &both).unwrap();
        for family in [Family::StableDiffusion, Family::Sd3, Family::Dit] {
            let error = check(family, &both).unwrap_err();
            assert!(error.contains("config.json") && error.contains("latents_mean"), "{error}");
        }
        let shift = serde_json::json!({ "shift_factor": 0.06 });
        check(Family::Sd3, &shift).unwrap();
        assert!(check(Family::Sdxl, &shift).unwrap_err().contains("shift_factor"));
        check(Family::StableDiffusion, &serde_json::json!({ "latents_mean": null, "shift_factor": 0.0 })).unwrap();
    }

    #[test]
    fn invalid_settings_are_named() {
        let four = [1.0; 4];
        let cases = [
            ("latents_mean", serde_json::json!({ "latents_mean": four })),
            ("latents_std", serde_json::json!({ "latents_std": four })),
            ("latents_mean", serde_json::json!({ "latents_mean": [1.0], "latents_std": four })),
            ("latents_std", serde_json::json!({ "latents_mean": four, "latents_std": [1.0, 0.0, 1.0, 1.0] })),
            ("_class_name", serde_json::json!({ "_class_name": "AutoencoderTiny" })),
            ("in_channels", serde_json::json!({ "in_channels": 4 })),
            ("norm_num_groups", serde_json::json!({ "norm_num_groups": 7 })),
            ("scaling_factor", serde_json::json!({ "scaling_factor": 0.0 })),
            ("latents_std[1]", serde_json::json!({ "latents_std": [1.0, "x"] })),
        ];
        for (key, settings) in cases {
            let error = check(Family::Sdxl, &settings).unwrap_err();
            assert!(error.contains(key), "{error}");
        }
    }
}
