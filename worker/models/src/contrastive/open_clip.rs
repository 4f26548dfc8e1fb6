//! OpenCLIP's `open_clip_config.json`.

use std::path::Path;

use elbo_images::{Filter, Preprocessing};
use elbo_kernels::Activation;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::architecture::{Config, Layout, Pool, TextConfig, VisionConfig};
use super::processor::{OPENAI, check_std};
use crate::encoder::EncoderConfig;
use crate::error::ModelError;
use crate::settings::{read_json, unsupported};

/// The configuration's file name.
pub(super) const FILE: &str = "open_clip_config.json";

/// OpenCLIP's epsilon of every norm.
const EPS: f64 = 1e-5;

/// Settings for training, initial weights or a part that [`NEUTRAL`] rules out.
const IGNORED: [&str; 19] = [
    "init_logit_scale",
    "init_logit_bias",
    "cast_dtype",
    "output_dict",
    "output_tokens",
    "patch_dropout",
    "attn_pooler_queries",
    "attn_pooler_heads",
    "timm_model_pretrained",
    "timm_pool",
    "timm_proj",
    "timm_proj_bias",
    "timm_drop",
    "timm_drop_path",
    "pad_id",
    "eos_id",
    "hf_model_pretrained",
    "hf_proj_type",
    "hf_pooler_type",
];

/// Values that have no effect, besides `null` and `false`.
const NEUTRAL: [(&str, &str); 6] = [
    ("vision_cfg.pool_type", "tok"),
    ("vision_cfg.pos_embed_type", "learnable"),
    ("vision_cfg.block_type", "default"),
    ("text_cfg.pool_type", "argmax"),
    ("text_cfg.proj_type", "linear"),
    ("text_cfg.block_type", "default"),
];

#[derive(Deserialize)]
struct OpenClip {
    model_cfg: Model,
    #[serde(default)]
    preprocess_cfg: Images,
}

#[derive(Deserialize)]
struct Model {
    embed_dim: usize,
    #[serde(default)]
    quick_gelu: bool,
    vision_cfg: Vision,
    text_cfg: Text,
    #[serde(flatten)]
    others: Map<String, Value>,
}

#[derive(Deserialize)]
#[serde(default)]
struct Vision {
    image_size: Value,
    layers: Value,
    width: usize,
    head_width: usize,
    patch_size: usize,
    mlp_ratio: f64,
    #[serde(flatten)]
    others: Map<String, Value>,
}

impl Default for Vision {
    fn default() -> Self {
        let (image_size, layers) = (Value::from(224), Value::from(12));
        Self { image_size, layers, width: 768, head_width: 64, patch_size: 16, mlp_ratio: 4.0, others: Map::new() }
    }
}

#[derive(Deserialize)]
#[serde(default)]
struct Text {
    context_length: usize,
    vocab_size: usize,
    width: usize,
    heads: usize,
    layers: usize,
    mlp_ratio: f64,
    #[serde(flatten)]
    others: Map<String, Value>,
}

impl Default for Text {
    fn default() -> Self {
        let (context_length, vocab_size) = (77, 49408);
        Self { context_length, vocab_size, width: 512, heads: 8, layers: 12, mlp_ratio: 4.0, others: Map::new() }
    }
}

#[derive(Default, Deserialize)]
struct Images {
    mean: Option<[f32; 3]>,
    std: Option<[f32; 3]>,
    interpolation: Option<String>,
    resize_mode: Option<String>,
}

/// Reads the configuration at `path`.
pub(super) fn read(path: &Path) -> Result<Config, ModelError> {
    let OpenClip { model_cfg: model, preprocess_cfg } = read_json(path)?;
    let Model { vision_cfg: vision, text_cfg: text, .. } = &model;
    for (prefix, settings) in [("", &model.others), ("vision_cfg.", &vision.others), ("text_cfg.", &text.others)] {
        for (key, value) in settings {
            let name = format!("{prefix}{key}");
            let neutral = NEUTRAL.iter().any(|(key, neutral)| *key == name && value.as_str() == Some(neutral));
            if !neutral && !value.is_null() && value.as_bool() != Some(false) && !IGNORED.contains(&key.as_str()) {
                return Err(unsupported(path, &name, value));
            }
        }
    }
    let integer = |key: &str, value: &Value| {
        value.as_u64().map(|value| value as usize).ok_or_else(|| unsupported(path, key, value))
    };
    let size = integer("vision_cfg.image_size", &vision.image_size)?;
    let encoder = |width: usize, heads, mlp_ratio, causal| EncoderConfig {
        width,
        inner: (width as f64 * mlp_ratio) as usize,
        heads,
        eps: EPS,
        activation: if model.quick_gelu { Activation::QuickGelu } else { Activation::Gelu },
        causal,
    };
    let heads = vision.width.checked_div(vision.head_width).unwrap_or(0);
    Config {
        layout: Layout::OpenClip,
        width: model.embed_dim,
        vision: VisionConfig {
            size,
            patch: vision.patch_size,
            layers: integer("vision_cfg.layers", &vision.layers)?,
            encoder: encoder(vision.width, heads, vision.mlp_ratio, false),
        },
        text: TextConfig {
            vocabulary: text.vocab_size,
            positions: text.context_length,
            layers: text.layers,
            encoder: encoder(text.width, text.heads, text.mlp_ratio, true),
            pool: Pool::Largest,
        },
        preprocessing: preprocess_cfg.preprocessing(path, size)?,
    }
    .checked(path)
}

impl Images {
    fn preprocessing(&self, path: &Path, size: usize) -> Result<Preprocessing, ModelError> {
        let (mean, std) = (self.mean.unwrap_or(OPENAI.0), self.std.unwrap_or(OPENAI.1));
        check_std(path, "preprocess_cfg.std", std)?;
        let filter = match self.interpolation.as_deref() {
            None | Some("bicubic") => Filter::Bicubic,
            Some("bilinear") => Filter::Bilinear,
            Some(other) => return Err(unsupported(path, "preprocess_cfg.interpolation", other)),
        };
        match self.resize_mode.as_deref() {
            None | Some("shortest") => Ok(Preprocessing::open_clip(size as u32, filter, mean, std)),
            Some("squash") => Ok(Preprocessing::siglip(size as u32, filter, mean, std)),
            Some(other) => Err(unsupported(path, "preprocess_cfg.resize_mode", other)),
        }
    }
}
