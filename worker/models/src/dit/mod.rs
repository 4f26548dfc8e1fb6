//! DiT (Peebles & Xie, ICCV 2023), a transformer over latent patches conditioned on a class label.
//!
//! An embedding of timestep and class modulates every block, so a point's evaluations share only the patch embedding.
//! The timestep and class embeddings are computed once each.

mod block;
mod config;
mod names;

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use elbo_kernels::{Activation, Linear, Modulation, activate, gather};

use self::block::{Block, EPS};
use self::config::DitConfig;
use self::names::Names;
use super::checkpoint::{Params, Weights};
use super::error::ModelError;
use super::layers::linear;
use super::options::LoadOptions;
use super::pass::{Indices, Pass};
use super::patch::{PatchEmbed, Positions, grid_embedding, unpatchify};
use super::probe::Probe;
use super::timestep::{EmbeddingMlp, Sinusoid, TimeCache};

/// Width of the timestep's sinusoid.
const SINUSOID: usize = 256;

/// The noise predictor.
#[derive(Debug)]
pub struct Dit {
    config: DitConfig,
    sinusoid: Sinusoid,
    patch: PatchEmbed,
    positions: Positions,
    /// One per block, or one for all.
    embedders: Vec<Embedder>,
    blocks: Vec<Block>,
    modulation: Linear,
    proj_out: Linear,
    device: Device,
    dtype: DType,
}

/// Embeds timesteps and classes.
#[derive(Debug)]
struct Embedder {
    time: EmbeddingMlp,
    /// `[classes + 1, D]`; the last is the null class.
    labels: Tensor,
}

/// Embeddings of a set of classes.
#[derive(Debug)]
pub struct LabelCache {
    /// `[N, D]` per embedder.
    layers: Vec<Tensor>,
    count: usize,
}

impl LabelCache {
    /// Number of classes.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether there are no classes.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }
}

impl Embedder {
    fn load(time: &Params<'_>, layers: [&str; 2], labels: &Params<'_>, config: &DitConfig) -> Result<Self, ModelError> {
        let (width, classes) = (config.width(), config.num_embeds_ada_norm);
        Ok(Self {
            time: EmbeddingMlp::load_named(time, layers, SINUSOID, width)?,
            labels: labels.get("embedding_table.weight", &[classes + 1, width])?,
        })
    }
}

