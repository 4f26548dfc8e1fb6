//! Activations, gates, copies and errors on the device.

use candle_core::{DType, Result, Tensor, bail};

use super::Gpu;
use crate::{Activation, Deviation, MeanErrors, Rows};

impl Gpu {
    /// Applies an activation to every element.
    pub(crate) fn activate(&self, x: &Tensor, activation: Activation) -> Result<Tensor> {
        let kind = match activation {
            Activation::Silu => 0,
            Activation::Gelu => 1,
            Activation::GeluTanh => 2,
            Activation::QuickGelu => 3,
        };
        let x = x.contiguous()?;
        let (out, to) = self.output(x.dtype(), x.shape())?;
        self.kernel("activate", x.dtype())?
            .pointers(&[self.pointer(&x)?, to])
            .long(x.elem_count())
            .sizes(&[kind])?
            .over(x.elem_count())?;
        Ok(out)
    }

    /// Maps `x [.., 2C]`, with halves `(h, g)`, to `h gelu(g) [.., C]`.
    pub(crate) fn geglu(&self, x: &Tensor) -> Result<Tensor> {
        let x = x.contiguous()?;
        let mut dims = x.dims().to_vec();
        let Some(last) = dims.last_mut().filter(|d| **d > 0 && **d % 2 == 0) else {
            bail!("a gated unit needs an even number of channels, found {:?}", x.shape());
        };
        *last /= 2;
        let channels = *last;
        let rows = x.elem_count() / (2 * channels);
        let (out, to) = self.output(x.dtype(), dims)?;
        self.kernel("geglu", x.dtype())?
            .pointers(&[self.pointer(&x)?, to])
            .long(rows)
            .sizes(&[channels])?
            .over(rows * channels)?;
        Ok(out)
    }

    /// `x + gate h` for `x` and `h [B, L, C]`, with part `gate` of `rows [B, K C]`.
    pub(crate) fn gate(&self, x: &Tensor, h: &Tensor, rows: &Tensor, gate: usize) -> Result<Tensor> {
        let (x, h, rows) = (x.contiguous()?, h.contiguous()?, rows.contiguous()?);
        let ((images, len, channels), width, dtype) = (x.dims3()?, rows.dim(1)?, x.dtype());
        let (out, to) = self.output(dtype, x.shape())?;
        self.kernel("gate", dtype)?
            .pointers(&[
                self.pointer(&x)?,
                self.operand(Some(&h), dtype, x.elem_count())?,
                self.operand(Some(&rows), dtype, images * width)?,
                to,
            ])
            .sizes(&[images, len, channels, width, gate])?
            .over(x.elem_count())?;
        Ok(out)
    }

    /// Rows `index` of `x` along the first dimension.
    pub(crate) fn gather(&self, x: &Tensor, index: &[u32]) -> Result<Tensor> {
        let x = x.contiguous()?;
        let mut dims = x.dims().to_vec();
        let Some(first) = dims.first_mut() else { bail!("rows of a scalar") };
        let len = x.elem_count() / (*first).max(1);
        *first = index.len();
        let (from, rows) = self.rows(Some(Rows::indexed(&x, index)), x.dtype(), index.len(), len)?;
        let (out, to) = self.output(x.dtype(), dims)?;
        self.kernel("gather", x.dtype())?
            .pointers(&[from, rows.pointer, to])
            .sizes(&[index.len()])?
            .long(len)
            .over(index.len() * len)?;
        Ok(out)
    }

    /// Joins each image of `x [B, H, W, C1]` with one image `[H, W, C2]` of `other`.
    pub(crate) fn concat(&self, x: &Tensor, other: Rows<'_>) -> Result<Tensor> {
        let x = x.contiguous()?;
        let ((images, h, w, c1), (_, h2, w2, c2)) = (x.dims4()?, other.tensor.dims4()?);
        if (h, w) != (h2, w2) {
            bail!("images of {h}x{w} and {h2}x{w2} pixels can't be joined");
        }
        let dtype = x.dtype();
        let (from, rows) = self.rows(Some(other), dtype, images, h * w * c2)?;
        let (out, to) = self.output(dtype, (images, h, w, c1 + c2))?;
        self.kernel("concat", dtype)?
            .pointers(&[self.pointer(&x)?, from, rows.pointer, to])
            .sizes(&[images, h * w, c1, c2])?
            .over(out.elem_count())?;
        Ok(out)
    }

    /// Doubles the height and width of `x [B, H, W, C]` by repeating pixels.
    pub(crate) fn upsample(&self, x: &Tensor) -> Result<Tensor> {
        let x = x.contiguous()?;
        let (b, h, w, c) = x.dims4()?;
        let (out, to) = self.output(x.dtype(), (b, 2 * h, 2 * w, c))?;
        self.kernel("upsample", x.dtype())?
            .pointers(&[self.pointer(&x)?, to])
            .sizes(&[b, h, w, c])?
            .over(out.elem_count())?;
        Ok(out)
    }

    /// The mean error of every evaluation `[B]`, in f32; see [`MeanErrors`].
    pub(crate) fn mean_errors(&self, output: &Tensor, of: &MeanErrors<'_>) -> Result<Tensor> {
        let output = output.contiguous()?;
        let (evaluations, height, width, out_channels) = output.dims4()?;
        let (points, _, _, channels) = of.targets.dims4()?;
        let deviation = match of.deviation {
            Deviation::Squared => 0,
            Deviation::Absolute => 1,
            Deviation::Huber => 2,
        };
        let f32s = |tensor, len| self.operand(Some(tensor), DType::F32, len);
        let of_points = self.indices(of.points)?;
        let (out, to) = self.output(DType::F32, evaluations)?;
        let size = points * height * width * channels;
        self.kernel("errors", output.dtype())?
            .pointers(&[
                self.pointer(&output)?,
                f32s(of.noisy, size)?,
                f32s(of.targets, size)?,
                f32s(of.mix, 2 * points)?,
                of_points.pointer,
                to,
            ])
            .sizes(&[evaluations, height * width, channels, out_channels, deviation])?
            .run([evaluations, 1, 1], super::launch::THREADS, 0)?;
        Ok(out)
    }
}
