//! Computes errors from a network's outputs, on the outputs' device.

use candle_core::{Result, Tensor, bail};

/// How far a prediction is from its target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deviation {
    /// `d^2`.
    Squared,
    /// `|d|`.
    Absolute,
    /// `0.5 d^2` where `|d| < 1`, else `|d| - 0.5`.
    Huber,
}

/// What to compare the outputs of evaluations with. Tensors are f32, on the outputs' device.
#[derive(Clone, Copy, Debug)]
pub struct MeanErrors<'a> {
    /// The noisy latents of the points, `[P, H, W, C]`.
    pub noisy: &'a Tensor,
    /// The predictions the network should have made, `[P, H, W, C]`.
    pub targets: &'a Tensor,
    /// For each point, the weights of the output and the noisy latent in the prediction, `[P, 2]`.
    pub mix: &'a Tensor,
    /// The point of each evaluation.
    pub points: &'a [u32],
    /// How to compute the error of an element.
    pub deviation: Deviation,
}

/// The mean error of every evaluation, `[B]` in f32, from the first `C` channels of outputs `[B, H, W, C or more]`.
///
/// On a GPU this is one pass over the outputs, and only the result leaves the device.
pub fn mean_errors(output: &Tensor, of: &MeanErrors<'_>) -> Result<Tensor> {
    let (evaluations, height, width, out_channels) = output.dims4()?;
    let (points, h, w, channels) = of.targets.dims4()?;
    if (height, width) != (h, w) || out_channels < channels || of.points.len() != evaluations {
        bail!("outputs {:?} do not fit targets {:?}", output.shape(), of.targets.shape());
    }
    if of.noisy.dims() != of.targets.dims() || of.mix.dims() != [points, 2] {
        bail!("noisy latents {:?}, mixtures {:?} and {points} targets", of.noisy.shape(), of.mix.shape());
    }
    if of.points.iter().any(|&point| point as usize >= points) {
        bail!("an evaluation of a point that is not among {points}");
    }
    on_gpu!(output, gpu => gpu.mean_errors(output, of));
    plain(output, of)
}

/// The same in plain candle operations, for any device and data type.
pub(crate) fn plain(output: &Tensor, of: &MeanErrors<'_>) -> Result<Tensor> {
    use candle_core::DType::{F32, F64};
    let (_, h, w, channels) = of.targets.dims4()?;
    let rows = |x: &Tensor| crate::gather(x, of.points);
    let weight = |column: usize| rows(&of.mix.narrow(1, column, 1)?.contiguous()?)?.reshape(((), 1, 1, 1));
    let output = output.narrow(3, 0, channels)?.to_dtype(F32)?;
    let predicted = (output.broadcast_mul(&weight(0)?)? + rows(of.noisy)?.broadcast_mul(&weight(1)?)?)?;
    let difference = (predicted - rows(of.targets)?)?;
    let errors = match of.deviation {
        Deviation::Squared => difference.sqr()?,
        Deviation::Absolute => difference.abs()?,
        Deviation::Huber => {
            let size = difference.abs()?;
            let near = (size.sqr()? * 0.5)?;
            size.lt(1f32)?.where_cond(&near, &(size - 0.5)?)?
        }
    };
    errors.reshape(((), h * w * channels))?.to_dtype(F64)?.mean(1)?.to_dtype(F32)
}
