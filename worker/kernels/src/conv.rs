//! 3x3 convolutions on channels-last images, as implicit matrix products, or by Winograd's method for images that are
//! large enough.
//!
//! The image, or a strip of its rows, is copied to a zero-padded scratch buffer. If the convolution follows a group
//! norm, the copy is normalised and activated on the way. The product then reads its patches directly from the buffer.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};
use pulp::Simd;

use super::cpu::{Rows, is_cpu_f32, values, with_optional};
use super::gemm::{Gemm, Packed};
use super::norm::{Affine, GroupNorm};
use super::profile::{Part, timed};
use super::simd::{Kernel, dispatch};
use super::winograd::{self, Convolve};

/// Values of the padded copy per strip. A strip should stay in the second-level cache.
const STRIP_VALUES: usize = 128 * 1024;

/// Where zeros are added to the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Padding {
    /// One pixel on every side.
    Around,
    /// One pixel at the right and at the bottom only, like the autoencoder's downsampler.
    After,
}

impl Padding {
    pub(crate) fn before(self) -> usize {
        usize::from(self == Self::Around)
    }
}

/// Operations around a convolution that are computed along with it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Fused<'a> {
    /// Group norm and SiLU applied to the input.
    pub norm: Option<&'a GroupNorm>,
    /// Row `[Cout]` added to every pixel of an image (the time embedding).
    pub shift: Option<Rows<'a>>,
    /// Image `[H', W', Cout]` added to the output.
    pub residual: Option<Rows<'a>>,
}

/// A 3x3 convolution.
#[derive(Debug)]
pub struct Conv2d {
    inputs: usize,
    outputs: usize,
    stride: usize,
    padding: Padding,
    weights: Weights,
}

#[derive(Debug)]
enum Weights {
    Packed {
        matrix: Packed,
        bias: Vec<f32>,
    },
    /// Weight `[Cout, 3, 3, Cin]`.
    #[cfg(feature = "cuda")]
    Gpu {
        gpu: std::sync::Arc<crate::cuda::Gpu>,
        weight: Tensor,
        bias: Tensor,
    },
    Plain {
        weight: Tensor,
        bias: Option<Tensor>,
    },
}

impl Conv2d {
    /// A convolution with weight `[Cout, Cin, 3, 3]` and bias `[Cout]`.
    pub fn new(weight: &Tensor, bias: Option<&Tensor>, stride: usize, padding: Padding) -> Result<Self> {
        let (outputs, inputs, 3, 3) = weight.dims4()? else {
            bail!("a 3x3 convolution got a kernel {:?}", weight.shape());
        };
        let weights = if is_cpu_f32(weight) {
            let w = weight.flatten_all()?.to_vec1::<f32>()?;
            let at = |k: usize, n: usize| w[(n * inputs + k % inputs) * 9 + k / inputs];
            let bias = match bias {
                Some(bias) => bias.to_vec1()?,
                None => vec![0.0; outputs],
            };
            Weights::Packed { matrix: Packed::new(9 * inputs, outputs, at), bias }
        } else {
            Self::elsewhere(weight, bias)?
        };
        Ok(Self { inputs, outputs, stride, padding, weights })
    }

    /// Weights for anything but f32 on the CPU.
    fn elsewhere(weight: &Tensor, bias: Option<&Tensor>) -> Result<Weights> {
        on_gpu!(weight, gpu => {
            let bias = match bias {
                Some(bias) => bias.clone(),
                None => Tensor::zeros(weight.dim(0)?, weight.dtype(), weight.device())?,
            };
            Ok(Weights::Gpu { gpu, weight: weight.permute((0, 2, 3, 1))?.contiguous()?, bias })
        });
        Ok(Weights::Plain { weight: weight.clone(), bias: bias.cloned() })
    }

