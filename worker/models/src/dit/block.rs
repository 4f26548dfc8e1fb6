//! One block: self-attention over the patches and a feed-forward, each modulated by timestep and class.

use candle_core::{Result, Tensor};
use elbo_kernels::{Activation, Linear, Modulation, activate, self_attention};

use super::config::DitConfig;
use super::names::Names;
use crate::checkpoint::Params;
use crate::error::ModelError;
use crate::layers::{joined, linear};
use crate::probe::Probe;

/// diffusers' epsilon of adaptive norms.
pub(super) const EPS: f64 = 1e-6;

/// BasicTransformerBlock with `ada_norm_zero`.
#[derive(Debug)]
pub(super) struct Block {
    heads: usize,
    width: usize,
    feed_forward_eps: f64,
    /// Computes shift, scale and gate of the attention, then of the feed-forward.
    modulation: Linear,
    qkv: Linear,
    out: Linear,
    up: Linear,
    down: Linear,
}

impl Block {
    pub(super) fn load(p: &Params<'_>, names: Names, config: &DitConfig) -> std::result::Result<Self, ModelError> {
        let width = config.width();
        let qkv = match names {
            Names::Diffusers => {
                let parts = ["to_q", "to_k", "to_v"].map(|name| p.at("attn1").at(name));
                joined(&parts, width, width, true)?
            }
            Names::Original => linear(&p.at("attn.qkv"), width, 3 * width)?,
        };
        let [modulation, out, up, down] = names.block();
        Ok(Self {
            heads: config.num_attention_heads,
            width,
            feed_forward_eps: if names == Names::Original { EPS } else { config.norm_eps },
            modulation: linear(&p.at(modulation), width, 6 * width)?,
            qkv,
            out: linear(&p.at(out), width, width)?,
            up: linear(&p.at(up), width, 4 * width)?,
            down: linear(&p.at(down), 4 * width, width)?,
        })
    }

    /// Maps `x [B, L, D]` to the same shape; `embedding [B, D]` is the activated sum of timestep and class embedding.
    pub(super) fn forward(&self, x: &Tensor, embedding: &Tensor, name: &str, probe: &mut Probe<'_>) -> Result<Tensor> {
        let rows = self.modulation.forward(embedding, None)?;
        let modulation = Modulation::new(&rows, self.width);
        let qkv = self.qkv.forward(&modulation.normalise(x, EPS, 0, 1)?, None)?;
        let h = self.out.forward(&self_attention(&qkv, self.heads, false)?, None)?;
        probe.see(|| format!("{name}.attn1"), &h);
        let x = modulation.gate(x, &h, 2)?;
        let normal = modulation.normalise(&x, self.feed_forward_eps, 3, 4)?;
        let h = activate(&self.up.forward(&normal, None)?, Activation::GeluTanh)?;
        let h = self.down.forward(&h, None)?;
        probe.see(|| format!("{name}.ff"), &h);
        modulation.gate(&x, &h, 5)
    }
}
