//! The text tower.

use candle_core::Tensor;
use elbo_kernels::{LayerNorm, Linear};

use super::architecture::{Config, Layout, Pool};
use crate::checkpoint::Params;
use crate::encoder::EncoderLayer;
use crate::error::ModelError;
use crate::layers::{layer_norm, linear, linear_no_bias};

/// The text tower.
#[derive(Debug)]
pub(super) struct TextTower {
    tokens: Tensor,
    positions: Tensor,
    layers: Vec<EncoderLayer>,
    norm: LayerNorm,
    pool: Pool,
    projection: Linear,
}

impl TextTower {
    /// Loads the tower of the model whose weights are `root`.
    pub(super) fn load(root: &Params<'_>, config: &Config) -> Result<Self, ModelError> {
        match config.layout {
            Layout::Clip | Layout::Siglip => Self::transformers(root, config),
            Layout::OpenClip => Self::open_clip(root, config),
        }
    }

    fn transformers(root: &Params<'_>, config: &Config) -> Result<Self, ModelError> {
        let (text, encoder) = (&config.text, &config.text.encoder);
        let (p, width) = (root.at("text_model"), encoder.width);
        let (embeddings, stack) = (p.at("embeddings"), p.at("encoder.layers"));
        Ok(Self {
            tokens: embeddings.at("token_embedding").get("weight", &[text.vocabulary, width])?,
            positions: embeddings.at("position_embedding").get("weight", &[text.positions, width])?,
            layers: (0..text.layers).map(|i| EncoderLayer::load(&stack.at(i), encoder)).collect::<Result<_, _>>()?,
            norm: layer_norm(&p.at("final_layer_norm"), width, encoder.eps)?,
            pool: text.pool,
            projection: match config.layout {
                Layout::Siglip => linear(&p.at("head"), width, config.width)?,
                _ => linear_no_bias(&root.at("text_projection"), width, config.width)?,
            },
        })
    }

    fn open_clip(root: &Params<'_>, config: &Config) -> Result<Self, ModelError> {
        let (text, encoder) = (&config.text, &config.text.encoder);
        let (stack, width) = (root.at("transformer.resblocks"), encoder.width);
        let layer = |i| EncoderLayer::load_open_clip(&stack.at(i), encoder);
        let projection = root.get("text_projection", &[width, config.width])?;
        Ok(Self {
            tokens: root.at("token_embedding").get("weight", &[text.vocabulary, width])?,
            positions: root.get("positional_embedding", &[text.positions, width])?,
            layers: (0..text.layers).map(layer).collect::<Result<_, _>>()?,
            norm: layer_norm(&root.at("ln_final"), width, encoder.eps)?,
            pool: text.pool,
            projection: Linear::new(&projection.t()?.contiguous()?, None)?,
        })
    }

    /// Embeddings `[N, D]` of `N` sequences of ids, each as long as the number of positions.
    pub(super) fn forward(&self, ids: &[Vec<u32>]) -> Result<Tensor, ModelError> {
        let (vocabulary, width) = self.tokens.dims2()?;
        let (count, len) = (ids.len(), self.positions.dim(0)?);
        let flat: Vec<u32> = ids.iter().flatten().copied().collect();
        if let Some(id) = flat.iter().find(|id| **id as usize >= vocabulary) {
            return Err(ModelError::Input(format!(
                "the tokenizer gave the id {id}, but the model's vocabulary has {vocabulary}"
            )));
        }
        let flat = Tensor::from_vec(flat, count * len, self.tokens.device())?;
        let embedded = self.tokens.index_select(&flat, 0)?.reshape((count, len, width))?;
        let mut h = embedded.broadcast_add(&self.positions)?;
        for layer in &self.layers {
            h = layer.forward(&h)?;
        }
        let rows = ids.iter().enumerate().map(|(i, ids)| (i * len + self.pool.position(ids)) as u32);
        let rows = Tensor::from_iter(rows, self.tokens.device())?;
        let pooled = h.reshape((count * len, width))?.index_select(&rows, 0)?;
        Ok(self.projection.forward(&self.norm.forward(&pooled)?, None)?)
    }
}

impl Pool {
    fn position(self, ids: &[u32]) -> usize {
        let first = |wanted: u32| ids.iter().position(|&id| id == wanted).unwrap_or(0);
        match self {
            Self::First(id) => first(id),
            Self::Largest => first(ids.iter().copied().max().unwrap_or_default()),
            Self::Last => ids.len().saturating_sub(1),
        }
    }
}
