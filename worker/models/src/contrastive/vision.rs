//! The image tower: a vision transformer (Dosovitskiy et al., ICLR 2021).

use candle_core::{D, Tensor};
use elbo_kernels::{KeyValues, LayerNorm, Linear, cross_attention};

use super::architecture::{Config, Layout, VisionConfig};
use crate::checkpoint::Params;
use crate::encoder::{EncoderLayer, Mlp};
use crate::error::ModelError;
use crate::layers::{layer_norm, linear, linear_no_bias};

/// The image tower.
#[derive(Debug)]
pub(super) struct VisionTower {
    /// Side of an image in pixels.
    size: usize,
    /// Side of a patch in pixels.
    patch: usize,
    /// A linear layer over patches, equal to a convolution whose windows don't overlap.
    patches: Linear,
    /// The class token before the patches, `[C]`.
    class: Option<Tensor>,
    positions: Tensor,
    norm: Option<LayerNorm>,
    layers: Vec<EncoderLayer>,
    head: Head,
}

/// How the last layer's output becomes one vector.
#[derive(Debug)]
enum Head {
    /// The class token's hidden state, projected.
    Class { norm: LayerNorm, projection: Linear },
    /// Attention over all patches.
    Attention { norm: LayerNorm, pool: Box<AttentionPool> },
}

impl VisionTower {
    /// Loads the tower of the model whose weights are `root`.
    pub(super) fn load(root: &Params<'_>, config: &Config) -> Result<Self, ModelError> {
        match config.layout {
            Layout::Clip => Self::clip(root, config),
            Layout::Siglip => Self::siglip(root, config),
            Layout::OpenClip => Self::open_clip(root, config),
        }
    }

    fn clip(root: &Params<'_>, config: &Config) -> Result<Self, ModelError> {
        let VisionConfig { size, patch, layers, encoder } = &config.vision;
        let (p, width, count) = (root.at("vision_model"), encoder.width, patches(&config.vision));
        let (embeddings, stack) = (p.at("embeddings"), p.at("encoder.layers"));
        Ok(Self {
            size: *size,
            patch: *patch,
            patches: patch_layer(&embeddings.at("patch_embedding"), &config.vision, false)?,
            class: Some(embeddings.get("class_embedding", &[width])?),
            positions: embeddings.at("position_embedding").get("weight", &[count + 1, width])?,
            norm: Some(layer_norm(&p.at("pre_layrnorm"), width, encoder.eps)?),
            layers: (0..*layers).map(|i| EncoderLayer::load(&stack.at(i), encoder)).collect::<Result<_, _>>()?,
            head: Head::Class {
                norm: layer_norm(&p.at("post_layernorm"), width, encoder.eps)?,
                projection: linear_no_bias(&root.at("visual_projection"), width, config.width)?,
            },
        })
    }

    fn siglip(root: &Params<'_>, config: &Config) -> Result<Self, ModelError> {
        let VisionConfig { size, patch, layers, encoder } = &config.vision;
        let (p, width, count) = (root.at("vision_model"), encoder.width, patches(&config.vision));
        let (embeddings, stack) = (p.at("embeddings"), p.at("encoder.layers"));
        Ok(Self {
            size: *size,
            patch: *patch,
            patches: patch_layer(&embeddings.at("patch_embedding"), &config.vision, true)?,
            class: None,
            positions: embeddings.at("position_embedding").get("weight", &[count, width])?,
            norm: None,
            layers: (0..*layers).map(|i| EncoderLayer::load(&stack.at(i), encoder)).collect::<Result<_, _>>()?,
            head: Head::Attention {
                norm: layer_norm(&p.at("post_layernorm"), width, encoder.eps)?,
                pool: Box::new(AttentionPool::load(&p.at("head"), &config.vision)?),
            },
        })
    }

    fn open_clip(root: &Params<'_>, config: &Config) -> Result<Self, ModelError> {
        let VisionConfig { size, patch, layers, encoder } = &config.vision;
        let (p, width, count) = (root.at("visual"), encoder.width, patches(&config.vision));
        let stack = p.at("transformer.resblocks");
        let layer = |i| EncoderLayer::load_open_clip(&stack.at(i), encoder);
        Ok(Self {
            size: *size,
            patch: *patch,
            patches: patch_layer(&p.at("conv1"), &config.vision, false)?,
            class: Some(p.get("class_embedding", &[width])?),
            positions: p.get("positional_embedding", &[count + 1, width])?,
            norm: Some(layer_norm(&p.at("ln_pre"), width, encoder.eps)?),
            layers: (0..*layers).map(layer).collect::<Result<_, _>>()?,
            head: Head::Class {
                norm: layer_norm(&p.at("ln_post"), width, encoder.eps)?,
                projection: Linear::new(&p.get("proj", &[width, config.width])?.t()?.contiguous()?, None)?,
            },
        })
    }

