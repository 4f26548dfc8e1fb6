//! CLIP's text encoder (Radford et al., 2021), which turns prompts into the UNet's conditioning.
//!
//! Stable Diffusion conditions on the last hidden state after the final layer norm, of all 77 positions: there is no
//! attention mask, so padding tokens carry information too.

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use serde::Deserialize;

use super::checkpoint::{ModelError, Weights, read_json, unsupported};
use super::encoder::{EncoderConfig, EncoderLayer, activation};
use super::layers::layer_norm;
use super::probe::Probe;
use crate::ops::LayerNorm;

/// What this needs of the text encoder's `config.json`, with transformers' defaults.
#[derive(Debug, Deserialize)]
#[serde(default)]
struct ClipConfig {
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    max_position_embeddings: usize,
    hidden_act: String,
    layer_norm_eps: f64,
}

impl Default for ClipConfig {
    fn default() -> Self {
        Self {
            vocab_size: 49408,
            hidden_size: 512,
            intermediate_size: 2048,
            num_hidden_layers: 12,
            num_attention_heads: 8,
            max_position_embeddings: 77,
            hidden_act: "quick_gelu".to_owned(),
            layer_norm_eps: 1e-5,
        }
    }
}

/// CLIP's text encoder.
#[derive(Debug)]
pub struct ClipTextModel {
    tokens: Tensor,
    positions: Tensor,
    layers: Vec<EncoderLayer>,
    final_norm: LayerNorm,
}

impl ClipTextModel {
    /// Loads the encoder in `dir`.
    pub fn load(dir: &Path, device: &Device, dtype: DType) -> Result<Self, ModelError> {
        let path = dir.join("config.json");
        let config: ClipConfig = read_json(&path)?;
        let (width, heads) = (config.hidden_size, config.num_attention_heads);
        if heads == 0 || !width.is_multiple_of(heads) {
            return Err(unsupported(&path, "num_attention_heads", heads));
        }
        let layer = EncoderConfig {
            width,
            inner: config.intermediate_size,
            heads,
            eps: config.layer_norm_eps,
            activation: activation(&path, &config.hidden_act)?,
            causal: true,
        };
        let weights = Weights::open(dir, "model", device, dtype)?;
        let p = weights.at("text_model");
        let (embeddings, layers) = (p.at("embeddings"), p.at("encoder.layers"));
        let layer = |i| EncoderLayer::load(&layers.at(i), &layer);
        Ok(Self {
            tokens: embeddings.at("token_embedding").get("weight", &[config.vocab_size, width])?,
            positions: embeddings.at("position_embedding").get("weight", &[config.max_position_embeddings, width])?,
            layers: (0..config.num_hidden_layers).map(layer).collect::<Result<_, _>>()?,
            final_norm: layer_norm(&p.at("final_layer_norm"), width, config.layer_norm_eps)?,
        })
    }

    /// Token ids in a sequence (77).
    pub fn positions(&self) -> usize {
        self.positions.dims().first().copied().unwrap_or_default()
    }

    /// The last hidden state `[N, 77, C]`, after the final layer norm, of `N` sequences of 77 ids.
    pub fn forward(&self, ids: &[Vec<u32>], probe: &mut Probe<'_>) -> Result<Tensor, ModelError> {
        let len = self.positions();
        let flat: Vec<u32> = ids.iter().flatten().copied().collect();
        let flat = Tensor::from_vec(flat, ids.len() * len, self.tokens.device())?;
        let embedded = self.tokens.index_select(&flat, 0)?;
        let width = embedded.dim(1)?;
        let mut h = embedded.reshape((ids.len(), len, width))?.broadcast_add(&self.positions)?;
        probe.see(|| "embeddings".to_owned(), &h);
        for (i, layer) in self.layers.iter().enumerate() {
            h = layer.forward(&h)?;
            probe.see(|| format!("layers.{i}"), &h);
        }
        Ok(self.final_norm.forward(&h)?)
    }
}
