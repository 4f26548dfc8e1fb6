//! MMDiT of Stable Diffusion 3 and 3.5 (Esser et al., ICML 2024): image and text tokens in one transformer.
//!
//! The timestep and the pooled text modulate every block, so a point's evaluations share only the patch embedding. The
//! text's first projection and the two embeddings are computed once per prompt and per timestep.

mod block;
mod config;

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use elbo_kernels::{Activation, Linear, Modulation, activate, gather};

use self::block::{Block, EPS};
use self::config::MmditConfig;
use super::checkpoint::Weights;
use super::error::ModelError;
use super::layers::linear;
use super::options::LoadOptions;
use super::pass::Pass;
use super::patch::{PatchEmbed, unpatchify};
use super::probe::Probe;
use super::text::TextEmbeddings;
use super::timestep::{EmbeddingMlp, Sinusoid, TimeCache};

/// The timestep's sinusoid.
const SINUSOID: Sinusoid = Sinusoid { width: 256, flip_sin_to_cos: true, freq_shift: 0.0 };

/// The velocity predictor.
#[derive(Debug)]
pub struct Mmdit {
    config: MmditConfig,
    patch: PatchEmbed,
    /// Position embeddings for a grid of `pos_embed_max_size` squared patches, `[1, G G, D]`.
    positions: Tensor,
    time: EmbeddingMlp,
    pooled: EmbeddingMlp,
    context: Linear,
    blocks: Vec<Block>,
    modulation: Linear,
    proj_out: Linear,
    device: Device,
    dtype: DType,
}

/// Values that depend only on the prompt.
#[derive(Debug)]
pub struct ContextCache {
    /// Text tokens, `[N, M, D]`.
    tokens: Tensor,
    /// Embeddings of the pooled texts, `[N, D]`.
    pooled: Tensor,
}

impl ContextCache {
    /// Number of prompts.
    pub fn len(&self) -> usize {
        self.pooled.dims().first().copied().unwrap_or_default()
    }

    /// Whether there are no prompts.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Mmdit {
    /// Loads the transformer in `dir`.
    pub fn load(dir: &Path, options: &LoadOptions) -> Result<Self, ModelError> {
        let config = MmditConfig::read(&dir.join("config.json"))?;
        let weights = Weights::open(dir, "diffusion_pytorch_model", options)?;
        let (width, max, patch) = (config.width(), config.pos_embed_max_size, weights.at("pos_embed"));
        let (embed, blocks) = (weights.at("time_text_embed"), weights.at("transformer_blocks"));
        let outputs = config.patch_size * config.patch_size * config.outputs();
        Ok(Self {
            patch: PatchEmbed::load(&patch.at("proj"), config.patch_size, config.in_channels, width)?,
            positions: patch.get("pos_embed", &[1, max * max, width])?,
            time: EmbeddingMlp::load(&embed.at("timestep_embedder"), SINUSOID.width, width)?,
            pooled: EmbeddingMlp::load(&embed.at("text_embedder"), config.pooled_projection_dim, width)?,
            context: linear(&weights.at("context_embedder"), config.joint_attention_dim, width)?,
            blocks: (0..config.num_layers).map(|i| Block::load(&blocks.at(i), i, &config)).collect::<Result<_, _>>()?,
            modulation: linear(&weights.at("norm_out.linear"), width, 2 * width)?,
            proj_out: linear(&weights.at("proj_out"), width, outputs)?,
            device: options.device.clone(),
            dtype: options.precision.compute,
            config,
        })
    }

    /// Height and width of the latents the model was trained on.
    pub fn sample_size(&self) -> usize {
        self.config.sample_size
    }

    /// The height and width of latents must be multiples of this.
    pub fn multiple(&self) -> usize {
        self.config.patch_size
    }

    /// Channels of the latents and of the output.
    pub fn in_channels(&self) -> usize {
        self.config.in_channels
    }

    /// Width of the text tokens it takes.
    pub fn text_width(&self) -> usize {
        self.config.joint_attention_dim
    }

