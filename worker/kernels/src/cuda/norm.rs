//! Norms on the device.

use candle_core::{DType, Result, Tensor, bail};

use super::Gpu;
use crate::Rows;

/// Pixels of an image whose statistics one block computes. It is constant, so that the order of sums depends only on
/// the image.
const CHUNK: usize = 64;
/// Maximum number of groups in the kernels.
const MOST_GROUPS: usize = 256;
/// Rows (32 threads each) and heads (8 threads each) that a block of 256 threads handles.
const ROWS: usize = 8;
const HEADS: usize = 32;

/// A group norm's weights and settings.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Group<'a> {
    /// Number of groups.
    pub(crate) groups: usize,
    /// Added to the variance.
    pub(crate) eps: f64,
    /// `[C]`.
    pub(crate) weight: &'a Tensor,
    /// `[C]`.
    pub(crate) bias: &'a Tensor,
}

impl Gpu {
    /// A group norm of `x [B, .., C]`, with SiLU after it if `activate`.
    pub(crate) fn group_norm(&self, x: &Tensor, norm: Group<'_>, activate: bool) -> Result<Tensor> {
        let x = x.contiguous()?;
        let (images, channels, dtype) = (x.dim(0)?, norm.weight.elem_count(), x.dtype());
        let pixels = x.elem_count() / (images * channels).max(1);
        if norm.groups == 0 || norm.groups > MOST_GROUPS || images * pixels * channels != x.elem_count() {
            bail!("a norm of {} groups over {channels} channels was given {:?}", norm.groups, x.shape());
        }
        let (weight, bias) =
            (self.operand(Some(norm.weight), dtype, channels)?, self.operand(Some(norm.bias), dtype, channels)?);
        let chunks = pixels.div_ceil(CHUNK);
        let (partial, moments) = self.output(DType::F32, (images, chunks, norm.groups, 2))?;
        let (out, to) = self.output(dtype, x.shape())?;
        let from = self.pointer(&x)?;
        let sizes = [images, pixels, channels, norm.groups, CHUNK];
        self.kernel("group_norm_stats", dtype)?.pointers(&[from, 0, 0, moments]).sizes(&sizes)?.run(
            [chunks, images, 1],
            super::launch::THREADS,
            0,
        )?;
        self.kernel("group_norm", dtype)?
            .pointers(&[from, 0, 0, moments, weight, bias, to])
            .sizes(&sizes)?
            .float(norm.eps)
            .flag(activate)
            .run([chunks, images, 1], super::launch::THREADS, 0)?;
        drop(partial); // freed in stream order, after both kernels
        Ok(out)
    }

    /// A layer norm of `x [.., C]`.
    pub(crate) fn layer_norm(&self, x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
        let x = x.contiguous()?;
        let (channels, dtype) = (weight.elem_count(), x.dtype());
        let rows = x.elem_count() / channels.max(1);
        let (out, to) = self.output(dtype, x.shape())?;
        let weights = [Some(weight), Some(bias)].map(|weight| self.operand(weight, dtype, channels));
        let [weight, bias] = weights;
        self.kernel("layer_norm", dtype)?
            .pointers(&[self.operand(Some(&x), dtype, rows * channels)?, weight?, bias?, to])
            .long(rows)
            .sizes(&[channels])?
            .float(eps)
            .run([rows.div_ceil(ROWS), 1, 1], super::launch::THREADS, 0)?;
        Ok(out)
    }

    /// `norm(x) (1 + scale) + shift` of `x [B, L, C]` with parts `shift` and `scale` of `rows [B, K C]`.
    pub(crate) fn adaptive_norm(
        &self,
        x: &Tensor,
        rows: &Tensor,
        eps: f64,
        shift: usize,
        scale: usize,
    ) -> Result<Tensor> {
        let (x, rows) = (x.contiguous()?, rows.contiguous()?);
        let ((images, len, channels), width) = (x.dims3()?, rows.dim(1)?);
        let (out, to) = self.output(x.dtype(), x.shape())?;
        self.kernel("adaptive_norm", x.dtype())?
            .pointers(&[self.pointer(&x)?, self.operand(Some(&rows), x.dtype(), images * width)?, to])
            .sizes(&[images, len, channels, width, shift, scale])?
            .float(eps)
            .run([(images * len).div_ceil(ROWS), 1, 1], super::launch::THREADS, 0)?;
        Ok(out)
    }

    /// `qkv [.., 3 heads d]` with queries and keys normalised per head.
    pub(crate) fn query_key_norm(&self, qkv: &Tensor, query: &Tensor, key: &Tensor, eps: f64) -> Result<Tensor> {
        let qkv = qkv.contiguous()?;
        let (dim, dtype) = (query.elem_count(), qkv.dtype());
        let heads = qkv.dims().last().copied().unwrap_or_default() / (3 * dim);
        let positions = qkv.elem_count() / (3 * heads * dim).max(1);
        let (out, to) = self.output(dtype, qkv.shape())?;
        self.kernel("qk_norm", dtype)?
            .pointers(&[
                self.pointer(&qkv)?,
                self.operand(Some(query), dtype, dim)?,
                self.operand(Some(key), dtype, dim)?,
                to,
            ])
            .long(positions)
            .sizes(&[heads, dim])?
            .float(eps)
            .run([(positions * 3 * heads).div_ceil(HEADS), 1, 1], super::launch::THREADS, 0)?;
        Ok(out)
    }

    /// Adds a bias `[C]`, a row `[C]` per image and an image to `out [B, P, C]` in place, so nothing else may refer to
    /// it.
    pub(super) fn add(
        &self,
        out: &Tensor,
        bias: Option<&Tensor>,
        shift: Option<Rows<'_>>,
        residual: Option<Rows<'_>>,
    ) -> Result<()> {
        let dtype = out.dtype();
        let (images, channels) = (out.dim(0)?, out.dims().last().copied().unwrap_or_default());
        let image = out.elem_count() / images.max(1);
        let (shift, shift_rows) = self.rows(shift, dtype, images, channels)?;
        let (residual, residual_rows) = self.rows(residual, dtype, images, image)?;
        self.kernel("add", dtype)?
            .pointers(&[
                self.pointer(out)?,
                self.operand(bias, dtype, channels)?,
                shift,
                shift_rows.pointer,
                residual,
                residual_rows.pointer,
            ])
            .sizes(&[images, image / channels.max(1), channels])?
            .over(out.elem_count())
    }
}
