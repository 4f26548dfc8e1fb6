//! T5's encoder (Raffel et al., JMLR 2020), in the gated variant of version 1.1. It is one of Stable Diffusion 3's text
//! encoders.
//!
//! It runs once per prompt, so attention uses plain operations.

use std::path::Path;

use candle_core::{D, DType, Result, Tensor};
use elbo_kernels::{Activation, Linear, activate};
use serde::Deserialize;
use tokenizers::Tokenizer;

use super::checkpoint::{Params, Weights};
use super::error::ModelError;
use super::layers::linear_no_bias;
use super::names;
use super::options::LoadOptions;
use super::probe::Probe;
use super::reading::Reading;
use super::settings::read_config;
use super::settings::{read, read_json, unsupported};

/// The settings used from the encoder's `config.json`, with transformers' defaults.
#[derive(Debug, Deserialize)]
#[serde(default)]
struct T5Config {
    vocab_size: usize,
    d_model: usize,
    d_kv: usize,
    d_ff: usize,
    num_layers: usize,
    num_heads: usize,
    relative_attention_num_buckets: usize,
    relative_attention_max_distance: usize,
    layer_norm_epsilon: f64,
    feed_forward_proj: String,
}

impl Default for T5Config {
    fn default() -> Self {
        Self {
            vocab_size: 32128,
            d_model: 512,
            d_kv: 64,
            d_ff: 2048,
            num_layers: 6,
            num_heads: 8,
            relative_attention_num_buckets: 32,
            relative_attention_max_distance: 128,
            layer_norm_epsilon: 1e-6,
            feed_forward_proj: "relu".to_owned(),
        }
    }
}

/// T5's encoder.
#[derive(Debug)]
pub struct T5Encoder {
    config: T5Config,
    tokens: Tensor,
    /// Bias for each distance bucket and head, shared by all layers.
    distances: Tensor,
    blocks: Vec<Block>,
    final_norm: RmsNorm,
}

impl T5Encoder {
    /// Loads the encoder in `dir`.
    pub fn load(dir: &Path, options: &LoadOptions) -> std::result::Result<Self, ModelError> {
        let path = dir.join("config.json");
        let config: T5Config = read_config(&path)?;
        if config.feed_forward_proj != "gated-gelu" {
            return Err(unsupported(&path, "feed_forward_proj", &config.feed_forward_proj));
        }
        let weights = Weights::open_named(dir, "model", names::t5, options)?;
        let blocks = weights.at("encoder.block");
        let bias = blocks.at("0.layer.0.SelfAttention.relative_attention_bias");
        Ok(Self {
            tokens: weights.at("shared").get("weight", &[config.vocab_size, config.d_model])?,
            distances: bias.get("weight", &[config.relative_attention_num_buckets, config.num_heads])?,
            blocks: (0..config.num_layers)
                .map(|i| Block::load(&blocks.at(i), &config))
                .collect::<std::result::Result<_, _>>()?,
            final_norm: RmsNorm::load(&weights.at("encoder.final_layer_norm"), &config)?,
            config,
        })
    }

    /// The last hidden state `[N, L, C]` of `N` sequences of `L` ids.
    pub fn forward(&self, ids: &[Vec<u32>], probe: &mut Probe<'_>) -> std::result::Result<Tensor, ModelError> {
        let len = ids.first().map_or(0, Vec::len);
        let flat: Vec<u32> = ids.iter().flatten().copied().collect();
        let flat = Tensor::from_vec(flat, ids.len() * len, self.tokens.device())?;
        let mut h = self.tokens.index_select(&flat, 0)?.reshape((ids.len(), len, self.config.d_model))?;
        probe.see(|| "embeddings".to_owned(), &h);
        let bias = self.position_bias(len)?;
        for (i, block) in self.blocks.iter().enumerate() {
            h = block.forward(&h, &bias, &self.config)?;
            probe.see(|| format!("block.{i}"), &h);
        }
        Ok(self.final_norm.forward(&h)?)
    }

    /// The bias added to the scores of `len` queries and keys, `[1, heads, len, len]`.
    fn position_bias(&self, len: usize) -> Result<Tensor> {
        let (buckets, furthest) =
            (self.config.relative_attention_num_buckets, self.config.relative_attention_max_distance);
        let pairs = (0..len).flat_map(|query| (0..len).map(move |key| bucket(query, key, buckets, furthest)));
        let pairs = Tensor::from_iter(pairs, self.distances.device())?;
        let bias = self.distances.index_select(&pairs, 0)?.reshape((len, len, self.config.num_heads))?;
        bias.permute((2, 0, 1))?.contiguous()?.unsqueeze(0)
    }
}

/// The bucket of a distance: exact when near, logarithmic when far; the upper half is for keys after the query.
fn bucket(query: usize, key: usize, buckets: usize, furthest: usize) -> u32 {
    let half = buckets / 2;
    let exact = half / 2;
    let distance = query.abs_diff(key);
    let of_distance = if distance < exact {
        distance
    } else {
        let far = (distance as f32 / exact as f32).ln() / (furthest as f32 / exact as f32).ln();
        (exact + (far * (half - exact) as f32) as usize).min(half - 1)
    };
    (of_distance + if key > query { half } else { 0 }) as u32
}

#[derive(Debug)]
struct Block {
    norm1: RmsNorm,
    query: Linear,
    key: Linear,
    value: Linear,
    out: Linear,
    norm2: RmsNorm,
    gate: Linear,
    hidden: Linear,
    down: Linear,
}

