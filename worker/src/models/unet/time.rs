//! Time embeddings and the per-timestep rows every resnet adds to its activations.
//!
//! A resnet adds `time_emb_proj(silu(temb(t)))` to each pixel. A job uses few distinct timesteps over and over, so these
//! rows are computed once per timestep instead of once per evaluation.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor, bail};

use super::config::UnetConfig;
use crate::models::checkpoint::{ModelError, Weights};
use crate::models::layers::linear;
use crate::ops::{Activation, Linear, activate};

/// `timesteps` to embeddings `[T, 4 C]`.
#[derive(Debug)]
pub(super) struct TimeEmbedding {
    width: usize,
    flip_sin_to_cos: bool,
    freq_shift: f64,
    device: Device,
    dtype: DType,
    linear_1: Linear,
    linear_2: Linear,
}

impl TimeEmbedding {
    pub(super) fn load(weights: &Weights, config: &UnetConfig) -> Result<Self, ModelError> {
        let p = weights.at("time_embedding");
        let width = config.levels[0].channels;
        Ok(Self {
            width,
            flip_sin_to_cos: config.flip_sin_to_cos,
            freq_shift: config.freq_shift,
            device: weights.device().clone(),
            dtype: weights.dtype(),
            linear_1: linear(&p.at("linear_1"), width, 4 * width)?,
            linear_2: linear(&p.at("linear_2"), 4 * width, 4 * width)?,
        })
    }

    /// Embeddings of timesteps.
    pub(super) fn forward(&self, timesteps: &[u32]) -> candle_core::Result<Tensor> {
        let mut values = Vec::with_capacity(timesteps.len() * self.width);
        for &t in timesteps {
            self.sinusoid(t, &mut values);
        }
        let h = Tensor::from_vec(values, (timesteps.len(), self.width), &self.device)?;
        let h = self.linear_1.forward(&h.to_dtype(self.dtype)?, None)?;
        self.linear_2.forward(&activate(&h, Activation::Silu)?, None)
    }

    /// The sinusoid of Vaswani et al. (2017), rounded to f32 where diffusers' `get_timestep_embedding` rounds.
    fn sinusoid(&self, t: u32, values: &mut Vec<f32>) {
        let half = self.width / 2;
        let angle = |i: usize| {
            let exponent = -(10_000f64.ln() as f32) * i as f32 / (half as f64 - self.freq_shift) as f32;
            t as f32 * f64::from(exponent).exp() as f32
        };
        let sines = |values: &mut Vec<f32>| values.extend((0..half).map(|i| f64::from(angle(i)).sin() as f32));
        let cosines = |values: &mut Vec<f32>| values.extend((0..half).map(|i| f64::from(angle(i)).cos() as f32));
        if self.flip_sin_to_cos {
            cosines(values);
            sines(values);
        } else {
            sines(values);
            cosines(values);
        }
        values.resize(values.len() + self.width % 2, 0.0);
    }
}

/// Every resnet's rows for a set of timesteps.
#[derive(Debug)]
pub struct TimeCache {
    /// Row of each timestep.
    rows: HashMap<u32, u32>,
    /// Per resnet `[T, Cout]`.
    shifts: Vec<Tensor>,
}

impl TimeCache {
    pub(super) fn new(timesteps: &[u32], shifts: Vec<Tensor>) -> Self {
        let rows = timesteps.iter().zip(0..).map(|(&t, row)| (t, row)).collect();
        Self { rows, shifts }
    }

    /// The rows of timesteps.
    pub(super) fn rows(&self, timesteps: &[u32]) -> candle_core::Result<Vec<u32>> {
        let row = |t: &u32| match self.rows.get(t) {
            Some(&row) => Ok(row),
            None => bail!("timestep {t} is not in the cache"),
        };
        timesteps.iter().map(row).collect()
    }

    /// The rows `[T, Cout]` of a resnet.
    pub(super) fn shift(&self, resnet: usize) -> candle_core::Result<&Tensor> {
        match self.shifts.get(resnet) {
            Some(shift) => Ok(shift),
            None => bail!("a time cache of another model"),
        }
    }
}
