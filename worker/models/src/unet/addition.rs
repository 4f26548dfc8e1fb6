//! SDXL's extra conditioning (Podell et al., ICLR 2024): embeddings of the pooled text and the image's sizes, added to
//! the time embedding.

use candle_core::{DType, Device, Tensor};

use super::config::TextTime;
use crate::checkpoint::Params;
use crate::error::ModelError;
use crate::timestep::{EmbeddingMlp, Sinusoid};

/// diffusers' `addition_embed_type: "text_time"`.
#[derive(Debug)]
pub(super) struct TextTimeEmbedding {
    sizes: Sinusoid,
    pooled: usize,
    mlp: EmbeddingMlp,
    device: Device,
    dtype: DType,
}

impl TextTimeEmbedding {
    pub(super) fn load(p: &Params<'_>, config: &TextTime, sizes: Sinusoid, width: usize) -> Result<Self, ModelError> {
        Ok(Self {
            sizes,
            pooled: config.inputs - 6 * config.width,
            mlp: EmbeddingMlp::load(p, config.inputs, width)?,
            device: p.device().clone(),
            dtype: p.dtype(),
        })
    }

    /// Width of the pooled embeddings.
    pub(super) fn pooled_width(&self) -> usize {
        self.pooled
    }

    /// The term `[N, 4 C]` that prompts with pooled embeddings `[N, P]` add to the time embedding, for square images of
    /// `side` pixels.
    ///
    /// The six sizes are the height and width before preprocessing, the crop's top and left, and the final height and
    /// width. As in diffusers' pipeline, they describe an image of exactly this size, since an image's original size
    /// should not affect its class.
    pub(super) fn forward(&self, pooled: &Tensor, side: usize) -> Result<Tensor, ModelError> {
        let (prompts, width) = pooled.dims2()?;
        if width != self.pooled {
            let message = format!("a pooled text embedding of {width} values, but the UNet takes {}", self.pooled);
            return Err(ModelError::Input(message));
        }
        let side = side as f32;
        let sizes = self.sizes.forward(&[side, side, 0.0, 0.0, side, side], &self.device, self.dtype)?;
        let sizes = sizes.reshape((1, 6 * self.sizes.width))?.broadcast_as((prompts, 6 * self.sizes.width))?;
        Ok(self.mlp.forward(&Tensor::cat(&[pooled, &sizes.contiguous()?], 1)?)?)
    }
}
