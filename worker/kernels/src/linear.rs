//! Linear layers and 1x1 convolutions, which are the same product on channels-last tensors.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};

use super::cpu::{Rows, is_cpu_f32, values, with_optional};
use super::gemm::{BLOCK_M, Gemm, Packed};
use super::profile::{Part, timed};

/// `y = x W^T + b`.
#[derive(Debug)]
pub struct Linear {
    inputs: usize,
    outputs: usize,
    weights: Weights,
}

#[derive(Debug)]
enum Weights {
    Packed { matrix: Packed, bias: Option<Vec<f32>> },
    Plain { weight: Tensor, bias: Option<Tensor> },
}

impl Linear {
    /// A layer with weight `[out, in]` (or `[out, in, 1, 1]`) and bias `[out]`.
    pub fn new(weight: &Tensor, bias: Option<&Tensor>) -> Result<Self> {
        let (outputs, inputs) = match *weight.dims() {
            [outputs, inputs] | [outputs, inputs, 1] | [outputs, inputs, 1, 1] => (outputs, inputs),
            _ => bail!("a linear weight is [out, in], found {:?}", weight.shape()),
        };
        let weight = weight.reshape((outputs, inputs))?;
        let weights = if is_cpu_f32(&weight) {
            let w = weight.flatten_all()?.to_vec1::<f32>()?;
            let matrix = Packed::new(inputs, outputs, |k, n| w[n * inputs + k]);
            Weights::Packed { matrix, bias: bias.map(|b| b.to_vec1()).transpose()? }
        } else {
            Weights::Plain { weight, bias: bias.cloned() }
        };
        Ok(Self { inputs, outputs, weights })
    }

    /// `x [B, .., in]` to `[B, .., out]`; adds `residual`, one `[.., out]` per batch element.
    pub fn forward(&self, x: &Tensor, residual: Option<Rows<'_>>) -> Result<Tensor> {
        timed(x, Part::Linear, "linear", 2 * x.elem_count() * self.outputs, || match &self.weights {
            Weights::Packed { matrix, bias } => {
                let layer = self.view(matrix, bias.as_deref());
                x.contiguous()?.apply_op1_no_bwd(&Op { layer, residual })
            }
            Weights::Plain { weight, bias } => {
                on_gpu!(x, gpu => gpu.linear(x, weight, bias.as_ref(), residual));
                plain(x, weight, bias.as_ref(), residual)
            }
        })
    }

    /// The packed layer, if it is on the CPU in f32.
    pub(crate) fn packed(&self) -> Option<PackedLinear<'_>> {
        match &self.weights {
            Weights::Packed { matrix, bias } => Some(self.view(matrix, bias.as_deref())),
            Weights::Plain { .. } => None,
        }
    }

    fn view<'a>(&self, matrix: &'a Packed, bias: Option<&'a [f32]>) -> PackedLinear<'a> {
        PackedLinear { inputs: self.inputs, outputs: self.outputs, matrix, bias }
    }
}

/// The same in plain candle operations, for any device and data type.
pub(crate) fn plain(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, residual: Option<Rows<'_>>) -> Result<Tensor> {
    let mut dims = x.dims().to_vec();
    let inputs = dims.pop().unwrap_or(1);
    let rows: usize = dims.iter().product();
    dims.push(weight.dim(0)?);
    let mut y = x.reshape((rows, inputs))?.matmul(&weight.t()?)?.reshape(dims)?;
    if let Some(bias) = bias {
        y = y.broadcast_add(bias)?;
    }
    match residual {
        Some(rows) => y + rows.materialise()?,
        None => Ok(y),
    }
}

/// A linear layer on the CPU.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PackedLinear<'a> {
    /// Width of an input row.
    pub(crate) inputs: usize,
    /// Width of an output row.
    pub(crate) outputs: usize,
    matrix: &'a Packed,
    bias: Option<&'a [f32]>,
}

impl PackedLinear<'_> {
    /// Applies the layer to at most [`BLOCK_M`] rows.
    pub(crate) fn run(&self, x: &[f32], residual: Option<&[f32]>, out: &mut [f32]) {
        let mut offsets = [0; BLOCK_M];
        let rows = (x.len() / self.inputs.max(1)).min(BLOCK_M);
        for (row, offset) in offsets[..rows].iter_mut().enumerate() {
            *offset = row * self.inputs;
        }
        Gemm {
            a: x,
            rows: &offsets[..rows],
            segments: &[0],
            segment_len: self.inputs,
            b: self.matrix.view(),
            bias: self.bias,
            residual,
            out,
            stride: self.outputs,
        }
        .run();
    }
}

struct Op<'a> {
    layer: PackedLinear<'a>,
    residual: Option<Rows<'a>>,
}

impl CustomOp1 for Op<'_> {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = values(storage, layout)?;
        let (inputs, outputs) = (self.layer.inputs, self.layer.outputs);
        let mut dims = layout.dims().to_vec();
        if dims.last() != Some(&inputs) {
            bail!("a linear layer of {inputs} inputs was given {:?}", layout.shape());
        }
        if let Some(last) = dims.last_mut() {
            *last = outputs;
        }
        let rows = x.len() / inputs;
        // Batch elements matter only for a residual with an index.
        let batch = if self.residual.is_some_and(|rows| rows.index.is_some()) { dims[0] } else { 1 };
        let mut out = Vec::with_capacity(rows * outputs);
        let image_rows = rows / batch.max(1);
        with_optional(self.residual.map(|r| r.tensor), |residual| {
            for image in 0..batch {
                let residual = match (residual, self.residual) {
                    (Some(values), Some(rows)) => {
                        let start = rows.at(image)? * image_rows * outputs;
                        match values.get(start..start + image_rows * outputs) {
                            Some(values) => Some(values),
                            None => {
                                bail!("the residual of a linear layer has the wrong shape: {:?}", rows.tensor.shape())
                            }
                        }
                    }
                    _ => None,
                };
                for first in (0..image_rows).step_by(BLOCK_M) {
                    let rows = BLOCK_M.min(image_rows - first);
                    let start = (image * image_rows + first) * inputs;
                    let done = out.len();
                    out.resize(done + rows * outputs, 0.0); // per block and not all at once, so the memory is in cache
                    let residual = residual.map(|r| &r[first * outputs..]);
                    self.layer.run(&x[start..start + rows * inputs], residual, &mut out[done..]);
                }
            }
            Ok(())
        })?;
        Ok((CpuStorage::F32(out), Shape::from(dims)))
    }
}