    /// Width of the pooled text embedding it takes.
    pub fn pooled_width(&self) -> usize {
        self.config.pooled_projection_dim
    }

    /// Computes the values that depend only on the timestep, for distinct `timesteps`, which the network gets as `times`.
    pub fn time_cache(&self, timesteps: &[u32], times: &[f32]) -> Result<TimeCache, ModelError> {
        let embedding = self.time.forward(&SINUSOID.forward(times, &self.device, self.dtype)?)?;
        Ok(TimeCache::new(timesteps, vec![embedding]))
    }

    /// Computes the values that depend only on the prompt.
    pub fn context_cache(&self, texts: &TextEmbeddings) -> Result<ContextCache, ModelError> {
        let Some(pooled) = &texts.pooled else {
            return Err(ModelError::Input("the transformer takes a pooled text embedding, but there is none".into()));
        };
        Ok(ContextCache { tokens: self.context.forward(&texts.tokens, None)?, pooled: self.pooled.forward(pooled)? })
    }

    /// The velocity `[B, H, W, C]` of every evaluation.
    pub fn forward(&self, input: &Pass<'_>, times: &TimeCache, prompts: &ContextCache) -> Result<Tensor, ModelError> {
        self.forward_probed(input, times, prompts, &mut Probe::none())
    }

    /// Like [`Mmdit::forward`], but shows every submodule's output to a probe.
    pub fn forward_probed(
        &self,
        input: &Pass<'_>,
        times: &TimeCache,
        prompts: &ContextCache,
        probe: &mut Probe<'_>,
    ) -> Result<Tensor, ModelError> {
        let (height, width) = input.check(self.multiple())?;
        let indices = input.indices(times, prompts.len())?;
        let (size, channels) = (self.config.patch_size, self.config.width());
        let x = self.patch.forward(input.latents, &self.cropped_positions(height / size, width / size)?)?;
        probe.see(|| "pos_embed".to_owned(), &x);
        let mut x = gather(&x, &indices.points)?;
        let mut text = gather(&prompts.tokens, &indices.conditions)?;
        probe.see(|| "context_embedder".to_owned(), &text);
        let embedding = (gather(times.layer(0)?, &indices.times)? + gather(&prompts.pooled, &indices.conditions)?)?;
        probe.see(|| "time_text_embed".to_owned(), &embedding);
        let embedding = activate(&embedding, Activation::Silu)?;
        for (i, block) in self.blocks.iter().enumerate() {
            let name = format!("transformer_blocks.{i}");
            (x, text) = block.forward(&x, &text, &embedding, probe, &name)?;
            probe.see(|| format!("{name}.hidden"), &x);
            if i + 1 < self.blocks.len() {
                probe.see(|| format!("{name}.context"), &text);
            }
        }
        // This norm stores its scale before its shift.
        let rows = self.modulation.forward(&embedding, None)?;
        let x = Modulation::new(&rows, channels).normalise(&x, EPS, 1, 0)?;
        probe.see(|| "norm_out".to_owned(), &x);
        let x = self.proj_out.forward(&x, None)?;
        probe.see(|| "proj_out".to_owned(), &x);
        Ok(unpatchify(&x, size, height, width)?)
    }

    /// The middle of the stored grid of positions, `[1, rows columns, D]`.
    fn cropped_positions(&self, rows: usize, columns: usize) -> Result<Tensor, ModelError> {
        let max = self.config.pos_embed_max_size;
        if rows > max || columns > max {
            let message =
                format!("latents of {rows} x {columns} patches, but the model has positions for {max} x {max}");
            return Err(ModelError::Input(message));
        }
        let grid = self.positions.reshape((max, max, self.config.width()))?;
        let grid = grid.narrow(0, (max - rows) / 2, rows)?.narrow(1, (max - columns) / 2, columns)?;
        Ok(grid.contiguous()?.reshape((1, rows * columns, self.config.width()))?)
    }
}
