//! What travels through the UNet: activations that may still be common to all evaluations of a point.
//!
//! Evaluations of one point differ in the prompt alone, so everything before the first cross-attention is computed once
//! per point. [`Flow`] carries which of the two a tensor is; [`Batch`] maps evaluations to points, prompts and timesteps.

use candle_core::{Result, Tensor, bail};

use super::time::TimeCache;
use crate::ops::{KeyValues, Rows};

/// Activations with one image per point (shared) or one per evaluation.
#[derive(Clone, Debug)]
pub(super) struct Flow {
    /// `[P or B, H, W, C]`.
    pub(super) tensor: Tensor,
    /// One image per point.
    pub(super) shared: bool,
}

/// The evaluations of one forward pass.
#[derive(Debug)]
pub(super) struct Batch<'a> {
    /// Per evaluation its point and prompt.
    pub(super) evaluations: &'a [(u32, u32)],
    /// Per evaluation itself and its prompt.
    own: Vec<(u32, u32)>,
    /// Per evaluation its point.
    points: Vec<u32>,
    /// Per point the row in the time cache.
    point_times: Vec<u32>,
    /// Per evaluation the row in the time cache.
    evaluation_times: Vec<u32>,
    /// Time rows of every resnet.
    pub(super) times: &'a TimeCache,
    /// Text keys and values of every cross-attention.
    pub(super) prompts: &'a PromptCache,
}

/// Keys and values of a set of prompts for every cross-attention.
#[derive(Debug)]
pub struct PromptCache {
    /// Per cross-attention.
    pub(super) layers: Vec<KeyValues>,
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
            None => bail!("a prompt cache of another model"),
        }
    }
}

impl<'a> Batch<'a> {
    pub(super) fn new(
        timesteps: &[u32],
        evaluations: &'a [(u32, u32)],
        times: &'a TimeCache,
        prompts: &'a PromptCache,
    ) -> Result<Self> {
        let point_times = times.rows(timesteps)?;
        let (mut points, mut evaluation_times) = (Vec::new(), Vec::new());
        for &(point, prompt) in evaluations {
            let Some(&time) = point_times.get(point as usize) else {
                bail!("an evaluation of point {point} among {}", timesteps.len());
            };
            if prompt as usize >= prompts.count {
                bail!("an evaluation with prompt {prompt} among {}", prompts.count);
            }
            points.push(point);
            evaluation_times.push(time);
        }
        let own = (0..).zip(evaluations).map(|(i, &(_, prompt))| (i, prompt)).collect();
        Ok(Self { evaluations, own, points, point_times, evaluation_times, times, prompts })
    }

    /// Per evaluation the row of `flow` that is its image, and its prompt.
    pub(super) fn pairs(&self, flow: &Flow) -> &[(u32, u32)] {
        if flow.shared { self.evaluations } else { &self.own }
    }

    /// The flow's images, one per evaluation.
    pub(super) fn rows<'f>(&'f self, flow: &'f Flow) -> Rows<'f> {
        match flow.shared {
            true => Rows::indexed(&flow.tensor, &self.points),
            false => Rows::direct(&flow.tensor),
        }
    }

    /// The time rows of a resnet, one per image of the flow.
    pub(super) fn shift(&self, resnet: usize, shared: bool) -> Result<Rows<'_>> {
        let times = if shared { &self.point_times } else { &self.evaluation_times };
        Ok(Rows::indexed(self.times.shift(resnet)?, times))
    }
}
