//! The network of a diffusion model of any family.

use std::path::Path;

use candle_core::Tensor;
use elbo_kernels::download;

use super::dit::{Dit, LabelCache};
use super::error::ModelError;
use super::family::Family;
use super::mmdit::{ContextCache, Mmdit};
use super::options::LoadOptions;
use super::pass::Pass;
use super::text::TextEmbeddings;
use super::timestep::TimeCache;
use super::unet::{PromptCache, Unet};

/// A network that predicts the noise (or the velocity).
#[derive(Debug)]
pub enum Network {
    /// Stable Diffusion 1.x, 2.x and SDXL.
    Unet(Box<Unet>),
    /// DiT.
    Dit(Box<Dit>),
    /// Stable Diffusion 3 and 3.5.
    Mmdit(Box<Mmdit>),
}

/// A network's conditions, prepared once: prompts, or class labels.
#[derive(Debug)]
pub enum Conditions {
    /// For a UNet.
    Prompts(PromptCache),
    /// For a DiT.
    Labels(LabelCache),
    /// For an MMDiT.
    Contexts(ContextCache),
    /// For a contrastive model.
    Embeddings(TextRows),
}

/// Unit-length embeddings of texts.
#[derive(Debug)]
pub struct TextRows {
    values: Vec<f32>,
    width: usize,
}

impl TextRows {
    /// Rows `[N, D]` in f32.
    pub fn new(rows: &Tensor) -> Result<Self, ModelError> {
        let width = rows.dim(1)?;
        Ok(Self { values: download(rows)?, width })
    }

    /// Number of texts.
    pub fn len(&self) -> usize {
        self.values.len() / self.width.max(1)
    }

    /// Whether there are no texts.
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// 1 - cosine of the angle between an image's embedding `[D]` and a text's, in [0, 2].
    pub fn distance(&self, image: &[f32], text: u32) -> Result<f32, ModelError> {
        let start = text as usize * self.width;
        match self.values.get(start..start + self.width) {
            Some(row) if row.len() == image.len() => {
                let product: f64 = row.iter().zip(image).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                Ok((1.0 - product).clamp(0.0, 2.0) as f32)
            }
            _ => Err(ModelError::Input(format!("no text {text} among {} of width {}", self.len(), self.width))),
        }
    }
}

impl Conditions {
    /// Number of conditions.
    pub fn len(&self) -> usize {
        match self {
            Self::Prompts(cache) => cache.len(),
            Self::Labels(cache) => cache.len(),
            Self::Contexts(cache) => cache.len(),
            Self::Embeddings(rows) => rows.len(),
        }
    }

    /// Whether there are no conditions.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Network {
    /// Loads the network of a family from its directory.
    pub fn load(family: Family, dir: &Path, options: &LoadOptions) -> Result<Self, ModelError> {
        Ok(match family {
            Family::StableDiffusion | Family::Sdxl => Self::Unet(Box::new(Unet::load(dir, options)?)),
            Family::Sd3 => Self::Mmdit(Box::new(Mmdit::load(dir, options)?)),
            Family::Dit => Self::Dit(Box::new(Dit::load(dir, options)?)),
        })
    }

    /// Height and width of the latents the model was trained on.
    pub fn sample_size(&self) -> usize {
        match self {
            Self::Unet(unet) => unet.sample_size(),
            Self::Dit(dit) => dit.sample_size(),
            Self::Mmdit(mmdit) => mmdit.sample_size(),
        }
    }

    /// The height and width of latents must be multiples of this.
    pub fn multiple(&self) -> usize {
        match self {
            Self::Unet(unet) => unet.multiple(),
            Self::Dit(dit) => dit.multiple(),
            Self::Mmdit(mmdit) => mmdit.multiple(),
        }
    }

    /// Channels of the latents.
    pub fn in_channels(&self) -> usize {
        match self {
            Self::Unet(unet) => unet.in_channels(),
            Self::Dit(dit) => dit.in_channels(),
            Self::Mmdit(mmdit) => mmdit.in_channels(),
        }
    }

    /// Channels of the output: the latents', or twice as many if the variance is learned too.
    pub fn out_channels(&self) -> usize {
        match self {
            Self::Unet(unet) => unet.out_channels(),
            Self::Dit(dit) => dit.out_channels(),
            Self::Mmdit(mmdit) => mmdit.in_channels(),
        }
    }

    /// Computes the values that depend only on texts, for images of `side` pixels.
    pub fn text_conditions(&self, texts: &TextEmbeddings, side: usize) -> Result<Conditions, ModelError> {
        match self {
            Self::Unet(unet) => Ok(Conditions::Prompts(unet.prompt_cache(texts, side)?)),
            Self::Mmdit(mmdit) => Ok(Conditions::Contexts(mmdit.context_cache(texts)?)),
            Self::Dit(_) => Err(ModelError::NoTextEncoder),
        }
    }

    /// Widths of the text tokens and of the pooled embedding, if the network takes texts.
    pub fn text_widths(&self) -> Option<(usize, Option<usize>)> {
        match self {
            Self::Unet(unet) => Some((unet.text_width(), unet.pooled_width())),
            Self::Mmdit(mmdit) => Some((mmdit.text_width(), Some(mmdit.pooled_width()))),
            Self::Dit(_) => None,
        }
    }

    /// Computes the values that depend only on the timestep, for distinct `timesteps`, which the network gets as `times`.
    pub fn time_cache(&self, timesteps: &[u32], times: &[f32]) -> Result<TimeCache, ModelError> {
        match self {
            Self::Unet(unet) => unet.time_cache(timesteps, times),
            Self::Dit(dit) => dit.time_cache(timesteps, times),
            Self::Mmdit(mmdit) => mmdit.time_cache(timesteps, times),
        }
    }

    /// The raw output `[B, H, W, Cout]` of every evaluation.
    ///
    /// An evaluation's output has the same bits whatever else is in the pass.
    pub fn forward(&self, pass: &Pass<'_>, times: &TimeCache, conditions: &Conditions) -> Result<Tensor, ModelError> {
        match (self, conditions) {
            (Self::Unet(unet), Conditions::Prompts(cache)) => unet.forward(pass, times, cache),
            (Self::Dit(dit), Conditions::Labels(cache)) => dit.forward(pass, times, cache),
            (Self::Mmdit(mmdit), Conditions::Contexts(cache)) => mmdit.forward(pass, times, cache),
            _ => Err(ModelError::Input("conditions of another model family".into())),
        }
    }
}