impl Dit {
    /// Loads the transformer in `dir`.
    pub fn load(dir: &Path, options: &LoadOptions) -> Result<Self, ModelError> {
        let config = DitConfig::read(&dir.join("config.json"))?;
        let weights = Weights::open(dir, "diffusion_pytorch_model", options)?;
        let names = Names::of(&weights);
        let (width, blocks) = (config.width(), weights.at(names.blocks()));
        let embedders = match names {
            Names::Diffusers => (0..config.num_layers)
                .map(|i| {
                    let p = blocks.at(i).at("norm1.emb");
                    let layers = ["linear_1", "linear_2"];
                    Embedder::load(&p.at("timestep_embedder"), layers, &p.at("class_embedder"), &config)
                })
                .collect::<Result<_, _>>()?,
            Names::Original => {
                let (time, labels) = (weights.at("t_embedder.mlp"), weights.at("y_embedder"));
                vec![Embedder::load(&time, ["0", "2"], &labels, &config)?]
            }
        };
        let [modulation, proj_out] = names.last();
        let outputs = config.patch_size * config.patch_size * config.outputs();
        Ok(Self {
            sinusoid: Sinusoid { width: SINUSOID, flip_sin_to_cos: true, freq_shift: names.freq_shift() },
            patch: PatchEmbed::load(&weights.at(names.patch()), config.patch_size, config.in_channels, width)?,
            positions: Positions::default(),
            embedders,
            blocks: (0..config.num_layers)
                .map(|i| Block::load(&blocks.at(i), names, &config))
                .collect::<Result<_, _>>()?,
            modulation: linear(&weights.at(modulation), width, 2 * width)?,
            proj_out: linear(&weights.at(proj_out), width, outputs)?,
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

    /// Channels of the latents.
    pub fn in_channels(&self) -> usize {
        self.config.in_channels
    }

    /// Channels of the output: twice the latents' if the variance is learned.
    pub fn out_channels(&self) -> usize {
        self.config.outputs()
    }

    /// Number of classes, without the null class.
    pub fn classes(&self) -> usize {
        self.config.num_embeds_ada_norm
    }

    /// Computes the values that depend only on the timestep, for distinct `timesteps`, which the network gets as `times`.
    pub fn time_cache(&self, timesteps: &[u32], times: &[f32]) -> Result<TimeCache, ModelError> {
        let sinusoids = self.sinusoid.forward(times, &self.device, self.dtype)?;
        let layers = self.embedders.iter().map(|e| e.time.forward(&sinusoids));
        Ok(TimeCache::new(timesteps, layers.collect::<candle_core::Result<_>>()?))
    }

    /// Computes the values that depend only on the class; label [`Dit::classes`] is the null class.
    pub fn label_cache(&self, labels: &[u32]) -> Result<LabelCache, ModelError> {
        if let Some(label) = labels.iter().find(|label| **label as usize > self.classes()) {
            return Err(ModelError::NoSuchClass { label: i64::from(*label), classes: self.classes() });
        }
        let layers = self.embedders.iter().map(|e| gather(&e.labels, labels));
        Ok(LabelCache { layers: layers.collect::<candle_core::Result<_>>()?, count: labels.len() })
    }

    /// The raw model output `[B, H, W, Cout]` of every evaluation.
    pub fn forward(&self, input: &Pass<'_>, times: &TimeCache, labels: &LabelCache) -> Result<Tensor, ModelError> {
        self.forward_probed(input, times, labels, &mut Probe::none())
    }

    /// Like [`Dit::forward`], but shows every submodule's output to a probe.
    pub fn forward_probed(
        &self,
        input: &Pass<'_>,
        times: &TimeCache,
        labels: &LabelCache,
        probe: &mut Probe<'_>,
    ) -> Result<Tensor, ModelError> {
        let (height, width) = input.check(self.multiple())?;
        let indices = input.indices(times, labels.count)?;
        let size = self.config.patch_size;
        let grid = (height / size, width / size);
        let base = self.config.sample_size / size;
        let positions = self
            .positions
            .of(grid, || grid_embedding(grid, base, 1.0, self.config.width(), &self.device, self.dtype))?;
        let x = self.patch.forward(input.latents, &positions)?;
        probe.see(|| "pos_embed".to_owned(), &x);
        let mut x = gather(&x, &indices.points)?;
        let mut first = None;
        for (i, block) in self.blocks.iter().enumerate() {
            let name = format!("transformer_blocks.{i}");
            let embedding = match (&first, self.embedders.len()) {
                (Some(shared), 1) => Tensor::clone(shared),
                _ => self.embedding(i, &indices, times, labels)?,
            };
            probe.see(|| format!("{name}.norm1.emb"), &embedding);
            let activated = activate(&embedding, Activation::Silu)?;
            x = block.forward(&x, &activated, &name, probe)?;
            probe.see(|| name, &x);
            first.get_or_insert(embedding);
        }
        let Some(first) = first else { return Err(ModelError::Input("the transformer has no blocks".into())) };
        let rows = self.modulation.forward(&activate(&first, Activation::Silu)?, None)?;
        probe.see(|| "proj_out_1".to_owned(), &rows);
        probe.compute("norm_out", || {
            Modulation::new(&rows.zeros_like()?, self.config.width()).normalise(&x, EPS, 0, 1)
        })?;
        let x = Modulation::new(&rows, self.config.width()).normalise(&x, EPS, 0, 1)?;
        let x = self.proj_out.forward(&x, None)?;
        probe.see(|| "proj_out_2".to_owned(), &x);
        Ok(unpatchify(&x, size, height, width)?)
    }

    /// The sum of timestep and class embeddings of a block, `[B, D]`.
    fn embedding(
        &self,
        block: usize,
        indices: &Indices,
        times: &TimeCache,
        labels: &LabelCache,
    ) -> Result<Tensor, ModelError> {
        let Some(classes) = labels.layers.get(block) else {
            return Err(ModelError::Input("the label cache belongs to another model".into()));
        };
        Ok((gather(times.layer(block)?, &indices.times)? + gather(classes, &indices.conditions)?)?)
    }
}