impl Block {
    fn load(p: &Params<'_>, config: &T5Config) -> std::result::Result<Self, ModelError> {
        let (attention, feed_forward) = (p.at("layer.0"), p.at("layer.1"));
        let (width, inner) = (config.d_model, config.num_heads * config.d_kv);
        let projection = |name: &str| linear_no_bias(&attention.at("SelfAttention").at(name), width, inner);
        let dense = feed_forward.at("DenseReluDense");
        Ok(Self {
            norm1: RmsNorm::load(&attention.at("layer_norm"), config)?,
            query: projection("q")?,
            key: projection("k")?,
            value: projection("v")?,
            out: linear_no_bias(&attention.at("SelfAttention.o"), inner, width)?,
            norm2: RmsNorm::load(&feed_forward.at("layer_norm"), config)?,
            gate: linear_no_bias(&dense.at("wi_0"), width, config.d_ff)?,
            hidden: linear_no_bias(&dense.at("wi_1"), width, config.d_ff)?,
            down: linear_no_bias(&dense.at("wo"), config.d_ff, width)?,
        })
    }

    fn forward(&self, x: &Tensor, bias: &Tensor, config: &T5Config) -> Result<Tensor> {
        let (batch, len, _) = x.dims3()?;
        let normal = self.norm1.forward(x)?;
        let heads = |projection: &Linear| {
            let y = projection.forward(&normal, None)?.reshape((batch, len, config.num_heads, config.d_kv))?;
            y.transpose(1, 2)?.contiguous()
        };
        // There is no division by sqrt(d): T5's weights include the scale.
        let scores = heads(&self.query)?.matmul(&heads(&self.key)?.t()?)?.broadcast_add(bias)?;
        let scores = scores.to_dtype(DType::F32)?;
        let scores = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
        let weights = scores.broadcast_div(&scores.sum_keepdim(D::Minus1)?)?.to_dtype(x.dtype())?;
        let h = weights.matmul(&heads(&self.value)?)?.transpose(1, 2)?.contiguous()?;
        let h = h.reshape((batch, len, config.num_heads * config.d_kv))?;
        let x = (x + self.out.forward(&h, None)?)?;
        let normal = self.norm2.forward(&x)?;
        let gate = activate(&self.gate.forward(&normal, None)?, Activation::GeluTanh)?;
        x + self.down.forward(&(gate * self.hidden.forward(&normal, None)?)?, None)?
    }
}

/// Root-mean-square normalisation over the last dimension.
#[derive(Debug)]
struct RmsNorm {
    weight: Tensor,
    eps: f64,
}

impl RmsNorm {
    fn load(p: &Params<'_>, config: &T5Config) -> std::result::Result<Self, ModelError> {
        Ok(Self { weight: p.get("weight", &[config.d_model])?, eps: config.layer_norm_epsilon })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let dtype = x.dtype();
        let x = x.to_dtype(DType::F32)?;
        let x = x.broadcast_div(&(x.sqr()?.mean_keepdim(D::Minus1)? + self.eps)?.sqrt()?)?;
        x.to_dtype(dtype)?.broadcast_mul(&self.weight)
    }
}

/// T5's SentencePiece tokenizer, from `tokenizer.json`.
#[derive(Debug)]
pub struct T5Tokenizer {
    tokenizer: Tokenizer,
    eos: u32,
    pad: u32,
    max_length: usize,
}

impl T5Tokenizer {
    /// Opens the tokenizer in `dir` for sequences of at most `longest` ids.
    pub fn open(dir: &Path, longest: usize) -> std::result::Result<Self, ModelError> {
        let broken = |message: String| ModelError::Tokenizer { path: dir.to_owned(), message };
        let file = dir.join("tokenizer.json");
        if !file.is_file() && dir.join("spiece.model").is_file() {
            let message =
                "there is spiece.model but no tokenizer.json: save it once with transformers' T5TokenizerFast";
            return Err(broken(message.into()));
        }
        let mut tokenizer = Tokenizer::from_bytes(read(&file)?).map_err(|e| broken(e.to_string()))?;
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|e| broken(e.to_string()))?;
        let id = |token: &str| tokenizer.token_to_id(token).ok_or_else(|| broken(format!("no token {token}")));
        let (eos, pad) = (id("</s>")?, id("<pad>")?);
        #[derive(Default, Deserialize)]
        struct Config {
            model_max_length: Option<f64>,
        }
        let config = dir.join("tokenizer_config.json");
        let config: Config = if config.is_file() { read_json(&config)? } else { Config::default() };
        let max_length = config.model_max_length.map_or(longest, |length| (length as usize).clamp(1, longest));
        Ok(Self { tokenizer, eos, pad, max_length })
    }

    /// The ids of a text: the text truncated to fit, end, then padding; always the same number.
    pub fn encode(&self, text: &str) -> std::result::Result<Vec<u32>, ModelError> {
        Ok(self.read(text)?.into_ids())
    }

    /// The ids of a text, and how much of the text they cover.
    pub(crate) fn read(&self, text: &str) -> std::result::Result<Reading, ModelError> {
        let encoding = self.tokenizer.encode(text, false).map_err(|e| ModelError::Input(e.to_string()))?;
        let room = self.max_length - 1;
        let mut ids: Vec<u32> = encoding.get_ids().iter().take(room).copied().collect();
        ids.push(self.eos);
        ids.resize(self.max_length, self.pad);
        Ok(Reading::new(ids, encoding.len(), room))
    }
}
