//! Transformer blocks: self-attention over the pixels, cross-attention to the prompt, a gated feed-forward.

use candle_core::Result;

use super::config::{Level, UnetConfig};
use super::flow::{Batch, Flow};
use super::resnet::Slots;
use crate::models::checkpoint::{ModelError, Params};
use crate::models::layers::{group_norm, joined, layer_norm, linear, linear_no_bias};
use elbo_kernels::{FeedForward, GroupNorm, LayerNorm, Linear, Rows, cross_attention, self_attention};

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
    heads: usize,
    norm1: LayerNorm,
    qkv: Linear,
    out1: Linear,
    norm2: LayerNorm,
    query: Linear,
    /// Which of the prompt cache's keys and values this attends to.
    slot: usize,
    out2: Linear,
    feed_forward: FeedForward,
}

impl Transformer {
    pub(super) fn load(
        p: &Params<'_>,
        level: &Level,
        config: &UnetConfig,
        slots: &mut Slots,
    ) -> std::result::Result<Self, ModelError> {
        let channels = level.channels;
        let blocks = p.at("transformer_blocks");
        let block = |i| Block::load(&blocks.at(i), level, slots);
        Ok(Self {
            norm: group_norm(&p.at("norm"), config.groups, channels, GROUP_EPS)?,
            proj_in: linear(&p.at("proj_in"), channels, channels)?,
            blocks: (0..level.depth).map(block).collect::<std::result::Result<_, _>>()?,
            proj_out: linear(&p.at("proj_out"), channels, channels)?,
        })
    }

    /// `x [.., H, W, C]` to the same shape, one image per evaluation.
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
    fn load(p: &Params<'_>, level: &Level, slots: &mut Slots) -> std::result::Result<Self, ModelError> {
        let (channels, text) = (level.channels, level.text);
        let (attn1, attn2) = (p.at("attn1"), p.at("attn2"));
        let slot = slots.text_projections.len();
        slots.text_projections.push((
            linear_no_bias(&attn2.at("to_k"), text, channels)?,
            linear_no_bias(&attn2.at("to_v"), text, channels)?,
            level.heads,
        ));
        let qkv = ["to_q", "to_k", "to_v"].map(|name| attn1.at(name));
        Ok(Self {
            heads: level.heads,
            norm1: layer_norm(&p.at("norm1"), channels, LAYER_EPS)?,
            qkv: joined(&qkv, channels, channels, false)?,
            out1: linear(&attn1.at("to_out.0"), channels, channels)?,
            norm2: layer_norm(&p.at("norm2"), channels, LAYER_EPS)?,
            query: linear_no_bias(&attn2.at("to_q"), channels, channels)?,
            slot,
            out2: linear(&attn2.at("to_out.0"), channels, channels)?,
            feed_forward: FeedForward::new(
                layer_norm(&p.at("norm3"), channels, LAYER_EPS)?,
                linear(&p.at("ff.net.0.proj"), channels, 8 * channels)?,
                linear(&p.at("ff.net.2"), 4 * channels, channels)?,
            ),
        })
    }

    /// `x [.., L, C]` to `[B, L, C]`. Up to its query, the block keeps what evaluations of a point share.
    fn forward(&self, x: &Flow, batch: &Batch<'_>) -> Result<Flow> {
        let qkv = self.qkv.forward(&self.norm1.forward(&x.tensor)?, None)?;
        let h = self_attention(&qkv, self.heads, false)?;
        let tensor = self.out1.forward(&h, Some(Rows::direct(&x.tensor)))?;
        let x = Flow { tensor, shared: x.shared };

        let query = self.query.forward(&self.norm2.forward(&x.tensor)?, None)?;
        let h = cross_attention(&query, batch.prompts.layer(self.slot)?, batch.pairs(&x))?;
        let x = self.out2.forward(&h, Some(batch.rows(&x)))?;

        Ok(Flow { tensor: self.feed_forward.forward(&x)?, shared: false })
    }
}
