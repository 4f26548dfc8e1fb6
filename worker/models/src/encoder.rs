//! The transformer layer of CLIP, SigLIP and OpenCLIP, with norms before the attention and the feed-forward (Radford et
//! al., ICML 2021).

use std::path::Path;

use candle_core::Tensor;
use elbo_kernels::{Activation, LayerNorm, Linear, Rows, activate, self_attention};

use super::checkpoint::Params;
use super::error::ModelError;
use super::layers::{joined, layer_norm, linear};
use super::settings::unsupported;

/// The settings shared by all layers of a transformer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct EncoderConfig {
    /// Channels.
    pub(crate) width: usize,
    /// Channels within the feed-forward.
    pub(crate) inner: usize,
    /// Attention heads.
    pub(crate) heads: usize,
    /// Epsilon of the norms.
    pub(crate) eps: f64,
    /// The feed-forward's activation.
    pub(crate) activation: Activation,
    /// Whether a position attends only to itself and earlier ones.
    pub(crate) causal: bool,
}

/// The activation that transformers calls `name`, from the configuration at `path`.
pub(crate) fn activation(path: &Path, name: &str) -> Result<Activation, ModelError> {
    match name {
        "quick_gelu" => Ok(Activation::QuickGelu),
        "gelu" => Ok(Activation::Gelu),
        "gelu_pytorch_tanh" | "gelu_new" => Ok(Activation::GeluTanh),
        other => Err(unsupported(path, "hidden_act", other)),
    }
}

/// One layer.
#[derive(Debug)]
pub(crate) struct EncoderLayer {
    heads: usize,
    causal: bool,
    norm1: LayerNorm,
    qkv: Linear,
    out: Linear,
    norm2: LayerNorm,
    mlp: Mlp,
}

impl EncoderLayer {
    /// Loads a layer whose weights have transformers' names.
    pub(crate) fn load(p: &Params<'_>, config: &EncoderConfig) -> Result<Self, ModelError> {
        let attention = p.at("self_attn");
        let qkv = ["q_proj", "k_proj", "v_proj"].map(|name| attention.at(name));
        Ok(Self {
            heads: config.heads,
            causal: config.causal,
            norm1: layer_norm(&p.at("layer_norm1"), config.width, config.eps)?,
            qkv: joined(&qkv, config.width, config.width, true)?,
            out: linear(&attention.at("out_proj"), config.width, config.width)?,
            norm2: layer_norm(&p.at("layer_norm2"), config.width, config.eps)?,
            mlp: Mlp::load(&p.at("mlp"), ["fc1", "fc2"], config)?,
        })
    }

    /// Loads a layer whose weights have OpenCLIP's names.
    pub(crate) fn load_open_clip(p: &Params<'_>, config: &EncoderConfig) -> Result<Self, ModelError> {
        let attention = p.at("attn");
        let weight = attention.get("in_proj_weight", &[3 * config.width, config.width])?;
        let bias = attention.get("in_proj_bias", &[3 * config.width])?;
        Ok(Self {
            heads: config.heads,
            causal: config.causal,
            norm1: layer_norm(&p.at("ln_1"), config.width, config.eps)?,
            qkv: Linear::new(&weight, Some(&bias))?,
            out: linear(&attention.at("out_proj"), config.width, config.width)?,
            norm2: layer_norm(&p.at("ln_2"), config.width, config.eps)?,
            mlp: Mlp::load(&p.at("mlp"), ["c_fc", "c_proj"], config)?,
        })
    }

    /// Maps `x [N, L, C]` to the same shape.
    pub(crate) fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let qkv = self.qkv.forward(&self.norm1.forward(x)?, None)?;
        let h = self_attention(&qkv, self.heads, self.causal)?;
        let x = self.out.forward(&h, Some(Rows::direct(x)))?;
        self.mlp.forward(&self.norm2.forward(&x)?, &x)
    }
}

/// A feed-forward of two linear layers.
#[derive(Debug)]
pub(crate) struct Mlp {
    activation: Activation,
    fc1: Linear,
    fc2: Linear,
}

impl Mlp {
    /// Loads a feed-forward, given the names of its two layers.
    pub(crate) fn load(p: &Params<'_>, names: [&str; 2], config: &EncoderConfig) -> Result<Self, ModelError> {
        let [fc1, fc2] = names.map(|name| p.at(name));
        Ok(Self {
            activation: config.activation,
            fc1: linear(&fc1, config.width, config.inner)?,
            fc2: linear(&fc2, config.inner, config.width)?,
        })
    }

    /// The feed-forward of `x [N, L, C]`, added to `residual`.
    pub(crate) fn forward(&self, x: &Tensor, residual: &Tensor) -> candle_core::Result<Tensor> {
        let h = activate(&self.fc1.forward(x, None)?, self.activation)?;
        self.fc2.forward(&h, Some(Rows::direct(residual)))
    }
}
