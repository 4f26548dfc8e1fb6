//! Adaptive layer normalisation (adaLN-Zero; Peebles & Xie, ICCV 2023): shifts, scales and gates computed from the
//! timestep and the condition, one row per image.

use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor, bail};

use super::cpu::{full_precision, is_cpu_f32, values, with_values};
use super::norm::{LayerKernel, LayerOp};
use super::profile::{Part, timed};
use super::simd::dispatch;

/// Rows `[B, K C]` of `K` shifts, scales and gates of `C` channels each, addressed by position.
#[derive(Clone, Copy, Debug)]
pub struct Modulation<'a> {
    rows: &'a Tensor,
    channels: usize,
}

impl<'a> Modulation<'a> {
    /// From the output of a modulation's linear layer.
    pub fn new(rows: &'a Tensor, channels: usize) -> Self {
        Self { rows, channels }
    }

    /// `norm(x) (1 + scale) + shift` of `x [B, L, C]`, where `norm` has no weights of its own.
    pub fn normalise(&self, x: &Tensor, eps: f64, shift: usize, scale: usize) -> Result<Tensor> {
        self.check(x, shift.max(scale))?;
        timed(x, Part::Norm, "adaptive-norm", 0, || {
            on_gpu!(x, gpu => gpu.adaptive_norm(x, self.rows, eps, shift, scale));
            if is_cpu_f32(x) && is_cpu_f32(self.rows) {
                let op = Normalise { channels: self.channels, eps, shift, scale };
                return x.contiguous()?.apply_op2_no_bwd(&self.rows.contiguous()?, &op);
            }
            self.plain_normalise(x, eps, shift, scale)
        })
    }

    /// The same in plain candle operations, for any device and data type.
    fn plain_normalise(&self, x: &Tensor, eps: f64, shift: usize, scale: usize) -> Result<Tensor> {
        let dtype = x.dtype();
        let x = full_precision(x)?;
        let x = x.broadcast_sub(&x.mean_keepdim(2)?)?;
        let variance = x.sqr()?.mean_keepdim(2)?;
        let x = x.broadcast_div(&(variance + eps)?.sqrt()?)?;
        let (scale, shift) = (full_precision(&self.part(scale)?)?, full_precision(&self.part(shift)?)?);
        x.broadcast_mul(&(scale + 1.0)?)?.broadcast_add(&shift)?.to_dtype(dtype)
    }

    /// `x + gate h` for `x` and `h [B, L, C]`.
    pub fn gate(&self, x: &Tensor, h: &Tensor, gate: usize) -> Result<Tensor> {
        self.check(x, gate)?;
        if x.dims() != h.dims() {
            bail!("a gated branch {:?} does not fit {:?}", h.shape(), x.shape());
        }
        timed(x, Part::Norm, "gate", 0, || {
            on_gpu!(x, gpu => gpu.gate(x, h, self.rows, gate));
            if is_cpu_f32(x) && is_cpu_f32(h) && is_cpu_f32(self.rows) {
                let rows = self.rows.contiguous()?;
                let op = Gate { rows: &rows, channels: self.channels, gate };
                return x.contiguous()?.apply_op2_no_bwd(&h.contiguous()?, &op);
            }
            x + h.broadcast_mul(&self.part(gate)?)?
        })
    }

    /// Part `index` as `[B, 1, C]`.
    fn part(&self, index: usize) -> Result<Tensor> {
        self.rows.narrow(1, index * self.channels, self.channels)?.unsqueeze(1)
    }

    fn check(&self, x: &Tensor, last: usize) -> Result<()> {
        let (batch, _, channels) = x.dims3()?;
        let (rows, width) = self.rows.dims2()?;
        if rows != batch || channels != self.channels || (last + 1) * channels > width {
            bail!("a modulation {:?} of {} channels does not fit {:?}", self.rows.shape(), self.channels, x.shape());
        }
        Ok(())
    }
}

struct Normalise {
    channels: usize,
    eps: f64,
    shift: usize,
    scale: usize,
}

impl CustomOp2 for Normalise {
    fn name(&self) -> &'static str {
        "adaptive-norm"
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        let (x, rows) = (values(s1, l1)?, values(s2, l2)?);
        let (batch, width) = l2.shape().dims2()?;
        let image = x.len() / batch.max(1);
        let mut out = vec![0.0; x.len()];
        let mut weight = vec![0.0; self.channels];
        for (b, (x, out)) in x.chunks_exact(image.max(1)).zip(out.chunks_exact_mut(image.max(1))).enumerate() {
            let part = |index: usize| &rows[b * width + index * self.channels..][..self.channels];
            weight.iter_mut().zip(part(self.scale)).for_each(|(w, scale)| *w = 1.0 + scale);
            let norm = LayerOp::new(&weight, part(self.shift), self.eps as f32);
            dispatch(LayerKernel { norm, x, out });
        }
        Ok((CpuStorage::F32(out), l1.shape().clone()))
    }
}

