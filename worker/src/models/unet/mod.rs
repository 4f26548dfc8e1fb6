//! UNet2DConditionModel of Stable Diffusion 1.x and 2.x (Rombach et al., CVPR 2022), for scoring many prompts.
//!
//! A pass takes *points* (noisy latents at timesteps) and *evaluations* (a point with a prompt). What depends on the
//! timestep alone comes from a [`TimeCache`], what depends on the prompt alone from a [`PromptCache`], and what depends on
//! the point alone is computed once per point: everything before the first cross-attention, and the first convolution's
//! part in the last resnet.

mod blocks;
mod config;
mod flow;
mod resnet;
mod time;
mod transformer;

use std::path::Path;

use candle_core::Tensor;

use self::blocks::{DownBlock, MidBlock, UpBlock};
use self::config::UnetConfig;
use self::flow::{Batch, Flow};
use self::resnet::Slots;
use self::time::TimeEmbedding;
use super::checkpoint::{ModelError, Weights};
use super::layers::{conv3x3, group_norm};
use super::options::LoadOptions;
use super::probe::Probe;
use crate::ops::{Activation, Conv2d, Fused, GroupNorm, KeyValues, Padding, activate};

pub use self::flow::PromptCache;
pub use self::time::TimeCache;

/// What a forward pass evaluates.
#[derive(Clone, Copy, Debug)]
pub struct UnetInput<'a> {
    /// Noisy latents x_t, one per point: `[P, H, W, C]`.
    pub latents: &'a Tensor,
    /// Each point's timestep, as a value (0 to 999) that the time cache holds: `P` of them.
    pub timesteps: &'a [u32],
    /// `B` pairs of point and prompt (as indices), points ascending. A point's evaluations share its common work.
    pub evaluations: &'a [(u32, u32)],
}

/// The noise predictor.
#[derive(Debug)]
pub struct Unet {
    config: UnetConfig,
    time: TimeEmbedding,
    slots: Slots,
    conv_in: Conv2d,
    down: Vec<DownBlock>,
    mid: MidBlock,
    up: Vec<UpBlock>,
    norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl Unet {
    /// Loads the UNet in `dir`.
    pub fn load(dir: &Path, options: &LoadOptions) -> Result<Self, ModelError> {
        let config = UnetConfig::read(&dir.join("config.json"))?;
        let weights = Weights::open(dir, "diffusion_pytorch_model", options)?;
        let (first, count) = (config.levels[0].channels, config.levels.len());
        let mut slots = Slots::default();
        let mut down = Vec::new();
        for i in 0..count {
            down.push(DownBlock::load(&weights.at(&format!("down_blocks.{i}")), i, &config, &mut slots)?);
        }
        let coarsest = &config.levels[count - 1];
        let mid = MidBlock::load(&weights.at("mid_block"), coarsest, &config, &mut slots)?;
        let mut up = Vec::new();
        for i in 0..count {
            up.push(UpBlock::load(&weights.at(&format!("up_blocks.{i}")), i, &config, &mut slots)?);
        }
        let (inputs, outputs) = (config.in_channels, config.out_channels);
        Ok(Self {
            time: TimeEmbedding::load(&weights, &config)?,
            conv_in: conv3x3(&weights.at("conv_in"), inputs, first, 1, Padding::Around)?,
            down,
            mid,
            up,
            norm_out: group_norm(&weights.at("conv_norm_out"), config.groups, first, config.eps)?,
            conv_out: conv3x3(&weights.at("conv_out"), first, outputs, 1, Padding::Around)?,
            slots,
            config,
        })
    }

    /// Height and width of the latents the model was trained on.
    pub fn sample_size(&self) -> usize {
        self.config.sample_size
    }

    /// What the height and width of latents must be multiples of.
    pub fn multiple(&self) -> usize {
        1 << (self.config.levels.len() - 1)
    }

    /// Channels of the latents.
    pub fn in_channels(&self) -> usize {
        self.config.in_channels
    }

    /// Channels of the output.
    pub fn out_channels(&self) -> usize {
        self.config.out_channels
    }

    /// Time embeddings `[T, 4 C]`.
    pub fn time_embedding(&self, timesteps: &[u32]) -> Result<Tensor, ModelError> {
        Ok(self.time.forward(timesteps)?)
    }

    /// Computes what depends on the timestep alone, for distinct timesteps.
    pub fn time_cache(&self, timesteps: &[u32]) -> Result<TimeCache, ModelError> {
        let embedding = activate(&self.time.forward(timesteps)?, Activation::Silu)?;
        let shift = |projection: &crate::ops::Linear| projection.forward(&embedding, None);
        let shifts = self.slots.time_projections.iter().map(shift).collect::<candle_core::Result<_>>()?;
        Ok(TimeCache::new(timesteps, shifts))
    }

    /// Computes what depends on the prompt alone, from text embeddings `[N, 77, C]`.
    pub fn prompt_cache(&self, embeds: &Tensor) -> Result<PromptCache, ModelError> {
        let projections = self.slots.text_projections.iter();
        let layers = projections.map(|(key, value, heads)| {
            KeyValues::new(&key.forward(embeds, None)?, &value.forward(embeds, None)?, *heads)
        });
        Ok(PromptCache { layers: layers.collect::<candle_core::Result<_>>()?, count: embeds.dim(0)? })
    }

    /// The raw model output `[B, H, W, Cout]` of every evaluation.
    ///
    /// An evaluation's output has the same bits whatever else is in the pass.
    pub fn forward(
        &self,
        input: &UnetInput<'_>,
        times: &TimeCache,
        prompts: &PromptCache,
    ) -> Result<Tensor, ModelError> {
        self.forward_probed(input, times, prompts, &mut Probe::none())
    }

    /// Like [`Unet::forward`], showing every submodule's output to a probe.
    pub fn forward_probed(
        &self,
        input: &UnetInput<'_>,
        times: &TimeCache,
        prompts: &PromptCache,
        probe: &mut Probe<'_>,
    ) -> Result<Tensor, ModelError> {
        let (points, height, width, _) = input.latents.dims4()?;
        let multiple = self.multiple();
        if points != input.timesteps.len() {
            return Err(ModelError::Input(format!("{points} points with {} timesteps", input.timesteps.len())));
        }
        if !height.is_multiple_of(multiple) || !width.is_multiple_of(multiple) {
            let message = format!("latents of {height}x{width} pixels, whose sides are not multiples of {multiple}");
            return Err(ModelError::Input(message));
        }
        let batch = Batch::new(input.timesteps, input.evaluations, times, prompts)?;
        let tensor = self.conv_in.forward(input.latents, Fused::default())?;
        probe.see(|| "conv_in".to_owned(), &tensor);
        let mut x = Flow { tensor, shared: true };
        let mut skips = vec![x.clone()];
        for block in &self.down {
            x = block.forward(x, &mut skips, &batch, probe)?;
        }
        x = self.mid.forward(&x, &batch)?;
        probe.see(|| "mid_block".to_owned(), &x.tensor);
        for block in &self.up {
            x = block.forward(x, &mut skips, &batch, probe)?;
        }
        probe.compute("conv_norm_out", || self.norm_out.forward(&x.tensor, false))?;
        let fused = Fused { norm: Some(&self.norm_out), ..Fused::default() };
        let output = self.conv_out.forward(&x.tensor, fused)?;
        probe.see(|| "conv_out".to_owned(), &output);
        Ok(output)
    }
}
