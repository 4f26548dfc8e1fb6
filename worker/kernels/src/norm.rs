//! Group and layer normalisation.
//!
//! Means and variances take two passes (the variance about the mean), which keeps f32 accurate. Group sums over many
//! pixels are accumulated in f64, block by block.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};
use pulp::Simd;

use super::cpu::{full_precision, is_cpu_f32, values};
use super::math::{silu, sum};
use super::profile::{Part, timed};
use super::simd::{Kernel, dispatch};

/// Pixels summed in f32 before the sum is added in f64.
const BLOCK: usize = 64;

/// Group normalisation over the pixels and the channels of a group, per image.
#[derive(Debug)]
pub struct GroupNorm {
    groups: usize,
    eps: f64,
    weight: Tensor,
    bias: Tensor,
    cpu: Option<(Vec<f32>, Vec<f32>)>,
}

impl GroupNorm {
    /// A layer with `groups` groups, and weight and bias `[C]`.
    pub fn new(groups: usize, eps: f64, weight: &Tensor, bias: &Tensor) -> Result<Self> {
        let channels = weight.dim(0)?;
        if groups == 0 || !channels.is_multiple_of(groups) {
            bail!("{channels} channels do not divide into {groups} groups");
        }
        let cpu = if is_cpu_f32(weight) { Some((weight.to_vec1()?, bias.to_vec1()?)) } else { None };
        Ok(Self { groups, eps, weight: weight.clone(), bias: bias.clone(), cpu })
    }

    /// Splits the layer into one for the first `channels` channels and one for the others, if no group contains both.
    pub fn split(&self, channels: usize) -> Result<Option<(Self, Self)>> {
        let all = self.weight.dim(0)?;
        let per_group = all / self.groups;
        if !channels.is_multiple_of(per_group) || channels >= all {
            return Ok(None);
        }
        let part = |start: usize, len: usize| {
            let (weight, bias) = (self.weight.narrow(0, start, len)?, self.bias.narrow(0, start, len)?);
            Self::new(len / per_group, self.eps, &weight.contiguous()?, &bias.contiguous()?)
        };
        Ok(Some((part(0, channels)?, part(channels, all - channels)?)))
    }

    /// Normalises `x [B, .., C]`, then applies SiLU if `activate`.
    pub fn forward(&self, x: &Tensor, activate: bool) -> Result<Tensor> {
        timed(x, Part::Norm, "group-norm", 0, || {
            on_gpu!(x, gpu => gpu.group_norm(x, self.on_gpu(), activate));
            if self.cpu.is_some() && is_cpu_f32(x) {
                return x.contiguous()?.apply_op1_no_bwd(&GroupOp { norm: self, activate });
            }
            let y = self.plain(x)?;
            if activate { y.silu() } else { Ok(y) }
        })
    }

    /// The same in plain candle operations, for any device and data type.
    pub(crate) fn plain(&self, x: &Tensor) -> Result<Tensor> {
        let (dims, channels, batch) = (x.dims(), self.weight.dim(0)?, x.dim(0)?);
        let pixels = x.elem_count() / (batch * channels).max(1);
        let dtype = x.dtype();
        let x = full_precision(&x.reshape((batch, pixels, self.groups, channels / self.groups))?)?;
        let mean = x.mean_keepdim((1, 3))?;
        let x = x.broadcast_sub(&mean)?;
        let variance = x.sqr()?.mean_keepdim((1, 3))?;
        let x = x.broadcast_div(&(variance + self.eps)?.sqrt()?)?.reshape(dims)?.to_dtype(dtype)?;
        x.broadcast_mul(&self.weight)?.broadcast_add(&self.bias)
    }

    /// The layer in the form the GPU code takes.
    #[cfg(feature = "cuda")]
    pub(crate) fn on_gpu(&self) -> crate::cuda::norm::Group<'_> {
        crate::cuda::norm::Group { groups: self.groups, eps: self.eps, weight: &self.weight, bias: &self.bias }
    }

    /// Scale and shift per channel that normalise one image `[pixels, C]`.
    pub(crate) fn affine(&self, image: &[f32]) -> Result<Affine> {
        match &self.cpu {
            Some((weight, bias)) if !weight.is_empty() && image.len().is_multiple_of(weight.len()) => {
                let stats = Stats { image, groups: self.groups, eps: self.eps, weight, bias };
                Ok(dispatch(stats))
            }
            _ => bail!("a group norm over {:?} channels does not fit the input", self.weight.shape()),
        }
    }
}

