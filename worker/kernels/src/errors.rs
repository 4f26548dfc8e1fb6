//! From a network's outputs to errors, where the outputs are.

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

/// What the outputs of evaluations are compared with. Tensors are f32, on the outputs' device.
#[derive(Clone, Copy, Debug)]
pub struct MeanErrors<'a> {
    /// The noisy latents of the points, `[P, H, W, C]`.
    pub noisy: &'a Tensor,
    /// What the network should have predicted, `[P, H, W, C]`.
    pub targets: &'a Tensor,
    /// Per point how much of the output and of the noisy latent make up the prediction, `[P, 2]`.
    pub mix: &'a Tensor,
    /// Per evaluation its point.
    pub points: &'a [u32],
    /// The error of an element.
    pub deviation: Deviation,
}

/// The mean error of every evaluation, `[B]` in f32, from outputs `[B, H, W, C or more]`, of which the first `C` channels count.
///
/// On a GPU this is one pass over the outputs, and only its result has to leave the device.
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
