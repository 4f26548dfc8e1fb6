//! Builds layers from a checkpoint's weights.

use candle_core::Tensor;
use elbo_kernels::{Conv2d, GroupNorm, LayerNorm, Linear, Padding};

use super::checkpoint::Params;
use super::error::ModelError;

/// A linear layer with bias.
pub(crate) fn linear(p: &Params<'_>, inputs: usize, outputs: usize) -> Result<Linear, ModelError> {
    let weight = projection(p, inputs, outputs)?;
    Ok(Linear::new(&weight, Some(&p.get("bias", &[outputs])?))?)
}

/// A linear layer without bias.
pub(crate) fn linear_no_bias(p: &Params<'_>, inputs: usize, outputs: usize) -> Result<Linear, ModelError> {
    Ok(Linear::new(&projection(p, inputs, outputs)?, None)?)
}

/// Joins several linear layers with the same input into one.
pub(crate) fn joined(parts: &[Params<'_>], inputs: usize, outputs: usize, bias: bool) -> Result<Linear, ModelError> {
    let weights: Vec<Tensor> = parts.iter().map(|p| projection(p, inputs, outputs)).collect::<Result<_, _>>()?;
    let weight = Tensor::cat(&weights, 0)?;
    if !bias {
        return Ok(Linear::new(&weight, None)?);
    }
    let biases: Vec<Tensor> = parts.iter().map(|p| p.get("bias", &[outputs])).collect::<Result<_, _>>()?;
    Ok(Linear::new(&weight, Some(&Tensor::cat(&biases, 0)?))?)
}

/// A weight `[out, in]`; some checkpoints store it as a 1x1 convolution.
pub(crate) fn projection(p: &Params<'_>, inputs: usize, outputs: usize) -> Result<Tensor, ModelError> {
    p.get_any("weight", &[&[outputs, inputs], &[outputs, inputs, 1, 1]])
}

/// A 3x3 convolution with bias.
pub(crate) fn conv3x3(
    p: &Params<'_>,
    inputs: usize,
    outputs: usize,
    stride: usize,
    padding: Padding,
) -> Result<Conv2d, ModelError> {
    let weight = p.get("weight", &[outputs, inputs, 3, 3])?;
    Ok(Conv2d::new(&weight, Some(&p.get("bias", &[outputs])?), stride, padding)?)
}

/// A group norm.
pub(crate) fn group_norm(p: &Params<'_>, groups: usize, channels: usize, eps: f64) -> Result<GroupNorm, ModelError> {
    Ok(GroupNorm::new(groups, eps, &p.get("weight", &[channels])?, &p.get("bias", &[channels])?)?)
}

/// A layer norm.
pub(crate) fn layer_norm(p: &Params<'_>, channels: usize, eps: f64) -> Result<LayerNorm, ModelError> {
    Ok(LayerNorm::new(eps, &p.get("weight", &[channels])?, &p.get("bias", &[channels])?)?)
}
