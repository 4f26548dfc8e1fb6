//! The encoder of the autoencoder (AutoencoderKL; Rombach et al., CVPR 2022): images to latents.
//!
//! A latent is the posterior's mean and not a sample, so the scores depend only on the image.

mod config;

use std::path::Path;

use candle_core::{D, DType, Device, Tensor};
use elbo_kernels::{Conv2d, Fused, GroupNorm, Linear, Padding, Rows, self_attention};

use self::config::VaeConfig;
use super::checkpoint::{Params, Weights};
use super::error::ModelError;
use super::family::Family;
use super::layers::{conv3x3, group_norm, joined, linear};
use super::options::LoadOptions;
use super::probe::Probe;

/// diffusers' epsilon of every norm in the autoencoder.
const EPS: f64 = 1e-6;

/// The autoencoder's encoder.
#[derive(Debug)]
pub struct VaeEncoder {
    conv_in: Conv2d,
    down: Vec<DownBlock>,
    mid: (Resnet, Option<Attention>, Resnet),
    norm_out: GroupNorm,
    conv_out: Conv2d,
    quant: Option<Linear>,
    latent_channels: usize,
    scaling: Scaling,
}

/// Scales the posterior's mean to a latent of about unit variance: `(mean - shift) * scale`, per channel or with one
/// value for all.
#[derive(Debug)]
enum Scaling {
    All {
        shift: f64,
        scale: f64,
    },
    /// `[C]` each.
    Channels {
        shift: Tensor,
        scale: Tensor,
    },
}

impl Scaling {
    fn new(config: &VaeConfig, device: &Device, dtype: DType) -> candle_core::Result<Self> {
        let scale = config.scaling_factor;
        let Some((mean, std)) = config.statistics() else {
            return Ok(Self::All { shift: config.shift_factor.unwrap_or(0.0), scale });
        };
        let tensor = |values: Vec<f32>| Tensor::from_vec(values, config.latent_channels, device)?.to_dtype(dtype);
        let scales = std.iter().map(|std| (scale / std) as f32).collect();
        Ok(Self::Channels { shift: tensor(mean.iter().map(|mean| *mean as f32).collect())?, scale: tensor(scales)? })
    }

    fn apply(&self, mean: &Tensor) -> candle_core::Result<Tensor> {
        match self {
            Self::All { shift, scale } => (mean - *shift)? * *scale,
            Self::Channels { shift, scale } => mean.broadcast_sub(shift)?.broadcast_mul(scale),
        }
    }
}

impl VaeEncoder {
    /// Loads the encoder of the autoencoder in `dir`.
    pub fn load(dir: &Path, options: &LoadOptions) -> Result<Self, ModelError> {
        Self::of_config(&VaeConfig::read(&dir.join("config.json"))?, dir, options)
    }

    /// Loads the encoder of the autoencoder in `dir`. Its settings must be ones that the family's pipeline uses.
    pub(crate) fn of_family(family: Family, dir: &Path, options: &LoadOptions) -> Result<Self, ModelError> {
        let path = dir.join("config.json");
        let config = VaeConfig::read(&path)?;
        config.check_family(family, &path)?;
        Self::of_config(&config, dir, options)
    }

    fn of_config(config: &VaeConfig, dir: &Path, options: &LoadOptions) -> Result<Self, ModelError> {
        let weights = Weights::open(dir, "diffusion_pytorch_model", options)?;
        let (p, groups) = (weights.at("encoder"), config.norm_num_groups);
        let channels = &config.block_out_channels;
        let (first, last) = (channels[0], channels[channels.len() - 1]);
        let mut down = Vec::new();
        for (i, &outputs) in channels.iter().enumerate() {
            let inputs = channels[i.saturating_sub(1)];
            let block = p.at(format!("down_blocks.{i}"));
            let downsample = i + 1 < channels.len();
            down.push(DownBlock::load(&block, inputs, outputs, config.layers_per_block, groups, downsample)?);
        }
        let mid = p.at("mid_block");
        let attention = if config.mid_block_add_attention {
            Some(Attention::load(&mid.at("attentions.0"), last, groups)?)
        } else {
            None
        };
        let moments = 2 * config.latent_channels;
        let quant =
            if config.use_quant_conv { Some(linear(&weights.at("quant_conv"), moments, moments)?) } else { None };
        Ok(Self {
            conv_in: conv3x3(&p.at("conv_in"), config.in_channels, first, 1, Padding::Around)?,
            down,
            mid: (
                Resnet::load(&mid.at("resnets.0"), last, last, groups)?,
                attention,
                Resnet::load(&mid.at("resnets.1"), last, last, groups)?,
            ),
            norm_out: group_norm(&p.at("conv_norm_out"), groups, last, EPS)?,
            conv_out: conv3x3(&p.at("conv_out"), last, moments, 1, Padding::Around)?,
            quant,
            latent_channels: config.latent_channels,
            scaling: Scaling::new(config, &options.device, options.precision.compute)?,
        })
    }

    /// The ratio of an image's side to its latent's side.
    pub fn factor(&self) -> usize {
        1 << (self.down.len() - 1)
    }

    /// Channels of a latent.
    pub fn latent_channels(&self) -> usize {
        self.latent_channels
    }

