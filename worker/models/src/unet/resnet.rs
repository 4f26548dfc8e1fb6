//! Residual blocks (ResnetBlock2D).

use candle_core::{D, Result, Tensor};
use elbo_kernels::{Conv2d, Fused, GroupNorm, Linear, Padding, Rows};

use super::config::UnetConfig;
use super::flow::{Batch, Flow};
use crate::checkpoint::Params;
use crate::error::ModelError;
use crate::layers::{conv3x3, group_norm, linear, projection};

/// Assigns consecutive numbers to the resnets and cross-attentions as they are loaded.
#[derive(Debug, Default)]
pub(super) struct Projections {
    /// Time projections of the resnets loaded so far.
    pub(super) time_projections: Vec<Linear>,
    /// Key and value projections and number of heads of the cross-attentions loaded so far.
    pub(super) text_projections: Vec<(Linear, Linear, usize)>,
}

/// `shortcut(x) + conv2(silu(norm2(conv1(silu(norm1(x))) + time)))`.
#[derive(Debug)]
pub(super) struct Resnet {
    slot: usize,
    input: Input,
    norm2: GroupNorm,
    conv2: Conv2d,
}

/// The part of a resnet that reads its input.
#[derive(Debug)]
enum Input {
    Whole(Box<Branch>),
    /// The input is a concatenation whose second part is shared by all evaluations of a point. Convolutions are linear
    /// in their input channels, so each part gets its own, provided that no normalisation group contains both.
    Split(Box<(Branch, Branch)>),
}

/// The first norm and convolution, and the shortcut.
#[derive(Debug)]
struct Branch {
    norm1: GroupNorm,
    conv1: Conv2d,
    shortcut: Option<Linear>,
}

impl Resnet {
    pub(super) fn load(
        p: &Params<'_>,
        inputs: usize,
        outputs: usize,
        config: &UnetConfig,
        slots: &mut Projections,
    ) -> std::result::Result<Self, ModelError> {
        let shortcut = if inputs == outputs { None } else { Some(linear(&p.at("conv_shortcut"), inputs, outputs)?) };
        let input = Input::Whole(Box::new(Branch {
            norm1: group_norm(&p.at("norm1"), config.groups, inputs, config.eps)?,
            conv1: conv3x3(&p.at("conv1"), inputs, outputs, 1, Padding::Around)?,
            shortcut,
        }));
        Self::with_input(p, input, outputs, config, slots)
    }

    /// A resnet over the concatenation of `own` and `shared` channels; the latter are the same for all evaluations of a
    /// point.
    pub(super) fn load_split(
        p: &Params<'_>,
        own: usize,
        shared: usize,
        outputs: usize,
        config: &UnetConfig,
        slots: &mut Projections,
    ) -> std::result::Result<Self, ModelError> {
        let inputs = own + shared;
        let norm = group_norm(&p.at("norm1"), config.groups, inputs, config.eps)?;
        let Some((own_norm, shared_norm)) = norm.split(own)?.filter(|_| inputs != outputs) else {
            return Self::load(p, inputs, outputs, config, slots);
        };
        let (conv, shortcut) = (p.at("conv1"), p.at("conv_shortcut"));
        let conv_weight = conv.get("weight", &[outputs, inputs, 3, 3])?;
        let shortcut_weight = projection(&shortcut, inputs, outputs)?;
        let biases = (conv.get("bias", &[outputs])?, shortcut.get("bias", &[outputs])?);
        let branch = |norm1, start, len, biases: Option<&(Tensor, Tensor)>| -> Result<Branch> {
            let weight = conv_weight.narrow(1, start, len)?.contiguous()?;
            let shortcut = shortcut_weight.narrow(D::Minus1, start, len)?.contiguous()?;
            Ok(Branch {
                norm1,
                conv1: Conv2d::new(&weight, biases.map(|b| &b.0), 1, Padding::Around)?,
                shortcut: Some(Linear::new(&shortcut, biases.map(|b| &b.1))?),
            })
        };
        let own_branch = branch(own_norm, 0, own, Some(&biases))?;
        let shared_branch = branch(shared_norm, own, shared, None)?;
        Self::with_input(p, Input::Split(Box::new((own_branch, shared_branch))), outputs, config, slots)
    }

    fn with_input(
        p: &Params<'_>,
        input: Input,
        outputs: usize,
        config: &UnetConfig,
        slots: &mut Projections,
    ) -> std::result::Result<Self, ModelError> {
        let slot = slots.time_projections.len();
        let time = linear(&p.at("time_emb_proj"), 4 * config.levels[0].channels, outputs)?;
        slots.time_projections.push(time);
        Ok(Self {
            slot,
            input,
            norm2: group_norm(&p.at("norm2"), config.groups, outputs, config.eps)?,
            conv2: conv3x3(&p.at("conv2"), outputs, outputs, 1, Padding::Around)?,
        })
    }

    /// Maps `x [.., H, W, Cin]` to `[.., H, W, Cout]`.
    pub(super) fn forward(&self, x: &Flow, batch: &Batch<'_>) -> Result<Flow> {
        let branch = match &self.input {
            Input::Whole(branch) => branch,
            Input::Split(_) => candle_core::bail!("a split resnet needs both parts of its input"),
        };
        let shift = Some(batch.shift(self.slot, x.shared)?);
        let h = branch.first(&x.tensor, shift, None)?;
        let residual = branch.residual(&x.tensor, None)?;
        self.finish(&h, &residual, x.shared)
    }

    /// Joins the input `x` with a skip connection and applies the resnet.
    pub(super) fn forward_with_skip(&self, x: &Flow, skip: &Flow, batch: &Batch<'_>) -> Result<Flow> {
        match &self.input {
            Input::Split(parts) if skip.shared && !x.shared => {
                let (own, common) = (&parts.0, &parts.1);
                let h = Flow { tensor: common.first(&skip.tensor, None, None)?, shared: true };
                let r = Flow { tensor: common.residual(&skip.tensor, None)?, shared: true };
                let shift = Some(batch.shift(self.slot, false)?);
                let h = own.first(&x.tensor, shift, Some(batch.rows(&h)))?;
                let residual = own.residual(&x.tensor, Some(batch.rows(&r)))?;
                self.finish(&h, &residual, false)
            }
            _ => {
                let other = if x.shared { Rows::direct(&skip.tensor) } else { batch.rows(skip) };
                let tensor = elbo_kernels::concat_channels(&x.tensor, other)?;
                self.forward(&Flow { tensor, shared: x.shared }, batch)
            }
        }
    }

    fn finish(&self, h: &Tensor, residual: &Tensor, shared: bool) -> Result<Flow> {
        let residual = Some(Rows::direct(residual));
        let fused = Fused { norm: Some(&self.norm2), residual, ..Fused::default() };
        Ok(Flow { tensor: self.conv2.forward(h, fused)?, shared })
    }
}

impl Branch {
    fn first(&self, x: &Tensor, shift: Option<Rows<'_>>, residual: Option<Rows<'_>>) -> Result<Tensor> {
        self.conv1.forward(x, Fused { norm: Some(&self.norm1), shift, residual })
    }

    fn residual(&self, x: &Tensor, added: Option<Rows<'_>>) -> Result<Tensor> {
        match &self.shortcut {
            Some(shortcut) => shortcut.forward(x, added),
            None => Ok(x.clone()),
        }
    }
}
