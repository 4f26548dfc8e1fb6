//! Contrastive image-text models: CLIP (Radford et al., ICML 2021), OpenCLIP (Cherti et al., CVPR 2023) and SigLIP (Zhai
//! et al., ICCV 2023).
//!
//! Both towers map to one space, where the inner product of an image's and a text's embedding scores how well they
//! match. One pass over an image scores it against every class, while a diffusion model needs many passes per class.

mod architecture;
mod config;
mod open_clip;
mod processor;
mod text;
mod tokenizer;
mod vision;

use std::path::Path;

use candle_core::{D, DType, Device, Tensor};
use elbo_images::Preprocessing;

use self::architecture::{Config, Layout};
use self::text::TextTower;
use self::tokenizer::Tokenizer;
use self::vision::VisionTower;
use super::checkpoint::Weights;
use super::error::ModelError;
use super::names;
use super::options::LoadOptions;
use super::reading::Reading;

/// Texts encoded at a time. This bounds the memory of their hidden states.
const TEXTS: usize = 32;

/// A contrastive image-text model.
#[derive(Debug)]
pub struct ContrastiveModel {
    family: &'static str,
    tokenizer: Tokenizer,
    text: TextTower,
    vision: VisionTower,
    preprocessing: Preprocessing,
    width: usize,
    logit_scale: f32,
    logit_bias: f32,
    device: Device,
    dtype: DType,
}

impl ContrastiveModel {
    /// Loads the model in `dir`, in the layout of transformers (CLIP, SigLIP) or OpenCLIP, onto a device.
    pub fn load(dir: &Path, options: &LoadOptions) -> Result<Self, ModelError> {
        let config = Config::read(dir)?;
        let weights = Weights::open_named(dir, config.weights(dir), names::towers, options)?;
        let root = weights.at("");
        Ok(Self {
            family: match config.layout {
                Layout::Clip => "CLIP",
                Layout::Siglip => "SigLIP",
                Layout::OpenClip => "OpenCLIP",
            },
            tokenizer: match config.layout {
                Layout::Clip | Layout::OpenClip => Tokenizer::clip(dir, config.text.positions)?,
                Layout::Siglip => Tokenizer::siglip(dir, config.text.positions)?,
            },
            text: TextTower::load(&root, &config)?,
            vision: VisionTower::load(&root, &config)?,
            logit_scale: root.scalar("logit_scale")?.exp(),
            logit_bias: if root.has("logit_bias") { root.scalar("logit_bias")? } else { 0.0 },
            preprocessing: config.preprocessing,
            width: config.width,
            device: options.device.clone(),
            dtype: options.precision.compute,
        })
    }

    /// The stem of the weights' file name.
    pub(crate) fn weights(dir: &Path) -> Result<&'static str, ModelError> {
        Ok(Config::read(dir)?.weights(dir))
    }

    /// CLIP, SigLIP or OpenCLIP.
    pub fn family(&self) -> &'static str {
        self.family
    }

    /// How to prepare an image file for [`Self::encode_images`].
    pub fn preprocessing(&self) -> Preprocessing {
        self.preprocessing.clone()
    }

    /// The device it runs on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Dimensions of an embedding.
    pub fn width(&self) -> usize {
        self.width
    }

    /// The factor from the inner product of two embeddings to a logit.
    pub fn logit_scale(&self) -> f32 {
        self.logit_scale
    }

    /// The bias added after scaling: 0 except for models trained with a sigmoid loss.
    pub fn logit_bias(&self) -> f32 {
        self.logit_bias
    }

    /// Unit-length embeddings `[B, D]` in f32 of preprocessed pixels `[B, S, S, 3]`.
    pub fn encode_images(&self, pixels: &Tensor) -> Result<Tensor, ModelError> {
        let pixels = pixels.to_device(&self.device)?.to_dtype(self.dtype)?;
        normalised(&self.vision.forward(&pixels)?)
    }

    /// Unit-length embeddings `[N, D]` in f32 of texts.
    pub fn encode_texts(&self, texts: &[String]) -> Result<Tensor, ModelError> {
        let mut embeddings = Vec::new();
        for texts in texts.chunks(TEXTS) {
            let ids: Vec<_> = texts.iter().map(|text| self.tokenize(text)).collect::<Result<_, _>>()?;
            embeddings.push(normalised(&self.text.forward(&ids)?)?);
        }
        if embeddings.is_empty() {
            Ok(Tensor::zeros((0, self.width), DType::F32, &Device::Cpu)?)
        } else {
            Ok(Tensor::cat(&embeddings, 0)?)
        }
    }

    /// Token ids of a text, padded to the length the text tower takes.
    pub fn tokenize(&self, text: &str) -> Result<Vec<u32>, ModelError> {
        Ok(self.tokenizer.read(text)?.into_ids())
    }

    /// The tokens that the text tower reads of texts.
    pub fn readings(&self, texts: &[String]) -> Result<Vec<Reading>, ModelError> {
        texts.iter().map(|text| self.tokenizer.read(text)).collect()
    }
}

/// Rows `[N, D]` divided by their lengths, in f32.
fn normalised(rows: &Tensor) -> Result<Tensor, ModelError> {
    let rows = rows.to_dtype(DType::F32)?;
    let lengths = rows.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?;
    if lengths.flatten_all()?.to_vec1::<f32>()?.iter().any(|length| !length.is_normal()) {
        return Err(ModelError::NotFinite);
    }
    Ok(rows.broadcast_div(&lengths)?)
}
