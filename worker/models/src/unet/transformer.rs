//! Transformer blocks: self-attention over the pixels, cross-attention to the prompt, a gated feed-forward.

use candle_core::Result;
use elbo_kernels::{FeedForward, GroupNorm, LayerNorm, Linear, Rows, cross_attention, self_attention};

use super::config::{Level, UnetConfig};
use super::flow::{Batch, Flow};
use super::resnet::Projections;
use crate::checkpoint::Params;
use crate::error::ModelError;
use crate::layers::{group_norm, joined, layer_norm, linear, linear_no_bias};

/// diffusers' epsilon of the transformer's group norm.
const GROUP_EPS: f64 = 1e-6;
/// torch's default epsilon of layer norms.
const LAYER_EPS: f64 = 1e-5;

/// Transformer2DModel: `x + proj_out(blocks(proj_in(norm(x))))`.
#[derive(Debug)]
pub(super) struct Transformer {
    norm: GroupNorm,
    proj_in: Linear,
    blocks: Vec<Block>,
    proj_out: Linear,
}

/// BasicTransformerBlock.
#[derive(Debug)]
struct Block {
    first: Attention,
    second: CrossAttention,
    feed_forward: FeedForward,
}

/// A block's first attention.
#[derive(Debug)]
enum Attention {
    /// Attention to the pixels.
    Own(SelfAttention),
    /// Attention to the prompt (`only_cross_attention`).
    Cross(CrossAttention),
}

/// `x + out(attention(norm(x)))` over the pixels.
#[derive(Debug)]
struct SelfAttention {
    heads: usize,
    norm: LayerNorm,
    qkv: Linear,
    out: Linear,
}

/// The same with attention to a prompt's tokens.
#[derive(Debug)]
struct CrossAttention {
    norm: LayerNorm,
    query: Linear,
    /// Index of this layer's keys and values in the prompt cache.
    slot: usize,
    out: Linear,
}

impl Transformer {
    pub(super) fn load(
        p: &Params<'_>,
        level: &Level,
        depth: usize,
        only_cross: bool,
        config: &UnetConfig,
        slots: &mut Projections,
    ) -> std::result::Result<Self, ModelError> {
        let channels = level.channels;
        let blocks = p.at("transformer_blocks");
        let block = |i| Block::load(&blocks.at(i), level, only_cross, slots);
        Ok(Self {
            norm: group_norm(&p.at("norm"), config.groups, channels, GROUP_EPS)?,
            proj_in: linear(&p.at("proj_in"), channels, channels)?,
            blocks: (0..depth).map(block).collect::<std::result::Result<_, _>>()?,
            proj_out: linear(&p.at("proj_out"), channels, channels)?,
        })
    }

    /// Maps `x [.., H, W, C]` to the same shape, with one image per evaluation.
    pub(super) fn forward(&self, x: &Flow, batch: &Batch<'_>) -> Result<Flow> {
        let (images, height, width, channels) = x.tensor.dims4()?;
        let sequence = x.tensor.reshape((images, height * width, channels))?;
        let normal = self.norm.forward(&sequence, false)?;
        let mut h = Flow { tensor: self.proj_in.forward(&normal, None)?, shared: x.shared };
        for block in &self.blocks {
            h = block.forward(&h, batch)?;
        }
        let input = Flow { tensor: sequence, shared: x.shared };
        let h = self.proj_out.forward(&h.tensor, Some(batch.rows(&input)))?;
        Ok(Flow { tensor: h.reshape(((), height, width, channels))?, shared: false })
    }
}

impl Block {
    fn load(
        p: &Params<'_>,
        level: &Level,
        only_cross: bool,
        slots: &mut Projections,
    ) -> std::result::Result<Self, ModelError> {
        let channels = level.channels;
        let (attn1, norm1) = (p.at("attn1"), p.at("norm1"));
        Ok(Self {
            first: if only_cross {
                Attention::Cross(CrossAttention::load(&attn1, &norm1, level, slots)?)
            } else {
                Attention::Own(SelfAttention::load(&attn1, &norm1, level)?)
            },
            second: CrossAttention::load(&p.at("attn2"), &p.at("norm2"), level, slots)?,
            feed_forward: FeedForward::new(
                layer_norm(&p.at("norm3"), channels, LAYER_EPS)?,
                linear(&p.at("ff.net.0.proj"), channels, 8 * channels)?,
                linear(&p.at("ff.net.2"), 4 * channels, channels)?,
            ),
        })
    }

    /// Maps `x [.., L, C]` to `[B, L, C]`. Before its first attention to the prompt, the block works on activations
    /// shared by the evaluations of a point.
    fn forward(&self, x: &Flow, batch: &Batch<'_>) -> Result<Flow> {
        let x = match &self.first {
            Attention::Own(attention) => attention.forward(x)?,
            Attention::Cross(attention) => attention.forward(x, batch)?,
        };
        let x = self.second.forward(&x, batch)?;
        Ok(Flow { tensor: self.feed_forward.forward(&x.tensor)?, shared: false })
    }
}

impl SelfAttention {
    fn load(p: &Params<'_>, norm: &Params<'_>, level: &Level) -> std::result::Result<Self, ModelError> {
        let qkv = ["to_q", "to_k", "to_v"].map(|name| p.at(name));
        Ok(Self {
            heads: level.heads,
            norm: layer_norm(norm, level.channels, LAYER_EPS)?,
            qkv: joined(&qkv, level.channels, level.channels, false)?,
            out: linear(&p.at("to_out.0"), level.channels, level.channels)?,
        })
    }

    /// `x [.., L, C]` to the same shape.
    fn forward(&self, x: &Flow) -> Result<Flow> {
        let qkv = self.qkv.forward(&self.norm.forward(&x.tensor)?, None)?;
        let h = self_attention(&qkv, self.heads, false)?;
        Ok(Flow { tensor: self.out.forward(&h, Some(Rows::direct(&x.tensor)))?, shared: x.shared })
    }
}

impl CrossAttention {
    fn load(
        p: &Params<'_>,
        norm: &Params<'_>,
        level: &Level,
        slots: &mut Projections,
    ) -> std::result::Result<Self, ModelError> {
        let slot = slots.text_projections.len();
        slots.text_projections.push((
            linear_no_bias(&p.at("to_k"), level.text, level.channels)?,
            linear_no_bias(&p.at("to_v"), level.text, level.channels)?,
            level.heads,
        ));
        Ok(Self {
            norm: layer_norm(norm, level.channels, LAYER_EPS)?,
            query: linear_no_bias(&p.at("to_q"), level.channels, level.channels)?,
            slot,
            out: linear(&p.at("to_out.0"), level.channels, level.channels)?,
        })
    }

    /// `x [.., L, C]` to `[B, L, C]`.
    fn forward(&self, x: &Flow, batch: &Batch<'_>) -> Result<Flow> {
        let query = self.query.forward(&self.norm.forward(&x.tensor)?, None)?;
        let h = cross_attention(&query, batch.prompts.layer(self.slot)?, batch.pairs(x))?;
        Ok(Flow { tensor: self.out.forward(&h, Some(batch.rows(x)))?, shared: false })
    }
}
