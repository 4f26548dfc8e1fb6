//! UNet2DConditionModel of Stable Diffusion 1.x, 2.x (Rombach et al., CVPR 2022), SDXL and models distilled from them,
//! for scoring many prompts.
//!
//! A pass takes *points* (noisy latents at timesteps) and *evaluations* (a point with a prompt). Values that depend
//! only on the timestep come from a [`TimeCache`], and values that depend only on the prompt from a [`PromptCache`].
//! Values that depend only on the point are computed once per point: everything before the first cross-attention, and
//! the first convolution's part in the last resnet. In SDXL the prompt's pooled embedding is part of the time
//! embedding, so only the first convolution is shared.

mod addition;
mod blocks;
mod config;
mod flow;
mod resnet;
mod transformer;

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use elbo_kernels::{Activation, Conv2d, Fused, GroupNorm, KeyValues, Linear, Padding, activate, gather};

use self::addition::TextTimeEmbedding;
use self::blocks::{DownBlock, MidBlock, UpBlock};
use self::config::UnetConfig;
use self::flow::{Batch, Flow, Shifts};
use self::resnet::Projections;
use super::checkpoint::{Params, Weights};
use super::error::ModelError;
use super::layers::{conv3x3, group_norm, linear_no_bias};
use super::options::LoadOptions;
use super::pass::{Indices, Pass};
use super::probe::Probe;
use super::text::TextEmbeddings;
use super::timestep::{EmbeddingMlp, Sinusoid, TimeCache};

pub use self::flow::PromptCache;

/// The noise predictor.
#[derive(Debug)]
pub struct Unet {
    config: UnetConfig,
    sinusoid: Sinusoid,
    time: EmbeddingMlp,
    /// The term that the guidance scale adds to every sinusoid, `[1, C]`.
    guidance: Option<Tensor>,
    addition: Option<TextTimeEmbedding>,
    device: Device,
    dtype: DType,
    slots: Projections,
    conv_in: Conv2d,
    down: Vec<DownBlock>,
    mid: Option<MidBlock>,
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
        let mut slots = Projections::default();
        let mut down = Vec::new();
        for i in 0..count {
            down.push(DownBlock::load(&weights.at(&format!("down_blocks.{i}")), i, &config, &mut slots)?);
        }
        let mid = MidBlock::load(&weights.at("mid_block"), &config, &mut slots)?;
        let mut up = Vec::new();
        for i in 0..count {
            up.push(UpBlock::load(&weights.at(&format!("up_blocks.{i}")), i, &config, &mut slots)?);
        }
        let (inputs, outputs) = (config.in_channels, config.out_channels);
        let sinusoid =
            Sinusoid { width: first, flip_sin_to_cos: config.flip_sin_to_cos, freq_shift: config.freq_shift };
        let addition = match &config.text_time {
            Some(text_time) => {
                let sizes = Sinusoid { width: text_time.width, ..sinusoid };
                Some(TextTimeEmbedding::load(&weights.at("add_embedding"), text_time, sizes, 4 * first)?)
            }
            None => None,
        };
        let guidance = match config.guidance {
            Some(width) => Some(no_guidance(&weights.at("time_embedding.cond_proj"), width, first)?),
            None => None,
        };
        Ok(Self {
            sinusoid,
            guidance,
            time: EmbeddingMlp::load(&weights.at("time_embedding"), first, 4 * first)?,
            addition,
            device: options.device.clone(),
            dtype: options.precision.compute,
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

    /// The height and width of latents must be multiples of this.
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

    /// Width of the text embeddings it attends to.
    pub fn text_width(&self) -> usize {
        self.config.levels.iter().map(|level| level.text).max().unwrap_or_default()
    }

    /// Width of the pooled text embedding it takes, if it takes one.
    pub fn pooled_width(&self) -> Option<usize> {
        self.addition.as_ref().map(TextTimeEmbedding::pooled_width)
    }

    /// Time embeddings `[T, 4 C]`.
    pub fn time_embedding(&self, timesteps: &[f32]) -> Result<Tensor, ModelError> {
        let mut sinusoids = self.sinusoid.forward(timesteps, &self.device, self.dtype)?;
        if let Some(guidance) = &self.guidance {
            sinusoids = sinusoids.broadcast_add(guidance)?;
        }
        Ok(self.time.forward(&sinusoids)?)
    }

    /// The term `[N, 4 C]` that prompts add to the time embedding, from their pooled embeddings `[N, P]` and the
    /// image's side in pixels; `None` for models without additional conditioning.
    pub fn added_embedding(&self, pooled: Option<&Tensor>, side: usize) -> Result<Option<Tensor>, ModelError> {
        match (&self.addition, pooled) {
            (None, _) => Ok(None),
            (Some(addition), Some(pooled)) => Ok(Some(addition.forward(pooled, side)?)),
            (Some(_), None) => {
                Err(ModelError::Input("the UNet takes a pooled text embedding, but there is none".into()))
            }
        }
    }

    /// Computes the values that depend only on the timestep, for distinct `timesteps`, which the network gets as `times`.
    pub fn time_cache(&self, timesteps: &[u32], times: &[f32]) -> Result<TimeCache, ModelError> {
        let embedding = self.time_embedding(times)?;
        let layers = if self.addition.is_some() { vec![embedding] } else { self.shifts(&embedding)? };
        Ok(TimeCache::new(timesteps, layers))
    }

    /// The shifts of all resnets, from embeddings `[N, 4 C]`.
    fn shifts(&self, embedding: &Tensor) -> Result<Vec<Tensor>, ModelError> {
        let embedding = activate(embedding, Activation::Silu)?;
        let shift = |projection: &Linear| projection.forward(&embedding, None);
        Ok(self.slots.time_projections.iter().map(shift).collect::<candle_core::Result<_>>()?)
    }

    /// Computes the values that depend only on the prompt, for images of `side` pixels.
    pub fn prompt_cache(&self, texts: &TextEmbeddings, side: usize) -> Result<PromptCache, ModelError> {
        let (count, _, width) = texts.tokens.dims3()?;
        if width != self.text_width() {
            let message = format!("text embeddings of width {width} for a UNet that takes {}", self.text_width());
            return Err(ModelError::Input(message));
        }
        let layers = self.slots.text_projections.iter().map(|(key, value, heads)| {
            KeyValues::new(&key.forward(&texts.tokens, None)?, &value.forward(&texts.tokens, None)?, *heads)
        });
        let layers = layers.collect::<candle_core::Result<_>>()?;
        Ok(PromptCache { layers, added: self.added_embedding(texts.pooled.as_ref(), side)?, count })
    }

    fn batch_shifts<'a>(
        &self,
        indices: &Indices,
        times: &'a TimeCache,
        prompts: &PromptCache,
    ) -> Result<Shifts<'a>, ModelError> {
        match &prompts.added {
            None => Ok(Shifts::PerTimestep(times.layers())),
            Some(added) => {
                let time = gather(times.layer(0)?, &indices.times)?;
                Ok(Shifts::PerEvaluation(self.shifts(&(time + gather(added, &indices.conditions)?)?)?))
            }
        }
    }