/// `y = x * scale[c] + shift[c]`.
#[derive(Debug)]
pub(crate) struct Affine {
    scale: Vec<f32>,
    shift: Vec<f32>,
}

impl Affine {
    /// Applies it to whole pixels, with SiLU after it if `activate`.
    #[inline(always)]
    pub(crate) fn apply(&self, from: &[f32], to: &mut [f32], activate: bool) {
        let channels = self.scale.len();
        for (from, to) in from.chunks_exact(channels).zip(to.chunks_exact_mut(channels)) {
            let affine =
                from.iter().zip(&self.scale).zip(&self.shift).map(|((x, scale), shift)| x.mul_add(*scale, *shift));
            if activate {
                to.iter_mut().zip(affine).for_each(|(to, y)| *to = silu(y));
            } else {
                to.iter_mut().zip(affine).for_each(|(to, y)| *to = y);
            }
        }
    }
}

struct Stats<'a> {
    image: &'a [f32],
    groups: usize,
    eps: f64,
    weight: &'a [f32],
    bias: &'a [f32],
}

impl Kernel for Stats<'_> {
    type Output = Affine;

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> Affine {
        let channels = self.weight.len();
        let per_group = channels / self.groups;
        let count = (self.image.len() / self.groups) as f64;
        let mut means = vec![0.0f32; channels];
        let totals = self.totals(&means, |x, _| x);
        for (group, total) in means.chunks_exact_mut(per_group).zip(totals.chunks_exact(per_group)) {
            group.fill((total.iter().sum::<f64>() / count) as f32);
        }
        let squares = self.totals(&means, |x, mean| (x - mean) * (x - mean));
        let mut affine = Affine { scale: vec![0.0; channels], shift: vec![0.0; channels] };
        for (g, squares) in squares.chunks_exact(per_group).enumerate() {
            let deviation = (squares.iter().sum::<f64>() / count + self.eps).sqrt();
            let channels = g * per_group..(g + 1) * per_group;
            for (c, mean) in channels.clone().zip(&means[channels]) {
                let scale = (f64::from(self.weight[c]) / deviation) as f32;
                affine.scale[c] = scale;
                affine.shift[c] = mean.mul_add(-scale, self.bias[c]);
            }
        }
        affine
    }
}

impl Stats<'_> {
    /// For each channel, the sum over pixels of `map(x, mean)`.
    #[inline(always)]
    fn totals(&self, means: &[f32], map: impl Fn(f32, f32) -> f32) -> Vec<f64> {
        let channels = means.len();
        let mut totals = vec![0.0f64; channels];
        let mut block_sums = vec![0.0f32; channels];
        for block in self.image.chunks(BLOCK * channels) {
            block_sums.fill(0.0);
            let fours = block.chunks_exact(4 * channels);
            let rest = fours.remainder();
            for four in fours {
                let (a, four) = four.split_at(channels);
                let (b, four) = four.split_at(channels);
                let (c, d) = four.split_at(channels);
                let inputs = a.iter().zip(b).zip(c).zip(d).zip(means);
                for (sum, ((((a, b), c), d), mean)) in block_sums.iter_mut().zip(inputs) {
                    *sum += (map(*a, *mean) + map(*b, *mean)) + (map(*c, *mean) + map(*d, *mean));
                }
            }
            for pixel in rest.chunks_exact(channels) {
                for ((sum, &x), &mean) in block_sums.iter_mut().zip(pixel).zip(means) {
                    *sum += map(x, mean);
                }
            }
            for (total, &sum) in totals.iter_mut().zip(&block_sums) {
                *total += f64::from(sum);
            }
        }
        totals
    }
}

struct GroupOp<'a> {
    norm: &'a GroupNorm,
    activate: bool,
}

impl CustomOp1 for GroupOp<'_> {
    fn name(&self) -> &'static str {
        "group-norm"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = values(storage, layout)?;
        let mut out = vec![0.0; x.len()];
        let image = x.len() / layout.dims()[0].max(1);
        for (from, to) in x.chunks_exact(image.max(1)).zip(out.chunks_exact_mut(image.max(1))) {
            let affine = self.norm.affine(from)?;
            dispatch(Apply { affine: &affine, from, to, activate: self.activate });
        }
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }
}

