//! The transformer's `config.json`. Settings that would change the forward pass in unsupported ways are refused by
//! name.

use std::path::Path;

use serde::Deserialize;

use crate::error::ModelError;
use crate::settings::unsupported;
use crate::settings::{read_config, square};

/// The settings of a DiTTransformer2DModel (older checkpoints: Transformer2DModel), with diffusers' defaults.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub(super) struct DitConfig {
    #[serde(rename = "_class_name")]
    class: String,
    pub(super) num_attention_heads: usize,
    pub(super) attention_head_dim: usize,
    pub(super) in_channels: usize,
    pub(super) out_channels: Option<usize>,
    pub(super) num_layers: usize,
    /// Height and width of the latents the model was trained on.
    #[serde(deserialize_with = "square")]
    pub(super) sample_size: usize,
    pub(super) patch_size: usize,
    /// Number of classes, without the null class.
    pub(super) num_embeds_ada_norm: usize,
    pub(super) norm_eps: f64,
    activation_fn: String,
    attention_bias: bool,
    norm_elementwise_affine: bool,
    norm_type: String,
}

impl Default for DitConfig {
    fn default() -> Self {
        Self {
            class: String::new(),
            num_attention_heads: 16,
            attention_head_dim: 72,
            in_channels: 4,
            out_channels: None,
            num_layers: 28,
            sample_size: 32,
            patch_size: 2,
            num_embeds_ada_norm: 1000,
            norm_eps: 1e-5,
            activation_fn: "gelu-approximate".to_owned(),
            attention_bias: true,
            norm_elementwise_affine: false,
            norm_type: "ada_norm_zero".to_owned(),
        }
    }
}

impl DitConfig {
    /// Reads and checks a configuration.
    pub(super) fn read(path: &Path) -> Result<Self, ModelError> {
        let config: Self = read_config(path)?;
        if config.class != "DiTTransformer2DModel" && config.class != "Transformer2DModel" {
            return Err(unsupported(path, "_class_name", &config.class));
        }
        if config.norm_type != "ada_norm_zero" {
            return Err(unsupported(path, "norm_type", &config.norm_type));
        }
        if config.activation_fn != "gelu-approximate" {
            return Err(unsupported(path, "activation_fn", &config.activation_fn));
        }
        if !config.attention_bias {
            return Err(unsupported(path, "attention_bias", config.attention_bias));
        }
        if config.norm_elementwise_affine {
            return Err(unsupported(path, "norm_elementwise_affine", config.norm_elementwise_affine));
        }
        if config.patch_size == 0 || config.sample_size == 0 || !config.sample_size.is_multiple_of(config.patch_size) {
            return Err(unsupported(path, "patch_size", config.patch_size));
        }
        if config.width() == 0 || !config.width().is_multiple_of(4) {
            return Err(unsupported(path, "attention_head_dim", config.attention_head_dim));
        }
        if config.num_layers == 0 {
            return Err(unsupported(path, "num_layers", config.num_layers));
        }
        Ok(config)
    }

    /// Width of a token.
    pub(super) fn width(&self) -> usize {
        self.num_attention_heads * self.attention_head_dim
    }

    /// Channels of the output: the noise, then the variance if it is learned.
    pub(super) fn outputs(&self) -> usize {
        self.out_channels.unwrap_or(self.in_channels)
    }
}