    /// The raw model output `[B, H, W, Cout]` of every evaluation.
    ///
    /// An evaluation's output has the same bits whatever else is in the pass.
    pub fn forward(&self, input: &Pass<'_>, times: &TimeCache, prompts: &PromptCache) -> Result<Tensor, ModelError> {
        self.forward_probed(input, times, prompts, &mut Probe::none())
    }

    /// Like [`Unet::forward`], but shows every submodule's output to a probe.
    pub fn forward_probed(
        &self,
        input: &Pass<'_>,
        times: &TimeCache,
        prompts: &PromptCache,
        probe: &mut Probe<'_>,
    ) -> Result<Tensor, ModelError> {
        input.check(self.multiple())?;
        let indices = input.indices(times, prompts.count)?;
        let shifts = self.batch_shifts(&indices, times, prompts)?;
        let batch = Batch::new(&indices, input.evaluations, shifts, prompts);
        let tensor = self.conv_in.forward(input.latents, Fused::default())?;
        probe.see(|| "conv_in".to_owned(), &tensor);
        let mut x = Flow { tensor, shared: true };
        let mut skips = vec![x.clone()];
        if prompts.added.is_some() {
            x = Flow { tensor: gather(&x.tensor, &indices.points)?, shared: false };
        }
        for block in &self.down {
            x = block.forward(x, &mut skips, &batch, probe)?;
        }
        if let Some(mid) = &self.mid {
            x = mid.forward(&x, &batch)?;
            probe.see(|| "mid_block".to_owned(), &x.tensor);
        }
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

/// The term that a guidance scale of 1 adds to sinusoids of `channels` values (Luo et al., Latent Consistency Models,
/// 2023, section 4.2): with it, errors are those of the prediction for the prompt alone. As in diffusers' pipelines,
/// the network gets the scale minus one, times 1000.
fn no_guidance(p: &Params<'_>, width: usize, channels: usize) -> Result<Tensor, ModelError> {
    let sinusoid = Sinusoid { width, flip_sin_to_cos: false, freq_shift: 1.0 };
    let projection = linear_no_bias(p, width, channels)?;
    Ok(projection.forward(&sinusoid.forward(&[0.0], p.device(), p.dtype())?, None)?)
}
