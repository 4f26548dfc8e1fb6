//! Copies that change an image's shape or layout, and copies to and from the device.

use candle_core::{CpuStorage, CustomOp1, D, DType, Device, Layout, Result, Shape, Tensor, bail};

use super::cpu::{Rows, is_cpu_f32, values, with_values};
use super::profile::{Part, timed};

/// Values as an f32 tensor on a device. On a GPU the copy is enqueued and not waited for.
pub fn upload(values: &[f32], shape: impl Into<Shape>, device: &Device) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Some(gpu) = crate::cuda::Gpu::behind(device)? {
        return gpu.upload(values, shape);
    }
    Tensor::from_slice(values, shape, device)
}

/// The values of a tensor in f32. On a GPU this waits for the work that computes them, but not for work enqueued
/// afterwards.
pub fn download(x: &Tensor) -> Result<Vec<f32>> {
    Download::start(x)?.wait()
}

/// A pending copy of values from a device. On a GPU the copy is enqueued when it is started, so start it before letting
/// others use the device, and wait for it afterwards.
#[derive(Debug)]
pub struct Download(Source);

#[derive(Debug)]
enum Source {
    Host(Vec<f32>),
    #[cfg(feature = "cuda")]
    Gpu(crate::cuda::Download),
}

impl Download {
    /// Enqueues a copy of the values of a tensor in f32.
    pub fn start(x: &Tensor) -> Result<Self> {
        if x.elem_count() == 0 {
            return Ok(Self(Source::Host(Vec::new())));
        }
        let x = x.to_dtype(DType::F32)?.contiguous()?;
        on_gpu!(&x, gpu => Ok(Self(Source::Gpu(crate::cuda::Download::start(gpu, &x)?))));
        Ok(Self(Source::Host(x.flatten_all()?.to_vec1()?)))
    }

    /// Waits for the values; returns them in the order of the tensor.
    pub fn wait(self) -> Result<Vec<f32>> {
        match self.0 {
            Source::Host(values) => Ok(values),
            #[cfg(feature = "cuda")]
            Source::Gpu(copy) => copy.wait(),
        }
    }
}

/// Doubles the height and width of `x [B, H, W, C]` by repeating pixels.
pub fn upsample_nearest2x(x: &Tensor) -> Result<Tensor> {
    timed(x, Part::Other, "upsample", 0, || {
        on_gpu!(x, gpu => gpu.upsample(x));
        if is_cpu_f32(x) { x.contiguous()?.apply_op1_no_bwd(&Upsample) } else { plain_upsample(x) }
    })
}

/// The same in plain candle operations, for any device and data type.
pub(crate) fn plain_upsample(x: &Tensor) -> Result<Tensor> {
    let (b, h, w, c) = x.dims4()?;
    let x = x.reshape((b, h, 1, w, 1, c))?.broadcast_as((b, h, 2, w, 2, c))?;
    x.contiguous()?.reshape((b, 2 * h, 2 * w, c))
}

struct Upsample;

impl CustomOp1 for Upsample {
    fn name(&self) -> &'static str {
        "upsample"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = values(storage, layout)?;
        let (b, h, w, c) = layout.shape().dims4()?;
        let mut out = Vec::with_capacity(4 * x.len());
        for row in x.chunks_exact((w * c).max(1)) {
            let start = out.len();
            for pixel in row.chunks_exact(c) {
                out.extend_from_slice(pixel);
                out.extend_from_slice(pixel);
            }
            out.extend_from_within(start..);
        }
        Ok((CpuStorage::F32(out), Shape::from((b, 2 * h, 2 * w, c))))
    }
}

/// Joins `x [B, H, W, C1]` and one image `[H, W, C2]` per batch element to `[B, H, W, C1 + C2]`.
pub fn concat_channels(x: &Tensor, other: Rows<'_>) -> Result<Tensor> {
    timed(x, Part::Other, "concat", 0, || {
        on_gpu!(x, gpu => gpu.concat(x, other));
        if is_cpu_f32(x) && is_cpu_f32(other.tensor) {
            x.contiguous()?.apply_op1_no_bwd(&Concat { other })
        } else {
            plain_concat(x, other)
        }
    })
}

/// The same in plain candle operations, for any device and data type.
pub(crate) fn plain_concat(x: &Tensor, other: Rows<'_>) -> Result<Tensor> {
    Tensor::cat(&[x, &other.materialise()?], D::Minus1)
}

struct Concat<'a> {
    other: Rows<'a>,
}

impl CustomOp1 for Concat<'_> {
    fn name(&self) -> &'static str {
        "concat-channels"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = values(storage, layout)?;
        let (b, h, w, c1) = layout.shape().dims4()?;
        let (_, h2, w2, c2) = self.other.tensor.dims4()?;
        if (h, w) != (h2, w2) {
            bail!("images of {h}x{w} and {h2}x{w2} pixels can't be joined");
        }
        let mut out = Vec::with_capacity(b * h * w * (c1 + c2));
        with_values(self.other.tensor, |all| {
            for (i, image) in x.chunks_exact((h * w * c1).max(1)).enumerate() {
                let other = &all[self.other.at(i)? * h * w * c2..][..h * w * c2];
                for (left, right) in image.chunks_exact(c1).zip(other.chunks_exact(c2)) {
                    out.extend_from_slice(left);
                    out.extend_from_slice(right);
                }
            }
            Ok(())
        })?;
        Ok((CpuStorage::F32(out), Shape::from((b, h, w, c1 + c2))))
    }
}

/// Rows `index` of `x` along the first dimension.
pub fn gather(x: &Tensor, index: &[u32]) -> Result<Tensor> {
    let rows = Rows::indexed(x, index);
    timed(x, Part::Other, "gather", 0, || {
        on_gpu!(x, gpu => gpu.gather(x, index));
        if is_cpu_f32(x) { x.contiguous()?.apply_op1_no_bwd(&Gather { rows, index }) } else { rows.materialise() }
    })
}

struct Gather<'a> {
    rows: Rows<'a>,
    index: &'a [u32],
}

impl CustomOp1 for Gather<'_> {
    fn name(&self) -> &'static str {
        "gather"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = values(storage, layout)?;
        let mut dims = layout.dims().to_vec();
        let len = x.len() / dims[0].max(1);
        let mut out = Vec::with_capacity(self.index.len() * len);
        for b in 0..self.index.len() {
            out.extend_from_slice(&x[self.rows.at(b)? * len..][..len]);
        }
        dims[0] = self.index.len();
        Ok((CpuStorage::F32(out), Shape::from(dims)))
    }
}