    /// `x [B, H, W, Cin]` to `[B, H', W', Cout]`.
    pub fn forward(&self, x: &Tensor, fused: Fused<'_>) -> Result<Tensor> {
        let flops = 2 * 9 * (x.elem_count() / (self.stride * self.stride)) * self.outputs;
        let whole = |operation: &dyn Fn() -> Result<Tensor>| timed(x, Part::Convolution, "conv2d", flops, operation);
        match &self.weights {
            Weights::Packed { matrix, bias } => {
                let op = Op { conv: self, matrix, bias, fused };
                whole(&|| x.contiguous()?.apply_op1_no_bwd(&op))
            }
            // On a GPU the norm, the convolution and the additions are separate operations, each timed on its own.
            #[cfg(feature = "cuda")]
            Weights::Gpu { gpu, weight, bias } => {
                let (stride, padding) = (self.stride, self.padding);
                let Fused { norm, shift, residual } = fused;
                let around = crate::cuda::Surroundings { norm: norm.map(GroupNorm::on_gpu), shift, residual };
                gpu.convolve(x, crate::cuda::Convolution { weight, bias, stride, padding }, around)
            }
            Weights::Plain { weight, bias } => {
                whole(&|| plain(x, weight, bias.as_ref(), self.stride, self.padding, fused))
            }
        }
    }
}

/// The same in plain candle operations, for any device and data type.
pub(crate) fn plain(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    stride: usize,
    padding: Padding,
    fused: Fused<'_>,
) -> Result<Tensor> {
    let mut x = x.clone();
    if let Some(norm) = fused.norm {
        x = norm.plain(&x)?.silu()?;
    }
    let before = padding.before();
    let x = x.permute((0, 3, 1, 2))?.pad_with_zeros(2, before, 1)?.pad_with_zeros(3, before, 1)?;
    let mut y = x.contiguous()?.conv2d(weight, 0, stride, 1, 1)?.permute((0, 2, 3, 1))?.contiguous()?;
    if let Some(bias) = bias {
        y = y.broadcast_add(bias)?;
    }
    if let Some(shift) = fused.shift {
        y = y.broadcast_add(&shift.materialise()?.unsqueeze(1)?.unsqueeze(1)?)?;
    }
    match fused.residual {
        Some(residual) => y + residual.materialise()?,
        None => Ok(y),
    }
}

struct Op<'a> {
    conv: &'a Conv2d,
    matrix: &'a Packed,
    bias: &'a [f32],
    fused: Fused<'a>,
}

impl CustomOp1 for Op<'_> {
    fn name(&self) -> &'static str {
        "conv2d"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = values(storage, layout)?;
        let conv = self.conv;
        let (batch, height, width, channels) = layout.shape().dims4()?;
        let before = conv.padding.before();
        let (padded_height, padded_width) = (height + before + 1, width + before + 1);
        if channels != conv.inputs || padded_height < 3 || padded_width < 3 {
            bail!("a convolution of {} channels was given {:?}", conv.inputs, layout.shape());
        }
        let geometry = Geometry {
            height,
            width,
            channels,
            before,
            padded_width,
            stride: conv.stride,
            out_height: (padded_height - 3) / conv.stride + 1,
            out_width: (padded_width - 3) / conv.stride + 1,
        };
        let shape = Shape::from((batch, geometry.out_height, geometry.out_width, conv.outputs));
        let mut out = Vec::with_capacity(shape.elem_count());
        with_optional(self.fused.shift.map(|r| r.tensor), |shift| {
            with_optional(self.fused.residual.map(|r| r.tensor), |residual| {
                self.images(x, &geometry, shift, residual, &mut out)
            })
        })?;
        Ok((CpuStorage::F32(out), shape))
    }
}

