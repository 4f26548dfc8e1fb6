//! A transformer's gated feed-forward: norm, projection to eight times the width, gate, projection back, residual.
//!
//! The hidden activations are by far the widest in a UNet. All steps run on one block of positions at a time, so that
//! the activations never leave the cache.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};

use super::activation::{Gate, geglu};
use super::cpu::{Rows, values};
use super::linear::{Linear, PackedLinear};
use super::norm::{LayerKernel, LayerNorm};
use super::profile::{Part, timed};
use super::simd::dispatch;

/// Positions per block.
const BLOCK: usize = 96;

/// `x + W2 geglu(W1 norm(x))`.
#[derive(Debug)]
pub struct FeedForward {
    norm: LayerNorm,
    gate: Linear,
    out: Linear,
}

impl FeedForward {
    /// From layers of widths `C`, `C` to `2 I` and `I` to `C`.
    pub fn new(norm: LayerNorm, gate: Linear, out: Linear) -> Self {
        Self { norm, gate, out }
    }

    /// `x [.., C]` to the same shape.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match (self.gate.packed(), self.out.packed()) {
            (Some(gate), Some(out)) => {
                let flops = 2 * x.elem_count() * (gate.outputs + out.inputs);
                let op = Op { norm: &self.norm, gate, out };
                timed(x, Part::Linear, "feed-forward", flops, || x.contiguous()?.apply_op1_no_bwd(&op))
            }
            _ => self.plain(x),
        }
    }

    /// The same, one step after the other.
    pub(crate) fn plain(&self, x: &Tensor) -> Result<Tensor> {
        let hidden = self.gate.forward(&self.norm.forward(x)?, None)?;
        self.out.forward(&geglu(&hidden)?, Some(Rows::direct(x)))
    }
}

struct Op<'a> {
    norm: &'a LayerNorm,
    gate: PackedLinear<'a>,
    out: PackedLinear<'a>,
}

impl CustomOp1 for Op<'_> {
    fn name(&self) -> &'static str {
        "feed-forward"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = values(storage, layout)?;
        let (channels, inner) = (self.gate.inputs, self.out.inputs);
        let fits =
            layout.dims().last() == Some(&channels) && self.out.outputs == channels && self.gate.outputs == 2 * inner;
        let Some(norm) = self.norm.cpu().filter(|norm| fits && norm.channels() == channels) else {
            bail!("a feed-forward of {channels} channels was given {:?}", layout.shape());
        };
        let mut normal = vec![0.0; BLOCK * channels];
        let mut hidden = vec![0.0; BLOCK * 2 * inner];
        let mut gated = vec![0.0; BLOCK * inner];
        let mut out = Vec::with_capacity(x.len());
        for x in x.chunks(BLOCK * channels) {
            let rows = x.len() / channels;
            let (normal, hidden) = (&mut normal[..rows * channels], &mut hidden[..rows * 2 * inner]);
            let gated = &mut gated[..rows * inner];
            dispatch(LayerKernel { norm, x, out: normal });
            self.gate.run(normal, None, hidden);
            dispatch(Gate { x: hidden, channels: inner, out: gated });
            let done = out.len();
            out.resize(done + rows * channels, 0.0);
            self.out.run(gated, Some(x), &mut out[done..]);
        }
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }
}