    /// Embeddings `[B, D]` of normalised pixels `[B, S, S, 3]`.
    pub(super) fn forward(&self, pixels: &Tensor) -> Result<Tensor, ModelError> {
        let size = self.size;
        let batch = match *pixels.dims() {
            [batch, height, width, 3] if batch > 0 && height == size && width == size => batch,
            ref other => return Err(ModelError::Input(format!("images of {other:?}, not [B, {size}, {size}, 3]"))),
        };
        let mut h = self.patches.forward(&self.cut(pixels, batch)?, None)?;
        if let Some(class) = &self.class {
            let class = class.reshape((1, 1, class.elem_count()))?;
            let class = class.broadcast_as((batch, 1, class.dim(2)?))?.contiguous()?;
            h = Tensor::cat(&[&class, &h], 1)?;
        }
        h = h.broadcast_add(&self.positions)?;
        if let Some(norm) = &self.norm {
            h = norm.forward(&h)?;
        }
        for layer in &self.layers {
            h = layer.forward(&h)?;
        }
        match &self.head {
            Head::Class { norm, projection } => {
                let class = h.narrow(1, 0, 1)?.squeeze(1)?.contiguous()?;
                Ok(projection.forward(&norm.forward(&class)?, None)?)
            }
            Head::Attention { norm, pool } => Ok(pool.forward(&norm.forward(&h)?)?),
        }
    }

    /// Patches `[B, count, patch * patch * 3]`; pixels that don't fill a whole patch are dropped.
    fn cut(&self, pixels: &Tensor, batch: usize) -> candle_core::Result<Tensor> {
        let (patch, side) = (self.patch, self.size / self.patch);
        let pixels = pixels.narrow(1, 0, side * patch)?.narrow(2, 0, side * patch)?.contiguous()?;
        let pixels = pixels.reshape(vec![batch, side, patch, side, patch, 3])?;
        pixels.permute(vec![0, 1, 3, 2, 4, 5])?.contiguous()?.reshape((batch, side * side, patch * patch * 3))
    }
}

/// Number of whole patches in an image.
fn patches(config: &VisionConfig) -> usize {
    (config.size / config.patch).pow(2)
}

/// The layer over patches, from a convolution's weight `[C, 3, patch, patch]`.
fn patch_layer(p: &Params<'_>, config: &VisionConfig, bias: bool) -> Result<Linear, ModelError> {
    let (width, patch) = (config.encoder.width, config.patch);
    let weight = p.get("weight", &[width, 3, patch, patch])?.permute((0, 2, 3, 1))?.contiguous()?;
    let weight = weight.reshape((width, patch * patch * 3))?;
    let bias = if bias { Some(p.get("bias", &[width])?) } else { None };
    Ok(Linear::new(&weight, bias.as_ref())?)
}

/// SigLIP's head: one learned query attends to all patches.
#[derive(Debug)]
struct AttentionPool {
    heads: usize,
    /// The learned query after its projection, `[1, 1, C]`.
    query: Tensor,
    keys_values: Linear,
    out: Linear,
    norm: LayerNorm,
    mlp: Mlp,
}

impl AttentionPool {
    fn load(p: &Params<'_>, config: &VisionConfig) -> Result<Self, ModelError> {
        let (encoder, width) = (&config.encoder, config.encoder.width);
        let attention = p.at("attention");
        let weight = attention.get("in_proj_weight", &[3 * width, width])?;
        let bias = attention.get("in_proj_bias", &[3 * width])?;
        let part = |start: usize, len: usize| -> Result<Linear, ModelError> {
            let (weight, bias) = (weight.narrow(0, start, len)?, bias.narrow(0, start, len)?);
            Ok(Linear::new(&weight.contiguous()?, Some(&bias.contiguous()?))?)
        };
        Ok(Self {
            heads: encoder.heads,
            query: part(0, width)?.forward(&p.get("probe", &[1, 1, width])?, None)?,
            keys_values: part(width, 2 * width)?,
            out: linear(&attention.at("out_proj"), width, width)?,
            norm: layer_norm(&p.at("layernorm"), width, encoder.eps)?,
            mlp: Mlp::load(&p.at("mlp"), ["fc1", "fc2"], encoder)?,
        })
    }

    /// Pools `x [B, L, C]` to `[B, C]`.
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let halves = self.keys_values.forward(x, None)?.chunk(2, D::Minus1)?;
        let cache = KeyValues::new(&halves[0].contiguous()?, &halves[1].contiguous()?, self.heads)?;
        let pairs: Vec<(u32, u32)> = (0..x.dim(0)? as u32).map(|image| (0, image)).collect();
        let h = self.out.forward(&cross_attention(&self.query, &cache, &pairs)?, None)?;
        self.mlp.forward(&self.norm.forward(&h)?, &h)?.squeeze(1)
    }
}
