//! Models in the formats of diffusers, transformers and OpenCLIP.
//!
//! Everything is loaded from a model directory in its library's layout, and checked while loading. A missing file or
//! weight, a wrong shape or an unsupported setting is an error that names it. Models have no interior
//! mutability, so one copy serves any number of threads.
//!
//! A [`DiffusionModel`] has an autoencoder ([`vae`](VaeEncoder)), text encoders that turn prompts into embeddings
//! ([`text`](TextEncoders); class-conditional models use labels instead), and a [`Network`]. All networks evaluate a
//! [`Pass`]. Values that depend only on the timestep come from a [`TimeCache`], and values that depend only on the
//! condition from [`Conditions`].

mod checkpoint;
mod clip;
mod contrastive;
mod distilled;
mod dit;
mod drawn;
mod encoder;
mod error;
mod family;
mod file;
mod inspect;
mod layers;
mod lora;
mod mmdit;
mod names;
mod network;
mod options;
mod pass;
mod patch;
mod probe;
mod reading;
mod settings;
mod stored;
mod t5;
mod text;
mod timestep;
mod tokenizer;
mod unet;
mod vae;

use std::path::Path;

use candle_core::{DType, Device, Tensor};

pub use self::checkpoint::{Params, Weights};
pub use self::clip::{ClipOutput, ClipTextModel};
pub use self::contrastive::ContrastiveModel;
pub use self::dit::{Dit, LabelCache};
pub use self::error::ModelError;
pub use self::family::Family;
pub use self::inspect::{Component, Inspection, Memory};
pub use self::lora::Lora;
pub use self::mmdit::{ContextCache, Mmdit};
pub use self::network::{Conditions, Network, TextRows};
pub use self::options::{LoadOptions, Precision, WeightsFrom};
pub use self::pass::Pass;
pub use self::probe::Probe;
pub use self::reading::{Reading, SameTokens, check_distinct, cut_off};
pub use self::t5::{T5Encoder, T5Tokenizer};
pub use self::text::{TextEmbeddings, TextEncoders};
pub use self::timestep::TimeCache;
pub use self::tokenizer::ClipTokenizer;
pub use self::unet::{PromptCache, Unet};
pub use self::vae::VaeEncoder;

use self::settings::unsupported;
use elbo_images::Preprocessing;

/// A diffusion model of any family.
#[derive(Debug)]
pub struct DiffusionModel {
    family: Family,
    /// `None` in class-conditional models, and after they were dropped.
    text_encoders: Option<TextEncoders>,
    vae: VaeEncoder,
    network: Network,
    /// Side of the images, in pixels.
    size: usize,
    options: LoadOptions,
}

impl DiffusionModel {
    /// Loads the model in `dir` for the CPU, in f32.
    ///
    /// ```no_run
    /// use elbo_core::class::Classes;
    /// use elbo_models::DiffusionModel;
    ///
    /// let model = DiffusionModel::load("stable-diffusion-2-base".as_ref())?;
    /// let classes = Classes::parse("ant\nbee\n", &[])?;
    /// let conditions = model.text_conditions(&classes.texts())?;
    /// println!("{} prompts for images of {} pixels", conditions.len(), model.size());
    /// # Ok::<_, Box<dyn std::error::Error>>(())
    /// ```
    pub fn load(dir: &Path) -> Result<Self, ModelError> {
        Self::load_with(dir, &LoadOptions::default())
    }

    /// Loads the model in `dir` onto a device, in a precision, with adapters.
    pub fn load_with(dir: &Path, options: &LoadOptions) -> Result<Self, ModelError> {
        let family = Family::of(dir)?;
        let network_dir = dir.join(family.network());
        let network = Network::load(family, &network_dir, options)?;
        let text_encoders = match (&network, family) {
            (Network::Dit(_), _) => None,
            (Network::Mmdit(mmdit), _) => Some(TextEncoders::sd3(dir, mmdit.text_width(), options)?),
            (Network::Unet(_), Family::Sdxl) => Some(TextEncoders::sdxl(dir, options)?),
            (Network::Unet(_), _) => Some(TextEncoders::stable_diffusion(dir, options)?),
        };
        let vae = VaeEncoder::of_family(family, &dir.join("vae"), options)?;
        let config = network_dir.join("config.json");
        if network.in_channels() != vae.latent_channels() {
            return Err(unsupported(&config, "in_channels", network.in_channels()));
        }
        if ![1, 2].map(|times| times * network.in_channels()).contains(&network.out_channels()) {
            return Err(unsupported(&config, "out_channels", network.out_channels()));
        }
        let size = network.sample_size() * vae.factor();
        Ok(Self { family, text_encoders, vae, network, size, options: options.clone() })
    }

