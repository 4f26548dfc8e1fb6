//! Reads a contrastive model's architecture from its directory, in any layout.

use std::path::Path;

use serde::Deserialize;

use super::architecture::{Config, Layout, Pool, TextConfig, VisionConfig};
use super::{open_clip, processor};
use crate::encoder::{EncoderConfig, activation};
use crate::error::ModelError;
use crate::settings::{read_json, unsupported};
use crate::stored::has_weights;

impl Config {
    /// Reads the configuration of the model in `dir`.
    pub(super) fn read(dir: &Path) -> Result<Self, ModelError> {
        match layout(dir)? {
            Layout::OpenClip => open_clip::read(&dir.join(open_clip::FILE)),
            layout => transformers(dir, layout),
        }
    }
}

/// The layout of the model in `dir`. Repositories of OpenCLIP models often contain transformers' configuration too; it
/// is used if its weights are there.
pub(super) fn layout(dir: &Path) -> Result<Layout, ModelError> {
    #[derive(Deserialize)]
    struct ModelType {
        model_type: Option<String>,
    }
    let path = dir.join("config.json");
    let open_clip = dir.join(open_clip::FILE).is_file();
    if open_clip && !has_weights(dir, "model") {
        return Ok(Layout::OpenClip);
    }
    let config: Result<ModelType, _> = read_json(&path);
    match config {
        Ok(ModelType { model_type: Some(name) }) if name == "clip" => Ok(Layout::Clip),
        Ok(ModelType { model_type: Some(name) }) if name == "siglip" => Ok(Layout::Siglip),
        _ if open_clip => Ok(Layout::OpenClip),
        Ok(ModelType { model_type }) => Err(unsupported(&path, "model_type", model_type.unwrap_or_default())),
        Err(error) => Err(error),
    }
}

/// The settings used from transformers' `config.json`.
#[derive(Deserialize)]
struct Transformers {
    projection_dim: Option<usize>,
    text_config: Option<Tower>,
    vision_config: Option<Tower>,
    /// Older files repeat a tower here, and this copy takes precedence.
    text_config_dict: Option<Tower>,
    vision_config_dict: Option<Tower>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Tower {
    vocab_size: Option<usize>,
    hidden_size: Option<usize>,
    intermediate_size: Option<usize>,
    num_hidden_layers: Option<usize>,
    num_attention_heads: Option<usize>,
    max_position_embeddings: Option<usize>,
    num_channels: Option<usize>,
    image_size: Option<usize>,
    patch_size: Option<usize>,
    hidden_act: Option<String>,
    layer_norm_eps: Option<f64>,
    eos_token_id: Option<u32>,
    projection_size: Option<usize>,
    vision_use_head: Option<bool>,
}

fn transformers(dir: &Path, layout: Layout) -> Result<Config, ModelError> {
    let path = dir.join("config.json");
    let file: Transformers = read_json(&path)?;
    let text = file.text_config_dict.or(file.text_config).unwrap_or_default();
    let vision = file.vision_config_dict.or(file.vision_config).unwrap_or_default();
    if let Some(channels) = vision.num_channels.filter(|&channels| channels != 3) {
        return Err(unsupported(&path, "num_channels", channels));
    }
    if vision.vision_use_head == Some(false) {
        return Err(unsupported(&path, "vision_use_head", false));
    }
    let is_clip = layout == Layout::Clip;
    let encoder = |tower: &Tower, width, inner, heads, causal| -> Result<EncoderConfig, ModelError> {
        let default = if is_clip { "quick_gelu" } else { "gelu_pytorch_tanh" };
        Ok(EncoderConfig {
            width: tower.hidden_size.unwrap_or(width),
            inner: tower.intermediate_size.unwrap_or(inner),
            heads: tower.num_attention_heads.unwrap_or(heads),
            eps: tower.layer_norm_eps.unwrap_or(if is_clip { 1e-5 } else { 1e-6 }),
            activation: activation(&path, tower.hidden_act.as_deref().unwrap_or(default))?,
            causal,
        })
    };
    let vision = VisionConfig {
        size: vision.image_size.unwrap_or(224),
        patch: vision.patch_size.unwrap_or(if is_clip { 32 } else { 16 }),
        layers: vision.num_hidden_layers.unwrap_or(12),
        encoder: encoder(&vision, 768, 3072, 12, false)?,
    };
    let width = match layout {
        Layout::Siglip => text.projection_size.or(text.hidden_size).unwrap_or(768),
        _ => file.projection_dim.unwrap_or(512),
    };
    if layout == Layout::Siglip && width != vision.encoder.width {
        return Err(unsupported(&path, "projection_size", width));
    }
    let text = TextConfig {
        vocabulary: text.vocab_size.unwrap_or(if is_clip { 49408 } else { 32000 }),
        positions: text.max_position_embeddings.unwrap_or(if is_clip { 77 } else { 64 }),
        layers: text.num_hidden_layers.unwrap_or(12),
        encoder: if is_clip { encoder(&text, 512, 2048, 8, true)? } else { encoder(&text, 768, 3072, 12, false)? },
        pool: match (is_clip, text.eos_token_id.unwrap_or(49407)) {
            (false, _) => Pool::Last,
            // The configurations of OpenAI's models have a wrong end-of-text id, which transformers handles in this
            // way.
            (true, 2) => Pool::Largest,
            (true, end) => Pool::First(end),
        },
    };
    let preprocessing = processor::read(dir, layout, vision.size)?;
    Config { layout, width, vision, text, preprocessing }.checked(&path)
}