/// [`Affine::apply`] as a separate kernel.
struct Apply<'a> {
    affine: &'a Affine,
    from: &'a [f32],
    to: &'a mut [f32],
    activate: bool,
}

impl Kernel for Apply<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        self.affine.apply(self.from, self.to, self.activate);
    }
}

/// Layer normalisation over the last dimension.
#[derive(Debug)]
pub struct LayerNorm {
    eps: f64,
    weight: Tensor,
    bias: Tensor,
    cpu: Option<(Vec<f32>, Vec<f32>)>,
}

impl LayerNorm {
    /// A layer with weight and bias `[C]`.
    pub fn new(eps: f64, weight: &Tensor, bias: &Tensor) -> Result<Self> {
        let cpu = if is_cpu_f32(weight) { Some((weight.to_vec1()?, bias.to_vec1()?)) } else { None };
        Ok(Self { eps, weight: weight.clone(), bias: bias.clone(), cpu })
    }

    /// Normalises `x [.., C]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        timed(x, Part::Norm, "layer-norm", 0, || {
            on_gpu!(x, gpu => gpu.layer_norm(x, &self.weight, &self.bias, self.eps));
            match self.cpu() {
                Some(norm) if is_cpu_f32(x) => x.contiguous()?.apply_op1_no_bwd(&norm),
                _ => self.plain(x),
            }
        })
    }

    /// The layer's values, if it is on the CPU in f32.
    pub(crate) fn cpu(&self) -> Option<LayerOp<'_>> {
        let (weight, bias) = self.cpu.as_ref()?;
        Some(LayerOp { weight, bias, eps: self.eps as f32 })
    }

    /// The same in plain candle operations, for any device and data type.
    pub(crate) fn plain(&self, x: &Tensor) -> Result<Tensor> {
        let (last, dtype) = (x.rank() - 1, x.dtype());
        let x = full_precision(x)?;
        let x = x.broadcast_sub(&x.mean_keepdim(last)?)?;
        let variance = x.sqr()?.mean_keepdim(last)?;
        let x = x.broadcast_div(&(variance + self.eps)?.sqrt()?)?.to_dtype(dtype)?;
        x.broadcast_mul(&self.weight)?.broadcast_add(&self.bias)
    }
}

/// A layer norm on the CPU.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LayerOp<'a> {
    weight: &'a [f32],
    bias: &'a [f32],
    eps: f32,
}

impl<'a> LayerOp<'a> {
    /// A norm whose weight and bias have the same length.
    pub(crate) fn new(weight: &'a [f32], bias: &'a [f32], eps: f32) -> Self {
        Self { weight, bias, eps }
    }

    /// Width of a row.
    pub(crate) fn channels(&self) -> usize {
        self.weight.len()
    }
}

impl CustomOp1 for LayerOp<'_> {
    fn name(&self) -> &'static str {
        "layer-norm"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = values(storage, layout)?;
        if layout.dims().last() != Some(&self.weight.len()) {
            bail!("a layer norm of {} channels was given {:?}", self.weight.len(), layout.shape());
        }
        let mut out = vec![0.0; x.len()];
        dispatch(LayerKernel { norm: *self, x, out: &mut out });
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }
}

/// Normalises rows.
pub(crate) struct LayerKernel<'a> {
    /// The layer.
    pub(crate) norm: LayerOp<'a>,
    /// Whole rows.
    pub(crate) x: &'a [f32],
    /// As long as `x`.
    pub(crate) out: &'a mut [f32],
}

impl Kernel for LayerKernel<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let channels = self.norm.weight.len();
        let inverse = 1.0 / channels as f32;
        for (x, out) in self.x.chunks_exact(channels).zip(self.out.chunks_exact_mut(channels)) {
            let mean = sum(x, |v| v) * inverse;
            let variance = sum(x, |v| (v - mean) * (v - mean)) * inverse;
            let scale = 1.0 / (variance + self.norm.eps).sqrt();
            for (((out, &x), &w), &b) in out.iter_mut().zip(x).zip(self.norm.weight).zip(self.norm.bias) {
                *out = ((x - mean) * scale).mul_add(w, b);
            }
        }
    }
}
