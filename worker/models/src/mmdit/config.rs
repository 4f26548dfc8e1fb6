//! The transformer's `config.json`. Settings that would change the forward pass in unsupported ways are refused by
//! name.

use std::path::Path;

use serde::Deserialize;

use crate::error::ModelError;
use crate::settings::square;
use crate::settings::{read_json, unsupported};

/// The settings of an SD3Transformer2DModel, with diffusers' defaults.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub(super) struct MmditConfig {
    #[serde(rename = "_class_name")]
    class: String,
    /// Height and width of the latents the model was trained on.
    #[serde(deserialize_with = "square")]
    pub(super) sample_size: usize,
    pub(super) patch_size: usize,
    pub(super) in_channels: usize,
    pub(super) out_channels: Option<usize>,
    pub(super) num_layers: usize,
    pub(super) attention_head_dim: usize,
    pub(super) num_attention_heads: usize,
    /// Width of a text token.
    pub(super) joint_attention_dim: usize,
    caption_projection_dim: usize,
    /// Width of the pooled text.
    pub(super) pooled_projection_dim: usize,
    /// Side of the stored grid of positions, in patches.
    pub(super) pos_embed_max_size: usize,
    /// Blocks in which the image also attends to itself only (SD3.5 medium).
    pub(super) dual_attention_layers: Vec<usize>,
    qk_norm: Option<String>,
}

impl Default for MmditConfig {
    fn default() -> Self {
        Self {
            class: String::new(),
            sample_size: 128,
            patch_size: 2,
            in_channels: 16,
            out_channels: Some(16),
            num_layers: 18,
            attention_head_dim: 64,
            num_attention_heads: 18,
            joint_attention_dim: 4096,
            caption_projection_dim: 1152,
            pooled_projection_dim: 2048,
            pos_embed_max_size: 96,
            dual_attention_layers: Vec::new(),
            qk_norm: None,
        }
    }
}

impl MmditConfig {
    /// Reads and checks a configuration.
    pub(super) fn read(path: &Path) -> Result<Self, ModelError> {
        let config: Self = read_json(path)?;
        if config.class != "SD3Transformer2DModel" {
            return Err(unsupported(path, "_class_name", &config.class));
        }
        if config.qk_norm.as_deref().is_some_and(|norm| norm != "rms_norm") {
            return Err(unsupported(path, "qk_norm", &config.qk_norm));
        }
        if config.caption_projection_dim != config.width() || config.width() == 0 {
            return Err(unsupported(path, "caption_projection_dim", config.caption_projection_dim));
        }
        if config.outputs() != config.in_channels {
            return Err(unsupported(path, "out_channels", config.outputs()));
        }
        if config.patch_size == 0 || !config.sample_size.is_multiple_of(config.patch_size) || config.sample_size == 0 {
            return Err(unsupported(path, "patch_size", config.patch_size));
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

    /// Channels of the output.
    pub(super) fn outputs(&self) -> usize {
        self.out_channels.unwrap_or(self.in_channels)
    }

    /// Whether queries and keys are normalised per head.
    pub(super) fn normalises_heads(&self) -> bool {
        self.qk_norm.is_some()
    }
}
