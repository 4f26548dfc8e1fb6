//! CLIP's text encoder (Radford et al., 2021), which turns prompts into a network's conditioning.
//!
//! Stable Diffusion conditions on the last hidden state after the final layer norm, its successors on the one before
//! the last layer and on the pooled embedding. There is no attention mask, so all 77 positions count and padding tokens
//! carry information too.

use std::path::Path;

use candle_core::{D, Tensor};
use elbo_kernels::{LayerNorm, Linear};
use serde::Deserialize;

use super::checkpoint::Weights;
use super::encoder::{EncoderConfig, EncoderLayer, activation};
use super::error::ModelError;
use super::layers::{layer_norm, linear_no_bias};
use super::names;
use super::options::LoadOptions;
use super::probe::Probe;
use super::settings::read_config;
use super::settings::unsupported;

/// The settings used from the text encoder's `config.json`, with transformers' defaults.
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
    projection_dim: usize,
    eos_token_id: u32,
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
            projection_dim: 512,
            eos_token_id: 49407,
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
    projection: Option<Linear>,
    eos: u32,
}

/// The encoder's output for `N` texts.
#[derive(Debug)]
pub struct ClipOutput {
    /// The state after the last layer and the final layer norm, `[N, 77, C]`.
    pub last_hidden_state: Tensor,
    /// The state before the last layer, without a norm, `[N, 77, C]`.
    pub penultimate: Tensor,
    /// The last hidden state at the end of the text, projected, `[N, P]`; only of a `CLIPTextModelWithProjection`.
    pub text_embeds: Option<Tensor>,
}

impl ClipTextModel {
    /// Loads the encoder in `dir`.
    pub fn load(dir: &Path, options: &LoadOptions) -> Result<Self, ModelError> {
        let path = dir.join("config.json");
        let config: ClipConfig = read_config(&path)?;
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
        let weights = Weights::open_named(dir, "model", names::clip, options)?;
        let p = weights.at("text_model");
        let (embeddings, layers) = (p.at("embeddings"), p.at("encoder.layers"));
        let layer = |i| EncoderLayer::load(&layers.at(i), &layer);
        Ok(Self {
            tokens: embeddings.at("token_embedding").get("weight", &[config.vocab_size, width])?,
            positions: embeddings.at("position_embedding").get("weight", &[config.max_position_embeddings, width])?,
            layers: (0..config.num_hidden_layers).map(layer).collect::<Result<_, _>>()?,
            final_norm: layer_norm(&p.at("final_layer_norm"), width, config.layer_norm_eps)?,
            projection: match weights.at("text_projection") {
                p if p.has("weight") => Some(linear_no_bias(&p, width, config.projection_dim)?),
                _ => None,
            },
            eos: config.eos_token_id,
        })
    }

    /// Token ids in a sequence (77).
    pub fn positions(&self) -> usize {
        self.positions.dims().first().copied().unwrap_or_default()
    }

    /// Encodes `N` sequences of 77 ids.
    pub fn forward(&self, ids: &[Vec<u32>], probe: &mut Probe<'_>) -> Result<ClipOutput, ModelError> {
        let len = self.positions();
        let flat: Vec<u32> = ids.iter().flatten().copied().collect();
        let flat = Tensor::from_vec(flat, ids.len() * len, self.tokens.device())?;
        let embedded = self.tokens.index_select(&flat, 0)?;
        let width = embedded.dim(1)?;
        let mut h = embedded.reshape((ids.len(), len, width))?.broadcast_add(&self.positions)?;
        probe.see(|| "embeddings".to_owned(), &h);
        let mut penultimate = h.clone();
        for (i, layer) in self.layers.iter().enumerate() {
            penultimate = h;
            h = layer.forward(&penultimate)?;
            probe.see(|| format!("layers.{i}"), &h);
        }
        let last_hidden_state = self.final_norm.forward(&h)?;
        let text_embeds = match &self.projection {
            Some(projection) => {
                let ends: Vec<Tensor> = ids
                    .iter()
                    .enumerate()
                    .map(|(i, ids)| last_hidden_state.get(i)?.get(end_of_text(ids, self.eos)))
                    .collect::<candle_core::Result<_>>()?;
                Some(projection.forward(&Tensor::stack(&ends, 0)?, None)?)
            }
            None => None,
        };
        Ok(ClipOutput { last_hidden_state, penultimate, text_embeds })
    }

    /// Width of a hidden state.
    pub fn width(&self) -> usize {
        self.tokens.dim(D::Minus1).unwrap_or_default()
    }
}

/// The position whose state stands for the whole text: the first end token, as in transformers.
///
/// Old configurations give the wrong id 2 for the end token. For these, the end token is the largest id.
fn end_of_text(ids: &[u32], eos: u32) -> usize {
    let eos = if eos == 2 { ids.iter().copied().max().unwrap_or_default() } else { eos };
    ids.iter().position(|&id| id == eos).unwrap_or_default()
}