impl Op<'_> {
    /// Whether to use Winograd's method.
    fn suits_winograd(&self, geometry: &Geometry) -> bool {
        let conv = self.conv;
        conv.stride == 1
            && conv.padding == Padding::Around
            && winograd::suits(conv.inputs, conv.outputs, geometry.out_height, geometry.out_width)
    }

    fn images(
        &self,
        x: &[f32],
        geometry: &Geometry,
        shift: Option<&[f32]>,
        residual: Option<&[f32]>,
        out: &mut Vec<f32>,
    ) -> Result<()> {
        let outputs = self.conv.outputs;
        let suits_winograd = self.suits_winograd(geometry);
        let strip =
            if suits_winograd { winograd::strip(geometry.out_width, geometry.out_height) } else { geometry.strip() };
        let (mut scratch, mut tiles) = (vec![0.0; geometry.strip_len(strip)], winograd::Scratch::default());
        let offsets = geometry.offsets(strip);
        let segments: [usize; 3] = std::array::from_fn(|ky| ky * geometry.padded_width * geometry.channels);
        let (image_len, out_len) = (geometry.image_len(), geometry.out_pixels() * outputs);
        let mut bias = self.bias.to_vec();
        for (b, image) in x.chunks_exact(image_len.max(1)).enumerate() {
            if let Some(row) = row(self.fused.shift, shift, b, outputs)? {
                for (sum, (&bias, &shift)) in bias.iter_mut().zip(self.bias.iter().zip(row)) {
                    *sum = bias + shift;
                }
            }
            let residual = row(self.fused.residual, residual, b, out_len)?;
            let affine = self.fused.norm.map(|norm| norm.affine(image)).transpose()?;
            for first in (0..geometry.out_height).step_by(strip) {
                let rows = strip.min(geometry.out_height - first);
                let pixels = first * geometry.out_width..(first + rows) * geometry.out_width;
                let part = pixels.start * outputs..pixels.end * outputs;
                let done = out.len();
                out.resize(done + part.len(), 0.0); // per strip and not all at once, so the memory is in cache for the product
                let padded = &mut scratch[..geometry.strip_len(rows)];
                dispatch(Pad { geometry, image, affine: affine.as_ref(), first, padded });
                let residual = residual.map(|r| &r[part]);
                if suits_winograd {
                    let (width, out) = (geometry.out_width, &mut out[done..]);
                    let strip = winograd::Strip { padded: &scratch, rows, width, bias: &bias, residual, out };
                    Convolve { kernels: self.matrix.view(), strip, scratch: &mut tiles }.run();
                    continue;
                }
                Gemm {
                    a: &scratch,
                    rows: &offsets[..pixels.len()],
                    segments: &segments,
                    segment_len: 3 * geometry.channels,
                    b: self.matrix.view(),
                    bias: Some(&bias),
                    residual,
                    out: &mut out[done..],
                    stride: outputs,
                }
                .run();
            }
        }
        Ok(())
    }
}

/// The row of batch element `b`, with `len` values.
fn row<'a>(rows: Option<Rows<'_>>, values: Option<&'a [f32]>, b: usize, len: usize) -> Result<Option<&'a [f32]>> {
    let (Some(rows), Some(values)) = (rows, values) else {
        return Ok(None);
    };
    let start = rows.at(b)? * len;
    match values.get(start..start + len) {
        Some(row) => Ok(Some(row)),
        None => bail!("a row or image to add to a convolution has the wrong shape: {:?}", rows.tensor.shape()),
    }
}

struct Geometry {
    height: usize,
    width: usize,
    channels: usize,
    before: usize,
    padded_width: usize,
    stride: usize,
    out_height: usize,
    out_width: usize,
}

impl Geometry {
    fn image_len(&self) -> usize {
        self.height * self.width * self.channels
    }

    fn out_pixels(&self) -> usize {
        self.out_height * self.out_width
    }

    /// Output rows per strip.
    fn strip(&self) -> usize {
        let row = self.padded_width * self.channels * self.stride;
        (STRIP_VALUES / row.max(1)).clamp(4, self.out_height.max(4))
    }

    /// Values of the padded copy for `rows` output rows.
    fn strip_len(&self, rows: usize) -> usize {
        ((rows - 1) * self.stride + 3) * self.padded_width * self.channels
    }

    /// Offset into the padded copy of each output pixel's patch.
    fn offsets(&self, rows: usize) -> Vec<usize> {
        let pixel = |y: usize, x: usize| (y * self.padded_width + x) * self.stride * self.channels;
        (0..rows).flat_map(|y| (0..self.out_width).map(move |x| pixel(y, x))).collect()
    }
}

/// Writes the padded copy for the output rows from `first` on.
struct Pad<'a> {
    geometry: &'a Geometry,
    image: &'a [f32],
    affine: Option<&'a Affine>,
    first: usize,
    padded: &'a mut [f32],
}

impl Kernel for Pad<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let g = self.geometry;
        let (row_len, left) = (g.width * g.channels, g.before * g.channels);
        for (i, to) in self.padded.chunks_exact_mut(g.padded_width * g.channels).enumerate() {
            let y = (self.first * g.stride + i).checked_sub(g.before).filter(|y| *y < g.height);
            let Some(y) = y else {
                to.fill(0.0);
                continue;
            };
            let from = &self.image[y * row_len..][..row_len];
            to[..left].fill(0.0);
            to[left + row_len..].fill(0.0);
            let to = &mut to[left..left + row_len];
            match self.affine {
                Some(affine) => affine.apply(from, to, true),
                None => to.copy_from_slice(from),
            }
        }
    }
}
