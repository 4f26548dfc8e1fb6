//! The models, as diffusers, transformers and OpenCLIP store them.
//!
//! Everything is loaded from a model directory in its library's layout and checked on the way: a missing file or weight, a
//! shape that does not fit or a setting that is not implemented is an error that names it. All models are plain values
//! without interior mutability, so one copy serves any number of threads.

mod checkpoint;
mod clip;
mod contrastive;
mod encoder;
mod layers;
mod probe;
mod tokenizer;
mod unet;
mod vae;

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use serde::Deserialize;

pub use self::checkpoint::{ModelError, Params, Weights};
pub use self::clip::ClipTextModel;
pub use self::contrastive::{ContrastiveModel, is_contrastive};
pub use self::probe::Probe;
pub use self::tokenizer::ClipTokenizer;
pub use self::unet::{PromptCache, TimeCache, Unet, UnetInput};
pub use self::vae::VaeEncoder;

use self::checkpoint::{read_json, unsupported};

/// A Stable Diffusion 1.x or 2.x model.
#[derive(Debug)]
pub struct StableDiffusion {
    tokenizer: ClipTokenizer,
    /// `None` once dropped.
    text_encoder: Option<ClipTextModel>,
    vae: VaeEncoder,
    unet: Unet,
    /// Side of the images, in pixels.
    size: usize,
    device: Device,
    dtype: DType,
}

#[derive(Deserialize)]
struct ModelIndex {
    #[serde(rename = "_class_name")]
    class: String,
}

impl StableDiffusion {
    /// Loads the model in `dir` for the CPU, in f32.
    pub fn load(dir: &Path) -> Result<Self, ModelError> {
        Self::load_on(dir, &Device::Cpu, DType::F32)
    }

    /// Loads the model in `dir` onto a device, in a floating point type.
    pub fn load_on(dir: &Path, device: &Device, dtype: DType) -> Result<Self, ModelError> {
        let path = dir.join("model_index.json");
        let index: ModelIndex = read_json(&path)?;
        if index.class != "StableDiffusionPipeline" {
            return Err(unsupported(&path, "_class_name", index.class));
        }
        let text_encoder = ClipTextModel::load(&dir.join("text_encoder"), device, dtype)?;
        let unet = Unet::load(&dir.join("unet"), device, dtype)?;
        let vae = VaeEncoder::load(&dir.join("vae"), device, dtype)?;
        if unet.in_channels() != vae.latent_channels() {
            let path = dir.join("unet").join("config.json");
            return Err(unsupported(&path, "in_channels", unet.in_channels()));
        }
        Ok(Self {
            tokenizer: ClipTokenizer::open(&dir.join("tokenizer"), text_encoder.positions())?,
            text_encoder: Some(text_encoder),
            size: unet.sample_size() * vae.factor(),
            vae,
            unet,
            device: device.clone(),
            dtype,
        })
    }

    /// Text to token ids.
    pub fn tokenizer(&self) -> &ClipTokenizer {
        &self.tokenizer
    }

    /// Prompts to text embeddings, until it is dropped.
    pub fn text_encoder(&self) -> Option<&ClipTextModel> {
        self.text_encoder.as_ref()
    }

    /// Images to latents.
    pub fn vae(&self) -> &VaeEncoder {
        &self.vae
    }

    /// The noise predictor.
    pub fn unet(&self) -> &Unet {
        &self.unet
    }

    /// Side of the square images in pixels: what the model was trained on, unless set otherwise.
    pub fn native_size(&self) -> usize {
        self.size
    }

    /// Images are to have another side than the model was trained on, a multiple of [`Self::size_factor`].
    pub fn set_size(&mut self, size: usize) {
        self.size = size;
    }

    /// What an image's side must be a multiple of, in pixels.
    pub fn size_factor(&self) -> usize {
        self.vae.factor() * self.unet.multiple()
    }

    /// Channels, height and width of an image's latent.
    pub fn latent_shape(&self) -> [usize; 3] {
        let side = self.size / self.vae.factor();
        [self.vae.latent_channels(), side, side]
    }

    /// Text embeddings `[N, 77, C]` of prompts.
    pub fn encode_prompts(&self, prompts: &[String]) -> Result<Tensor, ModelError> {
        let encoder = self.text_encoder.as_ref().ok_or(ModelError::NoTextEncoder)?;
        let ids: Vec<_> = prompts.iter().map(|prompt| self.tokenizer.encode(prompt)).collect::<Result<_, _>>()?;
        encoder.forward(&ids, &mut Probe::none())
    }

    /// Latents `[B, h, w, C]` of pixels `[B, H, W, 3]` in [-1, 1].
    pub fn encode_images(&self, pixels: &Tensor) -> Result<Tensor, ModelError> {
        let pixels = pixels.to_device(&self.device)?.to_dtype(self.dtype)?;
        self.vae.encode(&pixels, &mut Probe::none())
    }

    /// Gives the text encoder's memory back once the prompts are encoded.
    pub fn drop_text_encoder(&mut self) {
        self.text_encoder = None;
    }
}