struct Gate<'a> {
    rows: &'a Tensor,
    channels: usize,
    gate: usize,
}

impl CustomOp2 for Gate<'_> {
    fn name(&self) -> &'static str {
        "gate"
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        let (x, h) = (values(s1, l1)?, values(s2, l2)?);
        let (batch, width) = self.rows.dims2()?;
        let (image, mut out) = (x.len() / batch.max(1), x.to_vec());
        with_values(self.rows, |rows| {
            for (b, (out, h)) in out.chunks_exact_mut(image.max(1)).zip(h.chunks_exact(image.max(1))).enumerate() {
                let gate = &rows[b * width + self.gate * self.channels..][..self.channels];
                for (out, h) in out.chunks_exact_mut(self.channels).zip(h.chunks_exact(self.channels)) {
                    out.iter_mut().zip(h).zip(gate).for_each(|((out, h), gate)| *out += gate * h);
                }
            }
            Ok(())
        })?;
        Ok((CpuStorage::F32(out), l1.shape().clone()))
    }
}

/// Root-mean-square norms of queries and keys, per head (Esser et al., 2024, section 5.3.2).
#[derive(Debug)]
pub struct QueryKeyNorm {
    eps: f64,
    /// `[d]` each.
    query: Tensor,
    key: Tensor,
}

impl QueryKeyNorm {
    /// Norms with weights `[d]`, where `d` is a head's width.
    pub fn new(eps: f64, query: &Tensor, key: &Tensor) -> Self {
        Self { eps, query: query.clone(), key: key.clone() }
    }

    /// `qkv [B, L, 3 heads d]` (queries, keys, values side by side) with queries and keys normalised.
    pub fn forward(&self, qkv: &Tensor) -> Result<Tensor> {
        let (_, _, width) = qkv.dims3()?;
        let dim = self.query.dim(0)?;
        if dim == 0 || width % (3 * dim) != 0 || self.key.dim(0)? != dim {
            bail!("norms of heads of {dim} channels do not fit {:?}", qkv.shape());
        }
        timed(qkv, Part::Norm, "query-key-norm", 0, || {
            on_gpu!(qkv, gpu => gpu.query_key_norm(qkv, &self.query, &self.key, self.eps));
            if is_cpu_f32(qkv) && is_cpu_f32(&self.query) {
                let weights = [self.query.to_vec1()?, self.key.to_vec1()?];
                return qkv.contiguous()?.apply_op1_no_bwd(&NormaliseHeads { dim, eps: self.eps as f32, weights });
            }
            self.plain(qkv)
        })
    }

    /// The same in plain candle operations, for any device and data type.
    fn plain(&self, qkv: &Tensor) -> Result<Tensor> {
        let (batch, len, width) = qkv.dims3()?;
        let (dim, dtype) = (self.query.dim(0)?, qkv.dtype());
        let part = |index: usize, weight: Option<&Tensor>| {
            let x = qkv.narrow(2, index * width / 3, width / 3)?;
            let Some(weight) = weight else { return Ok(x) };
            let x = full_precision(&x.contiguous()?.reshape((batch, len, width / 3 / dim, dim))?)?;
            let x = x.broadcast_div(&(x.sqr()?.mean_keepdim(3)? + self.eps)?.sqrt()?)?;
            x.to_dtype(dtype)?.broadcast_mul(weight)?.reshape((batch, len, width / 3))
        };
        Tensor::cat(&[part(0, Some(&self.query))?, part(1, Some(&self.key))?, part(2, None)?], 2)
    }
}

struct NormaliseHeads {
    dim: usize,
    eps: f32,
    weights: [Vec<f32>; 2],
}

impl CustomOp1 for NormaliseHeads {
    fn name(&self) -> &'static str {
        "query-key-norm"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let mut out = values(storage, layout)?.to_vec();
        let (_, _, width) = layout.shape().dims3()?;
        for row in out.chunks_exact_mut(width) {
            for (part, weight) in row.chunks_exact_mut(width / 3).zip(&self.weights) {
                for head in part.chunks_exact_mut(self.dim) {
                    let mean = head.iter().map(|v| v * v).sum::<f32>() / self.dim as f32;
                    let scale = 1.0 / (mean + self.eps).sqrt();
                    head.iter_mut().zip(weight).for_each(|(v, w)| *v = *v * scale * w);
                }
            }
        }
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }
}