    /// The family.
    pub fn family(&self) -> Family {
        self.family
    }

    /// The autoencoder, which turns images into latents.
    pub fn vae(&self) -> &VaeEncoder {
        &self.vae
    }

    /// The noise predictor.
    pub fn network(&self) -> &Network {
        &self.network
    }

    /// Side of the square images, in pixels: the training size unless [`Self::set_size`] changed it.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Sets the side of the images, which must be a multiple of [`Self::size_factor`].
    pub fn set_size(&mut self, size: usize) {
        self.size = size;
    }

    /// How to prepare an image file for [`Self::encode_images`].
    pub fn preprocessing(&self) -> Preprocessing {
        match self.family {
            Family::Dit => Preprocessing::dit(self.size as u32),
            Family::StableDiffusion | Family::Sdxl | Family::Sd3 => Preprocessing::stable_diffusion(self.size as u32),
        }
    }

    /// An image's side must be a multiple of this, in pixels.
    pub fn size_factor(&self) -> usize {
        self.vae.factor() * self.network.multiple()
    }

    /// Channels, height and width of an image's latent.
    pub fn latent_shape(&self) -> [usize; 3] {
        let side = self.size / self.vae.factor();
        [self.vae.latent_channels(), side, side]
    }

    /// Embeddings of texts.
    pub fn encode_texts(&self, texts: &[String]) -> Result<TextEmbeddings, ModelError> {
        self.text_encoders.as_ref().ok_or(ModelError::NoTextEncoder)?.encode(texts)
    }

    /// The tokens that the text encoders read of texts.
    pub fn readings(&self, texts: &[String]) -> Result<Vec<Reading>, ModelError> {
        self.text_encoders.as_ref().ok_or(ModelError::NoTextEncoder)?.readings(texts)
    }

    /// The network's conditions for texts.
    pub fn text_conditions(&self, texts: &[String]) -> Result<Conditions, ModelError> {
        self.network.text_conditions(&self.encode_texts(texts)?, self.size)
    }

    /// A class-conditional network's conditions for labels.
    pub fn label_conditions(&self, labels: &[i32]) -> Result<Conditions, ModelError> {
        let Network::Dit(dit) = &self.network else {
            return Err(ModelError::Input("labels are for class-conditional models, and this one reads texts".into()));
        };
        let classes = dit.classes();
        let known = |&label: &i32| {
            let known = u32::try_from(label).ok().filter(|label| (*label as usize) < classes);
            known.ok_or(ModelError::NoSuchClass { label: i64::from(label), classes })
        };
        let labels: Vec<u32> = labels.iter().map(known).collect::<Result<_, _>>()?;
        Ok(Conditions::Labels(dit.label_cache(&labels)?))
    }

    /// Latents `[B, h, w, C]` of pixels `[B, H, W, 3]` in [-1, 1].
    pub fn encode_images(&self, pixels: &Tensor) -> Result<Tensor, ModelError> {
        let pixels = pixels.to_device(&self.options.device)?.to_dtype(self.options.precision.compute)?;
        self.vae.encode(&pixels, &mut Probe::none())
    }

    /// The device it runs on and the type it computes in.
    pub fn device(&self) -> (&Device, DType) {
        (&self.options.device, self.options.precision.compute)
    }

    /// Frees the text encoders' memory, once the prompts are encoded.
    pub fn drop_text_encoders(&mut self) {
        self.text_encoders = None;
    }
}
