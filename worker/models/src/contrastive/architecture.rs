//! The architecture of a contrastive model.

use std::path::Path;

use elbo_images::Preprocessing;

use crate::encoder::EncoderConfig;
use crate::error::ModelError;
use crate::settings::unsupported;
use crate::stored::has_weights;

/// The library whose weight names and architecture the model uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Layout {
    /// transformers' CLIPModel.
    Clip,
    /// transformers' SiglipModel.
    Siglip,
    /// OpenCLIP's own model.
    OpenClip,
}

/// The architecture.
#[derive(Debug)]
pub(super) struct Config {
    pub(super) layout: Layout,
    /// Dimensions of an embedding.
    pub(super) width: usize,
    pub(super) vision: VisionConfig,
    pub(super) text: TextConfig,
    pub(super) preprocessing: Preprocessing,
}

/// The image tower.
#[derive(Debug)]
pub(super) struct VisionConfig {
    /// Side of an image in pixels.
    pub(super) size: usize,
    /// Side of a patch in pixels.
    pub(super) patch: usize,
    pub(super) layers: usize,
    pub(super) encoder: EncoderConfig,
}

/// The text tower.
#[derive(Debug)]
pub(super) struct TextConfig {
    pub(super) vocabulary: usize,
    /// Number of token ids in a text.
    pub(super) positions: usize,
    pub(super) layers: usize,
    pub(super) encoder: EncoderConfig,
    pub(super) pool: Pool,
}

/// The token whose hidden state stands for a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pool {
    /// The first token with this id.
    First(u32),
    /// The first token with the largest id, which is the end of the text in CLIP's vocabulary.
    Largest,
    /// The last position.
    Last,
}

impl Config {
    /// The stem of the weights' file name.
    pub(super) fn weights(&self, dir: &Path) -> &'static str {
        match self.layout {
            Layout::Clip | Layout::Siglip => "model",
            Layout::OpenClip if has_weights(dir, "open_clip_pytorch_model") => "open_clip_pytorch_model",
            Layout::OpenClip => "open_clip_model",
        }
    }

    /// Checks for mistakes that would otherwise cause an error later and elsewhere.
    pub(super) fn checked(self, path: &Path) -> Result<Self, ModelError> {
        for encoder in [&self.vision.encoder, &self.text.encoder] {
            if encoder.heads == 0 || !encoder.width.is_multiple_of(encoder.heads) {
                return Err(unsupported(path, "num_attention_heads", encoder.heads));
            }
        }
        if self.vision.patch == 0 || self.vision.patch > self.vision.size {
            return Err(unsupported(path, "patch_size", self.vision.patch));
        }
        Ok(self)
    }
}