    /// Latents `[B, h, w, C]` of pixels `[B, H, W, 3]` in [-1, 1]: `(mean - shift_factor) * scaling_factor`, or
    /// `(mean - latents_mean) * scaling_factor / latents_std` if the configuration has statistics.
    pub fn encode(&self, pixels: &Tensor, probe: &mut Probe<'_>) -> Result<Tensor, ModelError> {
        let mut h = self.conv_in.forward(pixels, Fused::default())?;
        probe.see(|| "encoder.conv_in".to_owned(), &h);
        for (i, block) in self.down.iter().enumerate() {
            h = block.forward(&h)?;
            probe.see(|| format!("encoder.down_blocks.{i}"), &h);
        }
        h = self.mid.0.forward(&h)?;
        if let Some(attention) = &self.mid.1 {
            h = attention.forward(&h)?;
        }
        h = self.mid.2.forward(&h)?;
        probe.see(|| "encoder.mid_block".to_owned(), &h);
        probe.compute("encoder.conv_norm_out", || self.norm_out.forward(&h, false))?;
        h = self.conv_out.forward(&h, Fused { norm: Some(&self.norm_out), ..Fused::default() })?;
        probe.see(|| "encoder.conv_out".to_owned(), &h);
        if let Some(quant) = &self.quant {
            h = quant.forward(&h, None)?;
        }
        probe.see(|| "quant_conv".to_owned(), &h);
        let mean = h.narrow(D::Minus1, 0, self.latent_channels)?.contiguous()?;
        Ok(self.scaling.apply(&mean)?)
    }
}

#[derive(Debug)]
struct DownBlock {
    resnets: Vec<Resnet>,
    downsample: Option<Conv2d>,
}

impl DownBlock {
    fn load(
        p: &Params<'_>,
        inputs: usize,
        outputs: usize,
        layers: usize,
        groups: usize,
        downsample: bool,
    ) -> Result<Self, ModelError> {
        let resnet = |i: usize| {
            let inputs = if i == 0 { inputs } else { outputs };
            Resnet::load(&p.at(format!("resnets.{i}")), inputs, outputs, groups)
        };
        let downsample = if downsample {
            Some(conv3x3(&p.at("downsamplers.0.conv"), outputs, outputs, 2, Padding::After)?)
        } else {
            None
        };
        Ok(Self { resnets: (0..layers).map(resnet).collect::<Result<_, _>>()?, downsample })
    }

    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let mut h = x.clone();
        for resnet in &self.resnets {
            h = resnet.forward(&h)?;
        }
        match &self.downsample {
            Some(conv) => conv.forward(&h, Fused::default()),
            None => Ok(h),
        }
    }
}

/// A residual block without time embedding.
#[derive(Debug)]
struct Resnet {
    norm1: GroupNorm,
    conv1: Conv2d,
    norm2: GroupNorm,
    conv2: Conv2d,
    shortcut: Option<Linear>,
}

impl Resnet {
    fn load(p: &Params<'_>, inputs: usize, outputs: usize, groups: usize) -> Result<Self, ModelError> {
        let shortcut = if inputs == outputs { None } else { Some(linear(&p.at("conv_shortcut"), inputs, outputs)?) };
        Ok(Self {
            norm1: group_norm(&p.at("norm1"), groups, inputs, EPS)?,
            conv1: conv3x3(&p.at("conv1"), inputs, outputs, 1, Padding::Around)?,
            norm2: group_norm(&p.at("norm2"), groups, outputs, EPS)?,
            conv2: conv3x3(&p.at("conv2"), outputs, outputs, 1, Padding::Around)?,
            shortcut,
        })
    }

    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let h = self.conv1.forward(x, Fused { norm: Some(&self.norm1), ..Fused::default() })?;
        let residual = match &self.shortcut {
            Some(shortcut) => shortcut.forward(x, None)?,
            None => x.clone(),
        };
        let residual = Some(Rows::direct(&residual));
        self.conv2.forward(&h, Fused { norm: Some(&self.norm2), residual, ..Fused::default() })
    }
}

/// Single-head self-attention over the pixels.
#[derive(Debug)]
struct Attention {
    norm: GroupNorm,
    qkv: Linear,
    out: Linear,
}

impl Attention {
    fn load(p: &Params<'_>, channels: usize, groups: usize) -> Result<Self, ModelError> {
        let old = p.has("query.weight");
        let names = if old { ["query", "key", "value"] } else { ["to_q", "to_k", "to_v"] };
        let out = if old { "proj_attn" } else { "to_out.0" };
        Ok(Self {
            norm: group_norm(&p.at("group_norm"), groups, channels, EPS)?,
            qkv: joined(&names.map(|name| p.at(name)), channels, channels, true)?,
            out: linear(&p.at(out), channels, channels)?,
        })
    }

    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let (batch, height, width, channels) = x.dims4()?;
        let sequence = x.reshape((batch, height * width, channels))?;
        let qkv = self.qkv.forward(&self.norm.forward(&sequence, false)?, None)?;
        let h = self_attention(&qkv, 1, false)?;
        self.out.forward(&h, Some(Rows::direct(&sequence)))?.reshape((batch, height, width, channels))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statistics_are_applied_channel_by_channel() {
        let settings = serde_json::json!({
            "latents_mean": [1.0, -2.0], "latents_std": [2.0, 0.5], "latent_channels": 2, "scaling_factor": 0.5,
            "shift_factor": null,
        });
        let config: VaeConfig = serde_json::from_value(settings).unwrap();
        let scaling = Scaling::new(&config, &Device::Cpu, DType::F32).unwrap();
        let mean = Tensor::new(&[[3.0f32, 1.0], [1.0, -2.0]], &Device::Cpu).unwrap();
        // As in StableDiffusionXLImg2ImgPipeline: (latents - latents_mean) * scaling_factor / latents_std.
        assert_eq!(scaling.apply(&mean).unwrap().to_vec2::<f32>().unwrap(), [[0.5, 3.0], [0.0, 0.0]]);
    }
}
