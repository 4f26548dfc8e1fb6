//! The UNet's levels: down blocks, the middle, up blocks.

use candle_core::{Result, bail};
use elbo_kernels::{Conv2d, Fused, Padding, upsample_nearest2x};

use super::config::{Middle, UnetConfig};
use super::flow::{Batch, Flow};
use super::resnet::{Projections, Resnet};
use super::transformer::Transformer;
use crate::checkpoint::Params;
use crate::error::ModelError;
use crate::layers::conv3x3;
use crate::probe::Probe;

/// DownBlock2D or CrossAttnDownBlock2D.
#[derive(Debug)]
pub(super) struct DownBlock {
    name: String,
    resnets: Vec<Resnet>,
    attentions: Vec<Transformer>,
    downsample: Option<Conv2d>,
}

impl DownBlock {
    /// Loads level `index`.
    pub(super) fn load(
        p: &Params<'_>,
        index: usize,
        config: &UnetConfig,
        slots: &mut Projections,
    ) -> std::result::Result<Self, ModelError> {
        let level = &config.levels[index];
        let previous = config.levels[index.saturating_sub(1)].channels;
        let mut block = Self {
            name: format!("down_blocks.{index}"),
            resnets: Vec::new(),
            attentions: Vec::new(),
            downsample: None,
        };
        for (i, depth) in level.down.iter().enumerate() {
            let inputs = if i == 0 { previous } else { level.channels };
            let resnet = p.at(format!("resnets.{i}"));
            block.resnets.push(Resnet::load(&resnet, inputs, level.channels, config, slots)?);
            if let Some(depth) = depth {
                let attention = p.at(format!("attentions.{i}"));
                block.attentions.push(Transformer::load(&attention, level, *depth, level.only_cross, config, slots)?);
            }
        }
        if index + 1 < config.levels.len() {
            let conv = p.at("downsamplers.0.conv");
            block.downsample = Some(conv3x3(&conv, level.channels, level.channels, 2, Padding::Around)?);
        }
        Ok(block)
    }

    /// Applies the block, and adds the skip connections for the up blocks to `skips`.
    pub(super) fn forward(
        &self,
        mut x: Flow,
        skips: &mut Vec<Flow>,
        batch: &Batch<'_>,
        probe: &mut Probe<'_>,
    ) -> Result<Flow> {
        for (i, resnet) in self.resnets.iter().enumerate() {
            x = resnet.forward(&x, batch)?;
            probe.see(|| format!("{}.resnets.{i}", self.name), &x.tensor);
            if let Some(attention) = self.attentions.get(i) {
                x = attention.forward(&x, batch)?;
                probe.see(|| format!("{}.attentions.{i}", self.name), &x.tensor);
            }
            skips.push(x.clone());
        }
        if let Some(conv) = &self.downsample {
            x.tensor = conv.forward(&x.tensor, Fused::default())?;
            skips.push(x.clone());
        }
        probe.see(|| self.name.clone(), &x.tensor);
        Ok(x)
    }
}

/// UNetMidBlock2DCrossAttn, or only its first resnet (UNetMidBlock2D).
#[derive(Debug)]
pub(super) struct MidBlock {
    first: Resnet,
    rest: Option<(Transformer, Resnet)>,
}

impl MidBlock {
    /// Loads the middle, which is as wide as the coarsest level.
    pub(super) fn load(
        p: &Params<'_>,
        config: &UnetConfig,
        slots: &mut Projections,
    ) -> std::result::Result<Option<Self>, ModelError> {
        let Some(level) = config.levels.last() else { return Ok(None) };
        let resnet = |i: usize, slots: &mut Projections| {
            Resnet::load(&p.at(format!("resnets.{i}")), level.channels, level.channels, config, slots)
        };
        if config.middle == Middle::Nothing {
            return Ok(None);
        }
        let first = resnet(0, slots)?;
        let rest = match config.middle {
            Middle::Transformer(depth) => {
                let attention = Transformer::load(&p.at("attentions.0"), level, depth, false, config, slots)?;
                Some((attention, resnet(1, slots)?))
            }
            Middle::Nothing | Middle::Resnet => None,
        };
        Ok(Some(Self { first, rest }))
    }

    /// Applies the block.
    pub(super) fn forward(&self, x: &Flow, batch: &Batch<'_>) -> Result<Flow> {
        let x = self.first.forward(x, batch)?;
        match &self.rest {
            Some((attention, second)) => second.forward(&attention.forward(&x, batch)?, batch),
            None => Ok(x),
        }
    }
}

/// UpBlock2D or CrossAttnUpBlock2D.
#[derive(Debug)]
pub(super) struct UpBlock {
    name: String,
    resnets: Vec<Resnet>,
    attentions: Vec<Transformer>,
    upsample: Option<Conv2d>,
}

impl UpBlock {
    /// Loads the up block `index`, counted from the coarsest level.
    pub(super) fn load(
        p: &Params<'_>,
        index: usize,
        config: &UnetConfig,
        slots: &mut Projections,
    ) -> std::result::Result<Self, ModelError> {
        let at = config.levels.len() - 1 - index;
        let level = &config.levels[at];
        let below = config.levels[(at + 1).min(config.levels.len() - 1)].channels;
        let above = config.levels[at.saturating_sub(1)].channels;
        let mut block =
            Self { name: format!("up_blocks.{index}"), resnets: Vec::new(), attentions: Vec::new(), upsample: None };
        for (i, depth) in level.up.iter().enumerate() {
            let is_last = i + 1 == level.up.len();
            let inputs = if i == 0 { below } else { level.channels };
            let skip = if is_last { above } else { level.channels };
            let resnet = p.at(format!("resnets.{i}"));
            // The last skip connection is the first convolution's output, which does not depend on the prompt.
            let resnet = if at == 0 && is_last {
                Resnet::load_split(&resnet, inputs, skip, level.channels, config, slots)?
            } else {
                Resnet::load(&resnet, inputs + skip, level.channels, config, slots)?
            };
            block.resnets.push(resnet);
            if let Some(depth) = depth {
                let attention = p.at(format!("attentions.{i}"));
                block.attentions.push(Transformer::load(&attention, level, *depth, level.only_cross, config, slots)?);
            }
        }
        if at > 0 {
            let conv = p.at("upsamplers.0.conv");
            block.upsample = Some(conv3x3(&conv, level.channels, level.channels, 1, Padding::Around)?);
        }
        Ok(block)
    }

    /// Applies the block, taking its skip connections from the end of `skips`.
    pub(super) fn forward(
        &self,
        mut x: Flow,
        skips: &mut Vec<Flow>,
        batch: &Batch<'_>,
        probe: &mut Probe<'_>,
    ) -> Result<Flow> {
        for (i, resnet) in self.resnets.iter().enumerate() {
            let Some(skip) = skips.pop() else {
                bail!("{} has more resnets than skip connections", self.name);
            };
            x = resnet.forward_with_skip(&x, &skip, batch)?;
            if let Some(attention) = self.attentions.get(i) {
                x = attention.forward(&x, batch)?;
            }
        }
        if let Some(conv) = &self.upsample {
            x.tensor = conv.forward(&upsample_nearest2x(&x.tensor)?, Fused::default())?;
        }
        probe.see(|| self.name.clone(), &x.tensor);
        Ok(x)
    }
}
