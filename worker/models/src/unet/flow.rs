//! Activations on their way through the UNet, which may still be common to all evaluations of a point.
//!
//! Evaluations of one point differ only in the prompt, so everything before the first cross-attention is computed once
//! per point. A [`Flow`] records whether a tensor is per point or per evaluation. A [`Batch`] maps evaluations to
//! points, prompts and timesteps.

use candle_core::{Result, Tensor, bail};
use elbo_kernels::{KeyValues, Rows};

use crate::pass::Indices;

/// Activations with one image per point (shared) or one per evaluation.
#[derive(Clone, Debug)]
pub(super) struct Flow {
    /// `[P or B, H, W, C]`.
    pub(super) tensor: Tensor,
    /// Whether there is one image per point.
    pub(super) shared: bool,
}

/// The evaluations of one forward pass.
#[derive(Debug)]
pub(super) struct Batch<'a> {
    indices: &'a Indices,
    /// The point and prompt of each evaluation.
    evaluations: &'a [(u32, u32)],
    /// The index and prompt of each evaluation.
    own: Vec<(u32, u32)>,
    shifts: Shifts<'a>,
    /// Text keys and values of every cross-attention.
    pub(super) prompts: &'a PromptCache,
}

/// The shift that every resnet adds to its activations, per timestep or per evaluation.
#[derive(Debug)]
pub(super) enum Shifts<'a> {
    /// For each resnet, a row for each timestep in the cache.
    PerTimestep(&'a [Tensor]),
    /// For each resnet, a row for each evaluation, since the embedding also depends on the prompt.
    PerEvaluation(Vec<Tensor>),
}

/// Keys and values of a set of prompts for every cross-attention.
#[derive(Debug)]
pub struct PromptCache {
    /// One per cross-attention.
    pub(super) layers: Vec<KeyValues>,
    /// The term that each prompt adds to the time embedding, `[N, 4 C]`.
    pub(super) added: Option<Tensor>,
    /// Number of prompts.
    pub(super) count: usize,
}

impl PromptCache {
    /// Number of prompts.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether there are no prompts.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Keys and values of a cross-attention.
    pub(super) fn layer(&self, slot: usize) -> Result<&KeyValues> {
        match self.layers.get(slot) {
            Some(layer) => Ok(layer),
            None => bail!("the prompt cache belongs to another model"),
        }
    }
}

impl<'a> Batch<'a> {
    pub(super) fn new(
        indices: &'a Indices,
        evaluations: &'a [(u32, u32)],
        shifts: Shifts<'a>,
        prompts: &'a PromptCache,
    ) -> Self {
        let own = (0..).zip(evaluations).map(|(i, &(_, prompt))| (i, prompt)).collect();
        Self { indices, evaluations, own, shifts, prompts }
    }

    /// For each evaluation, the row of `flow` with its image, and its prompt.
    pub(super) fn pairs(&self, flow: &Flow) -> &[(u32, u32)] {
        if flow.shared { self.evaluations } else { &self.own }
    }

    /// The flow's images, one per evaluation.
    pub(super) fn rows<'f>(&'f self, flow: &'f Flow) -> Rows<'f> {
        if flow.shared { Rows::indexed(&flow.tensor, &self.indices.points) } else { Rows::direct(&flow.tensor) }
    }

    /// The time rows of a resnet, one per image of the flow.
    pub(super) fn shift(&self, resnet: usize, shared: bool) -> Result<Rows<'_>> {
        let layers = match &self.shifts {
            Shifts::PerTimestep(layers) => layers,
            Shifts::PerEvaluation(layers) => &layers[..],
        };
        let Some(layer) = layers.get(resnet) else { bail!("the time cache belongs to another model") };
        match (&self.shifts, shared) {
            (Shifts::PerTimestep(_), true) => Ok(Rows::indexed(layer, &self.indices.point_times)),
            (Shifts::PerTimestep(_), false) => Ok(Rows::indexed(layer, &self.indices.times)),
            (Shifts::PerEvaluation(_), false) => Ok(Rows::direct(layer)),
            (Shifts::PerEvaluation(_), true) => bail!("a resnet that depends on the prompt can't be shared"),
        }
    }
}
